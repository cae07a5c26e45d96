import dataclasses
from collections import defaultdict
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import BLOCKS, difference, images, tiny, tree_allclose
from toys import KEY, hybrid, mesh, run, toy

import equidit as edt
from equidit.checkpoint import Checkpoints

MATRICES = ("hidden", "input", "output")
MUON = edt.muon(1e-2)


class Mixed(eqx.Module):
    """A block of one's own: modules of others, bare arrays, and leaves that are no parameters."""

    qkv: jax.Array
    gate: jax.Array
    shift: jax.Array
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    embedding: eqx.nn.Embedding
    kernel: eqx.nn.Conv2d
    modulation: edt.Linear
    kv: edt.Linear
    order: jax.Array

    def __init__(self, dim, num_heads, mlp_ratio, *, key):
        self.qkv, self.gate, self.shift = jnp.ones((3 * dim, dim)), jnp.ones(dim), jnp.ones(dim)
        self.norm = eqx.nn.LayerNorm(dim)
        self.mlp = eqx.nn.MLP(dim, dim, 2 * dim, 1, key=key)
        self.embedding = eqx.nn.Embedding(5, dim, key=key)
        self.kernel = eqx.nn.Conv2d(1, 1, 3, key=key)
        self.modulation = edt.Linear(dim, 3 * dim, key=key)
        self.kv = edt.Linear(dim // 2, 2 * dim, key=key)
        self.order = jnp.arange(3)

    def __call__(self, tokens, cond):
        shift, scale, gate = jnp.split(self.modulation(cond.vector), 3)
        x = jax.vmap(self.norm)(edt.modulate(tokens, shift, scale)) @ self.qkv[: self.gate.size]
        y = self.kv(tokens[:, : tokens.shape[1] // 2])[:, : tokens.shape[1]]
        return tokens + gate[None] * self.gate[None] * (jax.vmap(self.mlp)(x) + y)


class Final(eqx.Module):
    """A last layer of one's own."""

    mix: edt.Linear
    to_patches: edt.Linear

    def __init__(self, dim, patch_size, out_channels, *, key):
        self.mix = edt.Linear(dim, dim, key=key)
        self.to_patches = edt.Linear(dim, patch_size**2 * out_channels, key=key)

    def __call__(self, tokens, cond):
        return self.to_patches(self.mix(tokens))


def own():
    return edt.DiT(1, 2, 32, 2, 4, 10, block=Mixed, final=Final, key=KEY)


def unstacked(network):
    return eqx.tree_at(lambda n: n.blocks, network, network.blocks.unstack())


def captions():
    conditioner = edt.TextConditioner(6, 32, max_length=3, key=KEY)
    block = edt.TextCrossAttentionBlock
    return edt.DiT(1, 2, 32, 2, 4, None, block=block, conditioner=conditioner, key=KEY)


NETWORKS: dict[str, Any] = {name: partial(tiny, block=block) for name, block in BLOCKS.items()}
NETWORKS |= {
    "unconditional": partial(tiny, num_classes=None),
    "plain last layer": partial(tiny, final=edt.PlainFinalLayer),
    "own parts": own,
    "captions": captions,
    "a list of blocks": lambda: unstacked(tiny()),
    "guided": lambda: edt.guide(tiny(), 2.0, 10),
    "guided by text": lambda: edt.guide(captions(), jnp.asarray(2.0), captions().conditioner.null),
    "autoguided": lambda: edt.guide(tiny(), 2.0, 10, other=tiny(depth=1), interval=(1, 2)),
    "autoencoder": lambda: edt.Autoencoder(1, 1, 2, (4, 4), 1, 2, key=KEY),
    "an array": lambda: jnp.ones((3, 4)),
}


def is_parameter(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def drawn(name, seed=0):
    """A network's parameters, none of them zero; drawn by NumPy, for nothing to compile."""
    shapes = eqx.filter(eqx.filter_eval_shape(NETWORKS[name]), is_parameter)
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda s: jnp.asarray(0.1 * draw(s.shape), s.dtype), shapes)


def squares(network, example, key):
    """A loss whose gradient is the network: quick, and no parameter stays where it is."""
    leaves = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    return sum((jnp.square(leaf).sum() for leaf in leaves), jnp.zeros(()))


def moved(optimizer, steps=2, make=toy):
    """A state after some steps."""
    return run(optimizer, objective=squares, make=make, steps=steps)[0]


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shapes_of(block):
    return eqx.filter_eval_shape(lambda: tiny(block=block).blocks)


def of(kinds, *wanted):
    return {name for name, found in named(kinds).items() if found.kind in wanted}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_one_kind_however_it_is_seen(name):
    traced = []

    def make():
        network = NETWORKS[name]()
        traced.append(edt.parameter_kinds(network))
        return network

    shapes = eqx.filter_eval_shape(make)
    params = eqx.filter(shapes, is_parameter)
    kinds = edt.parameter_kinds(shapes)
    assert jax.tree.structure(kinds) == jax.tree.structure(params)
    assert all(isinstance(leaf, edt.ParameterKind) for leaf in jax.tree.leaves(kinds))
    for other in (*traced, edt.parameter_kinds(params)):
        assert named(other) == named(kinds)
    for leaf, found in zip(jax.tree.leaves(params), jax.tree.leaves(kinds), strict=True):
        shape = leaf.shape[found.layers :]
        assert len(shape) == 2 or found.kind not in (*MATRICES, "embedding")
        assert len(shape) < 2 or found.kind not in ("scale",)
        assert found.parts == 1 or (found.kind == "hidden" and shape[0] % found.parts == 0)


def test_the_hidden_matrices_of_dit_s():
    network = eqx.filter_eval_shape(edt.build, "DiT-S/2", key=KEY)
    kinds = edt.parameter_kinds(network)
    block, hidden = "blocks.stacked.", partial(edt.ParameterKind, "hidden")
    assert {name: kind for name, kind in named(kinds).items() if kind.kind == "hidden"} == {
        f"{block}attention.qkv.weight": hidden(1, 3),
        f"{block}attention.out.weight": hidden(1),
        f"{block}mlp.up.weight": hidden(1),
        f"{block}mlp.down.weight": hidden(1),
        f"{block}modulation.weight": hidden(1, 6),
        "conditioner.timestep.down.weight": hidden(),
        "final.modulation.weight": hidden(0, 2),
    }
    assert of(kinds, "input") == {"patch_embed.weight", "conditioner.timestep.up.weight"}
    assert of(kinds, "output") == {"final.linear.weight"}
    assert of(kinds, "embedding") == {"conditioner.label.table"}
    assert of(kinds, "scale", "other") == set()
    assert of(kinds, "bias") == {name for name in named(kinds) if name.endswith(".bias")}


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ("adaln-zero", {"attention.qkv": 3, "modulation": 6}),
        ("adaln", {"attention.qkv": 3, "modulation": 4}),
        ("cross-attention", {"attention.qkv": 3, "cross.qkv": 3}),
        ("in-context", {"attention.qkv": 3}),
        ("text-cross-attention", {"attention.qkv": 3, "cross.qkv": 3, "modulation": 6}),
        ("rms-swiglu", {"attention.qkv": 3, "modulation": 6}),
    ],
)
def test_what_is_made_of_parts(block, parts):
    kinds = named(edt.parameter_kinds(shapes_of(BLOCKS[block])))
    found = {name: kind.parts for name, kind in kinds.items() if kind.parts > 1}
    assert found == {f"stacked.{name}.weight": count for name, count in parts.items()}


def test_norms_and_their_stacked_vectors():
    kinds = edt.parameter_kinds(shapes_of(BLOCKS["in-context-variant"]))
    attention = "stacked.attention."
    assert of(kinds, "scale") == {
        *(f"{attention}{norm}.scale" for norm in ("q_norm", "k_norm")),
        "stacked.norm_attention.scale",
        "stacked.norm_mlp.scale",
    }
    assert {f"{attention}q_norm.shift", "stacked.mlp.gate.bias"} <= of(kinds, "bias")
    assert all(kind.layers == 1 for kind in jax.tree.leaves(kinds))


def test_text_and_guidance():
    kinds = edt.parameter_kinds(eqx.filter_eval_shape(NETWORKS["guided by text"]))
    text = "network.conditioner.text."
    assert of(kinds, "embedding") == {f"{text}null", "null.0"}
    assert f"{text}up.weight" in of(kinds, "input")
    assert {f"{text}down.weight", f"{text}pooled.weight"} <= of(kinds, "hidden")
    assert of(kinds, "scale") == {"scale"}


@pytest.mark.parametrize(("stacked", "prefix"), [(True, "blocks.stacked"), (False, "blocks.1")])
def test_a_block_of_ones_own(stacked, prefix):
    network = eqx.filter_eval_shape(lambda: own() if stacked else unstacked(own()))
    found = named(edt.parameter_kinds(network))
    kind = lambda kind, parts=1: edt.ParameterKind(kind, int(stacked), parts)  # noqa: E731
    assert {n.removeprefix(f"{prefix}."): k for n, k in found.items() if n.startswith(prefix)} == {
        "qkv": kind("hidden", 3),
        "gate": kind("scale"),
        "shift": kind("bias"),
        "norm.weight": kind("scale"),
        "norm.bias": kind("bias"),
        "mlp.layers.0.weight": kind("hidden"),
        "mlp.layers.0.bias": kind("bias"),
        "mlp.layers.1.weight": kind("hidden"),
        "mlp.layers.1.bias": kind("bias"),
        "embedding.weight": kind("embedding"),
        "kernel.weight": kind("other"),
        "kernel.bias": kind("bias"),
        "modulation.weight": kind("hidden", 3),
        "modulation.bias": kind("bias"),
        "kv.weight": kind("hidden", 2),
        "kv.bias": kind("bias"),
    }
    assert found["final.to_patches.weight"].kind == "output"
    assert found["final.mix.weight"].kind == "hidden"


def test_rows_that_no_number_of_parts_divides_stay_whole():
    class Odd(eqx.Module):
        qkv: jax.Array
        modulation: jax.Array

    found = edt.parameter_kinds(Odd(jnp.ones((8, 4)), jnp.ones((2, 4))))
    assert found == Odd(*2 * [edt.ParameterKind("hidden")])  # pyright: ignore[reportArgumentType]


def apart(kinds, tree):
    """Every layer and part of hidden matrices, those of one shape stacked, and the rest by name."""
    hidden, rest = defaultdict(list), {}
    for (name, x), kind in zip(named(tree).items(), jax.tree.leaves(kinds), strict=True):
        if kind.kind != "hidden":
            rest[name] = x
            continue
        layers = x if kind.layers else x[None]
        for layer in layers:
            for part in jnp.split(layer, kind.parts):
                # optax's own rule reads a matrix as (in, out).
                hidden[f"{part.T.shape}"].append(part.T)
    return {shape: {"matrix": jnp.stack(some)} for shape, some in hidden.items()}, rest


DECAYED = {"consistent_rms": None, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adaln-zero", {}),
        ("captions", DECAYED),
        ("own parts", {}),
        ("a list of blocks", DECAYED),
        pytest.param("adaln-zero", DECAYED, marks=pytest.mark.slow),
        pytest.param("captions", {}, marks=pytest.mark.slow),
        pytest.param("own parts", DECAYED, marks=pytest.mark.slow),
        pytest.param("a list of blocks", {}, marks=pytest.mark.slow),
    ],
)
def test_muon_is_optaxs_on_every_layer_and_part_alone(name, options):
    params = drawn(name)
    kinds = edt.parameter_kinds(params)
    ours = edt.muon(0.1, **options)
    theirs = optax.contrib.muon(0.1, **{"consistent_rms": 0.2} | options)
    adam = optax.adamw(0.1, weight_decay=0, nesterov=True)

    @jax.jit
    def init(params):
        hidden, rest = apart(kinds, params)
        begun = {shape: jax.vmap(theirs.init)(some) for shape, some in hidden.items()}
        return ours.init(params), begun, adam.init(rest)

    @jax.jit
    def update(params, grads, states):
        mine, its, adams = states
        hidden, rest = apart(kinds, params)
        hidden_grads, rest_grads = apart(kinds, grads)
        updates, mine = ours.update(grads, mine, params)
        other, adams = adam.update(rest_grads, adams, rest)
        # Each matrix of a stack by itself.
        alone = {
            shape: jax.vmap(theirs.update)(hidden_grads[shape], its[shape], hidden[shape])
            for shape in hidden
        }
        one, its = ({shape: pair[i] for shape, pair in alone.items()} for i in (0, 1))
        return apart(kinds, updates), (one, other), (mine, its, adams)

    states = init(params)
    for seed in (1, 2):
        with jax.numpy_dtype_promotion("standard"):
            found, expected, states = update(params, drawn(name, seed), states)
        # One matrix or many at once: five rounds of products in another order.
        assert difference(found, expected) < 1e-4


