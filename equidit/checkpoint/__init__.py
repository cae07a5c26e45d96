"""Saving and restoring all that a run carries: verified, on any number of devices or hosts."""

from .checkpoints import Checkpoints as Checkpoints, Restored as Restored
from .hashing import fingerprint as fingerprint
from .record import CheckpointError as CheckpointError
