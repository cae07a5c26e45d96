"""The training step: what it computes, and that devices and micro-batches change nothing of it.

Most tests train a `Toy`, which has all that the step tells apart and compiles in a second.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import BLOCKS, PAPER_BLOCKS, difference, images, tree_allclose
from jax.sharding import AxisType
from toys import BATCH, KEY, ORDER, SGD, WARMUP, dit, hybrid, loss, mesh, run, stepper, toy, trained

import equidit as edt


@pytest.fixture(scope="module")
def reference():
    return run()


def test_one_step_is_sgd_on_the_mean_loss(reference):
    network = toy()
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, 0), i))(jnp.arange(16))
    mean = lambda n: jax.vmap(partial(loss, n))(BATCH, keys).mean()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(mean))(network)
    state, (metrics,) = run(steps=1)
    assert tree_allclose(metrics["loss"], value, ORDER)
    for name, tree in (("grad_norm", grads), ("param_norm", network)):
        squares = [np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)]
        assert metrics[name] == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    assert not metrics["skipped"]
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, network, grads)
    assert tree_allclose(stepped, state.network, ORDER)
    averaged = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, network, stepped)
    assert tree_allclose(averaged, state.ema, ORDER)
    assert state.step == 1


@pytest.mark.parametrize("devices", [1, 2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_devices_do_not_matter(reference, devices):
    assert difference(reference, run(mesh=mesh(devices))) < ORDER


@pytest.mark.parametrize(
    ("block", "sharding"),
    [
        ("adaln-zero", "fsdp"),
        *(pytest.param(block, "fsdp", marks=pytest.mark.slow) for block in PAPER_BLOCKS[1:]),
        *(pytest.param(block, "replicated", marks=pytest.mark.slow) for block in PAPER_BLOCKS),
    ],
)
def test_devices_do_not_matter_for_any_design(block, sharding):
    make = partial(dit, BLOCKS[block])
    one, two = (
        run(objective=hybrid, make=make, **options)
        for options in ({}, {"mesh": mesh(2), "sharding": sharding})
    )
    assert difference(one, two) < ORDER


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("block", PAPER_BLOCKS)
def test_any_design_can_be_traced_over_devices(block, dtype):
    """What differs from device to device is part of the arrays' types, and so is precision."""
    step = stepper(objective=hybrid, mesh=mesh(2), sharding="fsdp", dtype=dtype)
    state = eqx.filter_eval_shape(lambda: edt.init_state(dit(BLOCKS[block]), SGD))
    new, _ = eqx.filter_eval_shape(step, state, BATCH, KEY)
    assert jax.tree.leaves(new) == jax.tree.leaves(state)


def test_device_order_changes_nothing():
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    assert tree_allclose(run(mesh=mesh(8)), run(mesh=mesh(8, order)))


@pytest.mark.parametrize(("accumulate", "devices"), [(2, 1), (16, 1), (4, 4)])
def test_accumulation_does_not_matter(reference, accumulate, devices):
    shared = mesh(devices) if devices > 1 else None
    assert difference(reference, run(accumulate=accumulate, mesh=shared)) < ORDER


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_does_not_matter(reference, remat):
    state, history = run(make=partial(toy, remat=remat))
    assert difference(jax.tree.leaves(reference[0]), jax.tree.leaves(state)) < ORDER
    assert difference(reference[1], history) < ORDER


def test_same_seed_same_bits(reference):
    again = edt.make_train_step(loss, SGD, ema_decay=0.9)
    assert tree_allclose(reference, trained(again))
    assert not tree_allclose(reference, run(ema_decay=0.5))


def test_every_example_and_step_has_its_own_randomness():
    keys = []

    def spy(network, example, key):
        jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return loss(network, example, key)

    step = edt.make_train_step(spy, SGD, mesh=mesh(4))
    state = edt.init_state(toy(), SGD)
    for _ in range(2):
        state, _ = step(state, BATCH, KEY)
    jax.effects_barrier()
    assert len(set(keys)) == 32


