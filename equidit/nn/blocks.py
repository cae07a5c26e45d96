"""The paper's four kinds of block, and one for prompts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._base.common import Module
from ..seams import Conditioning, Number, PRNGKey
from .layers import MLP, Attention, LayerNorm, Linear, hidden_size, zeros
from .ops import layer_norm, modulate


class AdaLNZeroBlock(Module):
    """Self-attention and MLP, each shifted, scaled and gated by the conditioning vector.

    The gates are zero at initialisation, so a new block is the identity.

    ??? cite

        Section 3.2, "adaLN-Zero block", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    attention: Any
    mlp: Any
    modulation: Linear
    norm: Callable[..., Array] = eqx.field(static=True)
    norm_mlp: Callable[..., Array] = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        attention: Callable[..., Any] = Attention,
        mlp: Callable[..., Any] = MLP,
        norm: Callable[..., Array] = layer_norm,
        norm_mlp: Callable[..., Array] | None = None,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `num_heads`: attention heads; must divide `dim`.
        - `mlp_ratio`: the MLP's hidden size as a multiple of `dim`.
        - `attention`: called as `attention(dim, num_heads, key=key)`; makes a module with the call
            of [`equidit.Attention`][]. For variants, `partial(Attention, qk_norm=RMSNorm)` or
            `partial(Attention, rotary=rotary_2d)`.
        - `mlp`: called as `mlp(dim, hidden_size, key=key)`, e.g. [`equidit.SwiGLU`][].
        - `norm`: a function of the tokens without parameters, e.g. [`equidit.rms_norm`][].
        - `norm_mlp`: that of the MLP, where it is another; `None` is `norm`.
        - `key`: initialises the weights.
        """
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = attention(dim, num_heads, key=attention_key)
        self.mlp = mlp(dim, hidden_size(dim, mlp_ratio), key=mlp_key)
        self.modulation = Linear(dim, 6 * dim, init=zeros, key=modulation_key)
        self.norm = norm
        self.norm_mlp = norm if norm_mlp is None else norm_mlp

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `tokens`: one example's.
        - `cond`: its `vector` shifts, scales and gates.

        **Returns:**

        The tokens after the block, of the same shape and dtype.
        """
        modulation = self.modulation(jax.nn.silu(cond.vector))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6)
        x = modulate(self.norm(tokens), shift_a, scale_a)
        tokens = tokens + gate_a[None] * _self_attention(self.attention, x, cond)
        return tokens + gate_m[None] * self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))


class AdaLNBlock(Module):
    """Self-attention and MLP, each shifted and scaled, not gated, by the conditioning vector.

    Shifts and scales are zero at initialisation.

    ??? cite

        Section 3.2, "Adaptive layer norm (adaLN) block", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    attention: Any
    mlp: Any
    modulation: Linear
    norm: Callable[..., Array] = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        attention: Callable[..., Any] = Attention,
        mlp: Callable[..., Any] = MLP,
        norm: Callable[..., Array] = layer_norm,
        key: PRNGKey,
    ):
        """**Arguments:** as for [`equidit.AdaLNZeroBlock`][], but for `norm_mlp`."""
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = attention(dim, num_heads, key=attention_key)
        self.mlp = mlp(dim, hidden_size(dim, mlp_ratio), key=mlp_key)
        self.modulation = Linear(dim, 4 * dim, init=zeros, key=modulation_key)
        self.norm = norm

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `tokens`: one example's.
        - `cond`: its `vector` shifts and scales.

        **Returns:**

        The tokens after the block, of the same shape and dtype.
        """
        modulation = self.modulation(jax.nn.silu(cond.vector))
        shift_a, scale_a, shift_m, scale_m = jnp.split(modulation, 4)
        x = modulate(self.norm(tokens), shift_a, scale_a)
        tokens = tokens + _self_attention(self.attention, x, cond)
        return tokens + self.mlp(modulate(self.norm(tokens), shift_m, scale_m))


