"""Folders of diffusers' `AutoencoderKL`, loaded and saved."""

import dataclasses
import re
from typing import Any

import equinox as eqx
import jax

from .._base.common import check_statistics
from ..seams import StrPath
from ..vae import Autoencoder
from .files import Tensor, Weights, weights_of
from .folders import open_folder, write_folder
from .sizes import Declared, count, shapes_of
from .tables import Table, export, fill, name_of

_CLASS = "AutoencoderKL"


def _coder(ours: str, theirs: str, resample: str) -> dict[str, str | tuple[str, ...]]:
    middle, attention = f"{theirs}.mid_block", f"{theirs}.mid_block.attentions.0"
    resnets = {
        f"{ours}.stages.*.resnets.*": f"{theirs}.{resample}_blocks.*.resnets.*",
        f"{ours}.middle.first": f"{middle}.resnets.0",
        f"{ours}.middle.second": f"{middle}.resnets.1",
    }
    layers = ("norm1", "conv1", "norm2", "conv2")
    return {
        f"{ours}.conv_in": f"{theirs}.conv_in",
        **{f"{a}.{layer}": f"{b}.{layer}" for a, b in resnets.items() for layer in layers},
        **{f"{a}.shortcut": f"{b}.conv_shortcut" for a, b in resnets.items()},
        f"{ours}.stages.*.resample": f"{theirs}.{resample}_blocks.*.{resample}samplers.0.conv",
        f"{ours}.middle.norm": f"{attention}.group_norm",
        f"{ours}.middle.attention.qkv": tuple(f"{attention}.to_{x}" for x in "qkv"),
        f"{ours}.middle.attention.out": f"{attention}.to_out.0",
        f"{ours}.norm_out": f"{theirs}.conv_norm_out",
        f"{ours}.conv_out": f"{theirs}.conv_out",
    }


AUTOENCODER: Table = {
    **_coder("encoder", "encoder", "down"),
    **_coder("decoder", "decoder", "up"),
    "quant": "quant_conv",
    "post_quant": "post_quant_conv",
}

# What diffusers' class takes where a config does not say it.
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(_ATTENTION)})(?=\.)")


def load_vae(path: StrPath) -> Autoencoder:
    """An autoencoder from a folder of diffusers' `AutoencoderKL`, or of a pipeline with one.

    **Arguments:**

    - `path`: a folder with `config.json` and `diffusion_pytorch_model.safetensors` or `.bin` (needs
        PyTorch), or a pipeline's folder with such a one as `vae`. Both generations of diffusers'
        names for the attention are read.

    **Returns:**

    The autoencoder, with float32 weights and the factors of its config.

    **Raises:**

    As [`equidit.pretrained.load_diffusers_dit`][].
    """
    anchor = name_of(AUTOENCODER, "encoder.conv_in.weight")
    weights, declared = open_folder(path, (_CLASS,), subfolder="vae", anchor=anchor)
    weights = _modern_attention(weights)
    return fill(_skeleton(weights, declared), AUTOENCODER, weights)


def _modern_attention(weights: Weights) -> Weights:
    """The attention's layers under their newer names, as matrices rather than 1x1 convolutions."""
    modern: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        new = _OLD_ATTENTION.sub(lambda match: _ATTENTION[match[1]], name)
        if new in modern:
            raise ValueError(f"{weights.source} holds {new} twice, under an older and a newer name")
        if ".attentions.0." in new and tensor.shape[2:] == (1, 1):
            shape, read = tensor.shape[:2], tensor.read
            tensor = Tensor(shape, lambda read=read, shape=shape: read().reshape(shape))
        modern[new] = tensor
    return dataclasses.replace(weights, tensors=modern)


def _sizes(weights: Weights) -> dict[str, Any]:
    """What the weights tell of diffusers' config."""

    def holds(module: str) -> bool:
        return name_of(AUTOENCODER, f"{module}.weight") in weights.tensors

    def shape(module: str) -> tuple[int, ...]:
        name = name_of(AUTOENCODER, f"{module}.weight")
        return shapes_of(weights, "an autoencoder", {name: 4})[0]

    first = name_of(AUTOENCODER, "encoder.stages.0.resnets.0.conv1.weight")
    stages = count(weights, first.partition("0")[0])
    return {
        "block_out_channels": [
            shape(f"encoder.stages.{i}.resnets.0.conv1")[0] for i in range(stages)
        ],
        "in_channels": shape("encoder.conv_in")[1],
        "latent_channels": shape("decoder.conv_in")[1],
        "layers_per_block": count(weights, first.rpartition("0")[0]),
        "mid_block_add_attention": holds("encoder.middle.attention.out"),
        "out_channels": shape("decoder.conv_out")[0],
        "use_post_quant_conv": holds("post_quant"),
        "use_quant_conv": holds("quant"),
    }


def _skeleton(weights: Weights, declared: Declared) -> Autoencoder:
    """The autoencoder, with shapes in place of arrays."""
    sizes = _sizes(weights)
    declared = declared.filled(_DEFAULTS)
    declared.check_agrees(sizes, weights)
    widths = sizes["block_out_channels"]
    declared.check_fixed(_fixed(len(widths)))
    scale, shift = declared.fields["scaling_factor"], declared.fields["shift_factor"] or 0.0
    for name, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise ValueError(f"{declared.source}: {name}={value!r} must be a finite number")
    if scale <= 0:
        raise ValueError(f"{declared.source}: scaling_factor={scale} must be positive")
    mean, std = declared.fields["latents_mean"], declared.fields["latents_std"]
    try:
        check_statistics(mean, std, shift, sizes["latent_channels"])
    except ValueError as error:
        raise ValueError(f"{declared.source}: {error}") from None
    groups = declared.positive("norm_num_groups")
    if any(width % groups for width in widths):
        raise ValueError(f"{declared.source}: norm_num_groups={groups} must divide all of {widths}")
    return eqx.filter_eval_shape(
        Autoencoder,
        **sizes | {"block_out_channels": tuple(widths)},
        norm_num_groups=groups,
        scaling_factor=scale,
        shift_factor=shift,
        latents_mean=mean,
        latents_std=std,
        key=jax.random.key(0),
    )


def _fixed(stages: int) -> dict[str, str | list[str]]:
    """What only one value is supported for."""
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
    }


def save_vae(vae: Autoencoder, path: StrPath) -> None:
    """Writes a folder that diffusers' `AutoencoderKL.from_pretrained` reads.

    **Arguments:**

    - `vae`: the autoencoder.
    - `path`: the folder. It is written as a whole, and replaces one of the same class.

    **Raises:**

    `FileExistsError` if `path` holds something else.
    """
    arrays = export(vae, AUTOENCODER)
    sizes = _sizes(weights_of(arrays, "the autoencoder"))
    config = {
        "_class_name": _CLASS,
        "latents_mean": vae.latents_mean,
        "latents_std": vae.latents_std,
        "norm_num_groups": vae.encoder.norm_out.groups,
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor or None,
    }
    fixed = _fixed(len(sizes["block_out_channels"]))
    write_folder(path, config | sizes | fixed, arrays)
