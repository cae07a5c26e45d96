"""Published weights, read and written: official DiT files, and diffusers' folders of DiTs and VAEs.

**Two arithmetics.** diffusers' `DiTTransformer2DModel` holds the official weights, but computes
something else than the network that they were trained in: the frequencies of its
timestep features are `10000 ** (-i / 127)`, not `10000 ** (-i / 128)`, and the norm before its MLPs
has an epsilon of 1e-5, not 1e-6. `arithmetic="official"` is what the weights were trained in,
`"diffusers"` gives the same pictures as `DiTPipeline`.

**Safety.** Nothing in a file is executed, and nothing is allocated on its word. Weights are loaded
as float32, whatever the file has, without a random initialisation on the way.

**The hub.** Where a path does not exist, `owner/name` is downloaded by huggingface-hub. Official
files are `owner/name/file.pt`.
"""

import logging
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ._blocks import AdaLNZeroBlock
from ._conditioning import LabelConditioner
from ._dit import DiT
from ._files import (
    StrPath,
    Tensor,
    Weights,
    find,
    from_arrays,
    read_config,
    read_file,
    read_folder,
    write_folder,
)
from ._layers import Attention
from ._names import AUTOENCODER, DIFFUSERS, OFFICIAL, export, fill, modern_attention
from ._ops import layer_norm, sincos_2d, timestep_features
from .configs import CONFIGS
from .vae import Autoencoder

# Each made once: networks are compared, and compiled, by the identity of their functions.
_FEATURES = partial(timestep_features, endpoint=True)
_NORM_MLP = partial(layer_norm, eps=1e-5)
_PUBLISHED = {"hidden_size": 1152, "depth": 28, "patch_size": 2, "num_classes": 1000}
_log = logging.getLogger(__name__)
_told: set[str] = set()


def load_dit(
    path: StrPath,
    *,
    num_heads: int | None = None,
    ema: bool = True,
    arithmetic: str = "official",
) -> DiT:
    """A DiT from an official file: `DiT-XL-2-256x256.pt`, or a checkpoint of official training.

    Sizes are taken from the arrays' shapes. SiT's files have the same layout: its networks were
    trained with times in [0, 1], and are called with those.

    **Arguments:**

    - `path`: a `.pt` (needs PyTorch) or `.safetensors` file with the state dict, or a `.pt` file
        with a dictionary of `"model"`, `"ema"`, `"opt"` and `"args"`.
    - `num_heads`: attention heads, which no array tells. `None` takes those of the model that the
        file's own arguments name, else of the row of [`equidit.CONFIGS`][] of this depth and width.
    - `ema`: whether to prefer the averaged weights of a checkpoint to the trained ones.
    - `arithmetic`: `"official"` or `"diffusers"`, see above.

    **Raises:**

    `FileNotFoundError`; `ValueError` if the file is damaged or holds anything but weights, if names
    or shapes are not those of a DiT (it lists both sides), and if the head count is unknown.
    """
    local = find(path, file=True)
    weights, args = read_file(local, ema=ema)
    return _from_official(weights, args, num_heads, arithmetic, str(local))


def from_state_dict(
    arrays: Mapping[str, Any], *, num_heads: int | None = None, arithmetic: str = "official"
) -> DiT:
    """[`equidit.pretrained.load_dit`][] for arrays in memory, under the official names."""
    return _from_official(from_arrays(arrays), None, num_heads, arithmetic, "the state dict")


def _from_official(
    weights: Weights, args: Any, num_heads: int | None, arithmetic: str, source: str
) -> DiT:
    weights = dict(weights)
    positions = weights.pop("pos_embed", None)
    sizes = _sizes_of_official({name: tensor.shape for name, tensor in weights.items()}, source)
    heads = _num_heads(args, sizes, source) if num_heads is None else num_heads
    network = fill(_skeleton(arithmetic, num_heads=heads, **sizes), OFFICIAL, weights, source)
    if positions is not None:
        _check_positions(positions, sizes["hidden_size"], source)
    _tell_licence(sizes)
    return network


def _sizes_of_official(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Any]:
    keys = {
        "x_embedder.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.bias": 1,
    }
    if wrong := [name for name, rank in keys.items() if len(shapes.get(name, ())) != rank]:
        raise ValueError(
            f"{source} is no state dict of an official DiT: missing or of another shape are "
            f"{', '.join(wrong)}; it holds {', '.join(sorted(shapes)[:20]) or 'nothing'}"
        )
    patch, table, mlp, final = (shapes[name] for name in keys)
    hidden_size, in_channels, patch_size, _ = patch
    blocks = {m[1] for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}
    features = in_channels * patch_size**2
    if not features or final[0] not in (features, 2 * features):
        raise ValueError(
            f"{source}: final_layer.linear.bias has {final[0]} entries, which is neither "
            f"{features}, the patches' size, nor twice that, with a learned variance"
        )
    return {
        "in_channels": in_channels,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": len(blocks),
        "num_classes": table[0] - 1,
        "mlp_hidden": mlp[0],
        "learn_sigma": final[0] == 2 * features,
    }


