"""Whatever cuts work into parts gives what a plain loop gives, over sizes that nothing divides.

Samples, encoding and unfinished work have theirs in `test_sample.py` and `test_resumable.py`.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from helpers import Pointwise, difference
from hypothesis import example, given, settings, strategies as st
from jax.sharding import AxisType
from streams import Numbers, cache, taken

import equidit as edt
from equidit import diffusion as dfn, hosts
from equidit.data import Images, LatentSource, batches, held_out
from equidit.metrics import frechet_distance, nearest_distance
from equidit.runs import report, validation
from equidit.runs.settings import Settings


def law(examples):
    return settings(derandomize=True, deadline=None, max_examples=examples)


def mesh(devices):
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


# One, primes, one more and one less than a multiple.
SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23])


def one_by_one(count, source):
    """The examples in their order, each read by itself."""
    return [(batch["label"][0], batch["chance"][0]) for batch, _ in taken(count, source, 1)]


@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(1, 3))
@law(30)
def test_batches_over_processes_and_epochs(size, share, count, start, steps):
    """A process's share of a step is its part of one endless row of shuffled epochs."""
    batch = share * count
    row = one_by_one(max((start + steps) * batch, 2 * size), Numbers(size))
    for epoch in range(2):
        labels = [label for label, _ in row[epoch * size : (epoch + 1) * size]]
        assert sorted(labels) == list(range(size))
    for number in range(count):
        got = taken(steps, Numbers(size), batch, start=start, process=(number, count))
        for step, (found, _) in enumerate(got):
            first = (start + step) * batch + number * share
            expected = row[first : first + share]
            assert [*zip(found["label"], found["chance"], strict=True)] == expected


@given(SIZES, st.integers(1, 7), st.randoms(use_true_random=False))
@law(20)
def test_damaged_examples_are_replaced_by_the_next(size, batch, random):
    damaged = set(random.sample(range(size), random.randrange(size)))
    steps = -(-2 * size // batch)
    row = [label for label, _ in one_by_one(steps * batch, Numbers(size))]
    source = Numbers(size, damaged)
    got = taken(steps, source, batch, skip_corrupt=True)
    for step, (found, skipped) in enumerate(got):
        expected, passed = [], 0
        for label in row[step * batch : (step + 1) * batch]:
            while label in damaged:
                label, passed = (label + 1) % size, passed + 1
            expected.append(label)
        assert found["label"].tolist() == expected
        assert skipped == passed


@pytest.mark.slow
@pytest.mark.parametrize(("size", "batch", "workers", "start"), [(1, 1, 3, 0), (7, 3, 2, 5)])
def test_workers_read_the_same(size, batch, workers, start):
    whole = taken(5, Numbers(size), batch, start=start)
    for (a, _), (b, _) in zip(
        taken(5, Numbers(size), batch, start=start, workers=workers), whole, strict=True
    ):
        assert difference(a, b) == 0


@given(SIZES, st.data(), st.integers(0, 3))
@law(30)
def test_held_out_examples_and_the_rest_are_all(size, data, seed):
    count = data.draw(st.integers(0, size - 1))
    rng = np.random.default_rng(0)
    train, rest = held_out(Numbers(size), count, seed=seed)
    assert (len(train.label), len(rest.label)) == (size - count, count)
    assert sorted([*train.label, *rest.label]) == list(range(size))
    for part in (train, rest):
        read = [part.read(i, rng)["label"] for i in range(len(part.label))]
        assert read == part.label.tolist() == sorted(part.label)


@given(SIZES, st.integers(1, 5), st.randoms(use_true_random=False))
@law(15)
def test_latents_are_read_row_by_row(size, batch, random):
    rng = np.random.default_rng(random.randrange(100))
    mean, std = rng.random((2, size, 2, 1, 2, 2), np.float32)
    label = rng.integers(0, 2, size).astype(np.int32)
    skipped = random.sample(range(size), random.randrange(size))
    label[skipped] = -1
    with tempfile.TemporaryDirectory() as folder:
        source = LatentSource(cache(Path(folder) / "c", mean, std, label))
        rows = [row for row in range(size) if label[row] >= 0]
        order = [i for i, _ in one_by_one(3 * batch, Numbers(len(rows)))]
        with batches(source, batch, seed=3) as stream:
            for step in range(3):
                found, _ = next(stream)
                for place in range(batch):
                    row = rows[order[step * batch + place]]
                    sides = [(mean[row, i], std[row, i]) for i in range(2)]
                    got = found.mean[place], found.std[place]
                    assert any(all(map(np.array_equal, got, side)) for side in sides)
                    assert found.label[place] == label[row]


SCHEDULE = dfn.Schedule(dfn.linear_betas())
NETWORK = Pointwise()


def examples(count):
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32)
    return Images(image, rng.integers(0, 10, count).astype(np.int32))


@jax.jit
def validation_terms(image, label, index):
    """One example's losses at a step of each quartile, as the command says that they are."""
    _, step_key, noise_key = jax.random.split(
        jax.random.fold_in(Settings().key("validate"), index), 3
    )
    t = jax.random.randint(step_key, (4,), 0, 250) + jnp.arange(0, 1000, 250)
    noise = jax.random.normal(noise_key, (4, *image.shape))
    return [
        dfn.hybrid_loss(NETWORK, SCHEDULE, image, label, key=step_key, t=t[i], noise=noise[i])
        for i in range(4)
    ]


