"""Losses, weights and the bound, where the optimum is known in closed form."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VELOCITY, Pointwise, images, tree_allclose

import equidit as edt
from equidit import diffusion as dfn

BETAS = dfn.linear_betas()
FULL = dfn.Schedule(BETAS)
SHORT = dfn.Schedule(BETAS, dfn.space_timesteps(1000, 250))
KEY = jax.random.key(5)
# Data are N(0, SPREAD^2).
SPREAD = 0.7
TIMES = [0, 1, 10, 100, 500, 999]
UNKNOWN: Any = "other"
every_prediction = pytest.mark.parametrize(
    "prediction", ["eps", "x0", "v", VELOCITY], ids=["eps", "x0", "v", "of-ones-own"]
)


def signal_of(t, keep=None):
    """Float64: alphas_cumprod at step t and before, and beta."""
    signal = np.cumprod(1 - BETAS)[slice(None) if keep is None else np.asarray(keep)]
    before = signal[t - 1] if t else 1.0
    return signal[t], before, 1 - signal[t] / before


def spread_of(t, keep=None):
    """Variance of x0 given x_t."""
    signal, _, _ = signal_of(t, keep)
    return SPREAD**2 * (1 - signal) / (signal * SPREAD**2 + 1 - signal)


def ideal(prediction, schedule=FULL):
    """The ideal network of the Gaussian; its second half asks for the upper bound of variance."""

    def network(x, t, cond):
        a = jnp.interp(t, schedule.time, schedule.alphas_cumprod)
        signal, noise = jnp.sqrt(a), jnp.sqrt(1 - a)
        x0 = signal * SPREAD**2 / (a * SPREAD**2 + 1 - a) * x
        eps = (x - signal * x0) / noise
        values = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0, VELOCITY: eps - x0}
        value = values[prediction]
        return jnp.concatenate([value, jnp.ones_like(value)])

    return network


def means_over_data_and_noise(losses, times):
    """By Gauss-Hermite quadrature; `losses(t, x0, noise)` of an image of one pixel, a row each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x0, noise = (a.astype(np.float32).reshape(-1, 1, 1, 1) for a in np.meshgrid(nodes, nodes))
    over_both = jax.vmap(jax.vmap(losses, (None, 0, 0)), (0, None, None))
    values = jax.jit(over_both)(jnp.asarray(times), jnp.asarray(SPREAD * x0), jnp.asarray(noise))
    pair = np.outer(weights, weights).ravel() / weights.sum() ** 2
    rows = zip(*(np.asarray(value, np.float64) @ pair for value in values), strict=True)
    return dict(zip(times, rows, strict=True))


def mse_of(prediction, t, keep=None):
    signal, _, _ = signal_of(t, keep)
    snr = signal / (1 - signal)
    factors = {"eps": snr, "x0": 1.0, "v": 1 + snr, VELOCITY: (1 + np.sqrt(snr)) ** 2}
    return spread_of(t, keep) * factors[prediction]


def bits_of(t, keep=None):
    """The bound's term with variance beta and, at t = 0, the density of a Gaussian decoder."""
    signal, before, beta = signal_of(t, keep)
    difference = (beta * np.sqrt(before) / (1 - signal)) ** 2 * spread_of(t, keep)
    if t == 0:
        return 0.5 * (np.log(2 * np.pi * beta) + difference / beta) / np.log(2)
    variance = beta * (1 - before) / (1 - signal)
    return 0.5 * (np.log(beta / variance) + (variance + difference) / beta - 1) / np.log(2)


@functools.cache
def simple_losses(prediction):
    """At each time plain, weighted, and the gradient by a factor of the network's output."""

    def losses(t, x0, noise):
        def loss(factor, weight=None):
            network = lambda *args: factor * ideal(prediction)(*args)  # noqa: E731
            options = {"key": KEY, "t": t, "noise": noise, "prediction": prediction}
            return dfn.simple_loss(network, FULL, x0, None, weight=weight, **options)

        weight = partial(dfn.min_snr_weight, gamma=5.0, prediction=prediction)
        one = jnp.ones(())
        return loss(one), loss(one, weight), jax.grad(loss)(one)

    return means_over_data_and_noise(losses, TIMES)


@pytest.mark.parametrize("t", TIMES)
@every_prediction
def test_simple_loss_at_the_optimum(prediction, t):
    loss, weighted, gradient = simple_losses(prediction)[t]
    expected = mse_of(prediction, t)
    assert loss == pytest.approx(expected, abs=1e-4)
    # An optimum it is: of no factor but 1 is the loss as small.
    assert gradient == pytest.approx(0, abs=1e-4 * max(1, expected))
    # The weight makes of each the same error in x0.
    signal, _, _ = signal_of(t)
    snr = signal / (1 - signal)
    assert weighted == pytest.approx(min(snr, 5.0) * mse_of("x0", t), rel=1e-3, abs=1e-4)


