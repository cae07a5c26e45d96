"""Where the ideal network is known in closed form, so is what every sampler and loss must give."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from equidit import diffusion as dfn

pytestmark = pytest.mark.usefixtures("optimised")
BETAS = dfn.linear_betas()
FULL = dfn.Schedule(BETAS)
COUNT = 20_000
# Deviations are counted in standard errors of the samples.
LIMIT = 4.0

# Far from 0, so that its mean shows a wrong noise level; correlated, on scales from 0.5 to 2.
_ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
GAUSSIAN_MEAN = np.array([20.0, -15.0, 10.0])
GAUSSIAN_COV = (_ROTATION * np.array([0.5, 1.0, 2.0]) ** 2) @ _ROTATION.T

POINTS = 3 * GAUSSIAN_MEAN + np.array([[3.0, 0.0, 0.0], [-1.0, 4.0, 0.0], [0.0, -2.0, 5.0]])
WEIGHTS = np.array([0.5, 0.3, 0.2])

SAMPLERS = {
    "ddpm-small": partial(dfn.ddpm_step, variance="small"),
    "ddpm-large": partial(dfn.ddpm_step, variance="large"),
    "ddpm-learned": partial(dfn.ddpm_step, variance="learned"),
    "ddim": dfn.ddim_step,
    "ddim-eta": partial(dfn.ddim_step, eta=1.0),
    "ddim-half": partial(dfn.ddim_step, eta=0.5),
}
every_sampler = pytest.mark.parametrize("step", SAMPLERS.values(), ids=SAMPLERS)
# A network that is told a wrong time is seen by any of the samplers: one of them is quick.
every_sampler_and_shift = pytest.mark.parametrize(
    ("step", "shift"),
    [
        pytest.param(
            step,
            shift,
            id=f"{name}-{shift}",
            marks=() if shift == 0 or name == "ddpm-small" else pytest.mark.slow,
        )
        for name, step in SAMPLERS.items()
        for shift in (0, 1, -1)
    ],
)


def _output(eps):
    # The second half asks for the upper bound, the best variance for data of variance 1.
    return jnp.concatenate([eps, jnp.ones_like(eps)]).astype(jnp.float32).reshape(6, 1)


def gaussian_network(shift=0):
    """The ideal denoiser of the Gaussian; `shift` tells it a wrong time."""
    values, vectors = np.linalg.eigh(GAUSSIAN_COV)
    values, vectors, mean = (jnp.asarray(a, jnp.float32) for a in (values, vectors, GAUSSIAN_MEAN))

    def network(x, t, cond):
        index = jnp.clip(t.astype(jnp.int32) + shift, 0, 999)
        signal, noise = FULL.alphas_cumprod[index], FULL.sqrt_one_minus_alphas_cumprod[index]
        centred = vectors.T @ (x.reshape(3) - FULL.sqrt_alphas_cumprod[index] * mean)
        return _output(vectors @ (noise / (signal * values + noise**2) * centred))

    return network


def points_network(shift=0):
    """The ideal denoiser of a finite data set: a softmax over its points."""
    points, weights = jnp.asarray(POINTS, jnp.float32), jnp.asarray(WEIGHTS, jnp.float32)

    def network(x, t, cond):
        index = jnp.clip(t.astype(jnp.int32) + shift, 0, 999)
        noise = FULL.sqrt_one_minus_alphas_cumprod[index]
        offsets = x.reshape(1, 3) - FULL.sqrt_alphas_cumprod[index] * points
        logits = jnp.log(weights) - 0.5 * jnp.square(offsets / noise).sum(axis=1)
        return _output(jax.nn.softmax(logits) @ offsets / noise)

    return network


def draw(step, network, data, schedule=FULL):
    """Samples from `step`, begun at the noised data themselves, whose mean is not quite 0.

    They are the columns of one picture: every step, as the network, takes each by itself.
    """
    columns = jax.vmap(network, (1, None, None), 1)

    @jax.jit
    def run(start, key):
        noise_key, step_key = jax.random.split(key)
        deviation = schedule.sqrt_one_minus_alphas_cumprod[-1]
        x = schedule.sqrt_alphas_cumprod[-1] * start
        x = x + deviation * jax.random.normal(noise_key, x.shape)
        return dfn.sample(partial(step, columns, schedule), schedule, x, None, key=step_key)

    start = jnp.asarray(data.T[..., None], jnp.float32)
    return np.asarray(run(start, jax.random.key(1)), np.float64)[..., 0].T


def count(shift):
    """More of what must be seen to be wrong."""
    return COUNT if shift == 0 else 30_000


def deviations(samples, mean, cov, fourth=None):
    """Of sample mean and covariance, in standard errors."""
    if fourth is None:  # Gaussian
        fourth = np.outer(np.diag(cov), np.diag(cov)) + 2 * cov**2
    mean_error = np.abs(samples.mean(0) - mean) / np.sqrt(np.diag(cov) / len(samples))
    cov_error = np.abs(np.cov(samples, rowvar=False) - cov) / np.sqrt(
        (fourth - cov**2) / len(samples)
    )
    return float(mean_error.max()), float(cov_error.max())


@every_sampler_and_shift
def test_gaussian(step, shift):
    data = np.random.default_rng(0).multivariate_normal(GAUSSIAN_MEAN, GAUSSIAN_COV, count(shift))
    samples = draw(step, gaussian_network(shift), data)
    errors = deviations(samples, GAUSSIAN_MEAN, GAUSSIAN_COV)
    assert (max(errors) < LIMIT) == (shift == 0), errors


@every_sampler_and_shift
def test_finite_data(step, shift):
    data = POINTS[np.random.default_rng(0).choice(3, count(shift), p=WEIGHTS)]
    samples = draw(step, points_network(shift), data)
    mean = WEIGHTS @ POINTS
    centred = POINTS - mean
    cov = (centred.T * WEIGHTS) @ centred
    fourth = np.einsum("k,ki,kj->ij", WEIGHTS, centred**2, centred**2)
    errors = deviations(samples, mean, cov, fourth)
    off_support = np.linalg.norm(samples[:, None] - POINTS[None], axis=-1).min(1).max()
    right = max(errors) < LIMIT and off_support < 1e-3
    assert right == (shift == 0), (errors, off_support)


@every_sampler
def test_respaced(step):
    """50 of 1000 steps: still the support and, of a mixture's shares, the right ones."""
    schedule = dfn.Schedule(BETAS, dfn.space_timesteps(1000, 50))
    data = POINTS[np.random.default_rng(0).choice(3, COUNT, p=WEIGHTS)]
    distances = np.linalg.norm(
        draw(step, points_network(), data, schedule)[:, None] - POINTS, axis=-1
    )
    assert distances.min(1).max() < 1e-3
    shares = np.bincount(distances.argmin(1), minlength=3) / COUNT
    assert np.abs(shares - WEIGHTS).max() < LIMIT * np.sqrt(0.25 / COUNT) + 0.01