def test_muon_takes_what_it_is_told():
    params: Any = toy()
    where = lambda n: n.layers.stacked.linear.weight  # noqa: E731
    kinds = eqx.tree_at(where, edt.parameter_kinds(params), edt.ParameterKind("embedding", 1))
    ones = jax.tree.map(jnp.ones_like, params)

    def update(**options) -> Any:
        optimizer = edt.muon(0.1, **options)
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(optimizer.update)(ones, optimizer.init(params), params)[0]

    own, told, by_function = update(), update(kinds=kinds), update(kinds=lambda _: kinds)
    assert tree_allclose(told, by_function)
    same = jax.tree.map(tree_allclose, own, told)
    assert [name for name, equal in named(same).items() if not equal] == [
        "layers.stacked.linear.weight"
    ]
    # All gradients are 1, of which Adam makes the same everywhere.
    table = told.table
    assert tree_allclose(where(told), jnp.full_like(where(told), table[0, 0]), 1e-6)


@pytest.mark.slow
def test_muon_in_the_training_step():
    """Matrices that devices share are put together for their products, in another order."""
    optimizer = edt.muon(optax.cosine_decay_schedule(1e-2, 10), weight_decay=0.1)
    batch = (images(16), jnp.arange(16) % 10)
    options = {"objective": hybrid, "make": tiny, "steps": 3, "batch": batch}
    one = run(optimizer, **options)
    assert one[1][-1]["loss"] < one[1][0]["loss"]
    eight = run(optimizer, **options, mesh=mesh(8), sharding="fsdp")
    # Orthogonalising enlarges what rounding does to small singular values.
    assert difference(one[0].network, eight[0].network) < 2e-3