@functools.cache
def bounds(prediction):
    """At each time the hybrid loss, the rescaled one, the bound and that with a fixed variance."""
    network = ideal(prediction, SHORT)
    every = (
        dfn.hybrid_loss,
        dfn.rescaled_hybrid_loss,
        dfn.vlb_loss,
        partial(dfn.vlb_loss, variance="large"),
    )

    def losses(t, x0, noise):
        options = {"key": KEY, "t": t, "prediction": prediction, "likelihood": "latents"}
        return [loss(network, SHORT, x0, None, noise=noise, **options) for loss in every]

    return means_over_data_and_noise(losses, [t for t in TIMES if t < SHORT.steps])


@pytest.mark.parametrize("t", [t for t in TIMES if t < 250])
@every_prediction
def test_bounds_at_the_optimum(prediction, t):
    keep = dfn.space_timesteps(1000, 250)
    hybrid, rescaled, bound, large = bounds(prediction)[t]
    mse, bits = mse_of(prediction, t, keep), bits_of(t, keep)
    assert hybrid == pytest.approx(mse + bits, abs=1e-4)
    assert rescaled == pytest.approx(mse + bits / 4, abs=1e-4)
    assert bound / 250 == pytest.approx(bits, abs=1e-4)
    if t > 0:
        assert large / 250 == pytest.approx(bits, abs=1e-4)


def test_losses_draw_uniform_steps_and_their_own_noise():
    x0 = images(1)[0]
    seen, noisy = [], []

    def spy(x, t, cond):
        seen.append(int(t))
        noisy.append(np.asarray(x))
        return jnp.concatenate([x, x])

    for i in range(200):
        dfn.simple_loss(spy, SHORT, x0, jnp.asarray(3), key=jax.random.key(i))
    assert set(seen) <= {int(t) for t in SHORT.time}
    # Uniform on 0 to 999: mean 499.5, deviation 289, of which the error is 289 sqrt(0.2 / n).
    assert abs(np.mean(seen) - 499.5) < 4 * 289 / np.sqrt(200)
    assert abs(np.std(seen) - 289) < 4 * 289 * np.sqrt(0.2 / 200)
    # At the noisiest steps nothing but noise is left, another one for each key.
    last = np.stack([x for x, t in zip(noisy, seen, strict=True) if t > 800])
    assert abs(last.std() - 1) < 4 / np.sqrt(2 * last.size)
    assert np.abs(np.corrcoef(last.reshape(len(last), -1)) - np.eye(len(last))).max() < 0.7


def test_rescaling_is_nothing_at_1000_steps():
    network, args = Pointwise(), (images(1)[0], jnp.asarray(3))
    plain, rescaled = (
        loss(network, FULL, *args, key=KEY) for loss in (dfn.hybrid_loss, dfn.rescaled_hybrid_loss)
    )
    assert tree_allclose(plain, rescaled)


def test_vlb_loss_teaches_mean_and_variance():
    eps, values = images(2)

    def loss(eps, values):
        network = lambda x, t, cond: jnp.concatenate([eps, values])  # noqa: E731
        return dfn.vlb_loss(network, FULL, images(1, seed=9)[0], None, key=KEY)

    grads = jax.grad(loss, (0, 1))(eps, values)
    assert all((np.abs(grad) > 0).mean() > 0.99 for grad in grads)


ENTROPY = 0.5 * np.log2(2 * np.pi * np.e)


def mean_and_error(totals):
    totals = np.asarray(totals, np.float64)
    return totals.mean(), totals.std(ddof=1) / np.sqrt(len(totals))


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_bits_per_dim_of_a_gaussian_is_its_entropy(prediction):
    """For N(0, 1) each reverse step is Gaussian with variance beta: the bound is tight."""

    def network(x, t, cond):
        index = t.astype(jnp.int32)
        signal, noise = FULL.sqrt_alphas_cumprod[index], FULL.sqrt_one_minus_alphas_cumprod[index]
        value = {"eps": noise * x, "x0": signal * x, "v": 0 * x}[prediction]
        return jnp.concatenate([value, jnp.ones_like(value)])

    def bits(x0, key):
        return dfn.bits_per_dim(
            network, FULL, x0, None, key=key, prediction=prediction, likelihood="latents"
        )

    result = jax.jit(jax.vmap(bits))(images(8, (1, 64, 64)), jax.random.split(KEY, 8))
    mean, error = mean_and_error(result.total)
    assert error < 0.01
    assert abs(mean - ENTROPY) < 4 * error
    assert tree_allclose(result.total, result.prior + result.terms.sum(axis=1), 1e-5)
    assert result.terms.shape == result.mse.shape == (8, 1000)
    assert (result.prior >= 0).all()
    assert result.prior.max() < 1e-3


