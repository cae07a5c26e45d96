"""Laws that every block obeys, over the table of all blocks."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BLOCKS,
    IDENTITY_AT_INIT,
    READS_TOKENS,
    READS_VECTOR,
    check_fields,
    images,
    made,
    tree_allclose,
)
from jax.sharding import AxisType, PartitionSpec

import equidit as edt

DIM, HEADS, DEPTH = 32, 4, 3
KEY = jax.random.key(0)
TOKENS = images(8, (6, DIM))
VECTORS = images(8, (DIM,), seed=2)
MATRICES = images(8, (2, DIM), seed=3)
POSITIONS = jnp.asarray([[0.0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])


def conditioning(vector, tokens, positions=POSITIONS):
    return edt.Conditioning(vector, tokens, positions=positions)


COND = conditioning(VECTORS[0], MATRICES[0])
every_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
every_name = pytest.mark.parametrize("name", BLOCKS)


def new(make, seed=1):
    return made(make, DIM, HEADS, seed=seed)


def stack(make, remat=None):
    return made(edt.Stack, partial(make, DIM, HEADS), DEPTH, remat=remat)


@every_block
def test_is_a_block(make):
    block = new(make)
    assert isinstance(block, edt.Block)
    out = block(TOKENS[0], COND)
    assert out.shape == TOKENS[0].shape
    assert not tree_allclose(out, TOKENS[0], 0.01)


@every_block
def test_leaves_are_float_arrays_of_the_stated_shapes(make):
    typed = (edt.Linear, edt.LayerNorm, edt.RMSNorm)
    for module in jax.tree.leaves(new(make), is_leaf=lambda x: isinstance(x, typed)):
        assert isinstance(module, typed)
        check_fields(module)
    assert all(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(new(make)))


@every_name
def test_identity_at_initialisation(name):
    block = BLOCKS[name](DIM, HEADS, key=jax.random.key(0))
    unchanged = tree_allclose(block(TOKENS[0], COND), TOKENS[0])
    assert unchanged == (name in IDENTITY_AT_INIT)


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


@every_name
def test_reads_its_conditioning(name):
    block = new(BLOCKS[name])
    for reads, other in (
        (name in READS_VECTOR, conditioning(VECTORS[1], MATRICES[0])),
        (name in READS_TOKENS, conditioning(VECTORS[0], MATRICES[1])),
    ):
        same = tree_allclose(block(TOKENS[0], COND), block(TOKENS[0], other), 1e-6)
        assert same != reads


@every_block
def test_is_equivariant_to_the_order_of_tokens(make):
    block, order = new(make), jnp.asarray([3, 0, 5, 1, 4, 2])
    moved = conditioning(VECTORS[0], MATRICES[0], POSITIONS[order])
    assert tree_allclose(block(TOKENS[0][order], moved), block(TOKENS[0], COND)[order], 1e-5)


@every_name
def test_only_rotary_blocks_read_positions(name):
    block = new(BLOCKS[name])
    other = conditioning(VECTORS[0], MATRICES[0], 2 * POSITIONS)
    same = tree_allclose(block(TOKENS[0], COND), block(TOKENS[0], other), 1e-6)
    assert same == (name not in {"rotary", "in-context-variant"})


@every_block
def test_devices_do_not_matter(make):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    layers = stack(make, remat="dots")

    def mean(layers, x, v, m):
        out = jax.vmap(lambda x, v, m: layers(x, conditioning(v, m)))(x, v, m)
        return jnp.square(out).mean()

    def shared(layers, x, v, m):
        return jax.lax.pmean(mean(layers, x, v, m), "data")

    data = (TOKENS, VECTORS, MATRICES)
    specs = (PartitionSpec(), *[PartitionSpec("data")] * 3)
    gradient = jax.shard_map(jax.grad(shared), mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    alone = jax.jit(jax.grad(mean))(layers, *data)
    assert tree_allclose(alone, jax.jit(gradient)(layers, *data), 1e-5)


@every_block
def test_bfloat16(make):
    low = partial(edt.cast, dtype=jnp.bfloat16)
    out = low(new(make))(low(TOKENS[0]), low(COND))
    assert out.dtype == jnp.bfloat16
    assert tree_allclose(new(make)(TOKENS[0], COND), out.astype(jnp.float32), 0.03)


@every_block
def test_stack_equals_a_loop(make):
    @jax.jit
    def scan(layers):
        return jax.value_and_grad(lambda layers: jnp.square(layers(TOKENS[0], COND)).mean())(layers)

    @jax.jit
    @jax.value_and_grad
    def loop(layers):
        blocks, x = layers.unstack(), TOKENS[0]
        assert len(blocks) == DEPTH
        for block in blocks:
            x = block(x, COND)
        return jnp.square(x).mean()

    expected = loop(stack(make))
    for remat in (None, "dots", "full"):
        found = scan(stack(make, remat))
        assert tree_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-5), remat


@every_block
def test_gradient_reaches_every_parameter(make):
    grads = jax.grad(lambda b: jnp.square(b(TOKENS[0], COND)).mean())(stack(make))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert (np.abs(grad).max(axis=tuple(range(1, grad.ndim))) > 0).all(), path


@every_block
def test_blocks_of_a_stack_differ(make):
    first, second = edt.Stack(partial(make, DIM, HEADS), 2, key=jax.random.key(0)).unstack()
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


def layer_norm64(x, module=None):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    return x if module is None else x * module.scale + module.shift


def attention64(module, x, context=None):
    weight, bias = module.qkv.weight, module.qkv.bias
    context = x if context is None else context
    sources = (x, context, context)
    q, k, v = (
        (source @ weight[i * DIM : (i + 1) * DIM].T + bias[i * DIM : (i + 1) * DIM]).reshape(
            len(source), HEADS, -1
        )
        for i, source in enumerate(sources)
    )
    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(DIM / HEADS)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.einsum("hts,shd->thd", weights, v).reshape(len(x), DIM)
    return out @ module.out.weight.T + module.out.bias


def mlp64(module, x):
    h = x @ module.up.weight.T + module.up.bias
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return h @ module.down.weight.T + module.down.bias


def modulation64(block):
    silu = np.asarray(VECTORS[0], np.float64)
    silu = silu / (1 + np.exp(-silu))
    return (block.modulation.weight @ silu + block.modulation.bias).reshape(-1, DIM)


@pytest.mark.parametrize("name", ["adaln", "cross-attention", "in-context", "text-cross-attention"])
def test_is_the_formula(name):
    """The layouts of the paper's table, in NumPy and float64."""
    exact = made(BLOCKS[name], DIM, HEADS, scale=0.3)
    block = jax.tree.map(lambda a: np.asarray(a, np.float64), exact)
    x, context = np.asarray(TOKENS[0], np.float64), np.asarray(MATRICES[0], np.float64)
    if name == "adaln":
        shift_a, scale_a, shift_m, scale_m = modulation64(block)
        x = x + attention64(block.attention, layer_norm64(x) * (1 + scale_a) + shift_a)
        x = x + mlp64(block.mlp, layer_norm64(x) * (1 + scale_m) + shift_m)
    elif name == "text-cross-attention":
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation64(block)
        x = x + gate_a * attention64(block.attention, layer_norm64(x) * (1 + scale_a) + shift_a)
        x = x + attention64(block.cross, layer_norm64(x), context)
        x = x + gate_m * mlp64(block.mlp, layer_norm64(x) * (1 + scale_m) + shift_m)
    else:
        x = x + attention64(block.attention, layer_norm64(x, block.norm_attention))
        if name == "cross-attention":
            x = x + attention64(block.cross, layer_norm64(x, block.norm_cross), context)
        x = x + mlp64(block.mlp, layer_norm64(x, block.norm_mlp))
    assert tree_allclose(x, exact(TOKENS[0], COND), 2e-6)


