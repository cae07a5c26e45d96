"""How large the networks in files are: told by the arrays' shapes, with which a config must agree.

The arrays lie within their file, so what is built to these sizes is no larger than it deserves.
"""

import math
import re
from typing import Any

from .._base.common import check_statistics
from .._base.texts import brief
from ..configs import CONFIGS, Config
from .files import Tensor, Weights
from .names import AUTOENCODER, DIFFUSERS, OFFICIAL, Table, name_of

Shapes = dict[str, tuple[int, ...]]

FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}


def shapes_of(weights: Weights) -> Shapes:
    return {name: tensor.shape for name, tensor in weights.items()}


def official_config(weights: Weights, args: Any, num_heads: int | None, source: str) -> Config:
    """The sizes of an official DiT; without `num_heads`, what `args` or CONFIGS say."""
    sizes = _dit_sizes(shapes_of(weights), OFFICIAL, "an official DiT", source)
    if num_heads is None:
        num_heads = _num_heads(args, sizes, source)
    if num_heads < 1 or sizes["hidden_size"] % num_heads:
        raise ValueError(
            f"{source}: num_heads={num_heads} does not divide hidden_size={sizes['hidden_size']}"
        )
    return Config(num_heads=num_heads, **sizes)


def diffusers_config(weights: Weights, config: dict[str, Any], path: Any, source: str) -> Config:
    """The sizes of diffusers' DiT; `path` is the config's."""
    check_fixed(config, FIXED, path)
    names = ("num_attention_heads", "attention_head_dim", "in_channels")
    required = (*names, "patch_size", "num_layers", "num_embeds_ada_norm")
    if missing := [name for name in required if name not in config]:
        raise ValueError(f"{path} lacks {missing[0]!r}")
    heads, head_dim, channels = (positive(config, name, path) for name in names)
    sizes = _dit_sizes(shapes_of(weights), DIFFUSERS, "diffusers' DiT", source)
    found = {
        "in_channels": sizes["in_channels"],
        "patch_size": sizes["patch_size"],
        "num_layers": sizes["depth"],
        "num_embeds_ada_norm": sizes["num_classes"],
        "out_channels": sizes["in_channels"] * (1 + sizes["learn_sigma"]),
    }
    theirs = config | {"out_channels": config.get("out_channels") or channels}
    _check_agrees(theirs, found, path, source)
    if heads * head_dim != sizes["hidden_size"]:
        raise ValueError(
            f"{path}: num_attention_heads={heads} of attention_head_dim={head_dim} make "
            f"{heads * head_dim}, but the tokens of {source} have {sizes['hidden_size']}"
        )
    return Config(num_heads=heads, **sizes)


def _dit_sizes(shapes: Shapes, table: Table, kind: str, source: str) -> dict[str, Any]:
    ranks = {
        name_of(table, "patch_embed.weight"): 4,
        name_of(table, "conditioner.label.table"): 2,
        name_of(table, "blocks.blocks.mlp.up.weight"): 2,
        name_of(table, "final.linear.bias"): 1,
    }
    if wrong := [name for name, rank in ranks.items() if not _full(shapes.get(name, ()), rank)]:
        raise ValueError(
            f"{source} is no state dict of {kind}: missing or of another shape are "
            f"{', '.join(wrong)}; it holds {_names(shapes)}"
        )
    patch, labels, mlp, final = (shapes[name] for name in ranks)
    hidden_size, in_channels, patch_size, _ = patch
    for name in list(ranks)[1:3]:
        if shapes[name][1] != hidden_size:
            raise ValueError(
                f"{source}: {name} is {shapes[name]}, but the patches' weights {patch} make tokens "
                f"of {hidden_size}"
            )
    features = in_channels * patch_size**2
    if final[0] not in (features, 2 * features):
        raise ValueError(
            f"{source}: {list(ranks)[3]} has {final[0]} entries, which is neither "
            f"{features}, the patches' size, nor twice that, with a learned variance"
        )
    blocks = name_of(table, "blocks.blocks.modulation.weight").partition("0")[0]
    ratio = mlp[0] / hidden_size
    if int(hidden_size * ratio) != mlp[0]:
        ratio = math.nextafter(ratio, math.inf)
    return {
        "in_channels": in_channels,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": _count(shapes, blocks),
        "num_classes": labels[0] - 1,
        "mlp_ratio": ratio,
        "learn_sigma": final[0] == 2 * features,
    }


def _names(shapes: Shapes) -> str:
    return brief(", ".join(sorted(shapes)[:20]) or "nothing", 1000)


