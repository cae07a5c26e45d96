"""What a network is trained on, and the bound on its likelihood."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._base.common import upcast
from .._base.texts import check_choice
from ..seams import Network, Number, PRNGKey
from .predictions import prediction_of, x0_and_eps
from .schedules import (
    Image,
    Index,
    Schedule,
    at,
    posterior,
    q_sample,
)

VARIANCES = ("learned", "small", "large")
LIKELIHOODS = ("pixels", "latents")
Weight = Callable[[Schedule, Index], Float[Array, ""]]
"""A factor of the squared error at a step, called as `weight(schedule, t)`."""


def split_output(
    output: Float[Array, "out height width"], channels: int
) -> tuple[Image, Image | None]:
    """A network's output taken apart: what it predicts, and its variance channels.

    A loss of your own wants this: of one-channel images, `(2, height, width)` and
    `(1, height, width)` broadcast, so that the squared error of an output with a learned variance
    is a number too, of the noise and the variance alike.

    **Arguments:**

    - `output`: the network's, of one example.
    - `channels`: of the network's input, e.g. `x.shape[0]`.

    **Returns:**

    The first `channels` channels, and the other half or, of a network with `learn_sigma=False`,
    `None`; in at least float32.

    **Raises:**

    `ValueError` for an output that has neither `channels` channels nor twice as many.
    """
    output = upcast(output)
    if output.shape[0] == channels:
        return output, None
    if output.shape[0] == 2 * channels:
        return output[:channels], output[channels:]
    raise ValueError(
        f"the network's output has shape {output.shape}: for an input of {channels} channels it "
        f"should have {channels} channels, or {2 * channels} with a learned variance"
    )


def log_variance_of(schedule: Schedule, t: Index, values: Image | None, variance: str) -> Array:
    check_choice("variance", variance, VARIANCES)
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


def vb_term(
    schedule: Schedule,
    output: Float[Array, "out height width"],
    x0: Image,
    xt: Image,
    t: Index,
    *,
    variance: str = "learned",
    prediction: str = "eps",
    likelihood: str = "pixels",
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
    check_choice("likelihood", likelihood, LIKELIHOODS)
    value, values = split_output(output, x0.shape[0])
    log_variance = log_variance_of(schedule, t, values, variance)
    x0_hat, _ = x0_and_eps(schedule, xt, t, value, prediction)
    mean, _ = posterior(schedule, jnp.clip(x0_hat, -1, 1) if clip else x0_hat, xt, t)
    true_mean, true_log_variance = posterior(schedule, x0, xt, t)
    kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
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
    prediction: str = "eps",
    likelihood: str = "pixels",
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
    return _mse(schedule, value, x0, t, noise, prediction), vb


def _mse(
    schedule: Schedule, value: Image, x0: Image, t: Index, noise: Image, prediction: str
) -> Float[Array, ""]:
    target = prediction_of(prediction).target(schedule, x0, t, noise)
    return jnp.square(value - upcast(target)).mean()


def _gaussian_kl(mean_p: Array, log_var_p: Array, mean_q: Array, log_var_q: Array) -> Array:
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


def _corrupt(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    key: PRNGKey,
    t: Index | None,
    noise: Image | None,
) -> tuple[Array, Image, Index, Image]:
    t_key, noise_key = jax.random.split(key)
    if t is None:
        t = jax.random.randint(t_key, (), 0, schedule.steps)
    x0 = upcast(x0)
    if noise is None:
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    xt = q_sample(schedule, x0, t, noise)
    return network(xt, at(schedule.time, t), cond), xt, t, noise


def simple_loss(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    *,
    key: PRNGKey,
    t: Index | None = None,
    noise: Image | None = None,
    prediction: str = "eps",
    weight: Weight | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the prediction at one step (DDPM, equation 14).

    Variance channels, if the network has them, are ignored.

    **Arguments:**

    - `network`, `schedule`: what is trained, and the steps.
    - `x0`, `cond`: one clean example and its conditioning.
    - `key`: of this example and this training step.
    - `t`: the step, drawn uniformly if `None`; e.g. from
        [`equidit.diffusion.stratified_timesteps`][].
    - `noise`: drawn from `key` if `None`.
    - `prediction`: what the network predicts: `"eps"` the noise, `"x0"` the clean example, `"v"`
        the velocity of [`equidit.diffusion.predict_v`][].
    - `weight`: called as `weight(schedule, t)`, a factor of the squared error, e.g.
        `partial(min_snr_weight, prediction="v")`.

    **Returns:**

    The loss of this example, in at least float32.

    **Raises:**

    `ValueError` for an output of other channels than the input's or twice those, and for an unknown
    prediction.
    """
    output, _, t, noise = _corrupt(network, schedule, x0, cond, key, t, noise)
    mse = _mse(schedule, split_output(output, x0.shape[0])[0], x0, t, noise, prediction)
    return mse if weight is None else weight(schedule, t) * mse


def hybrid_loss(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    *,
    key: PRNGKey,
    t: Index | None = None,
    noise: Image | None = None,
    prediction: str = "eps",
    weight: Weight | None = None,
    likelihood: str = "pixels",
    vb_weight: Number = 1.0,
) -> Float[Array, ""]:
    """The paper's training loss: the sum of [`equidit.diffusion.hybrid_terms`][] at one step.

    **Arguments:** those of [`equidit.diffusion.simple_loss`][], and

    - `likelihood`: see [`equidit.diffusion.vb_term`][].
    - `vb_weight`: of the bound's term. DiT's is 1.

    **Returns:**

    The loss of this example, in at least float32.

    ??? cite

        Section 3.1 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """
    output, xt, t, noise = _corrupt(network, schedule, x0, cond, key, t, noise)
    mse, vb = hybrid_terms(
        schedule, output, x0, xt, t, noise, prediction=prediction, likelihood=likelihood
    )
    return (mse if weight is None else weight(schedule, t) * mse) + vb_weight * vb


