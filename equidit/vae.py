"""The Stable Diffusion autoencoder: images to the latents that a DiT sees, and back."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._base.common import Module, check_channels, check_positive, check_statistics
from .nn.attention import Attention
from .nn.convolutions import Conv, GroupNorm, Resnet
from .seams import Number, PRNGKey


class Gaussian(eqx.Module):
    """A normal distribution with independent entries: what an image is encoded to.

    **Fields:**

    - `mean`, `log_variance`: of the latent, in the units that a DiT sees.
    """

    mean: Float[Array, "channels height width"]
    log_variance: Float[Array, "channels height width"]

    def mode(self) -> Float[Array, "channels height width"]:
        """The most probable latent.

        **Returns:**

        The mean.
        """
        return self.mean

    def sample(self, key: PRNGKey) -> Float[Array, "channels height width"]:
        """A latent.

        **Arguments:**

        - `key`: that it is drawn with.

        **Returns:**

        One draw, in the shape and dtype of the mean.
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_variance / 2) * noise


class Autoencoder(Module):
    """The autoencoder of latent diffusion, diffusers' `AutoencoderKL`.

    Images are in [-1, 1]: see [`equidit.vae.check_range`][]. Latents are in the units that a DiT
    sees, `(z - shift_factor) * scaling_factor`, or with statistics of every channel
    `(z - latents_mean) * scaling_factor / latents_std`: nothing else in the library knows these.

    ??? cite

        [Rombach et al. 2022](https://arxiv.org/abs/2112.10752), section 3.1 and appendix G.
    """

    encoder: "_Coder"
    decoder: "_Coder"
    quant: Conv | None
    post_quant: Conv | None
    scaling_factor: float = eqx.field(static=True)
    shift_factor: float = eqx.field(static=True)
    latents_mean: tuple[float, ...] | None = eqx.field(static=True)
    latents_std: tuple[float, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: Number = 0.18215,
        shift_factor: Number = 0.0,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        latents_mean: Sequence[Number] | np.ndarray | Array | None = None,
        latents_std: Sequence[Number] | np.ndarray | Array | None = None,
        *,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `in_channels`, `out_channels`: of the images that go in and come out.
        - `latent_channels`: of the latents.
        - `block_out_channels`: channels at every resolution, from the image's down. Between two of
            them the side is halved, so four make latents of an eighth of the image's side.
        - `layers_per_block`: residual blocks at every resolution of the encoder; the decoder has
            one more.
        - `norm_num_groups`: of the group norms; must divide all of `block_out_channels`, else
            `ValueError`.
        - `scaling_factor`, `shift_factor`: from the autoencoder's units to the DiT's.
        - `use_quant_conv`, `use_post_quant_conv`: whether a 1x1 convolution follows the encoder,
            and one precedes the decoder.
        - `mid_block_add_attention`: whether the lowest resolution has self-attention.
        - `latents_mean`, `latents_std`: of every latent channel in the autoencoder's units, in
            place of `shift_factor`. `ValueError` unless both or neither are given, each with
            `latent_channels` finite numbers, and the deviations positive.
        - `key`: initialises the weights.
        """
        check_positive(
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            resolutions=len(block_out_channels),
        )
        if wrong := [c for c in block_out_channels if c < 1 or c % norm_num_groups]:
            raise ValueError(
                f"block_out_channels={block_out_channels} has {wrong[0]}, which is no positive "
                f"multiple of norm_num_groups={norm_num_groups}"
            )
        self.scaling_factor = float(scaling_factor)
        self.shift_factor = float(shift_factor)
        check_statistics(latents_mean, latents_std, self.shift_factor, latent_channels)
        self.latents_mean = None if latents_mean is None else tuple(map(float, latents_mean))
        self.latents_std = None if latents_std is None else tuple(map(float, latents_std))
        encoder_key, decoder_key, quant_key, post_quant_key = jax.random.split(key, 4)
        latent, moments, widths = latent_channels, 2 * latent_channels, tuple(block_out_channels)
        make = partial(_Coder, widths, groups=norm_num_groups, attention=mid_block_add_attention)
        self.encoder = make(in_channels, moments, layers_per_block, up=False, key=encoder_key)
        self.decoder = make(latent, out_channels, layers_per_block + 1, up=True, key=decoder_key)
        self.quant = Conv(moments, moments, 1, key=quant_key) if use_quant_conv else None
        self.post_quant = None
        if use_post_quant_conv:
            self.post_quant = Conv(latent, latent, 1, key=post_quant_key)

    @property
    def downsampling(self) -> int:
        """The side of an image in units of its latent's: 8 for Stable Diffusion's."""
        return 2 ** (len(self.encoder.stages) - 1)

    def encode(self, x: Float[Array, "channels height width"]) -> Gaussian:
        """**Arguments:**

        - `x`: one image in [-1, 1], of sides that `downsampling` divides, else `ValueError`.

        **Returns:**

        The distribution of its latent. The dtype is `x`'s; inside, the network computes in its
        parameters' dtype.
        """
        _check_channels("x", x, self.encoder.conv_in)
        factor = self.downsampling
        for name, side in zip(("height", "width"), x.shape[1:], strict=True):
            if side < 1 or side % factor:
                raise ValueError(
                    f"{name}={side} is not divisible by {factor}, the autoencoder's downsampling: "
                    "crop or resize the image"
                )
        moments = self.encoder(_enter(x, self.encoder.conv_in))
        if self.quant is not None:
            moments = self.quant(moments)
        mean, log_variance = jnp.split(_leave(moments, x), 2)
        shift, scale, log_scale = self._units(mean)
        return Gaussian((mean - shift) * scale, jnp.clip(log_variance, -30.0, 20.0) + 2 * log_scale)

    def decode(
        self, z: Float[Array, "channels height width"]
    ) -> Float[Array, "out {self.downsampling}*height {self.downsampling}*width"]:
        """**Arguments:**

        - `z`: one latent, as `encode` gives it and a DiT makes it. Any height and width.

        **Returns:**

        The image, `downsampling` times as high and wide, in [-1, 1] up to a little overshoot: clip
        it. The dtype is `z`'s.
        """
        _check_channels("z", z, self.decoder.conv_in)
        shift, scale, _ = self._units(z)
        unscaled = _enter(z / scale + shift, self.decoder.conv_in)
        if self.post_quant is not None:
            unscaled = self.post_quant(unscaled)
        return _leave(self.decoder(unscaled), z)

    def _units(self, like: Array) -> tuple[Any, Any, Any]:
        """Shift, scale and the scale's logarithm, from the autoencoder's units to the DiT's."""
        if self.latents_mean is None or self.latents_std is None:
            return self.shift_factor, self.scaling_factor, math.log(self.scaling_factor)
        scale = self.scaling_factor / np.array(self.latents_std)
        units = (np.array(self.latents_mean), scale, np.log(scale))
        shift, scale, log_scale = (jnp.asarray(u[:, None, None], like.dtype) for u in units)
        return shift, scale, log_scale


def check_range(images: Any) -> None:
    """`ValueError` unless all of `images` is finite and in [-1, 1].

    For the host, before images are encoded: values are unknown inside `jit` and `vmap`, and a check
    there would cost a synchronisation every step.

    **Arguments:**

    - `images`: floats of any shape.
    """
    images = np.asarray(images)
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.001 and high <= 1.001):  # NaN fails too.
        raise ValueError(
            f"images are in [{low:g}, {high:g}], but the autoencoder takes [-1, 1]: "
            "for bytes, x / 127.5 - 1"
        )