def _num_heads(args: Any, sizes: dict[str, Any], source: str) -> int:
    options = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    if isinstance(options.get("num_heads"), int):
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


def _check_positions(positions: Tensor, dim: int, source: str) -> None:
    side = math.isqrt(positions.shape[1]) if len(positions.shape) == 3 else 0
    if side < 1 or positions.shape != (1, side * side, dim):
        raise ValueError(
            f"{source}: pos_embed is {positions.shape}, not (1, a square number, {dim})"
        )
    # Half precision keeps three digits.
    if not np.allclose(positions.read()[0], sincos_2d(dim, (side, side)), rtol=0, atol=5e-3):
        raise ValueError(f"{source}: pos_embed is not the sine-cosine table that DiT computes")


def _skeleton(
    arithmetic: str,
    *,
    in_channels: int,
    patch_size: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    num_classes: int,
    mlp_hidden: int,
    learn_sigma: bool,
    remat: str | None = None,
    attention: Any = Attention,
) -> DiT:
    """The network, with shapes in place of arrays."""
    if arithmetic not in ("official", "diffusers"):
        raise ValueError(f"arithmetic={arithmetic!r} must be 'official' or 'diffusers'")
    theirs = arithmetic == "diffusers"

    def make(key: jax.Array) -> DiT:
        return DiT(
            in_channels,
            patch_size,
            hidden_size,
            depth,
            num_heads,
            None,
            # `int(hidden_size * mlp_ratio)` must not fall below.
            mlp_ratio=math.nextafter(mlp_hidden / hidden_size, math.inf),
            learn_sigma=learn_sigma,
            block=partial(
                AdaLNZeroBlock, attention=attention, norm_mlp=_NORM_MLP if theirs else None
            ),
            conditioner=LabelConditioner(
                num_classes, hidden_size, features=_FEATURES if theirs else None, key=key
            ),
            remat=remat,
            key=key,
        )

    return eqx.filter_eval_shape(make, jax.random.key(0))


def _tell_licence(sizes: dict[str, Any]) -> None:
    if _PUBLISHED.items() <= sizes.items() and not _told:
        _told.add("licence")
        _log.warning(
            "the published DiT-XL/2 weights are under CC-BY-NC 4.0, for non-commercial use: "
            "https://github.com/facebookresearch/DiT/blob/main/LICENSE.txt"
        )


_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}


def load_diffusers_dit(path: StrPath, *, arithmetic: str) -> DiT:
    """A DiT from a folder of diffusers' `DiTTransformer2DModel`, or of its `DiTPipeline`.

    **Arguments:**

    - `path`: a folder with `config.json` and `diffusion_pytorch_model.safetensors` or `.bin` (needs
        PyTorch), or a pipeline's folder with such a one as `transformer`.
    - `arithmetic`: `"official"` or `"diffusers"`, see above. For published weights the former is
        what they were trained in, for a model trained in diffusers the latter.

    **Raises:**

    As [`equidit.pretrained.load_dit`][]; `ValueError` also for a config of another kind of model,
    and if the blocks' own embedders of timestep and label differ: here one serves all.
    """
    folder = find(path, subfolder="transformer")
    config = read_config(folder, "DiTTransformer2DModel")
    _check_fixed(config, _FIXED, folder)
    try:
        heads, channels = config["num_attention_heads"], config["in_channels"]
        hidden_size = heads * config["attention_head_dim"]
        out_channels = config.get("out_channels") or channels
        sizes = {
            "in_channels": channels,
            "patch_size": config["patch_size"],
            "hidden_size": hidden_size,
            "depth": config["num_layers"],
            "num_classes": config["num_embeds_ada_norm"],
            "mlp_hidden": 4 * hidden_size,
            "learn_sigma": out_channels == 2 * channels,
        }
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}") from error
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{folder / 'config.json'}: out_channels={out_channels} is neither "
            f"in_channels={channels} nor twice that"
        )
    weights, file = read_folder(folder)
    network = fill(_skeleton(arithmetic, num_heads=heads, **sizes), DIFFUSERS, weights, str(file))
    _tell_licence(sizes)
    return network


