"""Layers: linear, attention, MLPs, norms, and the network's last."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._base.common import Module, check_positive
from ..seams import Conditioning, Number, PRNGKey
from .ops import layer_norm, modulate, rms_norm

Initializer = Callable[[PRNGKey, tuple[int, ...]], Array]


# "Linear layers are Xavier-uniform, tables normal 0.02, gates zero" (the paper's recipe).
# JAX's initialisers read a matrix as (in, out); Xavier's bound is the same either way.
xavier_uniform: Initializer = jax.nn.initializers.glorot_uniform()
normal_02: Initializer = jax.nn.initializers.normal(0.02)
zeros: Initializer = jax.nn.initializers.zeros


def parameter(module: Any, name: str, axes: str) -> Array:
    """A parameter as the array that it must be: `eqx.tree_at` puts anything in its place."""
    value = getattr(module, name)
    if isinstance(value, np.ndarray):
        value = jnp.asarray(value)
    is_array = isinstance(value, Array) and value.dtype.kind in "fV"  # V: bfloat16
    if not is_array or value.ndim != len(axes.split()):
        found = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else repr(value)
        raise ValueError(
            f"{type(module).__name__}.{name} is {found}, but must be a floating-point array of the "
            f"axes ({axes}): put one in its place, e.g. jnp.full_like(old, value)"
        )
    return value


class Linear(Module):
    """`x @ weight.T + bias` on the last axis of whole arrays: no `vmap` over tokens is needed."""

    weight: Float[Array, "out features"]
    bias: Float[Array, " out"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `in_features`, `out_features`: sizes, at least 1.
        - `init`: `init(key, shape)` makes the weight; Xavier-uniform by default. The bias is 0.
        - `key`: for `init`.
        """
        check_positive(in_features=in_features, out_features=out_features)
        self.weight = init(key, (out_features, in_features))
        self.bias = jnp.zeros(out_features)

    def __call__(self, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens out"]:
        """**Arguments:**

        - `x`: arrays of `in_features` on the last axis, else `ValueError`; any axes before it.

        **Returns:**

        The same with `out_features` on the last axis.
        """
        weight, bias = weight_and_bias(self)
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"x has {x.shape[-1]} features, but the layer was made for {weight.shape[1]}"
            )
        return _affine(x, weight, bias)


def weight_and_bias(layer: Linear) -> tuple[Array, Array]:
    """A linear layer's parameters, as the arrays that they must be."""
    weight, bias = parameter(layer, "weight", "out features"), parameter(layer, "bias", "out")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"Linear.bias has {bias.shape[0]} entries, but Linear.weight {weight.shape[0]} rows: "
            "put one of the old one's shape in its place"
        )
    return weight, bias


def hidden_size(dim: int, mlp_ratio: Number) -> int:
    """An MLP's hidden size; `ValueError` if it is below 1."""
    size = int(dim * mlp_ratio)
    if size < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP of dim={dim} no hidden features")
    return size


def _affine(x: Array, weight: Array, bias: Array) -> Array:
    y = x @ weight.T
    return y + jnp.broadcast_to(bias, y.shape)


class LayerNorm(Module):
    """[`equidit.layer_norm`][] with a learned scale and shift, initially 1 and 0."""

    scale: Float[Array, " dim"]
    shift: Float[Array, " dim"]

    def __init__(self, dim: int):
        """**Arguments:**

        - `dim`: size of a token, at least 1, else `ValueError`.
        """
        check_positive(dim=dim)
        self.scale, self.shift = jnp.ones(dim), jnp.zeros(dim)

    def __call__(self, x: Float[Array, "*tokens dim"]) -> Float[Array, "*tokens dim"]:
        """**Arguments:**

        - `x`: tokens, or one, of `dim` features.

        **Returns:**

        The normalised tokens, in the shape of `x`.
        """
        scale, shift = (parameter(self, name, "dim") for name in ("scale", "shift"))
        return _scaled(layer_norm(x), scale) + jnp.broadcast_to(shift, x.shape)


