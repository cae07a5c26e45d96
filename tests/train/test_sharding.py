from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import difference, images, tree_allclose
from jax.sharding import AxisType, PartitionSpec as P
from toys import BATCH, KEY, ORDER, SGD, Layer, loss, mesh, run, stepper, toy, trained

import equidit as edt

MODES = ("replicated", "zero1", "fsdp")
DIVIDED = ("zero1", "fsdp")


def compared(result):
    """State and metrics without the trees' types, which name the remat policy."""
    state, history = result
    return jax.tree.leaves((state.step, state.network, state.ema, state.opt_state)), history


@pytest.fixture(scope="module")
def reference():
    return compared(run(steps=3))


@pytest.mark.parametrize(
    ("sharding", "options"),
    [
        *((mode, {}) for mode in DIVIDED),
        ("fsdp", {"remat": "none"}),
        ("fsdp", {"remat": "dots"}),
        pytest.param("fsdp", {"remat": "full"}, marks=pytest.mark.slow),
        ("fsdp", {"accumulate": 2}),
        *((mode, {"ordered_sums": False}) for mode in ("replicated", "fsdp")),
        pytest.param("zero1", {"ordered_sums": False}, marks=pytest.mark.slow),
        pytest.param("zero1", {"accumulate": 2}, marks=pytest.mark.slow),
        pytest.param("zero1", {"remat": "dots"}, marks=pytest.mark.slow),
    ],
)
def test_sharding_does_not_matter(reference, sharding, options):
    options = {**options}
    make = partial(toy, remat=options.pop("remat", None))
    again = run(steps=3, make=make, mesh=mesh(8), sharding=sharding, **options)
    assert difference(reference, compared(again)) < ORDER


@pytest.mark.parametrize("sharding", DIVIDED)
def test_one_host_needs_neither_init_sharded_nor_global_batch(sharding):
    devices = mesh(8)
    step = stepper(mesh=devices, sharding=sharding)
    plain = jax.tree.map(np.asarray, BATCH)
    found = step(edt.init_state(toy(), SGD), plain, KEY)
    state = edt.init_sharded(toy, SGD, devices, sharding)
    assert difference(found, step(state, edt.hosts.global_batch(plain, devices), KEY)) < ORDER


@pytest.mark.parametrize("sharding", [pytest.param("zero1", marks=pytest.mark.slow), "fsdp"])
def test_same_seed_same_bits(sharding):
    options = {"ema_decay": 0.9, "mesh": mesh(8), "sharding": sharding}
    again = edt.make_train_step(loss, SGD, **options)
    assert tree_allclose(run(**options), trained(again))


