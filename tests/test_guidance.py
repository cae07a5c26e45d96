from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GUIDANCE, Pointwise, images, tiny, tree_allclose

import equidit as edt
from equidit import diffusion as dfn

X = images(7)
T = jnp.linspace(0.0, 999.0, 7)
LABEL = jnp.arange(7)
NULL = jnp.asarray(10)


def evaluate(network, label=LABEL):
    return jax.jit(lambda n, x, t, c: jax.vmap(n)(x, t, c))(network, X, T, label)


def test_formula():
    network = Pointwise()
    cond, null = evaluate(network), evaluate(network, jnp.full(7, 10))
    guided = evaluate(edt.guide(network, 4.0, NULL))
    assert tree_allclose(guided[:, :1], (cond + 3 * (cond - null))[:, :1], 1e-5)
    # The variance is the conditional one.
    assert tree_allclose(guided[:, 1:], cond[:, 1:])


def test_channels():
    network = Pointwise(in_channels=4)
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
    network = tiny(hidden_size=8, depth=1, num_heads=2)
    assert tree_allclose(evaluate(edt.guide(network, jnp.asarray(1.0), NULL)), evaluate(network))
    assert edt.guide(network, 1, NULL) is network
    assert edt.guide(network, 1.0, NULL) is network


def test_scale_0_is_the_unconditional_network():
    network = Pointwise(learn_sigma=False)
    null = evaluate(network, jnp.full(7, 10))
    assert tree_allclose(evaluate(edt.guide(network, 0.0, NULL)), null, 1e-5)


def test_one_program_for_every_scale_and_null():
    traces = []

    @jax.jit
    def run(network):
        traces.append(None)
        return network(X[0], T[0], LABEL[0])

    outs = [
        run(edt.guide(Pointwise(), s, n)) for s, n in ((2.0, 10), (3, 9), (jnp.asarray(4.0), NULL))
    ]
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


every_rule = pytest.mark.parametrize("rule", GUIDANCE.values(), ids=GUIDANCE)


@every_rule
def test_laws_of_every_rule(rule):
    network = rule(Pointwise(), 3.0, NULL)
    assert isinstance(network, edt.Network)
    batched = evaluate(network)
    loop = jnp.stack([network(*args) for args in zip(X, T, LABEL, strict=True)])
    assert tree_allclose(batched, loop, 1e-5)
    # The variance is the conditional one, and something is guided.
    cond = evaluate(Pointwise())
    assert tree_allclose(batched[:, 1:], cond[:, 1:], 1e-6)
    assert not tree_allclose(batched[:, :1], cond[:, :1], 1e-2)
    low = rule(edt.cast(Pointwise(), jnp.bfloat16), 3.0, NULL)
    assert low(X[0], T[3], LABEL[0]).dtype == jnp.float32
    assert low(X[0].astype(jnp.bfloat16), T[3], LABEL[0]).dtype == jnp.bfloat16
    assert rule(cond_network := Pointwise(), 1, NULL) is cond_network
    assert tree_allclose(evaluate(rule(Pointwise(), jnp.asarray(1.0), NULL)), cond, 1e-6)


@every_rule
@pytest.mark.parametrize("step", [dfn.ddim_step, dfn.ddpm_step])
def test_every_rule_composes_with_sampling(rule, step):
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 4))
    traces = []

    @jax.jit
    def run(network, x, label):
        traces.append(None)
        draw = partial(dfn.sample, partial(step, network, schedule), schedule)
        return jax.vmap(lambda x, c: draw(x, c, key=jax.random.key(0)))(x, label)

    outs = [run(rule(Pointwise(), scale, NULL), X, LABEL) for scale in (2.0, 4.0)]
    assert len(traces) == 1
    assert np.isfinite(outs[0]).all()
    assert not tree_allclose(outs[0], outs[1], 1e-3)