class RMSNorm(Module):
    """[`equidit.rms_norm`][] with a learned scale, initially 1."""

    scale: Float[Array, " dim"]

    def __init__(self, dim: int):
        """**Arguments:**

        - `dim`: size of a token, at least 1, else `ValueError`.
        """
        check_positive(dim=dim)
        self.scale = jnp.ones(dim)

    def __call__(self, x: Float[Array, "*tokens dim"]) -> Float[Array, "*tokens dim"]:
        """**Arguments:**

        - `x`: tokens, or one, of `dim` features.

        **Returns:**

        The normalised tokens, in the shape of `x`.
        """
        return _scaled(rms_norm(x), parameter(self, "scale", "dim"))


def _scaled(x: Array, scale: Array) -> Array:
    return x * jnp.broadcast_to(scale, x.shape)


class MLP(Module):
    """Two linear layers with the tanh approximation of GELU between them.

    ??? cite

        [Hendrycks & Gimpel 2016](https://arxiv.org/abs/1606.08415).
    """

    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden_size: int, *, key: PRNGKey):
        """**Arguments:**

        - `dim`: size of a token, in and out.
        - `hidden_size`: size between the layers; both at least 1, else `ValueError`.
        - `key`: initialises the weights.
        """
        up_key, down_key = jax.random.split(key)
        self.up = Linear(dim, hidden_size, key=up_key)
        self.down = Linear(hidden_size, dim, key=down_key)

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: tokens; each is mapped by itself.

        **Returns:**

        As many tokens of the same size.
        """
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class SwiGLU(Module):
    """An MLP gated by itself: `down(silu(gate(x)) * up(x))`. Takes the place of [`equidit.MLP`][].

    With three matrices in place of two, `hidden_size` 2/3 as large costs the same.

    ??? cite

        [Shazeer 2020](https://arxiv.org/abs/2002.05202).
    """

    gate: Linear
    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden_size: int, *, key: PRNGKey):
        """**Arguments:**

        - `dim`: size of a token, in and out.
        - `hidden_size`: size between the layers; both at least 1, else `ValueError`.
        - `key`: initialises the weights.
        """
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear(dim, hidden_size, key=gate_key)
        self.up = Linear(dim, hidden_size, key=up_key)
        self.down = Linear(hidden_size, dim, key=down_key)

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: tokens; each is mapped by itself.

        **Returns:**

        As many tokens of the same size.
        """
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Attention(Module):
    """Multi-head attention with one fused projection for queries, keys and values.

    ??? cite

        Section 3.2 of [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762).
    """

    qkv: Linear
    out: Linear
    q_norm: Any
    k_norm: Any
    num_heads: int = eqx.field(static=True)
    attend: Callable[..., Array] = eqx.field(static=True)
    rotary: Callable[..., Array] | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attend: Callable[..., Array] = jax.nn.dot_product_attention,
        qk_norm: Callable[[int], Any] | None = None,
        rotary: Callable[..., Array] | None = None,
        out_init: Initializer = xavier_uniform,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `num_heads`: must divide `dim`, else `ValueError`.
        - `attend`: `attend(query, key, value, mask=mask)` with arrays of shape
            `(tokens, heads, head_dim)` and a mask of shape `(1, 1, tokens)` or `None`. Any function
            with the signature of `jax.nn.dot_product_attention` will do.
        - `qk_norm`: called as `qk_norm(head_dim)`, e.g. [`equidit.RMSNorm`][]: makes a norm of
            every head's queries and another of its keys, which keeps the logits from growing
            ([Dehghani et al. 2023](https://arxiv.org/abs/2302.05442), section 2). `None` is none.
        - `rotary`: called as `rotary(x, positions)` on queries and keys of self-attention, e.g.
            [`equidit.rotary_2d`][]. `None` is none.
        - `out_init`: initialiser of the output projection.
        - `key`: initialises the weights.
        """
        check_positive(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            divisors = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
            raise ValueError(
                f"dim={dim} is not divisible by num_heads={num_heads}: "
                f"choose one of {divisors} heads, or another size"
            )
        qkv_key, out_key = jax.random.split(key)
        self.qkv = Linear(dim, 3 * dim, key=qkv_key)
        self.out = Linear(dim, dim, init=out_init, key=out_key)
        self.q_norm, self.k_norm = (
            None if qk_norm is None else qk_norm(dim // num_heads) for _ in range(2)
        )
        self.num_heads = num_heads
        self.attend = attend
        self.rotary = rotary

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        context: Float[Array, "cond dim"] | None = None,
        mask: Bool[Array, " keys"] | None = None,
        *,
        positions: Float[Array, "tokens 2"] | None = None,
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: the tokens that ask.
        - `context`: the tokens that are attended to; `None` is `x` itself.
        - `mask`: which of those may be attended to (`True`); `None` is all.
        - `positions`: row and column of every token of `x`; read if there is a `rotary`, and then
            needed for self-attention (`ValueError`).

        **Returns:**

        One output a token of `x`.
        """
        if context is None:
            q, k, v = map(self._heads, jnp.split(self.qkv(x), 3, axis=-1))
        else:
            dim = x.shape[-1]
            weight, bias = weight_and_bias(self.qkv)
            q = self._heads(_affine(x, weight[:dim], bias[:dim]))
            k, v = map(
                self._heads, jnp.split(_affine(context, weight[dim:], bias[dim:]), 2, axis=-1)
            )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None and context is None:
            if positions is None:
                raise ValueError("attention with a rotary embedding needs positions, but got None")
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if mask is not None:
            if mask.shape[0] != k.shape[0]:
                raise ValueError(
                    f"mask has {mask.shape[0]} entries, but there are {k.shape[0]} tokens "
                    "to attend to"
                )
            mask = mask[None, None]
        # JAX's own attention relies on implicit promotion to a float32 softmax.
        with jax.numpy_dtype_promotion("standard"):
            y = self.attend(q, k, v, mask=mask)
        return self.out(y.reshape(x.shape))

    def _heads(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens heads head_dim"]:
        return x.reshape(x.shape[0], self.num_heads, -1)


class FinalLayer(Module):
    """The last layer: adaptive layer norm, then a linear map to patches. Zero at initialisation.

    ??? cite

        Section 3.2, "Transformer decoder", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    modulation: Linear
    linear: Linear
    norm: Callable[..., Array] = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        patch_size: int,
        out_channels: int,
        *,
        norm: Callable[..., Array] = layer_norm,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `patch_size`: side of a patch, in pixels of the input.
        - `out_channels`: channels of the network's output, those of the variance among them.
        - `norm`: a function of the tokens without parameters, e.g. [`equidit.rms_norm`][].
        - `key`: initialises the weights.
        """
        modulation_key, linear_key = jax.random.split(key)
        self.modulation = Linear(dim, 2 * dim, init=zeros, key=modulation_key)
        self.linear = Linear(dim, patch_size**2 * out_channels, init=zeros, key=linear_key)
        self.norm = norm

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens features"]:
        """**Arguments:**

        - `tokens`: of the image, after the last block.
        - `cond`: its `vector` is read.

        **Returns:**

        One patch of `patch_size**2 * out_channels` features a token, for [`equidit.unpatchify`][].
        """
        shift, scale = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 2)
        return self.linear(modulate(self.norm(tokens), shift, scale))


class PlainFinalLayer(Module):
    """The last layer of the paper's designs without adaptive norms: a learned layer norm, then a
    linear map to patches, zero at initialisation. Does not read the conditioning.

    ??? cite

        Section 3.2, "Transformer decoder", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    norm: Any
    linear: Linear

    def __init__(
        self,
        dim: int,
        patch_size: int,
        out_channels: int,
        *,
        norm: Callable[[int], Any] = LayerNorm,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `patch_size`: side of a patch, in pixels of the input.
        - `out_channels`: channels of the network's output, those of the variance among them.
        - `norm`: called as `norm(dim)`; makes a module, e.g. [`equidit.RMSNorm`][].
        - `key`: initialises the weights.
        """
        self.norm = norm(dim)
        self.linear = Linear(dim, patch_size**2 * out_channels, init=zeros, key=key)

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens features"]:
        """**Arguments:**

        - `tokens`: of the image, after the last block.
        - `cond`: not read.

        **Returns:**

        One patch of `patch_size**2 * out_channels` features a token, for [`equidit.unpatchify`][].
        """
        return self.linear(self.norm(tokens))
