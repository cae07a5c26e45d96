"""The paper's four kinds of block, and one for prompts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._base.arguments import renamed
from .._base.common import Module
from ..seams import Conditioning, Number, PRNGKey, TokenMap, TokenMixer
from .attention import Attention
from .layers import MLP, LayerNorm, Linear, mlp_size, modulation, zeros
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
    norm: TokenMap = eqx.field(static=True)
    norm_mlp: TokenMap = eqx.field(static=True)

    @renamed(attention="make_attention", mlp="make_mlp")
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        make_attention: Callable[..., TokenMixer] = Attention,
        make_mlp: Callable[..., TokenMap] = MLP,
        norm: TokenMap = layer_norm,
        norm_mlp: TokenMap | None = None,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `num_heads`: attention heads; must divide `dim`.
        - `mlp_ratio`: the MLP's hidden size as a multiple of `dim`.
        - `make_attention`: called as `make_attention(dim, num_heads, key=key)`; makes a module with
            the call of [`equidit.Attention`][]. For variants, `partial(Attention, qk_norm=RMSNorm)`
            or `partial(Attention, rotary=rotary_2d)`. `attention` is its former name.
        - `make_mlp`: called as `make_mlp(dim, hidden_size, key=key)`, e.g. [`equidit.SwiGLU`][].
            `mlp` is its former name.
        - `norm`: a function of the tokens without parameters, e.g. [`equidit.rms_norm`][].
        - `norm_mlp`: that of the MLP, where it is another; `None` is `norm`.
        - `key`: initialises the weights.
        """
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = make_attention(dim, num_heads, key=attention_key)
        self.mlp = make_mlp(dim, mlp_size(dim, mlp_ratio), key=mlp_key)
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
        parts = modulation(self.modulation, cond, 6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
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
    norm: TokenMap = eqx.field(static=True)

    @renamed(attention="make_attention", mlp="make_mlp")
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        make_attention: Callable[..., TokenMixer] = Attention,
        make_mlp: Callable[..., TokenMap] = MLP,
        norm: TokenMap = layer_norm,
        key: PRNGKey,
    ):
        """**Arguments:** as for [`equidit.AdaLNZeroBlock`][], but for `norm_mlp`."""
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = make_attention(dim, num_heads, key=attention_key)
        self.mlp = make_mlp(dim, mlp_size(dim, mlp_ratio), key=mlp_key)
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
        shift_a, scale_a, shift_m, scale_m = modulation(self.modulation, cond, 4)
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

    norm_attention: TokenMap
    attention: Any
    norm_mlp: TokenMap
    mlp: Any

    @renamed(attention="make_attention", mlp="make_mlp", norm="make_norm")
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        make_attention: Callable[..., TokenMixer] = Attention,
        make_mlp: Callable[..., TokenMap] = MLP,
        make_norm: Callable[[int], TokenMap] = LayerNorm,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`, `num_heads`, `mlp_ratio`, `make_attention`, `make_mlp`, `key`: as for
            [`equidit.AdaLNZeroBlock`][].
        - `make_norm`: called as `make_norm(dim)`, e.g. [`equidit.RMSNorm`][]. `norm` is its former
            name.
        """
        attention_key, mlp_key = jax.random.split(key)
        self.norm_attention = make_norm(dim)
        self.attention = make_attention(dim, num_heads, key=attention_key)
        self.norm_mlp = make_norm(dim)
        self.mlp = make_mlp(dim, mlp_size(dim, mlp_ratio), key=mlp_key)

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

    norm_attention: TokenMap
    attention: Any
    norm_cross: TokenMap
    cross: Any
    norm_mlp: TokenMap
    mlp: Any

    @renamed(attention="make_attention", mlp="make_mlp", norm="make_norm")
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        make_attention: Callable[..., TokenMixer] = Attention,
        make_mlp: Callable[..., TokenMap] = MLP,
        make_norm: Callable[[int], TokenMap] = LayerNorm,
        key: PRNGKey,
    ):
        """**Arguments:** as for [`equidit.InContextBlock`][]; `make_attention` makes both."""
        attention_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.norm_attention = make_norm(dim)
        self.attention = make_attention(dim, num_heads, key=attention_key)
        self.norm_cross = make_norm(dim)
        self.cross = make_attention(dim, num_heads, key=cross_key)
        self.norm_mlp = make_norm(dim)
        self.mlp = make_mlp(dim, mlp_size(dim, mlp_ratio), key=mlp_key)

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
        tokens = tokens + _cross_attention(self.cross, self.norm_cross(tokens), context, cond)
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
    norm: TokenMap = eqx.field(static=True)

    @renamed(attention="make_attention", cross="make_cross", mlp="make_mlp")
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        make_attention: Callable[..., TokenMixer] = Attention,
        make_cross: Callable[..., TokenMixer] = partial(Attention, out_init=zeros),
        make_mlp: Callable[..., TokenMap] = MLP,
        norm: TokenMap = layer_norm,
        key: PRNGKey,
    ):
        """**Arguments:** as for [`equidit.AdaLNZeroBlock`][], and

        - `make_cross`: makes the cross-attention, as `make_attention` makes the self-attention.
            `cross` is its former name.
        """
        attention_key, cross_key, mlp_key, modulation_key = jax.random.split(key, 4)
        self.attention = make_attention(dim, num_heads, key=attention_key)
        self.cross = make_cross(dim, num_heads, key=cross_key)
        self.mlp = make_mlp(dim, mlp_size(dim, mlp_ratio), key=mlp_key)
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
        parts = modulation(self.modulation, cond, 6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = modulate(self.norm(tokens), shift_a, scale_a)
        tokens = tokens + gate_a[None] * _self_attention(self.attention, x, cond)
        tokens = tokens + _cross_attention(self.cross, self.norm(tokens), context, cond)
        return tokens + gate_m[None] * self.mlp(modulate(self.norm(tokens), shift_m, scale_m))


@jax.named_scope("self_attention")
def _self_attention(attention: TokenMixer, x: Array, cond: Conditioning) -> Array:
    # A mask beside `tokens` is theirs; alone it is that of all tokens, some of them appended.
    mask = cond.mask if cond.tokens is None else None
    return attention(x, mask=mask, positions=cond.positions)


@jax.named_scope("cross_attention")
def _cross_attention(attention: TokenMixer, x: Array, context: Array, cond: Conditioning) -> Array:
    return attention(x, context, cond.mask)


def tokens_of(cond: Conditioning, *, reader: str) -> Float[Array, "cond dim"]:
    """The conditioning's tokens; `ValueError` if the conditioner gave none."""
    if cond.tokens is None:
        raise ValueError(
            f"{reader} reads the conditioning's tokens, but the conditioner gave none: "
            "return Conditioning(vector, tokens) from it"
        )
    return cond.tokens