def test_adam_agrees_and_any_optimizer_sees_whole_gradients():
    """The norm inside `clip_by_global_norm` would be a part's own, were it given parts."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.lamb(1e-2))
    one, two = (run(optimizer, **kw) for kw in ({}, {"mesh": mesh(2), "sharding": "fsdp"}))
    assert one[1][0]["grad_norm"] > 0.5
    # The scale of a leaf's largest entry; Adam divides rounding by small second moments.
    assert difference(one[0].network, two[0].network) < 1e-4


@pytest.mark.parametrize("sharding", MODES)
def test_state_lies_where_it_should_is_donated_and_compiles_once(sharding, caplog):
    optimizer, devices = optax.adam(1e-3), mesh(8)
    state = edt.init_state(toy(), optimizer)
    wanted = edt.shardings(state, devices, sharding)
    step = edt.make_train_step(loss, optimizer, mesh=devices, sharding=sharding, dtype=jnp.bfloat16)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        state, metrics = step(state, BATCH, KEY)
        for _ in range(2):
            old = jax.tree.leaves(state)
            state, metrics = step(state, BATCH, KEY)
            assert all(leaf.is_deleted() for leaf in old)
    names = ("Compiling jit(run) ", "Compiling run ")
    assert sum(message.startswith(names) for message in caplog.messages) == 1
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert all(metric.is_fully_replicated for metric in metrics.values())

    def share(tree):
        leaves = jax.tree.leaves(tree)
        here = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
        return here / sum(leaf.size for leaf in leaves)

    # The last biases and the optimizer's count stay whole.
    divided = {"replicated": (), "zero1": ("ema", "opt_state")}.get(sharding, ("network", "ema"))
    for name in ("network", "ema", "opt_state"):
        expected = name in divided or sharding == "fsdp"
        assert share(getattr(state, name)) < 0.13 if expected else share(getattr(state, name)) == 1


def test_shardings_choose_the_largest_axis_but_never_the_layers():
    make = lambda: edt.build("DiT-S/8", key=KEY, depth=8)  # noqa: E731
    state = eqx.filter_eval_shape(lambda: edt.init_state(make(), optax.adam(1e-3)))
    found = edt.shardings(state, mesh(8), "fsdp")
    block = found.network.blocks.stacked
    assert block.mlp.up.weight.spec == P(None, "data", None)  # 8 x 1536 x 384
    assert block.mlp.down.weight.spec == P(None, None, "data")
    assert block.attention.out.bias.spec == P(None, "data")
    assert found.network.conditioner.label.table.spec == P(None, "data")  # 1001 x 384
    assert found.opt_state[0].mu.blocks.stacked.mlp.up.weight.spec == P(None, "data", None)
    assert found.opt_state[0].count.spec == P()
    assert found.step.spec == P()
    assert edt.shardings(state, mesh(8), "zero1").network.blocks.stacked.mlp.up.weight.spec == P()
    make: Any = lambda key: edt.Linear(3, 5, key=key)  # noqa: E731
    narrow = edt.init_state(edt.Stack(make, 8, key=KEY), SGD)
    assert {s.spec for s in jax.tree.leaves(edt.shardings(narrow, mesh(8), "fsdp"))} == {P()}


class Deep(eqx.Module):
    stack: edt.Stack

    def __call__(self, x, t, cond):
        vector = edt.Conditioning(jnp.ones(8))
        return self.stack(x.reshape(2, 8), vector).reshape(x.shape)


def deep():
    inner = lambda key: edt.Stack(lambda key: Layer(edt.Linear(8, 8, key=key)), 2, key=key)  # noqa: E731
    return Deep(edt.Stack(inner, 4, key=KEY))


def test_stacks_of_stacks():
    one, two = (run(make=deep, **kw) for kw in ({}, {"mesh": mesh(2), "sharding": "fsdp"}))
    assert difference(one, two) < ORDER


@pytest.mark.parametrize("sharding", DIVIDED)
def test_init_sharded(sharding):
    optimizer = optax.adam(1e-3)
    state = edt.init_sharded(toy, optimizer, mesh(8), sharding, ema_names=("a", "b"))
    whole = edt.init_state(toy(), optimizer, ema_names=("a", "b"))
    assert difference(whole, state) < ORDER
    places = edt.shardings(whole, mesh(8), sharding)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_init_sharded_holds_no_whole_array():
    """No device of the program that makes the state has room for the state."""
    make = lambda: edt.init_state(edt.build("DiT-S/8", key=KEY), SGD)  # noqa: E731
    shapes = eqx.filter_eval_shape(make)
    layout = edt.shardings(shapes, mesh(8), "fsdp")
    memory: Any = jax.jit(make, out_shardings=layout).lower().compile().memory_analysis()
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 0.3 * whole


def test_fsdp_gathers_one_block_at_a_time():
    make = partial(toy, 256, 12)

    def temporary(sharding):
        state = eqx.filter_eval_shape(lambda: edt.init_state(make(), SGD))
        places = edt.shardings(state, mesh(8), sharding)
        state = jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), state, places
        )
        step = stepper(mesh=mesh(8), sharding=sharding)
        lowered = jax.jit(step, donate_argnums=0).lower(state, BATCH, KEY)
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    # Replicated, the gradient alone is as large as the network.
    shapes = eqx.filter_eval_shape(make)
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert temporary("fsdp") < 0.75 * weights < temporary("replicated")


class Own(eqx.Module):
    """A stack of one's own, by the words of `equidit.train.whole`."""

    layers: Layer
    scans_layers: ClassVar[bool] = True

    def __call__(self, tokens, cond):
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        body = lambda tokens, a: (edt.train.whole(eqx.combine(a, static))(tokens, cond), None)  # noqa: E731
        body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, tokens, arrays)[0]


def test_a_stack_of_ones_own_is_divided_as_the_library_s():
    def own():
        network = toy(depth=8)
        return eqx.tree_at(lambda n: n.layers, network, Own(network.layers.stacked))

    options = {"mesh": mesh(2), "sharding": "fsdp"}
    found, expected = (run(make=make, **options)[0] for make in (own, partial(toy, depth=8)))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(found.network.layers)]
    assert specs == [P(None, None, "data"), P(None, "data")]
    assert difference(jax.tree.leaves(found), jax.tree.leaves(expected)) < ORDER


def test_bad_input():
    state = edt.init_state(toy(), SGD)
    unknown: list[Any] = ["zero2", "tp"]
    with pytest.raises(ValueError, match=r"did you mean 'zero1'\? Choose from replicated, zero1"):
        edt.make_train_step(loss, SGD, mesh=mesh(2), sharding=unknown[0])
    with pytest.raises(ValueError, match=r"sharding='tp' is unknown"):
        edt.shardings(state, mesh(2), unknown[1])
    with pytest.raises(ValueError, match=r"\('model',\).*'data'"):
        edt.shardings(state, jax.make_mesh((2,), ("model",), (AxisType.Auto,)), "fsdp")
    with pytest.raises(ValueError, match=r"sharding='fsdp' needs a mesh"):
        edt.make_train_step(loss, SGD, sharding="fsdp")
    step: Any = edt.make_train_step(loss, SGD, mesh=mesh(8), sharding="fsdp")
    with pytest.raises(ValueError, match=r"batch of 12.*8 devices.*8 or 16"):
        step(state, (images(12, (1, 4, 4)), np.zeros(12, int)), KEY)