def test_gradients_are_not_scaled_by_the_device_count(reference):
    """The slip that Adam hides: eight devices' gradients must not be eight times as large."""
    norms = [run(steps=1, mesh=mesh(n))[1][0]["grad_norm"] for n in (1, 8)]
    assert norms[0] == pytest.approx(float(norms[1]), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "objective"), [(toy, loss), pytest.param(dit, hybrid, marks=pytest.mark.slow)]
)
def test_bfloat16_computes_low_and_keeps_float32(make, objective):
    dtypes = []

    def spy(network, example, key):
        dtypes.extend(leaf.dtype for leaf in jax.tree.leaves(network))
        return objective(network, example, key)

    optimizer = optax.adam(1e-3)
    state = edt.init_state(make(), optimizer)
    step = edt.make_train_step(spy, optimizer, dtype=jnp.bfloat16, ema_decay=0.9, mesh=mesh(2))
    state, metrics = step(state, BATCH, KEY)
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    assert metrics["loss"].dtype == jnp.float32
    _, (first,) = run(objective=objective, make=make, steps=1)
    assert metrics["loss"] == pytest.approx(float(first["loss"]), rel=0.02)


def test_state_is_donated_and_the_ema_is_a_copy():
    state = edt.init_state(toy(), SGD)
    for a, b in zip(jax.tree.leaves(state.network), jax.tree.leaves(state.ema), strict=True):
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
    new, _ = stepper()(state, BATCH, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, BATCH, KEY)))


@pytest.mark.parametrize("devices", [1, 2])
def test_compiles_once(devices, caplog):
    state = edt.init_state(toy(), SGD)
    step = edt.make_train_step(loss, SGD, mesh=mesh(devices) if devices > 1 else None)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(3):
            state, _ = step(state, BATCH, KEY)
    names = ("Compiling jit(run) ", "Compiling run ")
    compiled = [message for message in caplog.messages if message.startswith(names)]
    assert len(compiled) == 1, caplog.messages


def test_learns():
    _, history = run(objective=hybrid, make=dit, steps=30)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_any_module():
    class Mine(eqx.Module):
        mlp: eqx.nn.MLP
        count: jax.Array
        name: str

        def __call__(self, x, t, cond):
            return self.mlp(x.ravel()).reshape(x.shape)

    def mine():
        return Mine(eqx.nn.MLP(16, 16, 8, 1, key=KEY), jnp.arange(3), "mine")

    state, _ = run(make=mine, mesh=mesh(2), dtype=jnp.bfloat16)
    assert state.network.name == "mine"
    assert state.network.count.dtype == jnp.int32
    assert (np.asarray(state.network.count) == [0, 1, 2]).all()
    assert state.network.mlp.layers[0].weight.dtype == jnp.float32


def test_ema_decays():
    ema, network = {"a": jnp.zeros(2), "n": 3}, {"a": jnp.ones(2), "n": 4}
    assert tree_allclose(edt.ema_update(ema, network, 0.9), {"a": jnp.full(2, 0.1), "n": 4}, 1e-6)
    expected = [(0, 0.1), (10, 11 / 20), (10_000, 0.99)]
    for step, value in expected:
        assert WARMUP(jnp.asarray(step)) == pytest.approx(value)
    first, _ = run(steps=1, ema_decay=WARMUP)
    averaged = jax.tree.map(lambda e, p: 0.1 * e + 0.9 * p, toy(), first.network)
    assert tree_allclose(averaged, first.ema, ORDER)


def test_several_averages():
    decays = {"short": 0.5, "long": WARMUP, "power": edt.power_ema_decay(0.1)}
    state = edt.init_state(toy(), SGD, ema_names=decays)
    step = edt.make_train_step(loss, SGD, ema_decay=decays)
    for _ in range(2):
        state, _ = step(state, BATCH, KEY)
    assert set(state.ema) == set(decays)
    for name, decay in decays.items():
        assert difference(state.ema[name], run(ema_decay=decay)[0].ema) < ORDER, name


def test_averages_that_the_state_lacks():
    step = edt.make_train_step(loss, SGD, ema_decay={"b": 0.9, "a": 0.99})
    for names, words in ((None, "one without a name"), (["a"], r"\['a'\]")):
        state = edt.init_state(toy(), SGD, ema_names=names)
        with pytest.raises(ValueError, match=rf"\['a', 'b'\].*{words}.*ema_names=ema_decay"):
            step(state, BATCH, KEY)


QUARTER = optax.sgd(0.1 * 0.25)
SHARDED = [{}, *({"sharding": mode} for mode in ("replicated", "zero1", "fsdp"))]


@pytest.mark.parametrize("options", SHARDED)
def test_clipping_is_of_the_whole_norm(reference, options):
    if options:
        options = options | {"mesh": mesh(2)}
    _, (metrics,) = run(steps=1)
    limit = 0.25 * float(metrics["grad_norm"])
    clipped, history = run(steps=1, max_grad_norm=limit, **options)
    # SGD: a quarter of the gradient is a quarter of the step.
    quarter, _ = run(QUARTER, steps=1)
    assert difference(quarter.network, clipped.network) < ORDER
    assert history[0]["grad_norm"] == pytest.approx(4 * limit, rel=1e-6)


