"""The closed forms of a Gaussian process over the tables of a schedule."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._base.common import upcast
from ..seams import Image, Index
from .predictions import NoiseLevel, PredictionLike, prediction_of
from .schedules import Schedule, at, times

Variance = Literal["learned", "small", "large"]
"""The variance of a step: `"learned"` is read from the network's second half, between the bounds
`"small"`, the posterior's, and `"large"`, beta."""


def noise_level(schedule: Schedule, t: Index, x: Image) -> NoiseLevel:
    """The level of step `t`, in the dtype of `x`."""
    tables = (
        schedule.sqrt_alphas_cumprod,
        schedule.sqrt_one_minus_alphas_cumprod,
        schedule.sqrt_recip_alphas_cumprod,
        schedule.sqrt_recipm1_alphas_cumprod,
    )
    return NoiseLevel(*(at(table, t).astype(x.dtype) for table in tables))


def q_sample(schedule: Schedule, x0: Image, t: Index, noise: Image) -> Image:
    """The forward process: `x0` with the noise of step `t` (DDPM, equation 4).

    **Arguments:**

    - `schedule`: the tables.
    - `x0`: one clean example.
    - `t`: the step, an index of the schedule; out of range an error or, traced, NaN.
    - `noise`: standard normal, in the shape of `x0`.

    **Returns:**

    The noisy example, computed and returned in at least float32, as by all of these functions.
    """
    signal = times(schedule.sqrt_alphas_cumprod, t, x0)
    return signal + times(schedule.sqrt_one_minus_alphas_cumprod, t, noise)


def posterior(schedule: Schedule, x0: Image, xt: Image, t: Index) -> tuple[Image, Float[Array, ""]]:
    """Mean and log-variance of q(x_{t-1} | x_t, x_0) (DDPM, equations 6 and 7).

    **Arguments:**

    - `schedule`, `x0`, `t`: as for [`equidit.diffusion.q_sample`][].
    - `xt`: the noisy example at step `t`.

    **Returns:**

    The mean, and one log-variance for all its entries; that at `t = 0`, minus infinity, is replaced
    by that of `t = 1`.
    """
    mean = times(schedule.posterior_mean_coef1, t, x0)
    mean = mean + times(schedule.posterior_mean_coef2, t, xt)
    return mean, at(schedule.posterior_log_variance_clipped, t).astype(mean.dtype)


def x0_and_eps(
    schedule: Schedule, xt: Image, t: Index, value: Image, prediction: PredictionLike = "eps"
) -> tuple[Image, Image]:
    """The clean example and the noise that a network's prediction implies.

    **Arguments:**

    - `schedule`, `xt`, `t`: as for [`equidit.diffusion.posterior`][].
    - `value`: what was predicted.
    - `prediction`: what that is: `"eps"`, `"x0"`, `"v"` ([`equidit.diffusion.predict_v`][]) or a
        [`equidit.diffusion.Prediction`][] of your own; any other string is a `ValueError`.

    **Returns:**

    The pair `(x0, eps)`.
    """
    xt = upcast(xt)
    return prediction_of(prediction).x0_and_eps(xt, upcast(value), noise_level(schedule, t, xt))


def target_of(
    schedule: Schedule, x0: Image, t: Index, eps: Image, prediction: PredictionLike
) -> Image:
    """What the network should predict at step `t`."""
    x0 = upcast(x0)
    return prediction_of(prediction).target(x0, upcast(eps), noise_level(schedule, t, x0))


def predict_x0(schedule: Schedule, xt: Image, t: Index, eps: Image) -> Image:
    """The clean example that `eps` implies: the inverse of [`equidit.diffusion.q_sample`][].

    **Arguments:**

    - `schedule`, `xt`, `t`: as for [`equidit.diffusion.posterior`][].
    - `eps`: the noise in `xt`.

    **Returns:**

    The clean example; infinite or NaN where the schedule leaves nothing of it (a last beta of 1).

    ??? cite

        Section 3.2 of [Ho et al. 2020](https://arxiv.org/abs/2006.11239).
    """
    return x0_and_eps(schedule, xt, t, eps, "eps")[0]


def predict_eps(schedule: Schedule, xt: Image, t: Index, x0: Image) -> Image:
    """The noise that `x0` implies: the inverse of [`equidit.diffusion.predict_x0`][].

    **Arguments:**

    - `schedule`, `xt`, `t`: as for [`equidit.diffusion.posterior`][].
    - `x0`: the clean example.

    **Returns:**

    The noise in `xt`.
    """
    return x0_and_eps(schedule, xt, t, x0, "x0")[1]


def predict_v(schedule: Schedule, x0: Image, t: Index, eps: Image) -> Image:
    """The velocity of a clean example and its noise: `sqrt(a) eps - sqrt(1 - a) x0`.

    **Arguments:**

    - `schedule`, `x0`, `t`: as for [`equidit.diffusion.q_sample`][]; `a` is `alphas_cumprod[t]`.
    - `eps`: the noise.

    **Returns:**

    What a network with `prediction="v"` predicts.

    ??? cite

        Appendix D of [Salimans & Ho 2022](https://arxiv.org/abs/2202.00512).
    """
    return target_of(schedule, x0, t, eps, "v")


def log_variance_of(
    schedule: Schedule, t: Index, values: Image | None, variance: Variance
) -> Array:
    """Log-variance of the network's step; `values` are its variance channels, if it has any."""
    if variance == "learned":
        if values is None:
            raise ValueError(
                "variance='learned' needs a network with twice the input's channels "
                "(learn_sigma=True): choose variance='small' or 'large' for this one"
            )
        fraction = (values + 1) / 2
        upper, lower = (
            at(table, t).astype(values.dtype)
            for table in (schedule.log_betas, schedule.posterior_log_variance_clipped)
        )
        return fraction * upper + (1 - fraction) * lower
    lower = at(schedule.posterior_log_variance_clipped, t)
    if variance == "small":
        return lower
    # At t = 0 beta is far below any useful decoder's variance: DDPM's code takes the posterior's.
    return jnp.where(jnp.asarray(t) == 0, lower, at(schedule.log_betas, t))
