import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from equidit.checkpoint.hashing import array_hash

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"]


def print_of(array):
    return int(array_hash(jnp.asarray(array)))


def random_bits(shape, dtype):
    raw = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
    return (raw[..., 0] > 127) if dtype == "bool" else raw.view(jnp.dtype(dtype))[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    """NaNs, denormals and negative zeros among them: nothing is computed in floating point."""
    array = random_bits((3, 5), dtype)
    seen = {print_of(array)}
    raw = array.view(np.uint8).reshape(-1)
    bits = range(8 * raw.size) if dtype != "bool" else range(0, 8 * raw.size, 8)
    for bit in bits:
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(print_of(flipped.view(array.dtype).reshape(array.shape)))
    assert len(seen) == len(bits) + 1


def test_places_count():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    swapped = array.copy()
    swapped[0, 0], swapped[2, 1] = array[2, 1], array[0, 0]
    others = [array[::-1], array[:, ::-1], array.T.reshape(3, 4), np.roll(array, 1), swapped]
    assert len({print_of(other) for other in [array, *others]}) == 6
    assert print_of(np.zeros(4, np.float32)) != print_of(np.zeros(5, np.float32))
    assert print_of(np.float32(1)) != print_of(np.float32(2))


def test_by_hand():
    """Independently, with Python's integers; formats on disk hold these digits."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    array = random_bits((2, 3, 4), "float32")
    words = array.view(np.uint32).ravel().tolist()
    expected = sum(mix(word ^ mix(i + 1)) for i, word in enumerate(words)) % 2**32
    assert print_of(array) == expected
    half = random_bits((7,), "bfloat16")
    words = half.view(np.uint16).tolist()
    assert print_of(half) == sum(mix(w ^ mix(i + 1)) for i, w in enumerate(words)) % 2**32


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [(None, "a"), ("a", "b"), (("a", "b"),), (None, None)])
def test_same_on_any_mesh(spec, axis_type):
    array = random_bits((8, 16), "float32")
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert int(array_hash(sharded)) == print_of(array)


def test_sharded_array_is_not_gathered():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    like = jax.ShapeDtypeStruct(
        (64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a"))
    )
    program = array_hash.lower(like).compile().as_text() or ""
    assert "all-gather" not in program
    assert "f32[8,64]" in program
    assert "f32[64,64]" not in program
