from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_fields, images, made, randomize, tiny, tree_allclose

import equidit as edt


def attention(**options):
    return made(edt.Attention, 16, 2, **options, scale=0.3)


def test_attention_is_the_formula():
    layer, x = attention(), images(1, (5, 16))[0]
    q, k, v = np.split(np.asarray(layer.qkv(x), np.float64).reshape(5, 6, 8), 3, axis=1)
    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.einsum("hts,shd->thd", weights, v).reshape(5, 16)
    expected = y @ np.asarray(layer.out.weight, np.float64).T + np.asarray(layer.out.bias)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-5)


def test_attention_to_itself_as_context_is_self_attention():
    layer, x = attention(), images(1, (5, 16))[0]
    assert tree_allclose(layer(x), layer(x, x), 1e-6)


def test_attention_mask_hides_tokens():
    layer, x, context = attention(), images(1, (5, 16))[0], images(1, (7, 16), seed=2)[0]
    mask = jnp.arange(7) < 4
    assert tree_allclose(layer(x, context, mask), layer(x, context[:4]), 1e-6)
    assert not tree_allclose(layer(x, context, mask), layer(x, context), 1e-2)
    with pytest.raises(ValueError, match="mask has 5 entries, but there are 7 tokens"):
        layer(x, context, jnp.ones(5, bool))


def test_attention_takes_any_function():
    seen = []

    def mean(query, key, value, *, mask=None):
        seen.append((query.shape, key.shape, value.shape, mask))
        return jnp.broadcast_to(value.mean(axis=0, keepdims=True), query.shape)

    x = images(1, (5, 16))[0]
    layer = attention(attend=mean)
    value = jnp.split(layer.qkv(x), 3, axis=1)[2].mean(axis=0, keepdims=True)
    assert tree_allclose(layer(x), jnp.broadcast_to(layer.out(value), x.shape), 1e-5)
    assert seen == [((5, 2, 8), (5, 2, 8), (5, 2, 8), None)]


def test_mlp_is_tanh_gelu():
    layer, x = made(edt.MLP, 8, 16), images(1, (3, 8))[0]
    h = np.asarray(layer.up(x), np.float64)
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    expected = h @ np.asarray(layer.down.weight, np.float64).T + np.asarray(layer.down.bias)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-6)


def test_label_out_of_range_is_an_error_or_nan_and_never_another_class():
    embedder = edt.LabelEmbedder(10, 8, key=jax.random.key(0))
    assert embedder.null == 10
    for label in range(11):
        assert tree_allclose(embedder(jnp.asarray(label)), embedder.table[label])
    for label in (-1, 11, 99, 1000):
        words = f"label={label} is unknown to a network of 10 classes"
        given: Any = np.int64(label)
        known = [
            lambda: embedder(given),  # noqa: B023
            lambda: jax.vmap(embedder)(jnp.asarray([3, label])),  # noqa: B023
            lambda: jax.vmap(jax.vmap(embedder))(jnp.asarray([[3], [label]])),  # noqa: B023
            lambda: jax.grad(lambda e: e(jnp.asarray(label)).sum())(embedder),  # noqa: B023
        ]
        for call in known:
            with pytest.raises(ValueError, match=words):
                call()
        traced = jnp.asarray([3, label])
        for rows in (
            jax.jit(lambda e, many: jax.vmap(e)(many))(embedder, traced),
            jnp.stack([jax.jit(lambda e, one: e(one))(embedder, one) for one in traced]),
        ):
            assert tree_allclose(rows[0], embedder.table[3])
            assert np.isnan(rows[1]).all()
    # Types that cannot hold the null label, and no labels at all.
    wide = edt.LabelEmbedder(1000, 8, key=jax.random.key(0))
    assert tree_allclose(wide(jnp.asarray(100, jnp.int8)), wide.table[100])
    assert jax.vmap(embedder)(jnp.zeros(0, int)).shape == (0, 8)


