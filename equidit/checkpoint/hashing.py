"""A hash of every array of a tree, the same on every mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from .._base.records import crc32
from .._base.trees import former_name, named


def fingerprints(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Eight hexadecimal digits an array, see `array_hash`.

    Computed where the arrays are: with several processes, all must call.
    """
    # In one program: of several under way together, the sums over hosts could meet in another order
    # on another host, and all would wait for ever.
    jax.block_until_ready(dict(arrays))
    hashes = np.asarray(_all(list(arrays.values())))
    return {name: f"{value:08x}" for name, value in zip(arrays, hashes.tolist(), strict=True)}


@jax.jit
def _all(arrays: list[Array]) -> UInt32[Array, " count"]:
    return jnp.stack([array_hash(array) for array in arrays])


@jax.jit
def array_hash(array: Array) -> UInt32[Array, ""]:
    """A hash of every bit of an array and of its place: any one flipped bit changes it.

    The words of the array, each mixed with its index by a bijection, are summed modulo 2^32. The
    order of a sum does not matter, so neither do the sharding and the number of hosts. Shape and
    dtype do not enter. There is no arithmetic in floating point.
    """
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        # By axis: numbering a flattened array would gather a sharded one.
        step = jnp.uint32(stride % 2**32)
        index = index + lax.broadcasted_iota(jnp.uint32, words.shape, axis) * step
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(index + jnp.uint32(1))), dtype=jnp.uint32)


def _words(array: Array) -> Array:
    if array.dtype == jnp.bool:
        return array.astype(jnp.uint32)
    bits = 8 * array.dtype.itemsize
    if bits > 32:
        return lax.bitcast_convert_type(array, jnp.uint32)
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """The bijection of 32-bit words that ends MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def fingerprint(tree: Any) -> str:
    """Eight hexadecimal digits that depend on every bit, name, shape and dtype of the arrays.

    **Arguments:**

    - `tree`: any pytree; its leaves that are no arrays are left out.

    **Returns:**

    The digits. They do not depend on how the arrays are divided among devices.
    """
    arrays = {name: jnp.asarray(leaf) for name, leaf in named(tree).items()}
    hashes = fingerprints(arrays) if arrays else {}
    lines = [
        f"{former_name(name)} {arrays[name].dtype} {arrays[name].shape} {digits}"
        for name, digits in hashes.items()
    ]
    return crc32("\n".join(lines).encode())
