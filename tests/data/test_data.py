"""Data sets, and the order in which training sees them."""

import dataclasses
import itertools
import multiprocessing
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from streams import Numbers, cache, taken

import equidit as edt
from equidit.data import (
    DIGITS_SHAPE,
    ArraySource,
    FolderSource,
    ImageError,
    Images,
    LatentSource,
    batches,
    check_labels,
    digits,
    held_out,
    image_folder,
)


def test_digits():
    train, held_out = digits()
    assert (len(train.label), len(held_out.label)) == (1437, 360)
    for images in (train, held_out):
        assert images.image.shape == (len(images.label), *DIGITS_SHAPE)
        assert images.image.dtype == np.float32
        assert (images.image.min(), images.image.max()) == (-1, 1)
    shares = [np.bincount(images.label) / len(images.label) for images in (train, held_out)]
    assert np.abs(shares[0] - shares[1]).max() < 0.002
    # No digit is on both sides, and the split is the same every time.
    flat = [images.image.reshape(-1, 64) for images in (train, held_out)]
    assert not {row.tobytes() for row in flat[0]} & {row.tobytes() for row in flat[1]}
    assert (digits()[1].image == held_out.image).all()


def labels(pairs):
    return np.concatenate([batch["label"] for batch, _ in pairs])


def test_batches_shuffle_anew_every_epoch():
    order = labels(taken(5, Numbers(10), 4))
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert (first != second).any()
    assert (labels(taken(5, Numbers(10), 4, seed=4)) != order).any()
    # A batch may be larger than the data.
    assert np.bincount(labels(taken(1, Numbers(10), 20))).tolist() == [2] * 10


def test_batches_depend_on_the_step_alone():
    whole = taken(6, Numbers(10), 4)
    for start in (1, 4):
        for (a, _), (b, _) in zip(
            taken(6 - start, Numbers(10), 4, start=start), whole[start:], strict=True
        ):
            np.testing.assert_array_equal(a["label"], b["label"])
            np.testing.assert_array_equal(a["chance"], b["chance"])
    # Chance is another one in the next epoch.
    chance = np.concatenate([batch["chance"] for batch, _ in whole])
    assert len(np.unique(chance)) == 24


def test_processes_share_each_batch():
    whole = taken(4, Numbers(10), 6)
    shares = [taken(4, Numbers(10), 6, process=(i, 3)) for i in range(3)]
    for step, (batch, _) in enumerate(whole):
        together = np.concatenate([share[step][0]["label"] for share in shares])
        np.testing.assert_array_equal(together, batch["label"])


@pytest.mark.slow
def test_workers_give_the_same_batches_and_end_with_the_statement():
    before = set(multiprocessing.active_children())
    whole = taken(6, Numbers(10), 4)
    for (a, _), (b, _) in zip(taken(6, Numbers(10), 4, workers=2), whole, strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
        np.testing.assert_array_equal(a["chance"], b["chance"])
    assert set(multiprocessing.active_children()) == before


def test_damaged_examples():
    with pytest.raises(ImageError, match="example 2 is damaged"):
        taken(3, Numbers(10, damaged=(2,)), 4)
    pairs = taken(5, Numbers(10, damaged=(2, 3)), 4, skip_corrupt=True)
    # Two epochs of ten: the two are replaced by the one after them.
    assert sum(skipped for _, skipped in pairs) == 2 * (2 + 1)
    assert np.bincount(labels(pairs)).tolist() == [2, 2, 0, 0, 6, 2, 2, 2, 2, 2]
    with pytest.raises(ImageError, match="every example is damaged"):
        taken(1, Numbers(3, damaged=(0, 1, 2)), 2, skip_corrupt=True)


def test_bad_batches():
    with pytest.raises(ValueError, match="batch_size=0"):
        taken(1, Numbers(3), 0)
    with pytest.raises(ValueError, match="examples=0"):
        taken(1, Numbers(0), 1)
    with pytest.raises(ValueError, match=r"batch_size=4 must be a multiple of 3"):
        taken(1, Numbers(3), 4, process=(0, 3))


@pytest.mark.parametrize("process", [(2, 2), (-1, 2), (0, 0)])
def test_bad_process(process):
    with pytest.raises(ValueError, match=r"process=\("):
        taken(1, Numbers(4), 2, process=process)


@dataclasses.dataclass
class Pair:
    image: np.ndarray
    label: np.ndarray


jax.tree_util.register_dataclass(Pair, ["image", "label"], [])
X, Y = np.arange(35.0).reshape(7, 5), np.arange(7)
# Own arrays, and which of them are their labels.
TREES = {
    "array": (X, None),
    "jax": ((jnp.asarray(X), jnp.asarray(Y)), None),
    "tuple": ((X, Y), None),
    "nested": ({"x": [X, {"y": Y}], "nothing": None}, None),
    "dictionary": ({"x": X, "label": Y}, Y),
    "images": (Images(X.reshape(7, 1, 5, 1), Y), Y),
    "dataclass": (Pair(X, Y), Y),
    "module": (edt.Conditioning(jnp.arange(7.0), mask=jnp.arange(7) < 3), None),
    "half": (jnp.asarray(X, jnp.bfloat16), None),
    "words": ({"x": X, "name": np.array(list("abcdefg"))}, None),
}


@pytest.mark.parametrize("name", TREES)
def test_batches_of_any_pytree_of_arrays(name):
    arrays, label = TREES[name]
    source = ArraySource(arrays)
    assert source.label.tolist() == ([0] * 7 if label is None else label.tolist())
    order = [batch["label"] for batch, _ in taken(4, Numbers(7), 3)]
    for (batch, skipped), rows in zip(taken(4, arrays, 3), order, strict=True):
        expected = jax.tree.map(lambda array, rows=rows: np.asarray(array)[rows], arrays)
        assert skipped == 0
        assert jax.tree.structure(batch) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
            assert (type(a), a.dtype) == (np.ndarray, b.dtype)
            np.testing.assert_array_equal(a, b)
    train, rest = held_out(arrays, 3)
    assert len(train.label) == 4
    assert jax.tree.structure(rest.read(0, np.random.default_rng(0))) == jax.tree.structure(arrays)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ((X, Y[:5]), r"share their first axis.*\[0\] \(7, 5\), arrays\[1\] \(5,\)"),
        ((), "share their first axis.*none"),
        (3, "arrays is 3, no array"),
        ({"x": X, "size": 5}, r"\['size'\] is 5, no array"),
        ({"x": X, "label": [0] * 7}, r"\['label'\]\[0\] is 0, .*np.asarray"),
        (object(), "arrays is <object"),
    ],
)
def test_what_is_no_pytree_of_arrays(arrays, words):
    for function in (ArraySource, lambda a: taken(1, a, 1), lambda a: held_out(a, 0)):
        with pytest.raises(ValueError, match=words) as error:
            function(arrays)
        assert len(str(error.value)) < 400