PARAMETERS = {
    "Linear": (made(edt.Linear, 8, 4), jnp.ones((3, 8))),
    "LayerNorm": (edt.LayerNorm(8), jnp.ones((3, 8))),
    "RMSNorm": (edt.RMSNorm(8), jnp.ones((3, 8))),
    "Attention": (made(edt.Attention, 8, 2), jnp.ones((3, 8)), jnp.ones((2, 8))),
    "LabelEmbedder": (made(edt.LabelEmbedder, 4, 8), jnp.asarray(3)),
    "TextEmbedder": (
        made(edt.TextEmbedder, 8, 8, max_length=3),
        jnp.ones((2, 8)),
        jnp.arange(2) < 1,
    ),
    "TimestepEmbedder": (made(edt.TimestepEmbedder, 8), jnp.asarray(3)),
    "DiT": (tiny(depth=3), images(1)[0], jnp.asarray(3), jnp.asarray(3)),
    "in-context": (tiny(block=edt.InContextBlock), images(1)[0], jnp.asarray(3), jnp.asarray(3)),
}


def _with_each_leaf(module, put):
    """The module with one array after another replaced by `put` of it."""
    leaves, structure = jax.tree.flatten(module)
    for i, leaf in enumerate(leaves):
        yield jax.tree.unflatten(structure, [*leaves[:i], put(leaf), *leaves[i + 1 :]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_may_be_of_numpy(name, dtype):
    module, *arguments = PARAMETERS[name]
    expected = module(*arguments)
    whole = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), module)
    assert tree_allclose(whole(*arguments), expected)
    assert tree_allclose(jax.jit(lambda m: m(*arguments))(whole), expected, 1e-5)
    for changed in _with_each_leaf(module, lambda leaf: np.asarray(leaf, dtype)):
        assert tree_allclose(changed(*arguments), expected)


@pytest.mark.parametrize(
    "put",
    [
        lambda leaf: 0.5,
        lambda leaf: np.float32(0.5),
        lambda leaf: jnp.zeros(()),
        lambda leaf: np.zeros(leaf.shape, int),
        lambda leaf: jnp.zeros((1, *leaf.shape)),
    ],
)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "LabelEmbedder", "TextEmbedder", "DiT"])
def test_what_is_no_parameter_is_named(name, put):
    module, *arguments = PARAMETERS[name]
    for changed in _with_each_leaf(module, put):
        for call in (lambda m: m(*arguments), jax.jit(lambda m: m(*arguments))):
            with pytest.raises(ValueError, match=r"\w+\.\w+ (is|has the shape) .* in its place"):
                call(changed)


@pytest.mark.parametrize(
    ("make", "std"),
    [
        (lambda k: edt.Linear(200, 300, key=k).weight, np.sqrt(2 / 500)),
        (lambda k: edt.Attention(96, 4, key=k).qkv.weight, np.sqrt(2 / (4 * 96))),
        (lambda k: edt.TimestepEmbedder(64, key=k).up.weight, 0.02),
        (lambda k: edt.TimestepEmbedder(128, key=k).down.weight, 0.02),
        (lambda k: edt.LabelEmbedder(300, 64, key=k).table, 0.02),
    ],
)
def test_initialisation(make, std):
    weight = make(jax.random.key(0))
    assert abs(weight.std() / std - 1) < 0.03
    assert abs(weight.mean()) < 4 * std / np.sqrt(weight.size)
    if std != 0.02:
        assert np.abs(weight).max() <= std * np.sqrt(3)


def test_zero_initialisation():
    final = edt.FinalLayer(16, 2, 4, key=jax.random.key(0))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(final))
    block = edt.AdaLNZeroBlock(16, 2, key=jax.random.key(0))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(block.modulation))
    assert isinstance(block.attention, edt.Attention)
    assert (block.attention.qkv.bias == 0).all()


def test_fields():
    key = jax.random.key(0)
    for module in (edt.Linear(2, 3, key=key), edt.LabelEmbedder(3, 4, key=key)):
        check_fields(module)


def test_conditioner_tokens_are_timestep_and_label():
    conditioner = edt.LabelConditioner(10, 16, key=jax.random.key(0))
    t, label = jnp.asarray(7.0), jnp.asarray(3)
    cond = conditioner(t, label)
    assert cond.tokens is not None
    assert tree_allclose(cond.tokens[0], conditioner.timestep(t))
    assert tree_allclose(cond.tokens[1], conditioner.label(label))
    assert tree_allclose(cond.vector, cond.tokens.sum(axis=0), 1e-6)