WEIGHTS, MEANS, DEVIATIONS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.2, 0.3])


def mixture_x0(x, a, xp):
    """E[x0 | x_t = x] of the mixture."""
    signal, x = xp.sqrt(a), x[..., None]
    variances = a * DEVIATIONS**2 + 1 - a
    logits = np.log(WEIGHTS) - 0.5 * ((x - signal * MEANS) ** 2 / variances + xp.log(variances))
    logits = logits - logits.max(axis=-1, keepdims=True)
    share = xp.exp(logits) / xp.exp(logits).sum(axis=-1, keepdims=True)
    centre = MEANS + signal * DEVIATIONS**2 / variances * (x - signal * MEANS)
    return (share * centre).sum(axis=-1)


@pytest.mark.usefixtures("optimised")
def test_bits_per_dim_of_a_mixture():
    def network(x, t, cond):
        a = FULL.alphas_cumprod[t.astype(jnp.int32)]
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            x0 = mixture_x0(x, a, jnp).astype(jnp.float32)
        return jnp.concatenate([x0, jnp.ones_like(x0)])

    def bits(x0, key):
        return dfn.bits_per_dim(
            network, FULL, x0, None, key=key, prediction="x0", likelihood="latents"
        )

    rng = np.random.default_rng(0)
    part = rng.choice(2, size=(16, 1, 64, 64), p=WEIGHTS)
    data = MEANS[part] + DEVIATIONS[part] * rng.normal(size=part.shape)
    result = jax.jit(jax.vmap(bits))(jnp.asarray(data, jnp.float32), jax.random.split(KEY, 16))
    mean, error = mean_and_error(result.total)

    # The bound's expectation, by quadrature in float64.
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    z, noise = np.meshgrid(nodes, nodes)
    pair = np.outer(weights, weights)
    total = 0.0
    signal = np.cumprod(1 - BETAS)
    for share, centre, deviation in zip(WEIGHTS, MEANS, DEVIATIONS, strict=True):
        x0 = centre + deviation * z
        for t in range(1000):
            a, before = signal[t], signal[t - 1] if t else 1.0
            beta = 1 - a / before
            xt = np.sqrt(a) * x0 + np.sqrt(1 - a) * noise
            gap = (beta * np.sqrt(before) / (1 - a) * (x0 - mixture_x0(xt, a, np))) ** 2
            if t == 0:
                term = 0.5 * (np.log(2 * np.pi * beta) + gap / beta)
            else:
                ratio = (1 - before) / (1 - a)
                term = 0.5 * (-np.log(ratio) + ratio + gap / beta - 1)
            total += share * (term * pair).sum() / np.log(2)
        a = signal[-1]
        prior = 0.5 * (a * x0**2 + 1 - a - np.log(1 - a) - 1)
        total += share * (prior * pair).sum() / np.log(2)
    assert error < 0.01
    assert abs(mean - total) < 4 * error
    # A bound, and with 1000 steps a good one.
    x = np.linspace(-4, 4, 100_001)[:, None]
    density = WEIGHTS / DEVIATIONS / np.sqrt(2 * np.pi)
    density = (density * np.exp(-0.5 * ((x - MEANS) / DEVIATIONS) ** 2)).sum(axis=1)
    entropy = -(density * np.log2(np.maximum(density, 1e-300))).sum() * (x[1, 0] - x[0, 0])
    assert entropy < total < entropy + 0.05


def test_pixel_likelihood_is_the_default():
    network, x0 = Pointwise(), images(1)[0]
    args = (FULL, jnp.concatenate([x0, x0]), x0, x0, 0)
    assert dfn.vb_term(*args) == dfn.vb_term(*args, likelihood="pixels")
    assert dfn.vb_term(*args) != dfn.vb_term(*args, likelihood="latents")
    mid = dfn.bits_per_dim(network, SHORT, x0, jnp.asarray(3), key=KEY, clip=True)
    assert np.isfinite(mid.total)


def test_stratified_timesteps():
    steps, batch = 1000, 64
    keys = jax.random.split(KEY, 300)
    draws = np.asarray(jax.vmap(lambda k: dfn.stratified_timesteps(k, steps, batch))(keys))
    # One from each of 64 equal shares, in any order.
    shares = np.sort(np.floor((draws + 0.5) * batch / steps), axis=1)
    assert np.abs(shares - np.arange(batch)).max() <= 1
    assert (draws[0] != np.sort(draws[0])).any()
    # Uniform for every example of the batch: mean 499.5, deviation 289.
    assert np.abs(draws.mean(axis=0) - 499.5).max() < 4.5 * 289 / np.sqrt(300)
    assert (draws.min() >= 0) & (draws.max() < steps)
    # Their mean varies far less than that of independent ones.
    assert draws.mean(axis=1).std() < 0.1 * 289 / np.sqrt(batch)
    assert set(np.asarray(dfn.stratified_timesteps(KEY, 10, 10))) == set(range(10))


