"""Layers: linear, MLPs, norms, modulation, and the network's last."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._base.arguments import renamed
from .._base.common import Module, check_positive
from ..seams import Conditioning, Number, PRNGKey, TokenMap
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
        return affine(x, weight, bias)


def weight_and_bias(layer: Linear) -> tuple[Array, Array]:
    """A linear layer's parameters, as the arrays that they must be."""
    weight, bias = parameter(layer, "weight", "out features"), parameter(layer, "bias", "out")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"Linear.bias has {bias.shape[0]} entries, but Linear.weight {weight.shape[0]} rows: "
            "put one of the old one's shape in its place"
        )
    return weight, bias


def mlp_size(dim: int, mlp_ratio: Number) -> int:
    """An MLP's hidden size; `ValueError` if it is below 1."""
    size = int(dim * mlp_ratio)
    if size < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP of dim={dim} no hidden features")
    return size


def affine(x: Array, weight: Array, bias: Array) -> Array:
    """`x @ weight.T + bias`, on the last axis."""
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


@jax.named_scope("modulation")
def modulation(layer: Callable[[Array], Array], cond: Conditioning, count: int) -> list[Array]:
    """Shifts, scales and gates: `count` vectors that a layer makes of the conditioning's."""
    return jnp.split(layer(jax.nn.silu(cond.vector)), count)


class FinalLayer(Module):
    """The last layer: adaptive layer norm, then a linear map to patches. Zero at initialisation.

    ??? cite

        Section 3.2, "Transformer decoder", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    modulation: Linear
    linear: Linear
    norm: TokenMap = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        patch_size: int,
        out_channels: int,
        *,
        norm: TokenMap = layer_norm,
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
        shift, scale = modulation(self.modulation, cond, 2)
        return self.linear(modulate(self.norm(tokens), shift, scale))


class PlainFinalLayer(Module):
    """The last layer of the paper's designs without adaptive norms: a learned layer norm, then a
    linear map to patches, zero at initialisation. Does not read the conditioning.

    ??? cite

        Section 3.2, "Transformer decoder", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    norm: TokenMap
    linear: Linear

    @renamed(norm="make_norm")
    def __init__(
        self,
        dim: int,
        patch_size: int,
        out_channels: int,
        *,
        make_norm: Callable[[int], TokenMap] = LayerNorm,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `patch_size`: side of a patch, in pixels of the input.
        - `out_channels`: channels of the network's output, those of the variance among them.
        - `make_norm`: called as `make_norm(dim)`, e.g. [`equidit.RMSNorm`][]. `norm` is its former
            name.
        - `key`: initialises the weights.
        """
        self.norm = make_norm(dim)
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
