"""What a network can be asked to predict, and what follows from each."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._base.texts import check_choice
from ..seams import Number
from .schedules import Image, Index, Schedule, predict_eps, predict_v, predict_x0, times


@dataclass(frozen=True)
class Prediction:
    """What a network predicts: all that depends on the choice.

    **Fields:**

    - `x0_and_eps`: called as `x0_and_eps(schedule, xt, t, value)`: the clean example and the noise
        that a predicted `value` implies.
    - `target`: called as `target(schedule, x0, t, eps)`: what the network should have predicted.
    - `min_snr`: called as `min_snr(snr, gamma)`: the factor of the squared error that is
        `min(snr, gamma)` of the error in x0.
    """

    x0_and_eps: Callable[[Schedule, Image, Index, Image], tuple[Image, Image]]
    target: Callable[[Schedule, Image, Index, Image], Image]
    min_snr: Callable[[Float[Array, ""], Number], Float[Array, ""]]


def _from_v(schedule: Schedule, xt: Image, t: Index, v: Image) -> tuple[Image, Image]:
    signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    x0 = times(signal, t, xt) - times(noise, t, v)
    return x0, times(noise, t, xt) + times(signal, t, v)


PREDICTIONS = {
    "eps": Prediction(
        x0_and_eps=lambda schedule, xt, t, eps: (predict_x0(schedule, xt, t, eps), eps),
        target=lambda schedule, x0, t, eps: eps,
        min_snr=lambda snr, gamma: jnp.minimum(1.0, gamma / snr),
    ),
    "x0": Prediction(
        x0_and_eps=lambda schedule, xt, t, x0: (x0, predict_eps(schedule, xt, t, x0)),
        target=lambda schedule, x0, t, eps: x0,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma),
    ),
    "v": Prediction(
        x0_and_eps=_from_v,
        target=predict_v,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma) / (snr + 1),
    ),
}


def prediction_of(name: str) -> Prediction:
    """The prediction of a name; `ValueError` for an unknown one."""
    check_choice("prediction", name, PREDICTIONS)
    return PREDICTIONS[name]


def x0_and_eps(
    schedule: Schedule, xt: Image, t: Index, value: Image, prediction: str = "eps"
) -> tuple[Image, Image]:
    """The clean example and the noise that a network's prediction implies.

    **Arguments:**

    - `schedule`, `xt`, `t`: the tables, the noisy example and its step.
    - `value`: what was predicted.
    - `prediction`: what that is: `"eps"`, `"x0"` or `"v"`
        ([`equidit.diffusion.predict_v`][]); anything else is a `ValueError`.

    **Returns:**

    The pair `(x0, eps)`.
    """
    return prediction_of(prediction).x0_and_eps(schedule, xt, t, value)
