"""Convolutions, group norms and residual blocks of images, which have their channels last."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._base.common import Module, upcast
from ..seams import PRNGKey
from .layers import parameter

_lecun_normal = jax.nn.initializers.lecun_normal(in_axis=(1, 2, 3), out_axis=0)


class Conv(Module):
    """A square convolution that keeps the sides."""

    weight: Float[Array, "out channels kernel kernel"]
    bias: Float[Array, " out"]

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, *, key: PRNGKey):
        self.weight = _lecun_normal(key, (out_channels, in_channels, kernel, kernel))
        self.bias = jnp.zeros(out_channels)

    def __call__(
        self, x: Float[Array, "height width channels"]
    ) -> Float[Array, "height width out"]:
        return self.convolve(x, 1, "SAME")

    def convolve(
        self, x: Array, stride: int, padding: str | tuple[tuple[int, int], ...]
    ) -> Float[Array, "rows columns out"]:
        y = jax.lax.conv_general_dilated(
            x[None],
            parameter(self, "weight", "out channels kernel kernel"),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )[0]
        return y + parameter(self, "bias", "out")[None, None]


class GroupNorm(Module):
    """Each group of channels to mean 0 and variance 1, with a learned scale and shift."""

    scale: Float[Array, " channels"]
    shift: Float[Array, " channels"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, groups: int):
        self.scale, self.shift = jnp.ones(channels), jnp.zeros(channels)
        self.groups = groups

    def __call__(
        self, x: Float[Array, "height width channels"]
    ) -> Float[Array, "height width channels"]:
        y = upcast(x).reshape(*x.shape[:2], self.groups, -1)
        y = y - y.mean(axis=(0, 1, 3), keepdims=True)
        variance = jnp.square(y).mean(axis=(0, 1, 3), keepdims=True)
        y = (y * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape).astype(x.dtype)
        return y * self.scale[None, None] + self.shift[None, None]


class Resnet(Module):
    """Two convolutions, each after a norm and SiLU, added to the input."""

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Conv | None

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, key: PRNGKey):
        key1, key2, shortcut_key = jax.random.split(key, 3)
        self.norm1 = GroupNorm(in_channels, groups)
        self.conv1 = Conv(in_channels, out_channels, key=key1)
        self.norm2 = GroupNorm(out_channels, groups)
        self.conv2 = Conv(out_channels, out_channels, key=key2)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = Conv(in_channels, out_channels, 1, key=shortcut_key)

    def __call__(
        self, x: Float[Array, "height width channels"]
    ) -> Float[Array, "height width out"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y
