from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_fields, images, made, tree_allclose
from jaxtyping import TypeCheckError

import equidit as edt

T = jnp.asarray(300)
WORDS = images(5, (6,), seed=4)


def embedder(max_length=8):
    return made(edt.TextEmbedder, 6, 16, max_length=max_length, scale=0.4)


def conditioner(**options):
    return made(edt.TextConditioner, 6, 32, max_length=8, scale=0.4, **options)


def prompt_network(block="text-cross-attention", **sizes):
    text: dict[str, Any] = {"num_classes": None, "text_dim": 6, "text_length": 8, "block": block}
    config = edt.Config(2, 32, 2, 4, in_channels=1, **text, **sizes)
    return made(edt.build, config, scale=0.2)


def padded(count, length, fill=0.0):
    rows = jnp.full((length, 6), fill).at[:count].set(WORDS[:count])
    return rows, jnp.arange(length) < count


TEXT_BLOCKS = pytest.mark.parametrize(
    "block", ["text-cross-attention", "cross-attention", "in-context", "adaln", "adaln-zero"]
)


@TEXT_BLOCKS
def test_padding_does_not_matter(block):
    network, x = prompt_network(block), images(1)[0]
    out = network(x, T, padded(3, 3))
    for other in (padded(3, 5), padded(3, 8), padded(3, 8, fill=1e3), padded(3, 4, fill=jnp.nan)):
        assert tree_allclose(out, network(x, T, other), 1e-5)
    assert not tree_allclose(out, network(x, T, padded(4, 8)), 1e-4)


@TEXT_BLOCKS
def test_reads_prompt_and_timestep(block):
    network, x = prompt_network(block), images(1)[0]
    out = network(x, T, padded(3, 8))
    words = padded(3, 8)[0].at[1].add(1.0)
    assert not tree_allclose(out, network(x, T, (words, padded(3, 8)[1])), 1e-4)
    assert not tree_allclose(out, network(x, jnp.asarray(900), padded(3, 8)), 1e-4)


@TEXT_BLOCKS
def test_null_prompt(block):
    """Nothing of a prompt that is all mask is seen, whatever its length."""
    network, x = prompt_network(block), images(1)[0]
    null = network(x, T, network.conditioner.null)
    for length in (1, 5, 8):
        nothing = (images(1, (length, 6))[0], jnp.zeros(length, bool))
        assert tree_allclose(null, network(x, T, nothing))
    assert not tree_allclose(null, network(x, T, padded(3, 8)), 1e-4)
    # It is learned: its tokens, all of them, take part.
    grads = jax.grad(lambda n: jnp.square(n(x, T, n.conditioner.null)).sum())(network)
    assert (np.abs(grads.conditioner.text.null).max(axis=1) > 0).all()


def test_embedder():
    text = embedder()
    for module in (text, text.up, text.down, text.pooled):
        check_fields(module)
    cond = text(*padded(3, 5))
    assert cond.tokens.shape == (8, 16)
    np.testing.assert_array_equal(cond.mask, np.arange(8) < 3)
    # Every token by itself, and the vector from the mean of those that count.
    one = text(WORDS[1:2], jnp.ones(1, bool))
    assert tree_allclose(one.tokens[0], cond.tokens[1], 1e-6)
    assert tree_allclose(text.pooled(cond.tokens[:3].mean(axis=0)), cond.vector, 1e-5)
    # The order of the mask is the prompt's own affair.
    scattered = text(WORDS, jnp.asarray([True, False, True, False, True]))
    mean = scattered.tokens[jnp.asarray([0, 2, 4])].mean(axis=0)
    assert tree_allclose(text.pooled(mean), scattered.vector, 1e-5)


def test_conditioner():
    plain, with_time = conditioner(), conditioner(timestep_token=True)
    a, b = plain(T, padded(3, 8)), with_time(T, padded(3, 8))
    assert tree_allclose(a.vector, plain.timestep(T) + plain.text(*padded(3, 8)).vector, 1e-6)
    assert (a.tokens.shape, b.tokens.shape) == ((8, 32), (9, 32))
    assert tree_allclose(b.tokens[0], with_time.timestep(T))
    assert tree_allclose(a.tokens, b.tokens[1:])
    np.testing.assert_array_equal(b.mask, np.arange(9) < 4)


def test_dropout_and_guidance_take_prompts():
    network, x = prompt_network(), images(1)[0]
    null = network.conditioner.null
    prompt = padded(3, 8)
    draws = [edt.drop_label(prompt, null, 0.5, key=jax.random.key(i)) for i in range(20)]
    kept = [bool(mask.any()) for _, mask in draws]
    assert 0 < sum(kept) < 20
    for (words, mask), keep in zip(draws, kept, strict=True):
        assert words.shape == (8, 6)
        expected = prompt if keep else null
        assert tree_allclose(network(x, T, (words, mask)), network(x, T, expected))
    cond, none = network(x, T, prompt), network(x, T, null)
    guided = edt.guide(network, 3.0, null)(x, T, prompt)
    assert tree_allclose(guided[:1], (cond + 2 * (cond - none))[:1], 1e-5)


def test_bfloat16():
    network, x = prompt_network(), images(1)[0]
    low = edt.cast(network, jnp.bfloat16)(x, T, padded(3, 8))
    assert low.dtype == jnp.float32
    assert tree_allclose(network(x, T, padded(3, 8)), low, 0.1)


def test_conditioners_know_their_number_of_classes():
    labels = edt.LabelConditioner(10, 8, key=jax.random.key(0))
    unconditional = edt.TimestepConditioner(8, key=jax.random.key(0))
    assert (labels.num_classes, labels.null) == (10, 10)
    assert unconditional.num_classes is conditioner().num_classes is None


def test_features_have_a_default():
    default, none, other = (
        edt.TimestepEmbedder(8, **options, key=jax.random.key(0))
        for options in ({}, {"features": None}, {"features": partial(edt.timestep_features)})
    )
    assert jax.tree.structure(default) == jax.tree.structure(none)
    assert jax.tree.structure(default) != jax.tree.structure(other)
    assert tree_allclose(default(jnp.asarray(7)), other(jnp.asarray(7)))


def test_bad_input():
    with pytest.raises(TypeCheckError, match="length"):
        embedder()(jnp.ones((5, 6)), jnp.ones(4, bool))
    with pytest.raises(ValueError, match="length=9, beyond max_length=8: truncate"):
        embedder()(jnp.ones((9, 6)), jnp.ones(9, bool))
    with pytest.raises(ValueError, match="text_dim=7, but the network was made for text_dim=6"):
        embedder()(jnp.ones((5, 7)), jnp.ones(5, bool))
    with pytest.raises(ValueError, match="max_length=0"):
        edt.TextEmbedder(6, 16, max_length=0, key=jax.random.key(0))