# Inside, channels are last: XLA's convolutions on CPUs are up to 1.4 times as fast so.


def _enter(
    x: Float[Array, "channels height width"], conv: Conv
) -> Float[Array, "height width channels"]:
    return jnp.moveaxis(x, 0, -1).astype(conv.weight.dtype)


def _leave(
    x: Float[Array, "height width channels"], like: Array
) -> Float[Array, "channels height width"]:
    return jnp.moveaxis(x, -1, 0).astype(like.dtype)


def _check_channels(name: str, x: Array, conv: Conv) -> None:
    channels = conv.weight.shape[1]
    check_channels(name, x, channels, f"the autoencoder takes {channels}")


class _Middle(Module):
    """Residual blocks of the lowest resolution, with self-attention of one head between them."""

    first: Resnet
    norm: GroupNorm | None
    attention: Attention | None
    second: Resnet

    def __init__(self, channels: int, groups: int, attention: bool, *, key: PRNGKey):
        first_key, attention_key, second_key = jax.random.split(key, 3)
        self.first = Resnet(channels, channels, groups, key=first_key)
        self.norm = GroupNorm(channels, groups) if attention else None
        self.attention = Attention(channels, 1, key=attention_key) if attention else None
        self.second = Resnet(channels, channels, groups, key=second_key)

    def __call__(
        self, x: Float[Array, "height width channels"]
    ) -> Float[Array, "height width channels"]:
        x = self.first(x)
        if self.norm is not None and self.attention is not None:
            tokens = self.norm(x).reshape(-1, x.shape[-1])
            x = x + self.attention(tokens).reshape(x.shape)
        return self.second(x)