def test_muon_with_traced_hyperparameters():
    fixed = moved(MUON)
    inject = optax.inject_hyperparams(lambda learning_rate: edt.muon(learning_rate))
    injected = moved(inject(learning_rate=1e-2))
    assert difference(fixed.network, injected.network) < 1e-5


def test_muons_state_is_checkpointed(tmp_path):
    state = moved(MUON, steps=1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data={}, config={})
        checkpoints.wait()
        restored = checkpoints.restore(eqx.filter_eval_shape(lambda: state), config={})
    assert tree_allclose(jax.tree.leaves(state), jax.tree.leaves(restored.state))


@pytest.mark.parametrize("name", ["adaln-zero", "in-context-variant", "own parts", "captions"])
def test_decay_of_matrices_alone(name):
    """As is usual for transformers: no biases, no norms, no tables."""

    def mask(params):
        return jax.tree.map(lambda p: p.kind in MATRICES, edt.parameter_kinds(params))

    params = drawn(name)
    optimizer = optax.adamw(1.0, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    decayed = {key for key, update in named(updates).items() if jnp.any(update != 0)}
    small = ("bias", "shift", "scale", "table", "null", "gate", "kernel.weight", "norm.weight")
    assert decayed == {k for k in named(params) if not k.endswith((*small, "embedding.weight"))}


def test_learning_rates_by_kind():
    rates = {"hidden": 0.1, "input": 1.0, "output": 0.2, "embedding": 3.0, "bias": 2.0}
    network = drawn("adaln-zero")
    optimizer = optax.multi_transform(
        {kind: optax.sgd(rate) for kind, rate in rates.items()},
        lambda params: jax.tree.map(lambda p: p.kind, edt.parameter_kinds(params)),
    )
    updates, _ = optimizer.update(network, optimizer.init(network), network)
    expected = jax.tree.map(lambda p, x: -rates[p.kind] * x, edt.parameter_kinds(network), network)
    assert tree_allclose(updates, expected)


@pytest.mark.parametrize("inner", [optax.adamw(1e-2, weight_decay=0.1), MUON])
@pytest.mark.parametrize("trained", [("bias",), ("hidden", "output")])
def test_what_is_frozen_keeps_its_bits(trained, inner):
    def labels(params):
        kinds = edt.parameter_kinds(params)
        return jax.tree.map(lambda p: "trained" if p.kind in trained else "frozen", kinds)

    optimizer = optax.partition({"trained": inner, "frozen": optax.set_to_zero()}, labels)
    before = drawn("adaln-zero")
    state = moved(optimizer, make=partial(drawn, "adaln-zero"))
    same = jax.tree.map(tree_allclose, before, state.network)
    kinds = edt.parameter_kinds(before)
    assert {name for name, equal in named(same).items() if not equal} == of(kinds, *trained)


def test_kinds_are_plain_data():
    kind = edt.ParameterKind("hidden", 1, 3)
    assert kind == edt.ParameterKind("hidden", layers=1, parts=3)
    assert dataclasses.replace(kind, parts=1) != kind
    assert hash(kind) == hash(edt.ParameterKind("hidden", 1, 3))


def test_norms_of_equinox_have_scales_however_they_are_stacked():
    norms = eqx.filter_vmap(lambda _: eqx.nn.LayerNorm(8))(jnp.arange(4))
    kinds = edt.parameter_kinds({"norm": norms, "group": eqx.nn.GroupNorm(2, 8)})
    assert kinds["norm"].weight.kind == kinds["group"].weight.kind == "scale"
    assert kinds["norm"].bias.kind == "bias"


def test_a_wrong_option_of_muon_is_refused_at_once():
    with pytest.raises(TypeError, match="weight_decya"):
        edt.muon(1e-3, weight_decya=0.1)
