"""From a timestep and a label or a prompt to what blocks are conditioned on."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Integer

from .._base.common import Module, check_positive
from ..seams import Conditioning, PRNGKey, Prompt, TimeFeatures
from .layers import Linear, normal_02, parameter
from .ops import timestep_features


class TimestepEmbedder(Module):
    """Sinusoidal features of the timestep through a two-layer SiLU MLP.

    ??? cite

        Appendix A of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    up: Linear
    down: Linear
    features: TimeFeatures = eqx.field(static=True)

    def __init__(
        self, dim: int, *, features: TimeFeatures | None = timestep_features, key: PRNGKey
    ):
        """**Arguments:**

        - `dim`: the model's hidden size.
        - `features`: called as `features(t, 256)`; `None` is the default.
        - `key`: initialises the weights.
        """
        up_key, down_key = jax.random.split(key)
        self.up = Linear(256, dim, init=normal_02, key=up_key)
        self.down = Linear(dim, dim, init=normal_02, key=down_key)
        self.features = timestep_features if features is None else features

    def __call__(self, t: Float[Array, ""] | Int[Array, ""]) -> Float[Array, " dim"]:
        """**Arguments:**

        - `t`: the time in diffusion steps (0 to 999 for the paper's models); need not be whole.

        **Returns:**

        Its embedding, in the parameters' dtype.
        """
        features = self.features(t, 256)
        dtype = parameter(self.up, "weight", "out features").dtype
        return self.down(jax.nn.silu(self.up(features.astype(dtype))))


class LabelEmbedder(Module):
    """A table with a row a class and one more, the last, for the null label of guidance."""

    table: Float[Array, "classes dim"]

    def __init__(self, num_classes: int, dim: int, *, key: PRNGKey):
        """**Arguments:**

        - `num_classes`: number of labels, without the null one; at least 1, else `ValueError`.
        - `dim`: the model's hidden size.
        - `key`: initialises the table.
        """
        check_positive(num_classes=num_classes, dim=dim)
        self.table = normal_02(key, (num_classes + 1, dim))

    @property
    def null(self) -> int:
        """The null label: the number of classes."""
        return self.table.shape[0] - 1

    def __call__(self, label: Integer[Array, ""]) -> Float[Array, " dim"]:
        """**Arguments:**

        - `label`: 0 to `num_classes - 1`, or `null`.

        **Returns:**

        Its row.

        **Raises:**

        `ValueError` for a label outside the table whose value is known, as in eager use, mapped or
        not. One that is traced by `jax.jit` is not checked, and gives NaN: never, as plain indexing
        would, another class. Check labels on the host.
        """
        table = parameter(self, "table", "classes dim")
        _check_label(label, table.shape[0] - 1)
        # Filled with NaN by default; one of our own is equal to no other, and would compile anew.
        return table.at[label].get(mode="fill", wrap_negative_indices=False)


def _check_label(label: Any, null: int) -> None:
    while isinstance(label, Tracer):
        if not hasattr(label, "batch_dim"):
            return
        label = label.val  # what jax.vmap maps over
    if not getattr(label, "is_fully_addressable", True):
        return
    labels = np.asarray(label)
    if (wrong := labels[(labels < 0) | (labels > null)]).size:
        raise ValueError(
            f"label={wrong[0]} is unknown to a network of {null} classes: labels are 0 to "
            f"{null - 1}, and {null} is the null label"
        )


class TextEmbedder(Module):
    """A prompt, as the hidden states of a text encoder, in the model's hidden size.

    ??? cite

        The learned null prompt and the two-layer map are those of
        [Chen et al. 2023](https://arxiv.org/abs/2310.00426), section 2.3; the pooled vector
        beside the tokens as in [Esser et al. 2024](https://arxiv.org/abs/2403.03206), section 4.
    """

    null: Float[Array, "max_length text_dim"]
    up: Linear
    down: Linear
    pooled: Linear

    def __init__(self, text_dim: int, dim: int, *, max_length: int = 77, key: PRNGKey):
        """**Arguments:**

        - `text_dim`: size of the text encoder's states: 768 for CLIP ViT-L/14, 4096 for T5-XXL.
        - `dim`: the model's hidden size.
        - `max_length`: of a prompt, in tokens: 77 for CLIP.
        - `key`: initialises the weights.
        """
        check_positive(text_dim=text_dim, dim=dim, max_length=max_length)
        null_key, up_key, down_key, pooled_key = jax.random.split(key, 4)
        self.null = normal_02(null_key, (max_length, text_dim))
        # Xavier's scale serves every width; the paper's normal 0.02 mutes prompts in a narrow one.
        self.up = Linear(text_dim, dim, key=up_key)
        self.down = Linear(dim, dim, key=down_key)
        self.pooled = Linear(dim, dim, key=pooled_key)

    def __call__(
        self, embeddings: Float[Array, "length text_dim"], mask: Bool[Array, " length"]
    ) -> Conditioning:
        """**Arguments:**

        - `embeddings`: states of up to `max_length` tokens (`ValueError` beyond). Whatever dtype.
        - `mask`: which of them are the prompt rather than padding; what the others hold does not
            matter. All `False` is the null prompt, and is replaced by the learned one.

        **Returns:**

        `max_length` tokens, whatever the length given, with the mask of those that count; and as
        vector a linear map of their mean.
        """
        null = parameter(self, "null", "max_length text_dim")
        length, max_length = embeddings.shape[0], null.shape[0]
        if embeddings.shape[1] != null.shape[1]:
            raise ValueError(
                f"the prompt's states have text_dim={embeddings.shape[1]}, but the network was "
                f"made for text_dim={null.shape[1]}"
            )
        if length > max_length:
            raise ValueError(
                f"the prompt has length={length}, beyond max_length={max_length}: truncate it, "
                "or make the network with a larger max_length (text_length of a Config)"
            )
        padding = max_length - length
        states = jnp.pad(embeddings.astype(null.dtype), ((0, padding), (0, 0)))
        mask = jnp.pad(mask, (0, padding))
        states = jnp.where(mask.any(), states, null)
        mask = jnp.where(mask.any(), mask, True)
        states = jnp.where(mask[:, None], states, jnp.zeros_like(states))
        tokens = self.down(jax.nn.gelu(self.up(states), approximate=True))
        share = mask.astype(jnp.float32) / mask.sum(dtype=jnp.float32)
        mean = (share[:, None].astype(tokens.dtype) * tokens).sum(axis=0)
        return Conditioning(self.pooled(mean), tokens, mask)