def test_importance_sampling():
    sampler = dfn.LossSecondMoment(4, terms=2)
    scale = jnp.asarray([1.0, 2.0, 3.0, 10.0])
    t = jnp.asarray([0, 1, 2, 3, 0, 1, 2], jnp.int32)
    sampler = jax.jit(lambda s: s.update(t, scale[t]))(sampler)
    # Uniform until every step has had two.
    assert tree_allclose(sampler.probabilities, jnp.full(4, 0.25))
    assert tree_allclose(sampler.sample(KEY, 5)[1], jnp.ones(5))
    sampler = sampler.update(t[3:4], scale[t[3:4]])
    expected = 0.999 * scale / scale.sum() + 0.001 / 4
    assert tree_allclose(sampler.probabilities, expected, 1e-6)
    t, weight = sampler.sample(KEY, 20_000)
    shares = np.bincount(t, minlength=4) / 20_000
    assert np.abs(shares - expected).max() < 4 * 0.5 / np.sqrt(20_000)
    # Weighted, the mean is that of uniform steps.
    values = np.asarray(weight * scale[t], np.float64)
    assert abs(values.mean() - 4.0) < 4 * values.std() / np.sqrt(20_000) + 1e-3
    # A loss that is not finite is left out.
    poisoned = sampler.update(jnp.asarray([0, 3]), jnp.asarray([jnp.nan, jnp.inf]))
    assert tree_allclose(poisoned.probabilities, sampler.probabilities)
    assert tree_allclose(
        dfn.LossSecondMoment(4, 1).update(jnp.arange(4), jnp.zeros(4)).probabilities,
        jnp.full(4, 0.25),
    )
    # Only the latest are remembered.
    for _ in range(2):
        sampler = sampler.update(jnp.arange(4), jnp.ones(4))
    assert tree_allclose(sampler.probabilities, jnp.full(4, 0.25), 1e-6)


def test_importance_sampling_in_a_training_loop():
    schedule, optimizer = SHORT, optax.sgd(0.1)

    def loss(network, example, key):
        image, label, t, weight = example
        return weight * dfn.hybrid_loss(network, schedule, image, label, key=key, t=t)

    step = edt.make_train_step(loss, optimizer)
    state, sampler = edt.init_state(Pointwise(), optimizer), dfn.LossSecondMoment(schedule.steps)
    metrics = {}
    for i in range(2):
        t, weight = sampler.sample(jax.random.key(i), 8)
        state, metrics = step(state, (images(8), jnp.arange(8), t, weight), KEY)
        sampler = sampler.update(t, metrics["losses"] / weight)
    assert sampler.counts.sum() == 16
    assert metrics["loss"] == pytest.approx(float(metrics["losses"].mean()), rel=1e-6)


@pytest.mark.parametrize("loss", [dfn.simple_loss, dfn.hybrid_loss, dfn.vlb_loss])
def test_unknown_prediction(loss):
    with pytest.raises(ValueError, match="prediction='other' is unknown: choose from eps, x0, v"):
        loss(Pointwise(), FULL, images(1)[0], jnp.asarray(3), key=KEY, prediction=UNKNOWN)


def test_bad_input():
    network, x0 = Pointwise(), images(1)[0]
    with pytest.raises(ValueError, match="likelihood='other' is unknown: choose from pixels"):
        dfn.hybrid_loss(network, FULL, x0, jnp.asarray(3), key=KEY, likelihood=UNKNOWN)
    with pytest.raises(ValueError, match="variance='other' is unknown"):
        dfn.vlb_loss(network, FULL, x0, jnp.asarray(3), key=KEY, variance=UNKNOWN)
    with pytest.raises(ValueError, match="batch_size=0"):
        dfn.stratified_timesteps(KEY, 1000, 0)
    with pytest.raises(ValueError, match="gamma=0 must be above 0"):
        dfn.min_snr_weight(FULL, 3, gamma=0)
    plain = dataclasses.replace(VELOCITY, min_snr=None)
    with pytest.raises(ValueError, match=r"the prediction has no min_snr, .* give it one"):
        dfn.min_snr_weight(FULL, 3, prediction=plain)
    with pytest.raises(ValueError, match="t=1000 is no index"):
        dfn.simple_loss(network, FULL, x0, jnp.asarray(3), key=KEY, t=1000)
