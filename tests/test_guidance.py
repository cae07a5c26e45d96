import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import images, tiny, tree_allclose

import equidit as edt

X = images(7)
T = jnp.linspace(0.0, 999.0, 7)
LABEL = jnp.arange(7)
NULL = jnp.asarray(10)


def evaluate(network, label=LABEL):
    return jax.jit(lambda n, x, t, c: jax.vmap(n)(x, t, c))(network, X, T, label)


def test_formula():
    network = tiny()
    cond, null = evaluate(network), evaluate(network, jnp.full(7, 10))
    guided = evaluate(edt.guide(network, 4.0, NULL))
    assert tree_allclose(guided[:, :1], (cond + 3 * (cond - null))[:, :1], 1e-5)
    # The variance is the conditional one.
    assert tree_allclose(guided[:, 1:], cond[:, 1:])


def test_channels():
    network = tiny(in_channels=4)
    x = images(1, (4, 8, 8))[0]
    t, label = jnp.asarray(3.0), jnp.asarray(2)
    cond, null = network(x, t, label), network(x, t, NULL)
    full = cond + 3 * (cond - null)
    for channels in (1, 3, 4, 8, None):
        out = edt.guide(network, 4.0, NULL, channels=channels)(x, t, label)
        count = 4 if channels is None else channels
        assert tree_allclose(out[:count], full[:count], 1e-5)
        if count < 8:
            assert tree_allclose(out[count:], cond[count:])


def test_scale_1_is_bit_for_bit_the_conditional_network():
    network = tiny()
    assert tree_allclose(evaluate(edt.guide(network, jnp.asarray(1.0), NULL)), evaluate(network))
    assert edt.guide(network, 1, NULL) is network
    assert edt.guide(network, 1.0, NULL) is network


def test_scale_0_is_the_unconditional_network():
    network = tiny(learn_sigma=False)
    null = evaluate(network, jnp.full(7, 10))
    assert tree_allclose(evaluate(edt.guide(network, 0.0, NULL)), null, 1e-5)


def test_one_program_for_every_scale_and_null():
    traces = []

    @jax.jit
    def run(network):
        traces.append(None)
        return network(X[0], T[0], LABEL[0])

    outs = [run(edt.guide(tiny(), s, n)) for s, n in ((2.0, 10), (3, 9), (jnp.asarray(4.0), NULL))]
    assert len(traces) == 1
    assert not tree_allclose(outs[0], outs[1], 1e-3)


def test_cost_is_two_evaluations_or_one():
    calls = []

    def network(x, t, cond):
        calls.append(cond)
        return x

    edt.guide(network, 2.0, 10)(X[0], T[0], 3)
    assert calls == [3, 10]
    calls.clear()
    edt.guide(network, 1, 10)(X[0], T[0], 3)
    assert calls == [3]


def test_guidance_of_a_bfloat16_network():
    out = edt.guide(edt.cast(tiny(), jnp.bfloat16), 2.0, NULL)(
        X[0].astype(jnp.bfloat16), T[0], LABEL[0]
    )
    assert out.dtype == jnp.bfloat16


def test_drop_label():
    keys = jax.random.split(jax.random.key(0), 20_000)
    label = jnp.asarray(3, jnp.int32)

    def dropped(probability):
        draw = lambda key: edt.drop_label(label, 10, probability, key=key)  # noqa: E731
        return np.asarray(jax.vmap(draw)(keys))

    for probability in (0.0, 0.1, 1.0):
        result = dropped(probability)
        assert result.dtype == np.int32
        assert set(result.tolist()) <= {3, 10}
        error = np.sqrt(probability * (1 - probability) / len(keys))
        assert abs((result == 10).mean() - probability) <= 4 * error


def test_drop_any_pytree_as_a_whole():
    cond, null = {"a": jnp.ones(3), "b": jnp.ones(())}, {"a": jnp.zeros(3), "b": 0}
    keys = jax.random.split(jax.random.key(0), 50)
    draws = jax.vmap(lambda key: edt.drop_label(cond, null, 0.5, key=key))(keys)
    np.testing.assert_array_equal(draws["a"], np.repeat(np.asarray(draws["b"])[:, None], 3, 1))
    assert 0 < draws["b"].mean() < 1


def test_bad_input():
    for probability in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"probability={probability}"):
            edt.drop_label(LABEL[0], 10, probability, key=jax.random.key(0))
    with pytest.raises(ValueError, match="scale=nan must be finite"):
        edt.guide(tiny(), float("nan"), NULL)
    with pytest.raises(ValueError, match="channels=0"):
        edt.guide(tiny(), 2.0, NULL, channels=0)
    with pytest.raises(ValueError, match="channels=3, but the output has only 2"):
        edt.guide(tiny(), 2.0, NULL, channels=3)(X[0], T[0], LABEL[0])
