"""Saving and restoring all that a run carries: verified, on any number of devices or hosts."""

import zlib
from typing import Any

import jax.numpy as jnp

from ._checkpoints import Checkpoints as Checkpoints, Restored as Restored
from ._fingerprint import fingerprints, named
from ._record import CheckpointError as CheckpointError


def fingerprint(tree: Any) -> str:
    """Eight hexadecimal digits that depend on every bit, name, shape and dtype of the arrays.

    **Arguments:**

    - `tree`: any pytree; its leaves that are no arrays are left out.

    **Returns:**

    The digits. They do not depend on how the arrays are divided among devices.
    """
    arrays = {name: jnp.asarray(leaf) for name, leaf in named(tree).items()}
    hashes = fingerprints(arrays) if arrays else {}
    lines = [f"{name} {arrays[name].dtype} {arrays[name].shape} {h}" for name, h in hashes.items()]
    return f"{zlib.crc32(chr(10).join(lines).encode()):08x}"