@pytest.mark.parametrize("name", sorted(READS_TOKENS))
def test_masked_tokens_do_not_matter(name):
    block = new(BLOCKS[name])
    mask = jnp.asarray([True, False])
    masked = edt.Conditioning(VECTORS[0], MATRICES[0], mask)
    alone = edt.Conditioning(VECTORS[0], MATRICES[0][:1])
    assert tree_allclose(block(TOKENS[0], masked), block(TOKENS[0], alone), 1e-6)
    assert not tree_allclose(block(TOKENS[0], masked), block(TOKENS[0], COND), 1e-3)
    with pytest.raises(ValueError, match="conditioner gave none"):
        block(TOKENS[0], edt.Conditioning(VECTORS[0]))


def test_in_context_masks_the_appended_tokens():
    block = new(edt.InContextBlock)
    both = jnp.concatenate([TOKENS[0], MATRICES[0]])
    masked = edt.Conditioning(VECTORS[0], mask=jnp.arange(8) < 7)
    alone = edt.Conditioning(VECTORS[0])
    assert tree_allclose(block(both, masked)[:7], block(both[:7], alone), 1e-6)
    # Beside tokens that were not appended, a mask is theirs.
    beside = edt.Conditioning(VECTORS[0], MATRICES[0], jnp.asarray([True, False]))
    assert tree_allclose(block(TOKENS[0], beside), block(TOKENS[0], alone))


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


