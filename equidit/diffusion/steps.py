"""Steps of samplers."""

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._base.common import upcast
from ..seams import Image, Index, Network, Number, PRNGKey, Scalar
from .gaussian import Variance, log_variance_of, posterior, predict_eps, q_sample, x0_and_eps
from .predictions import PredictionLike, split_output
from .schedules import Schedule, at, times


def _predicted(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    prediction: PredictionLike,
    clip: bool,
) -> tuple[Image, Image, Image | None]:
    """The clean example and the noise that the network implies, and its variance channels."""
    value, values = split_output(network(x, at(schedule.time, t), cond), x.shape[0])
    x0, eps = x0_and_eps(schedule, x, t, value, prediction)
    if clip:
        x0 = jnp.clip(x0, -1.0, 1.0)
        eps = predict_eps(schedule, x, t, x0)
    return x0, eps, values


@overload
def ddpm_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    variance: Variance = ...,
    prediction: PredictionLike = ...,
    clip: bool = ...,
    with_x0: Literal[False] = ...,
) -> Image: ...


@overload
def ddpm_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    variance: Variance = ...,
    prediction: PredictionLike = ...,
    clip: bool = ...,
    with_x0: Literal[True],
) -> tuple[Image, Image]: ...


@overload
def ddpm_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    variance: Variance = ...,
    prediction: PredictionLike = ...,
    clip: bool = ...,
    with_x0: bool,
) -> Image | tuple[Image, Image]: ...


def ddpm_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    variance: Variance = "learned",
    prediction: PredictionLike = "eps",
    clip: bool = False,
    with_x0: bool = False,
) -> Image | tuple[Image, Image]:
    """One ancestral step from `t` to `t - 1` (DDPM, algorithm 2).

    **Arguments:**

    - `network`, `schedule`: what predicts; what `t` indexes.
    - `x`, `t`: the noisy example and its step. The step at 0 adds no noise.
    - `cond`: passed to the network.
    - `key`: of this example and this step.
    - `variance`: `"learned"` interpolates between the two bounds by the network's second half;
        `"small"` is the posterior's, `"large"` is beta.
    - `prediction`: what the network predicts: `"eps"` the noise, `"x0"` the clean example, `"v"`
        the velocity of [`equidit.diffusion.predict_v`][], or a [`equidit.diffusion.Prediction`][]
        of your own.
    - `clip`: whether the implied clean example is clipped to [-1, 1].
    - `with_x0`: whether to return the implied clean example too.

    **Returns:**

    The example at the step before, or with `with_x0` the pair of it and the clean example.

    **Raises:**

    `ValueError` for an unknown variance or prediction, and for `variance="learned"` of a network
    without variance channels.

    ??? cite

        Algorithm 2 of [Ho et al. 2020](https://arxiv.org/abs/2006.11239); the learned variance is
        equation 15 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    x0, _, values = _predicted(network, schedule, x, t, cond, prediction, clip)
    mean, _ = posterior(schedule, x0, x, t)
    deviation = jnp.exp(log_variance_of(schedule, t, values, variance) / 2).astype(mean.dtype)
    noise = jax.random.normal(key, x.shape, mean.dtype)
    out = jnp.where(jnp.asarray(t) == 0, mean, mean + deviation * noise).astype(x.dtype)
    return (out, x0.astype(x.dtype)) if with_x0 else out


@overload
def ddim_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    eta: Scalar = ...,
    prediction: PredictionLike = ...,
    clip: bool = ...,
    with_x0: Literal[False] = ...,
) -> Image: ...


@overload
def ddim_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    eta: Scalar = ...,
    prediction: PredictionLike = ...,
    clip: bool = ...,
    with_x0: Literal[True],
) -> tuple[Image, Image]: ...


@overload
def ddim_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    eta: Scalar = ...,
    prediction: PredictionLike = ...,
    clip: bool = ...,
    with_x0: bool,
) -> Image | tuple[Image, Image]: ...


def ddim_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    eta: Scalar = 0.0,
    prediction: PredictionLike = "eps",
    clip: bool = False,
    with_x0: bool = False,
) -> Image | tuple[Image, Image]:
    """One DDIM step from `t` to `t - 1` (DDIM, equations 12 and 16).

    **Arguments:**

    - `network`, `schedule`, `x`, `t`, `cond`, `prediction`, `clip`, `with_x0`: as for
        [`equidit.diffusion.ddpm_step`][].
    - `key`: of this example and this step; not read at a plain `eta=0`, which draws no noise.
    - `eta`: 0 is deterministic, 1 has the posterior's variance at every step. Outside [0, 1] a
        `ValueError`.

    **Returns:**

    The example at the step before, or with `with_x0` the pair of it and the clean example.

    ??? cite

        Equations 12 and 16 of [Song et al. 2021](https://arxiv.org/abs/2010.02502).
    """
    if isinstance(eta, Number) and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]: 0 is deterministic, 1 is DDPM's noise")
    x0, eps, _ = _predicted(network, schedule, x, t, cond, prediction, clip)
    remaining = at(schedule.one_minus_alphas_cumprod_prev, t)
    deviation = None
    if not (isinstance(eta, Number) and eta == 0):
        deviation = eta * jnp.sqrt(at(schedule.posterior_variance, t))
        remaining -= jnp.square(deviation)
    # Not sqrt(max(remaining, 0)), whose gradient at 0 is NaN.
    positive = remaining > 0
    direction = jnp.where(positive, jnp.sqrt(jnp.where(positive, remaining, 1.0)), 0.0)
    mean = times(schedule.sqrt_alphas_cumprod_prev, t, x0) + direction.astype(eps.dtype) * eps
    if deviation is not None:
        mean += deviation.astype(mean.dtype) * jax.random.normal(key, x.shape, mean.dtype)
    out = mean.astype(x.dtype)
    return (out, x0.astype(x.dtype)) if with_x0 else out


def ddim_inversion_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey | None = None,
    prediction: PredictionLike = "eps",
) -> Image:
    """One step of DDIM backwards, from `t - 1` to `t`: from an example to the noise that gives it.

    The network is asked at `t` for the noise in `x`, as if `x` did not change over the step, so
    the error falls as 1 / steps. Drive it with `sample(..., ascending=True)`, from a clean example;
    [`equidit.diffusion.ddim_step`][] leads back.

    **Arguments:** as for [`equidit.diffusion.ddim_step`][]. `key` is not read.

    **Returns:**

    The example at step `t`.

    ??? cite

        Section 4.3 of [Song et al. 2021](https://arxiv.org/abs/2010.02502).
    """
    value, _ = split_output(network(x, at(schedule.time, t), cond), x.shape[0])
    _, eps = x0_and_eps(schedule, x, t, value, prediction)
    signal = at(schedule.sqrt_alphas_cumprod_prev, t).astype(eps.dtype)
    noise = jnp.sqrt(at(schedule.one_minus_alphas_cumprod_prev, t)).astype(eps.dtype)
    x0 = (upcast(x) - noise * eps) / signal
    return q_sample(schedule, x0, t, eps).astype(x.dtype)