@given(SIZES, st.integers(1, 8))
@example(5, 8)
@example(17, 3)
@law(3)
def test_validation_is_the_mean_over_a_loop(count, devices):
    held = examples(count)
    losses = np.array([validation_terms(held.image[i], held.label[i], i) for i in range(count)])
    state = edt.init_state(NETWORK, optax.sgd(1.0))
    row = validation.validation(Settings(), state, held, None if devices == 1 else mesh(devices))
    # Sums in another order.
    np.testing.assert_allclose(row["validation_loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["validation_loss_by_quartile"], losses.mean(0), rtol=1e-5)


def loss(network, example, key):
    return dfn.hybrid_loss(network, SCHEDULE, example.image, example.label, key=key)


@jax.jit
def example_gradient(network, example, key):
    return jax.value_and_grad(loss)(network, example, key)


@given(st.sampled_from([1, 2, 3, 5, 7]), st.sampled_from([1, 2, 3, 5]), st.integers(1, 3))
@example(3, 5, 2)
@law(3)
def test_accumulation_over_devices_is_the_mean_over_a_loop(devices, accumulate, part):
    count = devices * accumulate * part
    batch, key = examples(count), jax.random.key(5)
    network = jax.tree.map(jnp.copy, NETWORK)
    step = edt.make_train_step(
        loss, optax.sgd(1.0), mesh=None if devices == 1 else mesh(devices), accumulate=accumulate
    )
    state, metrics = step(edt.init_state(network, optax.sgd(1.0)), batch, key)
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(count)]
    each = [
        example_gradient(NETWORK, jax.tree.map(lambda a, i=i: a[i], batch), keys[i])
        for i in range(count)
    ]
    losses = np.array([value for value, _ in each])
    np.testing.assert_allclose(metrics["losses"], losses, rtol=1e-5)
    mean = jax.tree.map(lambda *grads: np.mean(grads, 0, np.float64), *(grad for _, grad in each))
    expected = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, NETWORK, mean)
    # Sums in another order; a leaf's scale is that of its largest entry.
    assert difference(state.network, expected) < 1e-5


@given(SIZES, st.integers(1, 8), st.integers(1, 4))
@law(30)
def test_a_batch_that_does_not_divide_is_refused(size, devices, accumulate):
    if size % (devices * accumulate) == 0:
        return
    step = edt.make_train_step(loss, optax.sgd(1.0), mesh=mesh(devices), accumulate=accumulate)
    state = edt.init_state(NETWORK, optax.sgd(1.0))
    with pytest.raises(ValueError, match=f"multiple of {devices * accumulate} such as"):
        step(state, examples(size), jax.random.key(0))


@given(SIZES, st.integers(1, 8))
@law(30)
def test_global_batch_divides_or_refuses(size, devices):
    batch = examples(size)
    if size % devices:
        with pytest.raises(ValueError, match=f"multiple of {devices} such as"):
            hosts.global_batch(batch, mesh(devices))
    else:
        placed = hosts.global_batch(batch, mesh(devices))
        assert difference(placed, batch) == 0
        assert {s.data.shape[0] for s in placed.image.addressable_shards} == {size // devices}


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([1, 3]),
    st.integers(33, 90),
    st.integers(1, 90),
)
@law(12)
def test_every_image_is_in_its_place_of_a_grid(rows, columns, channels, height, width):
    shape = (rows, columns, channels, height, width)
    pictures = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.png"
        report.grid(path, pictures, range(rows))
        sheet = matplotlib.image.imread(path)[..., :3]
    assert sheet.shape == (rows * (height + 4), 64 + columns * (width + 4), 3)
    for row in range(rows):
        for column in range(columns):
            top, left = 4 + row * (height + 4), 68 + column * (width + 4)
            found = sheet[top : top + height, left : left + width].transpose(2, 0, 1)
            # Two of the colour map's 256 greys; pictures differ by far more.
            assert np.abs(found - (pictures[row, column] * 0.5 + 0.5)).max() < 2.1 / 255


@given(SIZES, SIZES, st.integers(1, 6))
@law(40)
def test_distances_are_those_of_plain_loops(count, other, features):
    rng = np.random.default_rng(count * 100 + other)
    a, b = rng.normal(size=(count, features)), 2 * rng.normal(size=(other, features)) + 1
    nearest = [min(np.linalg.norm(x - y) for y in b) for x in a]
    assert nearest_distance(a, b) == pytest.approx(np.mean(nearest))
    # In parts, weighted by their sizes.
    cut = count // 2
    parts = [(len(part), nearest_distance(part, b)) for part in (a[:cut], a[cut:]) if len(part)]
    assert nearest_distance(a, b) == pytest.approx(sum(n * d for n, d in parts) / count)
    if min(count, other) < 2:
        with pytest.raises(ValueError, match="at least 2 samples"):
            frechet_distance(a, b)
        return
    means, covariances = [], []
    for x in (a, b):
        mean = sum(x) / len(x)
        means.append(mean)
        covariances.append(sum(np.outer(r - mean, r - mean) for r in x) / (len(x) - 1))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0))
    expected = np.square(means[0] - means[1]).sum() + np.trace(sum(covariances)) - 2 * roots.sum()
    # A singular covariance has eigenvalues of rounding, whose roots are 1e-8.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
