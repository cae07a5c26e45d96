import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny, tree_allclose

import equidit as edt
from equidit import checkpoint


def state(**sizes):
    return edt.init_state(tiny(**sizes), optax.adam(1e-3))


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_round_trip_is_bit_for_bit(tmp_path):
    saved = state()
    checkpoint.save(tmp_path / "a.npz", saved)
    restored = checkpoint.restore(tmp_path / "a.npz", shapes(saved))
    assert tree_allclose(saved, restored)
    assert jax.tree.map(lambda a: a.dtype, saved) == jax.tree.map(lambda a: a.dtype, restored)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_low_precision_and_names(tmp_path):
    saved = edt.cast(state().ema, jnp.bfloat16)
    checkpoint.save(tmp_path / "a.npz", saved)
    restored = checkpoint.restore(tmp_path / "a.npz", shapes(saved))
    assert tree_allclose(saved, restored)
    assert restored.patch_embed.weight.dtype == jnp.bfloat16
    with pytest.raises(checkpoint.CheckpointError, match=r"is bfloat16.*not float32"):
        checkpoint.restore(tmp_path / "a.npz", state().ema)
    with pytest.raises(ValueError, match="same path"):
        checkpoint.save(tmp_path / "b.npz", {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    assert not (tmp_path / "b.npz").exists()


def test_leaves_that_are_no_arrays_come_from_like(tmp_path):
    checkpoint.save(tmp_path / "a.npz", {"file": jnp.ones(2), "allow_pickle": jnp.zeros(1), "n": 3})
    like = {"file": jnp.zeros(2), "allow_pickle": jnp.ones(1), "n": 4}
    restored = checkpoint.restore(tmp_path / "a.npz", like)
    assert tree_allclose(restored, {"file": jnp.ones(2), "allow_pickle": jnp.zeros(1), "n": 4})


def test_failing_save_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    checkpoint.save(path, {"a": jnp.ones(2)})

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"a": jnp.zeros(2)})
    assert tree_allclose(checkpoint.restore(path, {"a": jnp.zeros(2)}), {"a": jnp.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_any_flipped_byte_or_lost_end_is_seen(tmp_path):
    """Never loaded wrong: either the file is refused, or the byte did not matter."""
    path = tmp_path / "a.npz"
    saved = {"a": jnp.arange(64.0), "b": jnp.arange(5)}
    checkpoint.save(path, saved)
    whole = path.read_bytes()
    refused = 0
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        try:
            assert tree_allclose(checkpoint.restore(path, saved), saved)
        except checkpoint.CheckpointError:
            refused += 1
    assert refused > 0.5 * len(whole) / 7
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(checkpoint.CheckpointError, match=r"a\.npz is damaged"):
            checkpoint.restore(path, saved)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (
            lambda: state(hidden_size=16),
            ["belongs to another model", "float32[2, 96], not float32[2, 48]"],
        ),
        (lambda: state(num_classes=11), ["(4 differences)", "conditioner/label/table"]),
        (lambda: edt.init_state(tiny(), optax.sgd(1e-3)), ["opt_state", "is unknown"]),
        (lambda: {"mine": jnp.ones(3)}, ["mine is missing"]),
    ],
)
def test_foreign_checkpoint(tmp_path, like, words):
    checkpoint.save(tmp_path / "a.npz", state())
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.restore(tmp_path / "a.npz", like())
    assert all(word in str(error.value) for word in words), error.value


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*a\.npz"):
        checkpoint.restore(tmp_path / "a.npz", {})


def test_nothing_in_a_file_is_executed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([print], dtype=object))
    with pytest.raises(checkpoint.CheckpointError, match="damaged or no checkpoint"):
        checkpoint.restore(path, {"a": jnp.ones(1)})