def test_a_gradient_below_the_limit_is_left_alone():
    assert tree_allclose(run(steps=1)[0], run(steps=1, max_grad_norm=1e6)[0])


@pytest.mark.parametrize("options", SHARDED)
def test_what_is_not_finite_reaches_nothing(options):
    """A loss, or only a gradient, that is not finite for one example on one of two devices."""

    def fragile(network, example, key):
        (image, label), poison = example
        # With 2 the loss is finite, but the square root's derivative at 0 is not.
        extra = jax.lax.cond(
            poison == 2,
            lambda b: jnp.sqrt(0.0 * jnp.square(b).sum()),
            lambda b: jnp.where(poison == 1, jnp.nan, 0.0) + 0.0 * b.sum(),
            network.down.bias,
        )
        return loss(network, (image, label), key) + extra

    optimizer = optax.adam(1e-3)
    step = edt.make_train_step(
        fragile, optimizer, ema_decay=0.9, **(options | ({"mesh": mesh(2)} if options else {}))
    )
    state = edt.init_state(toy(), optimizer)
    good = jnp.zeros(16, int)
    state, metrics = step(state, (BATCH, good), KEY)
    assert not metrics["skipped"]
    for poison in (1, 2):
        before = jax.tree.map(np.asarray, state)
        state, metrics = step(state, (BATCH, good.at[13].set(poison)), KEY)
        assert metrics["skipped"]
        assert np.isfinite(metrics["loss"]) == (poison == 2)
        assert np.isfinite(metrics["grad_norm"]) == (poison == 1)
        assert np.isnan(metrics["losses"]).sum() == (poison == 1)
        assert state.step == before.step + 1
        for name in ("network", "ema", "opt_state"):
            assert tree_allclose(getattr(before, name), getattr(state, name)), name
    state, metrics = step(state, (BATCH, good), KEY)
    assert not metrics["skipped"]
    assert not tree_allclose(before.network, state.network)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_cast():
    tree = {"a": jnp.ones(2), "b": jnp.arange(2), "c": "c", "d": None}
    low = edt.cast(tree, jnp.bfloat16)
    assert low["a"].dtype == jnp.bfloat16
    assert low["b"] is tree["b"]
    assert (low["c"], low["d"]) == ("c", None)


@pytest.mark.parametrize(
    ("options", "batch", "words"),
    [
        ({"mesh": 8}, 12, ["batch of 12", "8 devices", "multiple of 8", "8 or 16"]),
        ({"accumulate": 5}, 16, ["batch of 16", "5 micro-batches", "15 or 20"]),
        ({"mesh": 4, "accumulate": 8}, 16, ["multiple of 32"]),
        ({}, 0, ["batch of 0"]),
    ],
)
def test_batch_that_does_not_divide(options, batch, words):
    if "mesh" in options:
        options = options | {"mesh": mesh(options["mesh"])}
    step = edt.make_train_step(loss, SGD, **options)
    state = edt.init_state(toy(), SGD)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        step(state, (images(batch, (1, 4, 4)), jnp.zeros(batch, int)), KEY)
    assert all(word in str(error.value) for word in words), error.value
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_bad_input():
    with pytest.raises(ValueError, match="must share their first axis"):
        stepper()(edt.init_state(toy(), SGD), (images(4, (1, 4, 4)), jnp.zeros(3)), KEY)
    wrong: list[tuple[Any, str]] = [
        (lambda network, example, key: example[0], r"one number an example.*\[1,4,4\]"),
        (lambda network, example, key: (jnp.ones(()), None), "one number an example"),
    ]
    for bad, words in wrong:
        with pytest.raises(ValueError, match=words):
            edt.make_train_step(bad, SGD)(edt.init_state(toy(), SGD), BATCH, KEY)
    with pytest.raises(ValueError, match="'data' must be of type Auto"):
        edt.make_train_step(loss, SGD, mesh=jax.make_mesh((2,), ("data",), (AxisType.Explicit,)))
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        edt.make_train_step(loss, SGD, max_grad_norm=0)
    with pytest.raises(ValueError, match="accumulate=0"):
        edt.make_train_step(loss, SGD, accumulate=0)
    with pytest.raises(ValueError, match=r"\('model',\).*'data'"):
        edt.make_train_step(loss, SGD, mesh=jax.make_mesh((2,), ("model",), (AxisType.Auto,)))
