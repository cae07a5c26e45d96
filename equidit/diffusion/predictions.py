"""What a network can be asked to predict, and what its output holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._base.common import upcast
from ..seams import Image, Number


class NoiseLevel(NamedTuple):
    """How much is left of an example: the noisy one is `signal * x0 + noise * eps`.

    **Fields:** the numbers `signal` and `noise`; `inverse`, which is `1 / signal`; and `ratio`,
    which is `noise / signal`. Of a [`equidit.diffusion.Schedule`][] each comes from a table.
    """

    signal: Float[Array, ""]
    noise: Float[Array, ""]
    inverse: Float[Array, ""]
    ratio: Float[Array, ""]


@dataclass(frozen=True)
class Prediction:
    """What a network predicts, and all that follows from the choice.

    A prediction of your own goes wherever `"eps"`, `"x0"` and `"v"` do:

    ```python
    velocity = Prediction(
        x0_and_eps=lambda xt, value, level: (
            (xt - level.noise * value) / (level.signal + level.noise),
            (xt + level.signal * value) / (level.signal + level.noise),
        ),
        target=lambda x0, eps, level: eps - x0,
    )
    loss = simple_loss(network, schedule, x0, cond, key=key, prediction=velocity)
    ```

    **Fields**, functions of examples in at least float32:

    - `x0_and_eps`: called as `x0_and_eps(xt, value, level)`: the clean example and the noise that a
        predicted `value` implies, at a [`equidit.diffusion.NoiseLevel`][].
    - `target`: called as `target(x0, eps, level)`: what should have been predicted.
    - `min_snr`: called as `min_snr(snr, gamma)` by [`equidit.diffusion.min_snr_weight`][]: the
        factor of the squared error of the prediction that is `min(snr, gamma)` of the error in x0.
        `None` where that weight is not used.
    """

    x0_and_eps: Callable[[Image, Image, NoiseLevel], tuple[Image, Image]]
    target: Callable[[Image, Image, NoiseLevel], Image]
    min_snr: Callable[[Float[Array, ""], Number], Float[Array, ""]] | None = None


PredictionName = Literal["eps", "x0", "v"]
"""What a network predicts: `"eps"` the noise, `"x0"` the clean example, `"v"` the velocity of
[`equidit.diffusion.predict_v`][]."""
PredictionLike = Prediction | PredictionName
"""A prediction, or the name of one of the library's."""

PREDICTIONS: dict[PredictionName, Prediction] = {
    "eps": Prediction(
        x0_and_eps=lambda xt, eps, level: (level.inverse * xt - level.ratio * eps, eps),
        target=lambda x0, eps, level: eps,
        min_snr=lambda snr, gamma: jnp.minimum(1.0, gamma / snr),
    ),
    "x0": Prediction(
        x0_and_eps=lambda xt, x0, level: (x0, (xt - level.signal * x0) / level.noise),
        target=lambda x0, eps, level: x0,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma),
    ),
    "v": Prediction(
        x0_and_eps=lambda xt, v, level: (
            level.signal * xt - level.noise * v,
            level.noise * xt + level.signal * v,
        ),
        target=lambda x0, eps, level: level.signal * eps - level.noise * x0,
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
