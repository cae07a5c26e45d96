"""The terms of the objectives at one step, of a network's output."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._base.common import upcast
from ..seams import Image, Index
from .gaussian import Variance, log_variance_of, posterior, target_of, x0_and_eps
from .predictions import PredictionLike, split_output
from .schedules import Schedule

Likelihood = Literal["pixels", "latents"]
"""What the bound takes `x0` for at `t = 0`: see [`equidit.diffusion.vb_term`][]."""


def squared_error(
    schedule: Schedule, value: Image, x0: Image, t: Index, noise: Image, prediction: PredictionLike
) -> Float[Array, ""]:
    """Mean squared error of a predicted `value`."""
    return jnp.square(value - target_of(schedule, x0, t, noise, prediction)).mean()


def vb_term(
    schedule: Schedule,
    output: Float[Array, "out height width"],
    x0: Image,
    xt: Image,
    t: Index,
    *,
    variance: Variance = "learned",
    prediction: PredictionLike = "eps",
    likelihood: Likelihood = "pixels",
    clip: bool = False,
) -> Float[Array, ""]:
    """Step `t`'s term of the variational bound, in bits per dimension.

    For `t > 0` the Kullback-Leibler divergence of the network's step from the posterior, for
    `t = 0` the negative log-likelihood of `x0`.

    **Arguments:**

    - `schedule`: the tables.
    - `output`: the network's at `xt`: the prediction and, with a learned variance, its channels.
    - `x0`, `xt`, `t`: as in [`equidit.diffusion.q_sample`][].
    - `variance`, `prediction`, `clip`: as in [`equidit.diffusion.ddpm_step`][].
    - `likelihood`: `"pixels"`, the paper's, takes `x0` for one of 256 values from -1 to 1, with
        the outer two bins open. `"latents"` takes it for any real number, as latents are: the
        term is then a density's, and may be negative.

    **Returns:**

    The mean over all entries of the example, in bits.

    ??? cite

        Equations 4 to 7 and section 3.1 of
        [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    value, values = split_output(output, x0.shape[0])
    log_variance = log_variance_of(schedule, t, values, variance)
    x0_hat, _ = x0_and_eps(schedule, xt, t, value, prediction)
    mean, _ = posterior(schedule, jnp.clip(x0_hat, -1, 1) if clip else x0_hat, xt, t)
    true_mean, true_log_variance = posterior(schedule, x0, xt, t)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    if likelihood == "pixels":
        nll = -_discretized_log_likelihood(upcast(x0), mean, log_variance / 2)
    else:
        square = jnp.square(upcast(x0) - mean) * jnp.exp(-log_variance)
        nll = 0.5 * (square + log_variance + math.log(2 * math.pi))
    return jnp.where(jnp.asarray(t) == 0, nll, kl).mean() / math.log(2)


def hybrid_terms(
    schedule: Schedule,
    output: Float[Array, "out height width"],
    x0: Image,
    xt: Image,
    t: Index,
    noise: Image,
    *,
    prediction: PredictionLike = "eps",
    likelihood: Likelihood = "pixels",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two terms of the learned-variance objective.

    **Arguments:**

    - `schedule`: the tables.
    - `output`: the network's output at `xt`: prediction channels, then variance channels.
    - `x0`, `xt`, `t`, `noise`: as in [`equidit.diffusion.q_sample`][].
    - `prediction`, `likelihood`: as in [`equidit.diffusion.vb_term`][].

    **Returns:**

    `(mse, vb)`: the mean squared error of the prediction, and
    [`equidit.diffusion.vb_term`][] in bits. The bound teaches the variance only: no gradient
    reaches the prediction's channels through it.

    ??? cite

        Sections 3.1 and 3.3 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    value, values = split_output(output, x0.shape[0])
    if values is not None:
        output = jnp.concatenate([jax.lax.stop_gradient(value), values])
    vb = vb_term(schedule, output, x0, xt, t, prediction=prediction, likelihood=likelihood)
    return squared_error(schedule, value, x0, t, noise, prediction), vb


def gaussian_kl(mean_p: Array, log_var_p: Array, mean_q: Array, log_var_q: Array) -> Array:
    """KL(p || q) of two diagonal Gaussians, element by element, in nats."""
    difference = log_var_p - log_var_q
    distance = jnp.square(mean_p - mean_q) * jnp.exp(-log_var_q)
    return 0.5 * (jnp.exp(difference) - 1 - difference + distance)


def _discretized_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """Log-probability of `x` in bins of width 2/255 over [-1, 1], the outer two open."""

    def cdf(z: Array) -> Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale = jnp.exp(-log_scale)
    below = cdf((x - mean - 1 / 255) * inverse_scale)
    above = cdf((x - mean + 1 / 255) * inverse_scale)
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))
