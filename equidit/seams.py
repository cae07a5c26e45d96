"""The vocabulary of shapes, and the three seams at which code of your own takes part.

Axis names, the same in every signature of the library:

| name | meaning |
| --- | --- |
| `channels height width` | an image or a latent, channels first |
| `tokens dim` | a sequence of tokens and the model's hidden size |
| `cond dim` | the conditioning as a sequence |
| `length text_dim` | a prompt: the states of a text encoder |
| `features` | the entries of one patch, in the order (row, column, channel) |
| `heads head_dim` | attention heads and the size of each |
| `out` | output features or channels |
| `steps` | diffusion steps of a schedule |
| `batch` | examples; only in `train`, `data` and `metrics` |

Everything else takes **one example**: batch with `jax.vmap`.
"""

import os
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

Number = float | int | np.number
"""A Python or NumPy number, known while tracing."""
Scalar = Number | Float[Array, ""]
"""A number that may be traced."""
PRNGKey = Key[Array, ""]
"""What `jax.random.key` makes. A legacy key of `jax.random.PRNGKey` becomes one."""
StrPath = str | os.PathLike[str]
"""A path, as a string or as pathlib has it."""


class Conditioning(eqx.Module):
    """What a block is conditioned on, for one example.

    **Fields:**

    - `vector`: read by adaptive norms; the paper's timestep embedding + label embedding.
    - `tokens`: read by attention; the paper's sequence [timestep, label].
    - `mask`: which of `tokens` may be attended to; `None` is all of them. Where the tokens were
        appended to the image's (`DiT(append_cond=True)`), `tokens` is `None` in the blocks and
        `mask` that of all tokens.
    - `positions`: row and column of every token, in patches; 0 for appended ones. `DiT` fills it
        in, since a conditioner does not know the size of the image.
    """

    vector: Float[Array, " dim"]
    tokens: Float[Array, "cond dim"] | None = None
    mask: Bool[Array, " cond"] | None = None
    positions: Float[Array, "tokens 2"] | None = None


@runtime_checkable
class Network(Protocol):
    """A denoiser: anything called as `network(x, t, cond)`.

    `x` is one noisy example, `t` its time (for DiT in units of diffusion steps, 0 to 999) and
    `cond` whatever the network takes, by default an integer label. The result has the height and
    width of `x`, and as many channels or (with a learned variance) twice as many.
    """

    def __call__(
        self,
        x: Float[Array, "channels height width"],
        t: Float[Array, ""] | Int[Array, ""],
        cond: PyTree,
        /,
    ) -> Float[Array, "out height width"]: ...


@runtime_checkable
class Block(Protocol):
    """A transformer block: anything called as `block(tokens, cond)` that keeps the shape.

    `tokens` are one example's, `cond` its [`equidit.Conditioning`][]. The result has the shape and
    dtype of `tokens`.
    """

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning, /
    ) -> Float[Array, "tokens dim"]: ...


@runtime_checkable
class Loss(Protocol):
    """A training objective: anything called as `loss(network, example, key)`, for one example.

    `network` is what is trained, `example` one element of the batch (any pytree) and `key` that
    example's own. The result is one number, whose mean over the batch is minimised; or the pair
    `(number, {name: number})`, where the means of the named numbers join the step's metrics.

    Shapes that differ broadcast without a word: of an image of one channel, the squared error of
    an output with a learned variance would be the mean over noise and variance alike. Take the
    output apart by [`equidit.diffusion.split_output`][], which checks its channels.
    """

    def __call__(
        self, network: Any, example: PyTree, key: PRNGKey, /
    ) -> Float[Array, ""] | tuple[Float[Array, ""], dict[str, Any]]: ...


@runtime_checkable
class Optimizer(Protocol):
    """What turns gradients into updates: an optimizer of optax, or anything with its two methods,
    such as `optax.MultiSteps`.

    `init(params)` makes the state. `update(updates, state, params)` takes the gradients and returns
    the pair of what is added to the parameters and the next state. If it takes further arguments by
    name (`**extra_args`), the training step passes `value=`, the loss.
    """

    def init(self, params: PyTree, /) -> PyTree: ...

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, /
    ) -> tuple[PyTree, PyTree]: ...