def test_norms():
    x = images(1, (3, 8))[0] + 2
    y = np.asarray(x, np.float64)
    rms = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-6)
    assert tree_allclose(rms, edt.rms_norm(x), 1e-6)
    centred = y - y.mean(-1, keepdims=True)
    ln = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    for make, plain in ((edt.LayerNorm, ln), (edt.RMSNorm, rms)):
        assert tree_allclose(plain, make(8)(x), 1e-6)
        module = randomize(make(8), scale=1.0)
        check_fields(module)
        expected = plain * np.asarray(module.scale) + np.asarray(getattr(module, "shift", 0.0))
        assert tree_allclose(expected, module(x), 1e-6)
        low = edt.cast(module, jnp.bfloat16)(x.astype(jnp.bfloat16))
        assert low.dtype == jnp.bfloat16


def test_swiglu():
    layer, x = made(edt.SwiGLU, 8, 16), images(1, (3, 8))[0]
    gate = np.asarray(layer.gate(x), np.float64)
    expected = layer.down(jnp.asarray(gate / (1 + np.exp(-gate)) * layer.up(x), jnp.float32))
    assert tree_allclose(expected, layer(x), 1e-6)


def test_qk_norm_bounds_the_logits():
    layer = attention(qk_norm=edt.RMSNorm)
    seen = []

    def spy(query, key, value, *, mask=None):
        seen.extend([query, key])
        return value

    layer = attention(qk_norm=edt.RMSNorm, attend=spy)
    layer(1000 * images(1, (5, 16))[0])
    for x, norm in zip(seen, (layer.q_norm, layer.k_norm), strict=True):
        assert x.shape == (5, 2, 8)
        squares = jnp.square(x / norm.scale[None, None]).mean(axis=-1)
        assert tree_allclose(squares, jnp.ones((5, 2)), 1e-5)
    assert not tree_allclose(layer.q_norm.scale, layer.k_norm.scale, 0.1)


def test_rotary_depends_on_differences_alone():
    q, k = images(2, (6, 2, 8))
    grid = jnp.asarray([[i // 3, i % 3] for i in range(6)], jnp.float32)

    def products(p):
        return jnp.einsum("thd,shd->hts", edt.rotary_2d(q, p), edt.rotary_2d(k, p))

    assert tree_allclose(products(grid), products(grid + jnp.asarray([[5.0, 7.0]])), 1e-5)
    assert not tree_allclose(products(grid), products(2 * grid), 1e-2)
    # Rows and columns are told apart, lengths are kept, and (0, 0) is not turned.
    assert not tree_allclose(products(grid), products(grid[:, ::-1]), 1e-2)
    turned = edt.rotary_2d(q, grid)
    assert tree_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(q, axis=-1), 1e-6)
    assert tree_allclose(turned[0], q[0])
    assert edt.rotary_2d(q.astype(jnp.bfloat16), grid).dtype == jnp.bfloat16


def test_rotary_is_the_formula():
    """Pair i of the first half is the complex number that turns by column * theta^(-i/quarter)."""
    x, positions = images(1, (4, 1, 8))[0], images(1, (4, 2), seed=2)[0]
    y, p = np.asarray(x, np.float64), np.asarray(positions, np.float64)
    expected = np.empty_like(y)
    for half, position in ((slice(0, 4), p[:, 1]), (slice(4, 8), p[:, 0])):
        pairs = y[..., half][..., :2] + 1j * y[..., half][..., 2:]
        pairs = pairs * np.exp(1j * position[:, None, None] * 100.0 ** (-np.arange(2) / 2))
        expected[..., half] = np.concatenate([pairs.real, pairs.imag], axis=-1)
    assert tree_allclose(expected, edt.rotary_2d(x, positions, theta=100), 1e-6)


def test_bad_rotary():
    with pytest.raises(ValueError, match="head_dim=5 must be a multiple of 4"):
        edt.rotary_2d(jnp.ones((3, 2, 5)), jnp.ones((3, 2)))
    layer = attention(rotary=edt.rotary_2d)
    with pytest.raises(ValueError, match="needs positions"):
        layer(images(1, (5, 16))[0])