@every_block
def test_a_stack_is_a_sequence_of_its_blocks(make):
    layers = edt.Stack(partial(make, DIM, 4), 3, key=jax.random.key(0))
    blocks = layers.unstack()
    assert len(layers) == len(blocks) == 3
    for found, expected in (
        (list(layers), blocks),
        ([layers[0], layers[np.int64(1)], layers[jnp.asarray(2)]], blocks),
        ([layers[-3], layers[-2], layers[-1]], blocks),
        (layers[1:], blocks[1:]),
        (layers[::-2], blocks[::-2]),
        (layers[5:], []),
    ):
        assert tree_allclose(found, expected) if expected else found == []
    x = TOKENS[0]
    for block in layers:
        x = block(x, COND)
    assert tree_allclose(layers(TOKENS[0], COND), x, 1e-5)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"block {index} of a stack of depth=3"):
            layers[index]


def test_stack_takes_modules_without_arrays():
    class Twice(eqx.Module):
        def __init__(self, *, key):
            pass

        def __call__(self, tokens, cond):
            return 2 * tokens

    layers = edt.Stack(Twice, 3, key=jax.random.key(0))
    assert tree_allclose(layers(TOKENS[0], COND), 8 * TOKENS[0])


def test_no_remat_has_one_spelling():
    plain, none = (
        edt.Stack(partial(edt.AdaLNBlock, 8, 2), 1, remat=r, key=KEY) for r in ("none", None)
    )
    assert jax.tree.structure(plain) == jax.tree.structure(none)


NORMED = partial(edt.Attention, qk_norm=edt.RMSNorm)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (partial(edt.AdaLNZeroBlock, 8, 2), "mlp", edt.SwiGLU),
        (partial(edt.AdaLNBlock, 8, 2), "attention", NORMED),
        (partial(edt.InContextBlock, 8, 2), "norm", edt.RMSNorm),
        (partial(edt.CrossAttentionBlock, 8, 2), "norm", edt.RMSNorm),
        (partial(edt.TextCrossAttentionBlock, 8, 2), "cross", NORMED),
        (partial(edt.PlainFinalLayer, 8, 2, 1), "norm", edt.RMSNorm),
    ],
)
def test_keywords_are_taken_under_their_former_names(make, name, value):
    def structure(**options):
        return jax.tree.structure(eqx.filter_eval_shape(partial(make, **options), key=KEY))

    new = f"make_{name}"
    assert structure(**{name: value}) == structure(**{new: value}) != structure()
    with pytest.raises(TypeError, match=f"{name} is the former name of {new}: pass the latter"):
        structure(**{name: value, new: value})


def test_remat_recomputes():
    def saved(remat):
        layers = stack(edt.AdaLNZeroBlock, remat)
        gradient = jax.grad(lambda n: jnp.square(n(TOKENS[0], COND)).mean())
        return str(jax.make_jaxpr(gradient)(layers)).count("dot_general")

    assert saved(None) < saved("dots") < saved("full")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (lambda tokens: tokens[:, :-1], ["float32[6, 32]", "Mine returned float32[6, 31]"]),
        (lambda tokens: tokens.astype(jnp.bfloat16), ["Mine returned bfloat16[6, 32]"]),
        (lambda tokens: (tokens, None), ["Mine returned a tuple"]),
    ],
)
def test_a_block_that_changes_the_shape_is_named(out, words):
    class Mine(eqx.Module):
        weight: jax.Array

        def __init__(self, *, key):
            self.weight = jax.random.normal(key, (DIM,))

        def __call__(self, tokens, cond):
            return out(tokens)

    with pytest.raises(ValueError, match="keep the tokens' shape") as error:
        edt.Stack(Mine, 2, key=jax.random.key(0))(TOKENS[0], COND)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda k: edt.Attention(30, 4, key=k), ["dim=30", "num_heads=4", "[1, 2, 3, 5, 6"]),
        (lambda k: edt.Attention(32, 0, key=k), ["num_heads=0"]),
        (lambda k: edt.Linear(0, 4, key=k), ["in_features=0"]),
        (lambda k: edt.MLP(8, 16, key=k)(jnp.ones((3, 9))), ["9 features", "made for 8"]),
        (lambda k: edt.AdaLNZeroBlock(8, 2, 0.01, key=k), ["mlp_ratio=0.01", "dim=8"]),
        (lambda k: edt.Stack(partial(edt.AdaLNZeroBlock, 8, 2), 0, key=k), ["depth=0"]),
        (
            lambda k: edt.Stack(
                partial(edt.AdaLNZeroBlock, 8, 2),
                1,
                remat="all",  # pyright: ignore[reportArgumentType]
                key=k,
            ),
            ["remat='all'", "dots", "full"],
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(jax.random.key(0))
    assert all(word in str(error.value) for word in words), error.value
