"""What a network is trained on."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, PyTree

from .._base.common import upcast
from ..seams import Image, Index, Network, Number, PRNGKey
from .gaussian import Variance, q_sample
from .predictions import PredictionLike, prediction_of, split_output
from .schedules import Schedule, at
from .terms import Likelihood, hybrid_terms, squared_error, vb_term

Weight = Callable[[Schedule, Index], Float[Array, ""]]
"""A factor of the squared error at a step, called as `weight(schedule, t)`."""


def noise_and_evaluate(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    key: PRNGKey,
    t: Index | None,
    noise: Image | None,
) -> tuple[Array, Image, Index, Image]:
    """The network's output, the noisy example it was asked about, its step and its noise; the last
    two are drawn if not given."""
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
    prediction: PredictionLike = "eps",
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
        the velocity of [`equidit.diffusion.predict_v`][], or a [`equidit.diffusion.Prediction`][]
        of your own.
    - `weight`: called as `weight(schedule, t)`, a factor of the squared error, e.g.
        `partial(min_snr_weight, prediction="v")`.

    **Returns:**

    The loss of this example, in at least float32.

    **Raises:**

    `ValueError` for an output of other channels than the input's or twice those, and for an unknown
    prediction.
    """
    output, _, t, noise = noise_and_evaluate(network, schedule, x0, cond, key, t, noise)
    mse = squared_error(schedule, split_output(output, x0.shape[0])[0], x0, t, noise, prediction)
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
    prediction: PredictionLike = "eps",
    weight: Weight | None = None,
    likelihood: Likelihood = "pixels",
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
    output, xt, t, noise = noise_and_evaluate(network, schedule, x0, cond, key, t, noise)
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
    prediction: PredictionLike = "eps",
    weight: Weight | None = None,
    likelihood: Likelihood = "pixels",
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
    variance: Variance = "learned",
    prediction: PredictionLike = "eps",
    likelihood: Likelihood = "pixels",
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
    output, xt, t, _ = noise_and_evaluate(network, schedule, x0, cond, key, t, noise)
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
    schedule: Schedule, t: Index, gamma: Number = 5.0, prediction: PredictionLike = "eps"
) -> Float[Array, ""]:
    """A weight of the squared error that bounds what the least noisy steps count.

    Of the error in x0 it is `min(snr, gamma)`, for every `prediction`: so of the error in eps
    `min(snr, gamma) / snr`, and of the error in v `min(snr, gamma) / (snr + 1)`.

    **Arguments:**

    - `schedule`, `t`: the tables and the step.
    - `gamma`: the bound, a signal-to-noise ratio above 0, else `ValueError`; 5 is the paper's.
    - `prediction`: what the network predicts: `"eps"`, `"x0"`, `"v"` or a
        [`equidit.diffusion.Prediction`][] with a `min_snr`, else `ValueError`.

    **Returns:**

    The factor of the squared error, for the `weight` of a loss.

    ??? cite

        Section 3.4 of [Hang et al. 2023](https://arxiv.org/abs/2303.09556).
    """
    weight = prediction_of(prediction).min_snr
    if weight is None:
        raise ValueError("the prediction has no min_snr, which this weight is made of: give it one")
    if gamma <= 0:
        raise ValueError(f"gamma={gamma} must be above 0")
    return weight(at(schedule.snr, t), gamma)
