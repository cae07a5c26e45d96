from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import difference, images, tiny, tree_allclose
from jax.sharding import AxisType, PartitionSpec as P
from test_train import BATCH, KEY, ORDER, SGD, loss, mesh, run

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
        *((mode, {"ordered_sums": False}) for mode in MODES),
        pytest.param("zero1", {"accumulate": 2}, marks=pytest.mark.slow),
        pytest.param("zero1", {"remat": "dots"}, marks=pytest.mark.slow),
    ],
)
def test_sharding_does_not_matter(reference, sharding, options):
    options = {**options}
    network = tiny(remat=options.pop("remat", None))
    again = run(steps=3, network=network, mesh=mesh(8), sharding=sharding, **options)
    assert difference(reference, compared(again)) < ORDER


@pytest.mark.parametrize("sharding", DIVIDED)
def test_one_host_needs_neither_init_sharded_nor_global_batch(sharding):
    devices = mesh(8)
    step = edt.make_train_step(loss, SGD, mesh=devices, sharding=sharding)
    plain = jax.tree.map(np.asarray, BATCH)
    found = step(edt.init_state(tiny(), SGD), plain, KEY)
    state = edt.init_sharded(tiny, SGD, devices, sharding)
    assert difference(found, step(state, edt.hosts.global_batch(plain, devices), KEY)) < ORDER


@pytest.mark.parametrize("sharding", DIVIDED)
def test_same_seed_same_bits(sharding):
    one, two = (run(mesh=mesh(8), sharding=sharding) for _ in range(2))
    assert tree_allclose(one, two)


def test_adam_agrees_and_any_optimizer_sees_whole_gradients():
    """The norm inside `clip_by_global_norm` would be a part's own, were it given parts."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.lamb(1e-2))
    one, eight = (run(optimizer, **kw) for kw in ({}, {"mesh": mesh(8), "sharding": "fsdp"}))
    assert one[1][0]["grad_norm"] > 0.5
    # The scale of a leaf's largest entry; Adam divides rounding by small second moments.
    assert difference(one[0].network, eight[0].network) < 1e-4


@pytest.mark.parametrize("sharding", MODES)
def test_state_lies_where_it_should_is_donated_and_compiles_once(sharding, caplog):
    optimizer, devices = optax.adam(1e-3), mesh(8)
    state = edt.init_state(tiny(), optimizer)
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
    network = edt.build("DiT-S/8", key=KEY, depth=8)
    state = eqx.filter_eval_shape(lambda: edt.init_state(network, optax.adam(1e-3)))
    found = edt.shardings(state, mesh(8), "fsdp")
    block = found.network.blocks.blocks
    assert block.mlp.up.weight.spec == P(None, "data", None)  # 8 x 1536 x 384
    assert block.mlp.down.weight.spec == P(None, None, "data")
    assert block.attention.out.bias.spec == P(None, "data")
    assert found.network.conditioner.label.table.spec == P(None, "data")  # 1001 x 384
    assert found.opt_state[0].mu.blocks.blocks.mlp.up.weight.spec == P(None, "data", None)
    assert found.opt_state[0].count.spec == P()
    assert found.step.spec == P()
    assert edt.shardings(state, mesh(8), "zero1").network.blocks.blocks.mlp.up.weight.spec == P()
    make: Any = lambda key: edt.Linear(3, 5, key=key)  # noqa: E731
    narrow = edt.init_state(edt.Stack(make, 8, key=KEY), SGD)
    assert {s.spec for s in jax.tree.leaves(edt.shardings(narrow, mesh(8), "fsdp"))} == {P()}


def test_stacks_of_stacks():
    class Deep(eqx.Module):
        stack: edt.Stack

        def __call__(self, x, t, cond):
            vector = edt.Conditioning(jnp.ones(16))
            return jnp.tile(self.stack(x.reshape(4, 16), vector).reshape(1, 8, 8), (2, 1, 1))

    def block(key):
        return edt.AdaLNBlock(16, 2, key=key)

    def inner(key):
        return edt.Stack(block, 2, key=key)

    def deep():
        return Deep(edt.Stack(inner, 8, key=KEY))

    one, eight = (run(network=deep(), **kw) for kw in ({}, {"mesh": mesh(8), "sharding": "fsdp"}))
    assert difference(one, eight) < ORDER


@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
def test_init_sharded(sharding):
    optimizer = optax.adam(1e-3)
    make = lambda: edt.build(edt.Config(2, 32, 2, 2, in_channels=1, num_classes=10), key=KEY)  # noqa: E731
    state = edt.init_sharded(make, optimizer, mesh(8), sharding, ema_names=("a", "b"))
    whole = edt.init_state(make(), optimizer, ema_names=("a", "b"))
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
    config = edt.Config(2, 256, 12, 4, in_channels=1, num_classes=10)

    def temporary(sharding):
        state = eqx.filter_eval_shape(lambda: edt.init_state(edt.build(config, key=KEY), SGD))
        places = edt.shardings(state, mesh(8), sharding)
        state = jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), state, places
        )
        step = edt.make_train_step(loss, SGD, mesh=mesh(8), sharding=sharding)
        lowered = jax.jit(step, donate_argnums=0).lower(state, (images(8), jnp.arange(8)), KEY)
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    # Replicated, the gradient alone is as large as the network.
    weights = 4 * edt.num_params(config)
    assert temporary("fsdp") < 0.75 * weights < temporary("replicated")


def test_bad_input():
    state = edt.init_state(tiny(), SGD)
    with pytest.raises(ValueError, match=r"did you mean 'zero1'\? Choose from replicated, zero1"):
        edt.make_train_step(loss, SGD, mesh=mesh(2), sharding="zero2")
    with pytest.raises(ValueError, match=r"sharding='tp' is unknown"):
        edt.shardings(state, mesh(2), "tp")
    with pytest.raises(ValueError, match=r"\('model',\).*'data'"):
        edt.shardings(state, jax.make_mesh((2,), ("model",), (AxisType.Auto,)), "fsdp")
    with pytest.raises(ValueError, match=r"sharding='fsdp' needs a mesh"):
        edt.make_train_step(loss, SGD, sharding="fsdp")
    step: Any = edt.make_train_step(loss, SGD, mesh=mesh(8), sharding="fsdp")
    with pytest.raises(ValueError, match=r"batch of 12.*8 devices.*8 or 16"):
        step(state, (images(12), np.zeros(12, int)), KEY)