TIMES = [0, 1, 2, 10, 100, 500, 999]


@functools.cache
def _expected_terms():
    """At each time the mean MSE and bound of exact posteriors over N(0, 1) data, by Gauss-Hermite
    quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    x0, noise = (jnp.asarray(a.ravel(), jnp.float32) for a in np.meshgrid(nodes, nodes))

    def one(t, x0, noise):
        x0, noise = x0.reshape(1, 1, 1), noise.reshape(1, 1, 1)
        xt = dfn.q_sample(FULL, x0, t, noise)
        # For N(0, 1) data x_t is N(0, 1), and x_{t-1} given x_t has variance beta.
        eps = FULL.sqrt_one_minus_alphas_cumprod[t] * xt
        return dfn.hybrid_terms(FULL, jnp.concatenate([eps, jnp.ones_like(eps)]), x0, xt, t, noise)

    over_both = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None))
    mse, bits = jax.jit(over_both)(jnp.asarray(TIMES), x0, noise)
    pair = np.outer(weights, weights).ravel()
    means = (np.asarray(term, np.float64) @ pair for term in (mse, bits))
    return dict(zip(TIMES, zip(*means, strict=True), strict=True))


@pytest.mark.parametrize("t", TIMES[1:])
def test_terms_of_the_exact_posterior(t):
    signal = np.cumprod(1 - BETAS)
    beta, prev = BETAS[t], signal[t - 1]
    variance = beta * (1 - prev) / (1 - signal[t])
    mse, bits = _expected_terms()[t]
    assert mse == pytest.approx(signal[t], abs=1e-4)
    # KL(N(m1, v) || N(m2, beta)): E (m1 - m2)^2 is coef1^2 var(x0 | xt), which is 1 - signal.
    spread = (beta * np.sqrt(prev) / (1 - signal[t])) ** 2 * (1 - signal[t])
    kl = 0.5 * (np.log(beta / variance) + (variance + spread) / beta - 1)
    assert bits == pytest.approx(kl / np.log(2), abs=1e-4)


def test_first_term_of_the_exact_posterior():
    mse, bits = _expected_terms()[0]
    assert mse == pytest.approx(1 - BETAS[0], abs=1e-4)
    # The bins' mass under the decoder N(x0_hat, variance), in float64 throughout.
    signal, scale = 1 - BETAS[0], np.sqrt(BETAS[0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x0, noise = np.meshgrid(nodes, nodes)
    mean = np.sqrt(signal) * (np.sqrt(signal) * x0 + np.sqrt(1 - signal) * noise)

    def nll(cdf):
        below, above = (cdf((x0 - mean + side / 255) / scale) for side in (-1, 1))
        mass = np.where(x0 < -0.999, above, np.where(x0 > 0.999, 1 - below, above - below))
        return -np.log2(np.maximum(mass, 1e-12)).ravel() @ np.outer(weights, weights).ravel()

    total = weights.sum() ** 2
    # ADM takes a tanh approximation of the normal's distribution function.
    adm = nll(lambda z: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))) / total
    assert bits == pytest.approx(adm, abs=1e-4)
    assert bits == pytest.approx(nll(ndtr) / total, abs=1e-3)