def test_scale_of_each_sample():
    scales = jnp.linspace(0.0, 5.0, 7)
    guided = lambda s, x, t, c: edt.guide(Pointwise(), s, NULL)(x, t, c)  # noqa: E731
    each = jax.vmap(guided)(scales, X, T, LABEL)
    for i, scale in enumerate(scales):
        assert tree_allclose(
            edt.guide(Pointwise(), scale, NULL)(X[i], T[i], LABEL[i]), each[i], 1e-5
        )


def test_negative_conditioning():
    network = Pointwise(learn_sigma=False)
    cond, avoided = evaluate(network), evaluate(network, jnp.full(7, 4))
    guided = evaluate(edt.guide(network, 3.0, jnp.asarray(4)))
    assert tree_allclose(cond + 2 * (cond - avoided), guided, 1e-5)


def test_autoguidance():
    network, weaker = Pointwise(learn_sigma=False), Pointwise(learn_sigma=False, seed=1)
    cond, weak = evaluate(network), evaluate(weaker)
    guided = evaluate(edt.guide(network, 3.0, NULL, other=weaker))
    assert tree_allclose(cond + 2 * (cond - weak), guided, 1e-5)
    assert tree_allclose(guided, evaluate(edt.guide(network, 3.0, None, other=weaker)))
    args = (X[0], T[0], LABEL[0])
    cost = edt.count_macs(edt.guide(network, 3.0, None, other=weaker), *args)
    assert cost == edt.count_macs(network, *args) + edt.count_macs(weaker, *args)


def test_interval():
    guided, plain = edt.guide(Pointwise(), 3.0, NULL), Pointwise()
    limited = edt.guide(Pointwise(), 3.0, NULL, interval=(T[2], T[4]))
    for i, t in enumerate(T):
        expected = guided if 2 <= i <= 4 else plain
        assert tree_allclose(expected(X[i], t, LABEL[i]), limited(X[i], t, LABEL[i]), 1e-6)
    assert limited(X[0], jnp.asarray(500), LABEL[0]).shape == (2, 8, 8)


def test_rescale():
    cond = evaluate(Pointwise())[:, :1]
    plain, full, half = (
        evaluate(edt.guide(Pointwise(), 5.0, NULL, rescale=r))[:, :1] for r in (0.0, 1.0, 0.5)
    )
    assert tree_allclose(plain, evaluate(edt.guide(Pointwise(), 5.0, NULL))[:, :1], 1e-6)
    axes = (1, 2, 3)
    assert tree_allclose(full.std(axes), cond.std(axes), 1e-5)
    assert tree_allclose((full + plain) / 2, half, 1e-5)
    assert (plain.std(axes) != cond.std(axes)).all()
    new = jax.tree.map(jnp.zeros_like, Pointwise())  # predicts 0, as a new DiT does
    assert (evaluate(edt.guide(new, 5.0, NULL, rescale=1.0)) == 0).all()


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
        edt.guide(Pointwise(), float("nan"), NULL)
    with pytest.raises(ValueError, match=r"rescale=1\.5 must lie in"):
        edt.guide(Pointwise(), 2.0, NULL, rescale=1.5)
    with pytest.raises(ValueError, match=r"interval=\(5, 3\) must be the lowest"):
        edt.guide(Pointwise(), 2.0, NULL, interval=(5, 3))
    with pytest.raises(ValueError, match="null has the structure"):
        edt.guide(Pointwise(), 2.0, {"label": NULL})(X[0], T[0], LABEL[0])
    with pytest.raises(ValueError, match="must predict the same"):
        edt.guide(Pointwise(), 2.0, None, other=Pointwise(learn_sigma=False))(X[0], T[0], LABEL[0])
    with pytest.raises(ValueError, match="null=1000 does not fit the label's dtype uint8"):
        edt.drop_label(jnp.asarray(3, jnp.uint8), jnp.asarray(1000), 0.1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="null has the structure"):
        edt.drop_label({"a": LABEL[0]}, NULL, 0.1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="channels=0"):
        edt.guide(Pointwise(), 2.0, NULL, channels=0)
    with pytest.raises(ValueError, match="channels=3, but the output has only 2"):
        edt.guide(Pointwise(), 2.0, NULL, channels=3)(X[0], T[0], LABEL[0])
