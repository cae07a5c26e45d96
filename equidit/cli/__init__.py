"""The `equidit` command."""

from .main import run as run