def rescaled_hybrid_loss(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    *,
    key: PRNGKey,
    t: Index | None = None,
    noise: Image | None = None,
    prediction: str = "eps",
    weight: Weight | None = None,
    likelihood: str = "pixels",
) -> Float[Array, ""]:
    """[`equidit.diffusion.hybrid_loss`][] with the bound weighted by steps/1000: 0.001 times the
    whole bound, however long the schedule. At 1000 steps the two losses are the same.

    **Arguments:** those of [`equidit.diffusion.hybrid_loss`][] but `vb_weight`.

    **Returns:**

    The loss of this example, in at least float32.

    ??? cite

        Equation 16 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    return hybrid_loss(
        network,
        schedule,
        x0,
        cond,
        key=key,
        t=t,
        noise=noise,
        prediction=prediction,
        weight=weight,
        likelihood=likelihood,
        vb_weight=schedule.steps / 1000,
    )


def vlb_loss(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    *,
    key: PRNGKey,
    t: Index | None = None,
    noise: Image | None = None,
    variance: str = "learned",
    prediction: str = "eps",
    likelihood: str = "pixels",
) -> Float[Array, ""]:
    """The variational bound itself, less its constant prior term: steps times one step's term.

    Its mean over uniform steps is the bound in bits per dimension. Mean and variance both learn
    from it. Noisy: see [`equidit.diffusion.LossSecondMoment`][].

    **Arguments:** those of [`equidit.diffusion.simple_loss`][] but `weight`, and `variance` and
    `likelihood` as for [`equidit.diffusion.vb_term`][].

    **Returns:**

    An estimate of this example's bound, in bits per dimension.

    ??? cite

        Equation 4 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    output, xt, t, _ = _corrupt(network, schedule, x0, cond, key, t, noise)
    return schedule.steps * vb_term(
        schedule,
        output,
        x0,
        xt,
        t,
        variance=variance,
        prediction=prediction,
        likelihood=likelihood,
    )


def min_snr_weight(
    schedule: Schedule, t: Index, gamma: Number = 5.0, prediction: str = "eps"
) -> Float[Array, ""]:
    """A weight of the squared error that bounds what the least noisy steps count.

    Of the error in x0 it is `min(snr, gamma)`, for every `prediction`: so of the error in eps
    `min(snr, gamma) / snr`, and of the error in v `min(snr, gamma) / (snr + 1)`.

    **Arguments:**

    - `schedule`, `t`: the tables and the step.
    - `gamma`: the bound, a signal-to-noise ratio above 0, else `ValueError`; 5 is the paper's.
    - `prediction`: what the network predicts: `"eps"`, `"x0"` or `"v"`.

    **Returns:**

    The factor of the squared error, for the `weight` of a loss.

    ??? cite

        Section 3.4 of [Hang et al. 2023](https://arxiv.org/abs/2303.09556).
    """
    weight = prediction_of(prediction).min_snr
    if gamma <= 0:
        raise ValueError(f"gamma={gamma} must be above 0")
    return weight(at(schedule.snr, t), gamma)


class BitsPerDim(eqx.Module):
    """Bits per dimension of one example, by [`equidit.diffusion.bits_per_dim`][].

    **Fields:** `total`, which is `prior` + the sum of `terms`; `terms`, the bound's, one a step;
    and `mse`, the squared error of the prediction at each step.
    """

    total: Float[Array, ""]
    prior: Float[Array, ""]
    terms: Float[Array, " steps"]
    mse: Float[Array, " steps"]


def bits_per_dim(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    *,
    key: PRNGKey,
    variance: str = "learned",
    prediction: str = "eps",
    likelihood: str = "pixels",
    clip: bool = False,
) -> BitsPerDim:
    """The whole variational bound on the negative log-likelihood of one example, by one draw of
    noise a step. Costs one evaluation of the network a step.

    **Arguments:**

    - `network`, `schedule`, `x0`, `cond`: as for [`equidit.diffusion.simple_loss`][].
    - `key`: of this example.
    - `variance`, `prediction`, `likelihood`, `clip`: as for [`equidit.diffusion.vb_term`][].

    **Returns:**

    The bound, its terms, and the squared error at every step.

    ??? cite

        Equation 4 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """

    def step(carry: None, t: Array) -> tuple[None, tuple[Array, Array]]:
        output, xt, _, noise = _corrupt(
            network, schedule, x0, cond, jax.random.fold_in(key, t), t, None
        )
        term = vb_term(
            schedule,
            output,
            x0,
            xt,
            t,
            variance=variance,
            prediction=prediction,
            likelihood=likelihood,
            clip=clip,
        )
        mse = _mse(schedule, split_output(output, x0.shape[0])[0], x0, t, noise, prediction)
        return carry, (term, mse)

    terms, mse = jax.lax.scan(step, None, jnp.arange(schedule.steps))[1]
    last = schedule.steps - 1
    mean = at(schedule.sqrt_alphas_cumprod, last) * upcast(x0)
    log_variance = 2 * jnp.log(at(schedule.sqrt_one_minus_alphas_cumprod, last))
    prior = _gaussian_kl(mean, log_variance, jnp.zeros_like(mean), jnp.zeros_like(log_variance))
    prior = prior.mean() / math.log(2)
    return BitsPerDim(prior + terms.sum(), prior, terms, mse)