class InContextBlock(Module):
    """A plain transformer block, for conditioning that is among the tokens.

    It reads no conditioning of its own: use it with `DiT(append_cond=True)`, which appends
    `cond.tokens` to the image's and removes them after the last block. Otherwise the network is
    unconditional.

    ??? cite

        Section 3.2, "In-context conditioning", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    norm_attention: Any
    attention: Any
    norm_mlp: Any
    mlp: Any

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        attention: Callable[..., Any] = Attention,
        mlp: Callable[..., Any] = MLP,
        norm: Callable[[int], Any] = LayerNorm,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`, `num_heads`, `mlp_ratio`, `attention`, `mlp`, `key`: as for
            [`equidit.AdaLNZeroBlock`][].
        - `norm`: called as `norm(dim)`; makes a module, e.g. [`equidit.RMSNorm`][].
        """
        attention_key, mlp_key = jax.random.split(key)
        self.norm_attention = norm(dim)
        self.attention = attention(dim, num_heads, key=attention_key)
        self.norm_mlp = norm(dim)
        self.mlp = mlp(dim, hidden_size(dim, mlp_ratio), key=mlp_key)

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `tokens`: one example's.
        - `cond`: not read, but for the mask of appended tokens.

        **Returns:**

        The tokens after the block, of the same shape and dtype.
        """
        x = self.norm_attention(tokens)
        tokens = tokens + _self_attention(self.attention, x, cond)
        return tokens + self.mlp(self.norm_mlp(tokens))


class CrossAttentionBlock(Module):
    """A transformer block with cross-attention to the conditioning's tokens after self-attention.

    ??? cite

        Section 3.2, "Cross-attention block", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    norm_attention: Any
    attention: Any
    norm_cross: Any
    cross: Any
    norm_mlp: Any
    mlp: Any

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        attention: Callable[..., Any] = Attention,
        mlp: Callable[..., Any] = MLP,
        norm: Callable[[int], Any] = LayerNorm,
        key: PRNGKey,
    ):
        """**Arguments:** as for [`equidit.InContextBlock`][]; `attention` makes both attentions."""
        attention_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.norm_attention = norm(dim)
        self.attention = attention(dim, num_heads, key=attention_key)
        self.norm_cross = norm(dim)
        self.cross = attention(dim, num_heads, key=cross_key)
        self.norm_mlp = norm(dim)
        self.mlp = mlp(dim, hidden_size(dim, mlp_ratio), key=mlp_key)

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `tokens`: one example's.
        - `cond`: its `tokens` are attended to, as far as `mask` allows; `ValueError` if there are
            none.

        **Returns:**

        The tokens after the block, of the same shape and dtype.
        """
        context = tokens_of(cond, reader="CrossAttentionBlock")
        tokens = tokens + _self_attention(self.attention, self.norm_attention(tokens), cond)
        tokens = tokens + self.cross(self.norm_cross(tokens), context, cond.mask)
        return tokens + self.mlp(self.norm_mlp(tokens))


class TextCrossAttentionBlock(Module):
    """An adaLN-Zero block with cross-attention to the conditioning's tokens, the prompt's, between.

    The gates and the cross-attention's output projection are zero at initialisation, so a new block
    is the identity.

    ??? cite

        Section 2.3 of [Chen et al. 2023](https://arxiv.org/abs/2310.00426).
    """

    attention: Any
    cross: Any
    mlp: Any
    modulation: Linear
    norm: Callable[..., Array] = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        attention: Callable[..., Any] = Attention,
        cross: Callable[..., Any] = partial(Attention, out_init=zeros),
        mlp: Callable[..., Any] = MLP,
        norm: Callable[..., Array] = layer_norm,
        key: PRNGKey,
    ):
        """**Arguments:** as for [`equidit.AdaLNZeroBlock`][], and

        - `cross`: makes the cross-attention, as `attention` makes the self-attention.
        """
        attention_key, cross_key, mlp_key, modulation_key = jax.random.split(key, 4)
        self.attention = attention(dim, num_heads, key=attention_key)
        self.cross = cross(dim, num_heads, key=cross_key)
        self.mlp = mlp(dim, hidden_size(dim, mlp_ratio), key=mlp_key)
        self.modulation = Linear(dim, 6 * dim, init=zeros, key=modulation_key)
        self.norm = norm

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `tokens`: one example's.
        - `cond`: its `vector` shifts, scales and gates; its `tokens` are attended to, as far as
            `mask` allows; `ValueError` if there are none.

        **Returns:**

        The tokens after the block, of the same shape and dtype.
        """
        context = tokens_of(cond, reader="TextCrossAttentionBlock")
        modulation = self.modulation(jax.nn.silu(cond.vector))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6)
        x = modulate(self.norm(tokens), shift_a, scale_a)
        tokens = tokens + gate_a[None] * _self_attention(self.attention, x, cond)
        tokens = tokens + self.cross(self.norm(tokens), context, cond.mask)
        return tokens + gate_m[None] * self.mlp(modulate(self.norm(tokens), shift_m, scale_m))


def _self_attention(attention: Any, x: Array, cond: Conditioning) -> Array:
    # A mask beside `tokens` is theirs; alone it is that of all tokens, some of them appended.
    mask = cond.mask if cond.tokens is None else None
    return attention(x, mask=mask, positions=cond.positions)


def tokens_of(cond: Conditioning, *, reader: str) -> Float[Array, "cond dim"]:
    """The conditioning's tokens; `ValueError` if the conditioner gave none."""
    if cond.tokens is None:
        raise ValueError(
            f"{reader} reads the conditioning's tokens, but the conditioner gave none: "
            "return Conditioning(vector, tokens) from it"
        )
    return cond.tokens
