import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_fields, images, randomize, tree_allclose

import equidit as edt


def attention(**options):
    return randomize(edt.Attention(16, 2, **options, key=jax.random.key(0)), scale=0.3)


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
    layer, x = randomize(edt.MLP(8, 16, key=jax.random.key(0))), images(1, (3, 8))[0]
    h = np.asarray(layer.up(x), np.float64)
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    expected = h @ np.asarray(layer.down.weight, np.float64).T + np.asarray(layer.down.bias)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-6)


def test_label_out_of_range_is_nan_and_never_another_class():
    embedder = edt.LabelEmbedder(10, 8, key=jax.random.key(0))
    assert embedder.null == 10
    for label in range(11):
        assert tree_allclose(embedder(jnp.asarray(label)), embedder.table[label])
    for label in (-1, 11, 1000):
        assert np.isnan(embedder(jnp.asarray(label))).all()


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