class LabelConditioner(Module):
    """The paper's conditioning: `conditioner(t, label)` from a timestep and a class label."""

    timestep: TimestepEmbedder
    label: LabelEmbedder

    @property
    def num_classes(self) -> int:
        """The number of classes, without the null label."""
        return self.label.null

    @property
    def null(self) -> int:
        """The null label: the number of classes."""
        return self.label.null

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        features: TimeFeatures | None = timestep_features,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `num_classes`, `dim`: see [`equidit.LabelEmbedder`][].
        - `features`: see [`equidit.TimestepEmbedder`][].
        - `key`: initialises the weights.
        """
        timestep_key, label_key = jax.random.split(key)
        self.timestep = TimestepEmbedder(dim, features=features, key=timestep_key)
        self.label = LabelEmbedder(num_classes, dim, key=label_key)

    def __call__(
        self, t: Float[Array, ""] | Int[Array, ""], label: Integer[Array, ""]
    ) -> Conditioning:
        """**Arguments:**

        - `t`: the time in diffusion steps.
        - `label`: 0 to `num_classes - 1`, or `null`; others as for [`equidit.LabelEmbedder`][].

        **Returns:**

        The sum of both embeddings as vector, the two of them as tokens.
        """
        t_embedding, label_embedding = self.timestep(t), self.label(label)
        return Conditioning(
            vector=t_embedding + label_embedding,
            tokens=jnp.stack([t_embedding, label_embedding]),
        )


class TimestepConditioner(Module):
    """Conditioning of an unconditional model: `conditioner(t, None)`."""

    timestep: TimestepEmbedder
    num_classes: ClassVar[None] = None

    def __init__(self, dim: int, *, key: PRNGKey):
        """**Arguments:**

        - `dim`: the model's hidden size.
        - `key`: initialises the weights.
        """
        self.timestep = TimestepEmbedder(dim, key=key)

    def __call__(self, t: Float[Array, ""] | Int[Array, ""], cond: None = None) -> Conditioning:
        """**Arguments:**

        - `t`: the time in diffusion steps.
        - `cond`: nothing.

        **Returns:**

        The timestep's embedding, as vector and as the one token.
        """
        embedding = self.timestep(t)
        return Conditioning(vector=embedding, tokens=embedding[None])


class TextConditioner(Module):
    """Conditioning on text: `conditioner(t, (embeddings, mask))`, see [`equidit.TextEmbedder`][].

    The vector is timestep + pooled prompt; the tokens are the prompt's.
    """

    timestep: TimestepEmbedder
    text: TextEmbedder
    timestep_token: bool = eqx.field(static=True)
    num_classes: ClassVar[None] = None

    def __init__(
        self,
        text_dim: int,
        dim: int,
        *,
        max_length: int = 77,
        timestep_token: bool = False,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `text_dim`, `dim`, `max_length`: see [`equidit.TextEmbedder`][].
        - `timestep_token`: whether the timestep is a token too, the first: for blocks that read the
            tokens alone.
        - `key`: initialises the weights.
        """
        timestep_key, text_key = jax.random.split(key)
        self.timestep = TimestepEmbedder(dim, key=timestep_key)
        self.text = TextEmbedder(text_dim, dim, max_length=max_length, key=text_key)
        self.timestep_token = timestep_token

    @property
    def null(self) -> Prompt:
        """The null prompt, for `drop_label` and `guide`: one token that is masked."""
        return jnp.zeros((1, self.text.null.shape[1])), jnp.zeros(1, bool)

    def __call__(self, t: Float[Array, ""] | Int[Array, ""], prompt: Prompt) -> Conditioning:
        """**Arguments:**

        - `t`: the time in diffusion steps.
        - `prompt`: the pair `(embeddings, mask)`, as for [`equidit.TextEmbedder`][].

        **Returns:**

        Timestep + pooled prompt as vector, the prompt's tokens and their mask.
        """
        timestep, text = self.timestep(t), self.text(*prompt)
        tokens, mask = text.tokens, text.mask
        assert tokens is not None
        assert mask is not None
        if self.timestep_token:
            tokens = jnp.concatenate([timestep[None], tokens])
            mask = jnp.concatenate([jnp.ones(1, bool), mask])
        return Conditioning(timestep + text.vector, tokens, mask)