def save_diffusers_dit(
    network: DiT, path: StrPath, *, sample_size: int = 32, allow_mismatch: bool = False
) -> None:
    """Writes a folder that diffusers' `DiTTransformer2DModel.from_pretrained` reads.

    **Arguments:**

    - `network`: a DiT of adaLN-Zero blocks and labels.
    - `path`: the folder; made if need be.
    - `sample_size`: height and width of the latents, which diffusers' model is limited to.
    - `allow_mismatch`: whether to write a network of the official arithmetic, from whose outputs
        diffusers' then depart.

    **Raises:**

    `ValueError` for a network of the official arithmetic without `allow_mismatch`, and for one that
    diffusers' model cannot express.
    """
    kind = _kind_of(network)
    if kind is None:
        raise ValueError(
            "diffusers' DiT has adaLN-Zero blocks with GELU MLPs of 4 times the width, layer "
            "norms, a timestep and a label; this network has something else"
        )
    if kind == "official" and not allow_mismatch:
        raise ValueError(
            "this network's timestep frequencies and norms are the official ones, and diffusers "
            "would compute something else from its weights: train or load it with "
            "arithmetic='diffusers', or pass allow_mismatch=True"
        )
    attention = network.blocks.blocks.attention
    hidden_size = network.patch_embed.weight.shape[0]
    config = {
        "_class_name": "DiTTransformer2DModel",
        "attention_head_dim": hidden_size // attention.num_heads,
        "in_channels": network.in_channels,
        "num_attention_heads": attention.num_heads,
        "num_embeds_ada_norm": network.conditioner.null,
        "num_layers": network.blocks.depth,
        "out_channels": network.out_channels,
        "patch_size": network.patch_size,
        "sample_size": sample_size,
    }
    write_folder(path, config | _FIXED, export(network, DIFFUSERS))


def _kind_of(network: DiT) -> str | None:
    """Which arithmetic a network has: that whose skeleton, for its sizes, is the same."""
    try:
        block = network.blocks.blocks
        sizes: dict[str, Any] = {
            "in_channels": network.in_channels,
            "patch_size": network.patch_size,
            "hidden_size": network.patch_embed.weight.shape[0],
            "depth": network.blocks.depth,
            "num_heads": block.attention.num_heads,
            "num_classes": network.conditioner.null,
            "mlp_hidden": 4 * network.patch_embed.weight.shape[0],
            "learn_sigma": network.out_channels != network.in_channels,
            "remat": network.blocks.remat,
            "attention": partial(Attention, attend=block.attention.attend),
        }
    except AttributeError:
        return None
    for arithmetic in ("official", "diffusers"):
        skeleton = _skeleton(arithmetic, **sizes)
        if jax.tree.structure(network) == jax.tree.structure(skeleton) and all(
            a.shape == b.shape
            for a, b in zip(jax.tree.leaves(network), jax.tree.leaves(skeleton), strict=True)
        ):
            return arithmetic
    return None


def load_vae(path: StrPath) -> Autoencoder:
    """An autoencoder from a folder of diffusers' `AutoencoderKL`, or of a pipeline with one.

    **Arguments:**

    - `path`: a folder with `config.json` and `diffusion_pytorch_model.safetensors` or `.bin` (needs
        PyTorch), or a pipeline's folder with such a one as `vae`. Both generations of diffusers'
        names for the attention are read.

    **Raises:**

    As [`equidit.pretrained.load_diffusers_dit`][].
    """
    folder = find(path, subfolder="vae")
    config = read_config(folder, "AutoencoderKL")
    widths = tuple(config.get("block_out_channels", (64,)))
    fixed = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latents_mean": None,
        "latents_std": None,
    }
    _check_fixed(config, fixed, folder)
    skeleton = eqx.filter_eval_shape(
        Autoencoder,
        config.get("in_channels", 3),
        config.get("out_channels", 3),
        config.get("latent_channels", 4),
        widths,
        config.get("layers_per_block", 1),
        config.get("norm_num_groups", 32),
        config.get("scaling_factor", 0.18215),
        config.get("shift_factor") or 0.0,
        config.get("use_quant_conv", True),
        config.get("use_post_quant_conv", True),
        config.get("mid_block_add_attention", True),
        key=jax.random.key(0),
    )
    weights, file = read_folder(folder)
    return fill(skeleton, AUTOENCODER, modern_attention(weights, file), str(file))


def _check_fixed(config: dict[str, Any], fixed: dict[str, Any], folder: Any) -> None:
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{folder / 'config.json'}: {name}={config[name]!r} is not supported, "
                f"only {value!r}"
            )


def save_vae(vae: Autoencoder, path: StrPath) -> None:
    """Writes a folder that diffusers' `AutoencoderKL.from_pretrained` reads.

    **Arguments:**

    - `vae`: the autoencoder.
    - `path`: the folder; made if need be.
    """
    encoder, decoder = vae.encoder, vae.decoder
    widths = [stage.resnets[0].conv1.weight.shape[0] for stage in encoder.stages]
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": encoder.conv_in.weight.shape[1],
        "latent_channels": decoder.conv_in.weight.shape[1],
        "layers_per_block": len(encoder.stages[0].resnets),
        "mid_block_add_attention": encoder.middle.attention is not None,
        "norm_num_groups": encoder.norm_out.groups,
        "out_channels": decoder.conv_out.weight.shape[0],
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor or None,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_post_quant_conv": vae.post_quant is not None,
        "use_quant_conv": vae.quant is not None,
    }
    write_folder(path, config, export(vae, AUTOENCODER))