def _full(shape: tuple[int, ...], rank: int) -> bool:
    return len(shape) == rank and 0 not in shape


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow the prefix in names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def _options(args: Any) -> dict[str, Any]:
    return args if isinstance(args, dict) else getattr(args, "__dict__", {})


def is_sit(args: Any, file: str) -> bool:
    """Whether a file's arguments or its name say that it is a SiT."""
    return str(_options(args).get("model")).startswith("SiT-") or file.startswith("SiT")


def _num_heads(args: Any, sizes: dict[str, Any], source: str) -> int:
    options = _options(args)
    if type(options.get("num_heads")) is int:
        return options["num_heads"]
    named = CONFIGS.get(re.sub("^SiT", "DiT", str(options.get("model"))))
    size = (sizes["hidden_size"], sizes["depth"])
    for row in (named, *CONFIGS.values()):
        if row is not None and (row.hidden_size, row.depth) == size:
            return row.num_heads
    raise ValueError(
        f"{source}: the number of attention heads is unknown, since no array tells it and no row "
        f"of CONFIGS has hidden_size={size[0]} and depth={size[1]}: pass num_heads="
    )


def grid_side(positions: Tensor, dim: int, source: str) -> int:
    """The side of the grid of patches that `pos_embed` is for."""
    side = math.isqrt(positions.shape[1]) if len(positions.shape) == 3 else 0
    if side < 1 or positions.shape != (1, side * side, dim):
        raise ValueError(
            f"{source}: pos_embed is {positions.shape}, not (1, a square number, {dim})"
        )
    return side


def autoencoder_sizes(
    weights: Weights, config: dict[str, Any], path: Any, source: str
) -> dict[str, Any]:
    """The arguments of `Autoencoder`; `path` is the config's."""
    shapes = shapes_of(weights)

    def shape(leaf: str) -> tuple[int, ...]:
        name = name_of(AUTOENCODER, leaf)
        if not _full(shapes.get(name, ()), 4):
            raise ValueError(
                f"{source} is no state dict of an autoencoder: {name} is missing or of another "
                f"shape; it holds {_names(shapes)}"
            )
        return shapes[name]

    first = name_of(AUTOENCODER, "encoder.stages.0.resnets.0.conv1.weight")
    stages, resnets = first.partition("0")[0], first.rpartition("0")[0]
    widths = [
        shape(f"encoder.stages.{i}.resnets.0.conv1.weight")[0]
        for i in range(_count(shapes, stages))
    ]
    attention = name_of(AUTOENCODER, "encoder.middle.attention.out.weight")
    found = {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, resnets),
        "use_quant_conv": name_of(AUTOENCODER, "quant.weight") in shapes,
        "use_post_quant_conv": name_of(AUTOENCODER, "post_quant.weight") in shapes,
        "mid_block_add_attention": attention in shapes,
    }
    defaults = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }
    theirs = defaults | config
    _check_agrees(theirs, found, path, source)
    fixed = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    check_fixed(config, fixed, path)
    factors = {
        "scaling_factor": config.get("scaling_factor", 0.18215),
        "shift_factor": config.get("shift_factor") or 0.0,
    }
    for name, value in factors.items():
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise ValueError(f"{path}: {name}={value!r} must be a finite number")
    if factors["scaling_factor"] <= 0:
        raise ValueError(f"{path}: scaling_factor={factors['scaling_factor']} must be positive")
    shift, channels = factors["shift_factor"], found["latent_channels"]
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    try:
        check_statistics(mean, std, shift, channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    groups = positive(theirs, "norm_num_groups", path)
    if any(width % groups for width in widths):
        raise ValueError(f"{path}: norm_num_groups={groups} must divide all of {widths}")
    theirs = {"norm_num_groups": groups, "block_out_channels": tuple(widths)}
    return found | factors | theirs | {"latents_mean": mean, "latents_std": std}


def _check_agrees(config: dict[str, Any], found: dict[str, Any], path: Any, source: str) -> None:
    for name, value in found.items():
        if type(config[name]) is not type(value) or config[name] != value:
            raise ValueError(
                f"{path}: {name}={brief(repr(config[name]))}, but the weights in {source} "
                f"have {value}"
            )


def check_fixed(config: dict[str, Any], fixed: dict[str, Any], path: Any) -> None:
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name}={brief(repr(config[name]))} is not supported, only {value!r}"
            )


def positive(config: dict[str, Any], name: str, path: Any) -> int:
    value = config[name]
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{path}: {name}={brief(repr(value))} must be a positive whole number")
    return value