def test_labels_are_checked_where_the_classes_are_told():
    for arrays in ((X, Y), {"x": X, "labels": Y}, {"label": {"a": Y}}, held_out((X, Y), 2)[0]):
        with pytest.raises(ValueError, match="none of the arrays is called 'label'"):
            taken(1, arrays, 2, num_classes=10)
    for arrays in ({"x": X, "label": Y}, Pair(X, Y), Numbers(7)):
        taken(1, arrays, 2, num_classes=7)
        # It would be trained as the null label, that of no class.
        with pytest.raises(ValueError, match=r"label 6 .*labels are 0 to 5"):
            taken(1, arrays, 2, num_classes=6)


def test_folder_source_mirrors_every_other_picture(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    source = FolderSource(image_folder(tmp_path), 8)
    plain = pixels.transpose(2, 0, 1)
    mirrored = 0
    for seed in range(200):
        example = source.read(0, np.random.default_rng(seed))
        flipped = (example.image == plain[..., ::-1]).all()
        assert flipped or (example.image == plain).all()
        mirrored += flipped
    example = source.read(0, np.random.default_rng(0))
    # Binomial with a deviation of 7.
    assert 70 < mirrored < 130
    clean = example.clean(jax.random.key(0))
    np.testing.assert_allclose(clean, example.image / 127.5 - 1, atol=1e-6)
    (tmp_path / "a" / "1.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"example 0: .*1\.png is no picture") as error:
        source.read(0, np.random.default_rng(0))
    assert error.value.damaged


def test_latents_are_drawn_with_the_moments_of_a_picture_or_its_mirror_image(tmp_path):
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal((2, 3, 2, 4, 2, 2)).astype(np.float32)
    std = np.abs(std)
    source = LatentSource(cache(tmp_path / "c", mean, std, np.array([1, -1, 0], np.int32)))
    # The one that was skipped is left out.
    assert source.label.tolist() == [1, 0]
    seen = set()
    for seed in range(20):
        example = source.read(1, np.random.default_rng(seed))
        assert example.label == 0
        (side,) = (i for i in range(2) if (example.mean == mean[2, i]).all())
        np.testing.assert_array_equal(example.std, std[2, side])
        seen.add(side)
    example = source.read(1, np.random.default_rng(0))
    assert seen == {0, 1}
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(example.clean))(keys), np.float64)
    # Four standard errors of a mean, and of a deviation.
    errors = example.std / np.sqrt(len(keys))
    assert (np.abs(drawn.mean(0) - example.mean) < 4 * errors).all()
    assert (np.abs(drawn.std(0) - example.std) < 4 * errors / np.sqrt(2)).all()
    again = pickle.loads(pickle.dumps(source))
    example = source.read(0, np.random.default_rng(0))
    np.testing.assert_array_equal(again.read(0, np.random.default_rng(0)).mean, example.mean)


def test_held_out_examples_are_the_same_every_time_and_in_no_batch():
    train, rest = held_out(Numbers(20), 5)
    assert sorted([*train.label, *rest.label]) == list(range(20))
    assert len(rest.label) == 5
    assert held_out(Numbers(20), 5)[1].label.tolist() == rest.label.tolist()
    assert [rest.read(i, np.random.default_rng(0))["label"] for i in range(5)] == [*rest.label]
    with pytest.raises(ValueError, match=r"count=20 must be below 20"):
        held_out(Numbers(20), 20)


@pytest.mark.parametrize(("label", "where"), [(-1, 0), (10, 0), (11, 2)])
def test_labels_out_of_range(label, where):
    labels = np.array([0, 9, 3])
    check_labels(labels, 10)
    labels[where] = label
    with pytest.raises(ValueError, match=rf"label {label} \(number {where}\).*0 to 9"):
        check_labels(labels, 10)


def test_batches_need_no_with():
    stream = batches(Numbers(5), 2, seed=0)
    first, skipped = next(stream)
    assert (len(first["label"]), skipped) == (2, 0)
    assert len(list(itertools.islice(stream, 3))) == 3
    stream.close()
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(Numbers(5), 0, seed=0)
