"""What a network can be asked to predict, and what its output holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._base.common import upcast
from ..seams import Number
from .schedules import Image

_Scalar = Float[Array, ""]


@dataclass(frozen=True)
class Prediction:
    """What a network predicts of a noisy example `xt = signal * x0 + noise * eps`, and all that
    follows from the choice.

    `signal` and `noise` are numbers, the rest are examples, all in at least float32. A prediction
    of your own goes wherever `"eps"`, `"x0"` and `"v"` do:

    ```python
    velocity = Prediction(
        x0_and_eps=lambda xt, value, signal, noise: (
            (xt - noise * value) / (signal + noise),
            (xt + signal * value) / (signal + noise),
        ),
        target=lambda x0, eps, signal, noise: eps - x0,
    )
    loss = simple_loss(network, schedule, x0, cond, key=key, prediction=velocity)
    ```

    **Fields:**

    - `x0_and_eps`: called as `x0_and_eps(xt, value, signal, noise)`: the clean example and the
        noise that a predicted `value` implies.
    - `target`: called as `target(x0, eps, signal, noise)`: what should have been predicted.
    - `min_snr`: called as `min_snr(snr, gamma)` by [`equidit.diffusion.min_snr_weight`][]: the
        factor of the squared error of the prediction that is `min(snr, gamma)` of the error in x0.
        `None` where that weight is not used.
    """

    x0_and_eps: Callable[[Image, Image, _Scalar, _Scalar], tuple[Image, Image]]
    target: Callable[[Image, Image, _Scalar, _Scalar], Image]
    min_snr: Callable[[_Scalar, Number], _Scalar] | None = None


PredictionName = Literal["eps", "x0", "v"]
"""What a network predicts: `"eps"` the noise, `"x0"` the clean example, `"v"` the velocity of
[`equidit.diffusion.predict_v`][]."""
PredictionLike = Prediction | PredictionName
"""A prediction, or the name of one of the library's."""

PREDICTIONS: dict[PredictionName, Prediction] = {
    "eps": Prediction(
        x0_and_eps=lambda xt, eps, signal, noise: ((xt - noise * eps) / signal, eps),
        target=lambda x0, eps, signal, noise: eps,
        min_snr=lambda snr, gamma: jnp.minimum(1.0, gamma / snr),
    ),
    "x0": Prediction(
        x0_and_eps=lambda xt, x0, signal, noise: (x0, (xt - signal * x0) / noise),
        target=lambda x0, eps, signal, noise: x0,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma),
    ),
    "v": Prediction(
        x0_and_eps=lambda xt, v, signal, noise: (signal * xt - noise * v, noise * xt + signal * v),
        target=lambda x0, eps, signal, noise: signal * eps - noise * x0,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma) / (snr + 1),
    ),
}


def prediction_of(prediction: PredictionLike) -> Prediction:
    """The prediction that was meant; `ValueError` for an unknown name."""
    return prediction if isinstance(prediction, Prediction) else PREDICTIONS[prediction]


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
