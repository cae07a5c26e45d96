"""The vocabulary of shapes, and the seams at which code of your own takes part.

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
Image = Float[Array, "channels height width"]
"""One image or latent."""
Index = Int[Array, ""] | int | np.integer
"""A step: an index of a schedule, 0 the least noisy."""
Prompt = tuple[Float[Array, "length text_dim"], Bool[Array, " length"]]
"""The states of a text encoder, and which of them are the prompt rather than padding."""


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
    """A denoiser: anything called as `network(x, t, cond)`."""

    def __call__(
        self,
        x: Float[Array, "channels height width"],
        t: Float[Array, ""] | Int[Array, ""],
        cond: PyTree,
        /,
    ) -> Float[Array, "out height width"]:
        """**Arguments:**

        - `x`: one noisy example.
        - `t`: its time; for DiT in units of diffusion steps, 0 to 999.
        - `cond`: whatever the network takes, by default an integer label.

        **Returns:**

        What the network predicts, in the height and width of `x`, with as many channels or (with a
        learned variance) twice as many.
        """
        ...


@runtime_checkable
class Conditioner(Protocol):
    """What a network is told, as its blocks read it: anything called as `conditioner(t, cond)`.

    One with labels has `num_classes`, their number, and one that can be left without a condition
    `null`, which stands for that. Both may be missing, or `num_classes` be `None`.
    """

    def __call__(self, t: Float[Array, ""] | Int[Array, ""], cond: Any, /) -> Conditioning:
        """**Arguments:**

        - `t`: the time, as the network is told it.
        - `cond`: a label, a prompt, or whatever else the network is conditioned on.

        **Returns:**

        A [`equidit.Conditioning`][] of vectors of the network's hidden size.
        """
        ...


@runtime_checkable
class Block(Protocol):
    """A transformer block: anything called as `block(tokens, cond)` that keeps the shape."""

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning, /
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `tokens`: one example's.
        - `cond`: its [`equidit.Conditioning`][].

        **Returns:**

        The tokens after the block, of the same shape and dtype.
        """
        ...


@runtime_checkable
class LastLayer(Protocol):
    """From tokens to patches: anything called as `final(tokens, cond)`."""

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning, /
    ) -> Float[Array, "tokens features"]:
        """**Arguments:**

        - `tokens`: of the image, after the last block.
        - `cond`: the example's [`equidit.Conditioning`][].

        **Returns:**

        One patch of `patch_size**2 * out_channels` features a token, for [`equidit.unpatchify`][].
        """
        ...


@runtime_checkable
class TokenMap(Protocol):
    """A norm or an MLP: anything called as `f(tokens)` that maps each token by itself."""

    def __call__(self, tokens: Float[Array, "*tokens dim"], /) -> Float[Array, "*tokens dim"]:
        """**Arguments:**

        - `tokens`: vectors on the last axis; an attention's norms get one a token and head.

        **Returns:**

        As many, of the same shape and dtype.
        """
        ...


@runtime_checkable
class TokenMixer(Protocol):
    """Attention in a block: anything with the call of [`equidit.Attention`][]."""

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        /,
        context: Float[Array, "cond dim"] | None = None,
        mask: Bool[Array, " keys"] | None = None,
        *,
        positions: Float[Array, "tokens 2"] | None = None,
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: the tokens that ask.
        - `context`: the tokens that are attended to; `None` is `x` itself. Self-attention's blocks
            do not pass it.
        - `mask`: which of those may be attended to; `None` is all.
        - `positions`: row and column of every token of `x`; self-attention's blocks pass it.

        **Returns:**

        One output a token of `x`.
        """
        ...


@runtime_checkable
class Attend(Protocol):
    """The products of attention: anything called as `attend(query, key, value, mask=mask)`, as
    `jax.nn.dot_product_attention` is.
    """

    def __call__(
        self,
        query: Float[Array, "tokens heads head_dim"],
        key: Float[Array, "keys heads head_dim"],
        value: Float[Array, "keys heads head_dim"],
        /,
        *,
        mask: Bool[Array, "1 1 keys"] | None,
    ) -> Float[Array, "tokens heads head_dim"]:
        """**Arguments:**

        - `query`: one a token that asks, and head.
        - `key`, `value`: one a token that is attended to, and head.
        - `mask`: which of those may be attended to (`True`); `None` is all.

        **Returns:**

        For each query the mean of the values, weighted by the likeness of their keys.
        """
        ...


@runtime_checkable
class Rotary(Protocol):
    """A position embedding of queries and keys: anything called as `rotary(x, positions)`."""

    def __call__(
        self, x: Float[Array, "tokens heads head_dim"], positions: Float[Array, "tokens 2"], /
    ) -> Float[Array, "tokens heads head_dim"]:
        """**Arguments:**

        - `x`: the queries, or the keys.
        - `positions`: row and column of every token, in patches.

        **Returns:**

        The same with the positions in them, of the same shape and dtype.
        """
        ...


@runtime_checkable
class TimeFeatures(Protocol):
    """What a network is told of the time: anything called as `features(t, dim)`."""

    def __call__(
        self, t: Float[Array, ""] | Int[Array, ""], dim: int, /
    ) -> Float[Array, " features"]:
        """**Arguments:**

        - `t`: the time, as the network is told it.
        - `dim`: how many features are asked for.

        **Returns:**

        So many, in at least float32.
        """
        ...


@runtime_checkable
class Step(Protocol):
    """A step of a sampler: anything called as `step(x, t, cond, key=key)`."""

    def __call__(self, x: Any, t: Index, cond: PyTree, /, *, key: PRNGKey) -> Any:
        """**Arguments:**

        - `x`: the noisy example; or whatever tree of arrays the step remembers, with it inside.
        - `t`: the step, an index of the schedule; 0 is the last but in an ascending sampler.
        - `cond`: passed to the network.
        - `key`: of this example and this step.

        **Returns:**

        The next `x`, of the same structure, shapes and dtypes; or the pair of it and something to
        be collected, where the sampler is told of that.
        """
        ...


@runtime_checkable
class Loss(Protocol):
    """A training objective: anything called as `loss(network, example, key)`, for one example.

    Shapes that differ broadcast without a word: of an image of one channel, the squared error of
    an output with a learned variance would be the mean over noise and variance alike. Take the
    output apart by [`equidit.diffusion.split_output`][], which checks its channels.
    """

    def __call__(
        self, network: Any, example: PyTree, key: PRNGKey, /
    ) -> Float[Array, ""] | tuple[Float[Array, ""], dict[str, Any]]:
        """**Arguments:**

        - `network`: what is trained.
        - `example`: one element of the batch: any pytree.
        - `key`: of this example and this step.

        **Returns:**

        One number, whose mean over the batch is minimised; or the pair `(number, {name: number})`,
        where the means of the named numbers join the step's metrics.
        """
        ...


@runtime_checkable
class Optimizer(Protocol):
    """What turns gradients into updates: an optimizer of optax, or anything with its two methods,
    such as `optax.MultiSteps`.
    """

    def init(self, params: PyTree, /) -> PyTree:
        """**Arguments:**

        - `params`: what is trained.

        **Returns:**

        The optimizer's state.
        """
        ...

    def update(self, updates: PyTree, state: PyTree, params: PyTree, /) -> tuple[PyTree, PyTree]:
        """**Arguments:**

        - `updates`: the gradients.
        - `state`: the optimizer's.
        - `params`: what is trained.

        An `update` that takes further arguments by name (`**extra_args`) is passed `value=`, the
        loss, by the training step.

        **Returns:**

        The pair of what is added to the parameters and the next state.
        """
        ...