class _Stage(Module):
    """The residual blocks of one resolution, and the convolution that leads to the next."""

    resnets: tuple[Resnet, ...]
    resample: Conv | None
    up: bool = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        groups: int,
        *,
        resample: bool,
        up: bool,
        key: PRNGKey,
    ):
        *keys, resample_key = jax.random.split(key, layers + 1)
        widths = (in_channels, *[channels] * layers)
        self.resnets = tuple(
            Resnet(a, b, groups, key=k)
            for a, b, k in zip(widths[:-1], widths[1:], keys, strict=True)
        )
        self.resample = Conv(channels, channels, key=resample_key) if resample else None
        self.up = up

    def __call__(
        self, x: Float[Array, "height width channels"]
    ) -> Float[Array, "rows columns out"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample is None:
            return x
        if self.up:
            return self.resample(jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1))
        # Padded below and on the right alone, as the published weights were trained.
        return self.resample.convolve(x, 2, ((0, 1), (0, 1)))


class _Coder(Module):
    """An encoder, from the image's resolution down; or with `up` a decoder, in the other order."""

    conv_in: Conv
    stages: tuple[_Stage, ...]
    middle: _Middle
    norm_out: GroupNorm
    conv_out: Conv
    up: bool = eqx.field(static=True)

    def __init__(
        self,
        widths: tuple[int, ...],
        in_channels: int,
        out_channels: int,
        layers: int,
        *,
        groups: int,
        attention: bool,
        up: bool,
        key: PRNGKey,
    ):
        in_key, middle_key, out_key, *keys = jax.random.split(key, 3 + len(widths))
        self.middle = _Middle(widths[-1], groups, attention, key=middle_key)
        widths = widths[::-1] if up else widths
        last = len(widths) - 1
        self.conv_in = Conv(in_channels, widths[0], key=in_key)
        self.stages = tuple(
            _Stage(a, b, layers, groups, resample=i < last, up=up, key=k)
            for i, (a, b, k) in enumerate(zip((widths[0], *widths[:-1]), widths, keys, strict=True))
        )
        self.norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], out_channels, key=out_key)
        self.up = up

    def __call__(
        self, x: Float[Array, "height width channels"]
    ) -> Float[Array, "rows columns out"]:
        x = self.conv_in(x)
        for layer in (self.middle, *self.stages) if self.up else (*self.stages, self.middle):
            x = layer(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))
