"""Laws that every block obeys, over the table of all blocks."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BLOCKS, IDENTITY_AT_INIT, check_fields, images, randomize, tree_allclose

import equidit as edt

DIM, HEADS, DEPTH = 32, 4, 3
TOKENS = images(5, (6, DIM))
VECTORS = images(5, (DIM,), seed=2)
MATRICES = images(5, (2, DIM), seed=3)


def conditioning(vector, tokens):
    return edt.Conditioning(vector, tokens)


COND = conditioning(VECTORS[0], MATRICES[0])
every_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)


def new(make, seed=1):
    return randomize(make(DIM, HEADS, key=jax.random.key(0)), seed)


def stack(make, remat=None):
    made = edt.Stack(partial(make, DIM, HEADS), DEPTH, remat=remat, key=jax.random.key(0))
    return randomize(made)


@every_block
def test_is_a_block(make):
    block = new(make)
    assert isinstance(block, edt.Block)
    out = block(TOKENS[0], COND)
    assert out.shape == TOKENS[0].shape
    assert not tree_allclose(out, TOKENS[0], 0.1)


@every_block
def test_leaves_are_float_arrays_of_the_stated_shapes(make):
    for module in jax.tree.leaves(new(make), is_leaf=lambda x: isinstance(x, edt.Linear)):
        check_fields(module)
    assert all(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(new(make)))


@every_block
def test_identity_at_initialisation(make):
    block = make(DIM, HEADS, key=jax.random.key(0))
    unchanged = tree_allclose(block(TOKENS[0], COND), TOKENS[0])
    assert unchanged == (make in [BLOCKS[name] for name in IDENTITY_AT_INIT])


@every_block
def test_vmap_equals_loop(make):
    block = new(make)
    batched = jax.vmap(lambda x, v, m: block(x, conditioning(v, m)))(TOKENS, VECTORS, MATRICES)
    loop = [block(*pair) for pair in zip(TOKENS, map(conditioning, VECTORS, MATRICES), strict=True)]
    assert tree_allclose(batched, jnp.stack(loop), 1e-5)


@every_block
def test_jit_equals_eager(make):
    block = new(make)
    jitted = jax.jit(lambda block, x, c: block(x, c))(block, TOKENS[0], COND)
    assert tree_allclose(jitted, block(TOKENS[0], COND), 1e-5)


@every_block
def test_reads_its_conditioning(make):
    block = new(make)
    other = conditioning(VECTORS[1], MATRICES[1])
    assert not tree_allclose(block(TOKENS[0], COND), block(TOKENS[0], other), 1e-2)


@every_block
def test_is_equivariant_to_the_order_of_tokens(make):
    block, order = new(make), jnp.asarray([3, 0, 5, 1, 4, 2])
    assert tree_allclose(block(TOKENS[0][order], COND), block(TOKENS[0], COND)[order], 1e-5)


@every_block
def test_bfloat16(make):
    low = partial(edt.cast, dtype=jnp.bfloat16)
    out = low(new(make))(low(TOKENS[0]), low(COND))
    assert out.dtype == jnp.bfloat16
    assert tree_allclose(new(make)(TOKENS[0], COND), out.astype(jnp.float32), 0.03)


@every_block
@pytest.mark.parametrize("remat", [None, "dots", "full"])
def test_stack_equals_a_loop(make, remat):
    layers = stack(make, remat)

    def loop(layers, x):
        for block in layers.unstack():
            x = block(x, COND)
        return x

    assert len(layers.unstack()) == DEPTH
    assert tree_allclose(layers(TOKENS[0], COND), loop(layers, TOKENS[0]), 1e-5)
    square = lambda f: jax.grad(lambda layers: jnp.square(f(layers)).mean())(layers)  # noqa: E731
    scanned = square(lambda layers: layers(TOKENS[0], COND))
    assert tree_allclose(scanned, square(lambda layers: loop(layers, TOKENS[0])), 1e-5)


@every_block
def test_gradient_reaches_every_parameter(make):
    grads = jax.grad(lambda b: jnp.square(b(TOKENS[0], COND)).mean())(stack(make))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert (np.abs(grad).max(axis=tuple(range(1, grad.ndim))) > 0).all(), path


@every_block
def test_blocks_of_a_stack_differ(make):
    made = edt.Stack(partial(make, DIM, HEADS), 2, key=jax.random.key(0))
    first, second = made.unstack()
    matrices = [
        (a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        if np.abs(a).max() > 0 and a.ndim == 2
    ]
    assert matrices
    assert all(not tree_allclose(a, b, 0.1) for a, b in matrices)


@every_block
def test_is_deterministic_and_compiles_once_whatever_the_depth(make):
    def size(depth):
        layers = edt.Stack(partial(make, DIM, HEADS), depth, key=jax.random.key(0))
        return len(str(jax.make_jaxpr(lambda n, x: n(x, COND))(layers, TOKENS[0])).splitlines())

    assert size(2) == size(9)


def test_stack_takes_any_module():
    class Mine(eqx.Module):
        mlp: eqx.nn.MLP
        calls: jax.Array
        name: str

        def __init__(self, *, key):
            self.mlp = eqx.nn.MLP(DIM, DIM, DIM, 1, activation=jnp.tanh, key=key)
            self.calls, self.name = jnp.arange(3), "mine"

        def __call__(self, tokens, cond):
            return tokens + jax.vmap(self.mlp)(tokens) + cond.vector[None]

    layers = edt.Stack(Mine, 3, key=jax.random.key(0))
    x = TOKENS[0]
    for block in layers.unstack():
        assert block.name == "mine"
        x = block(x, COND)
    assert tree_allclose(layers(TOKENS[0], COND), x, 1e-5)


def test_remat_recomputes():
    def saved(remat):
        layers = stack(edt.AdaLNZeroBlock, remat)
        gradient = jax.grad(lambda n: jnp.square(n(TOKENS[0], COND)).mean())
        return str(jax.make_jaxpr(gradient)(layers)).count("dot_general")

    assert saved(None) < saved("dots") < saved("full")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda k: edt.Attention(30, 4, key=k), ["dim=30", "num_heads=4", "[1, 2, 3, 5, 6"]),
        (lambda k: edt.Attention(32, 0, key=k), ["num_heads=0"]),
        (lambda k: edt.Linear(0, 4, key=k), ["in_features=0"]),
        (lambda k: edt.Stack(partial(edt.AdaLNZeroBlock, 8, 2), 0, key=k), ["depth=0"]),
        (
            lambda k: edt.Stack(partial(edt.AdaLNZeroBlock, 8, 2), 1, remat="all", key=k),
            ["remat='all'", "dots", "full"],
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(jax.random.key(0))
    assert all(word in str(error.value) for word in words), error.value
