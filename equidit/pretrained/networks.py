"""Published networks and autoencoders, loaded and saved."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np

from .._base.texts import choose_from
from ..configs import Config
from ..nn.attention import Attention
from ..nn.blocks import AdaLNZeroBlock
from ..nn.conditioning import LabelConditioner
from ..nn.dit import DiT
from ..nn.ops import layer_norm, sincos_2d, timestep_features
from ..seams import StrPath
from ..vae import Autoencoder
from .files import (
    Weights,
    find,
    is_file,
    read_config,
    read_file,
    read_folder,
    weights_of,
    write_folder,
)
from .names import AUTOENCODER, DIFFUSERS, OFFICIAL, Table, export, fill, modern_attention, name_of
from .sizes import (
    FIXED,
    autoencoder_sizes,
    diffusers_config,
    grid_side,
    is_sit,
    official_config,
    positive,
)
from .unwrap import network_in

# Each made once: networks are compared, and compiled, by the identity of their functions.
_FEATURES = partial(timestep_features, endpoint=True)
_NORM_MLP = partial(layer_norm, eps=1e-5)
_PUBLISHED = {"hidden_size": 1152, "depth": 28, "patch_size": 2, "num_classes": 1000}
_log = logging.getLogger(__name__)
_told: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Published:
    """What a file or folder of weights holds: see [`equidit.pretrained.describe`][].

    **Fields:**

    - `config`: the network's sizes.
    - `sample_size`: height and width of the latents that it was made for, or `None` if the file
        does not tell.
    - `time`: `"steps"` if the network is told the time in diffusion steps, `"unit"` if in [0, 1],
        as SiT's are.
    - `kind`: `"official"` for a file, to be read by [`equidit.pretrained.load_dit`][]; or
        `"diffusers"` for a folder, by [`equidit.pretrained.load_diffusers_dit`][].
    """

    config: Config
    sample_size: int | None
    time: Literal["steps", "unit"]
    kind: Literal["official", "diffusers"]


def describe(
    path: StrPath, *, num_heads: int | None = None, select: str | None = None
) -> Published:
    """What a file or folder with a DiT holds, from its headers and config: no weights are read.

    From the hub, though, it is the whole file that is downloaded, and kept.

    **Arguments:**

    - `path`: a file for [`equidit.pretrained.load_dit`][], or a folder for
        [`equidit.pretrained.load_diffusers_dit`][]. A SiT is told by the model's name in the file's
        own arguments, or else by a file name that begins with `SiT`.
    - `num_heads`, `select`: as for `load_dit`. A folder's config has its own heads, and there is
        nothing to select.

    **Returns:**

    What it holds.

    **Raises:**

    As those functions do for damaged files and other networks, as far as names and shapes tell;
    `ValueError` if a folder's config has another `num_heads`, or one is to be selected from.
    """
    if not is_file(path):
        if select is not None:
            raise ValueError(f"select={select!r} is for a file: the folder {path} has one network")
        _, config, side, source = _read_diffusers(path)
        if num_heads not in (None, config.num_heads):
            raise ValueError(f"num_heads={num_heads}, but {source} has {config.num_heads}")
        return Published(config, side, "steps", "diffusers")
    local = find(path, file=True)
    weights, args, source = _weights(read_file(local), OFFICIAL, str(local), select=select)
    config = official_config(weights, args, num_heads, source)
    side = None
    if "pos_embed" in weights:
        grid = grid_side(weights["pos_embed"], config.hidden_size, source)
        side = grid * config.patch_size
    time = "unit" if is_sit(args, Path(path).name) else "steps"
    return Published(config, side, time, "official")


def load_dit(
    path: StrPath,
    *,
    num_heads: int | None = None,
    ema: bool = True,
    select: str | None = None,
    arithmetic: str = "official",
) -> DiT:
    """A DiT from an official file: `DiT-XL-2-256x256.pt`, or a checkpoint of official training.

    Also from what others make of such files: names may begin with `module.`, `_orig_mod.`, `model.`
    or whatever else all of them begin with, and the network may lie in dictionaries, as Lightning's
    `"state_dict"`. What training keeps beside it is left out.

    Sizes are taken from the arrays' shapes. SiT's files have the same layout: its networks were
    trained with times in [0, 1], and are called with those.

    **Arguments:**

    - `path`: a `.safetensors` file, or one of PyTorch, which it needs: `.pt`, `.pth`, `.ckpt` or
        `.bin`. It holds the state dict, or dictionaries with it, such as one of `"model"`, `"ema"`,
        `"opt"` and `"args"`.
    - `num_heads`: attention heads, which no array tells. `None` takes those of the model that the
        file's own arguments name, else of the row of [`equidit.CONFIGS`][] of this depth and width.
    - `ema`: whether to prefer the averaged weights of a checkpoint, `"ema"`, to the trained ones,
        `"model"`.
    - `select`: of several networks in a file, which one: the keys that lead to it, with a slash
        between them, as `"state_dict/teacher."`, and at the end the prefix that its names have and
        others have not. The error for such a file lists them.
    - `arithmetic`: `"official"` or `"diffusers"`, see above.

    **Returns:**

    The network, with float32 weights.

    **Raises:**

    `FileNotFoundError`; `ValueError` if the file is damaged or holds objects that would have to be
    executed, if names or shapes are not those of a DiT (it lists both sides), if several networks
    fit and `select` names none of them, and if the head count is unknown.
    """
    local = find(path, file=True)
    found = _weights(read_file(local), OFFICIAL, str(local), ema=ema, select=select)
    return _from_official(*found, num_heads, arithmetic)


def from_state_dict(
    arrays: Mapping[Any, Any],
    *,
    num_heads: int | None = None,
    ema: bool = True,
    select: str | None = None,
    arithmetic: str = "official",
) -> DiT:
    """[`equidit.pretrained.load_dit`][] for what a file would hold, in memory.

    **Arguments:**

    - `arrays`: NumPy, JAX or PyTorch arrays by their official names, or dictionaries with them.
    - `num_heads`, `ema`, `select`, `arithmetic`: as for `load_dit`.

    **Returns:**

    The network, with float32 weights.

    **Raises:**

    `ValueError` as `load_dit` does.
    """
    found = _weights(arrays, OFFICIAL, "the state dict", ema=ema, select=select)
    return _from_official(*found, num_heads, arithmetic)


def _weights(content: Any, table: Table, source: str, **options: Any) -> tuple[Weights, Any, str]:
    """The weights of the one network in what a file holds, its arguments, and where it was."""
    first = "encoder.conv_in" if table is AUTOENCODER else "patch_embed"
    found = network_in(content, name_of(table, f"{first}.weight"), source, **options)
    return weights_of(found.arrays, found.source), found.args, found.source


def _from_official(
    weights: Weights, args: Any, source: str, num_heads: int | None, arithmetic: str
) -> DiT:
    weights = dict(weights)
    positions = weights.pop("pos_embed", None)
    config = official_config(weights, args, num_heads, source)
    network = fill(_skeleton(arithmetic, config), OFFICIAL, weights, source)
    if positions is not None:
        side = grid_side(positions, config.hidden_size, source)
        table = sincos_2d(config.hidden_size, (side, side))
        # Half precision keeps three digits.
        if not np.allclose(positions.read()[0], table, rtol=0, atol=5e-3):
            raise ValueError(
                f"{source}: pos_embed is not the sine-cosine table that DiT computes, but trained "
                "or interpolated. Without it in the file, the weights load with that table"
            )
    _tell_licence(config)
    return network


def _skeleton(arithmetic: str, config: Config, attention: Any = Attention) -> DiT:
    """The network, with shapes in place of arrays."""
    theirs = _checked_arithmetic(arithmetic) == "diffusers"

    def make(key: jax.Array) -> DiT:
        assert config.num_classes is not None
        return DiT(
            config.in_channels,
            config.patch_size,
            config.hidden_size,
            config.depth,
            config.num_heads,
            None,
            mlp_ratio=config.mlp_ratio,
            learn_sigma=config.learn_sigma,
            block=partial(
                AdaLNZeroBlock, make_attention=attention, norm_mlp=_NORM_MLP if theirs else None
            ),
            conditioner=LabelConditioner(
                config.num_classes,
                config.hidden_size,
                features=_FEATURES if theirs else None,
                key=key,
            ),
            remat=config.remat,
            key=key,
        )

    return eqx.filter_eval_shape(make, jax.random.key(0))


def _checked_arithmetic(arithmetic: str | None) -> str:
    if arithmetic is None or arithmetic not in ("official", "diffusers"):
        raise ValueError(
            f"arithmetic={arithmetic!r} is unknown: "
            f"{choose_from(('official', 'diffusers'), str(arithmetic))}. 'official' is what the "
            "published weights were trained in: timestep frequencies 10000 ** (-i / 128), norms' "
            "epsilon 1e-6. 'diffusers' is what its DiTPipeline computes of any weights: "
            "10000 ** (-i / 127), and 1e-5 before the MLPs; it is for models trained in diffusers"
        )
    return arithmetic


def _tell_licence(config: Config) -> None:
    if _PUBLISHED.items() <= dataclasses.asdict(config).items() and not _told:
        _told.add("licence")
        _log.warning(
            "the published DiT-XL/2 weights are under CC-BY-NC 4.0, for non-commercial use: "
            "https://github.com/facebookresearch/DiT/blob/main/LICENSE.txt"
        )


def load_diffusers_dit(path: StrPath, *, arithmetic: str | None = None) -> DiT:
    """A DiT from a folder of diffusers' `DiTTransformer2DModel`, or of its `DiTPipeline`.

    **Arguments:**

    - `path`: a folder with `config.json` and `diffusion_pytorch_model.safetensors`, its shards with
        their index, or `.bin` (needs PyTorch), or a pipeline's folder with such a one as
        `transformer`.
    - `arithmetic`: `"official"` or `"diffusers"`, see above; `ValueError` if it is not said. For
        published weights the former is what they were trained in, for a model trained in diffusers
        the latter.

    **Returns:**

    The network, with float32 weights.

    **Raises:**

    As [`equidit.pretrained.load_dit`][]; `ValueError` also for a config of another kind of model,
    and if the blocks' own embedders of timestep and label differ: here one serves all.
    """
    theirs = _checked_arithmetic(arithmetic)
    weights, config, _, source = _read_diffusers(path)
    network = fill(_skeleton(theirs, config), DIFFUSERS, weights, source)
    _tell_licence(config)
    return network


def _read_diffusers(path: StrPath) -> tuple[Weights, Config, int | None, str]:
    """Weights, sizes, the latents' side, and the file of weights."""
    folder = find(path, subfolder="transformer")
    # Published under the older name, when one class served several kinds of transformer.
    theirs = read_config(folder, "DiTTransformer2DModel", "Transformer2DModel")
    content, file = read_folder(folder)
    weights, _, source = _weights(content, DIFFUSERS, str(file))
    where = folder / "config.json"
    config = diffusers_config(weights, theirs, where, source)
    side = theirs.get("sample_size")
    return (
        weights,
        config,
        side if side is None else positive(theirs, "sample_size", where),
        source,
    )


def save_diffusers_dit(
    network: DiT, path: StrPath, *, sample_size: int = 32, allow_mismatch: bool = False
) -> None:
    """Writes a folder that diffusers' `DiTTransformer2DModel.from_pretrained` reads.

    **Arguments:**

    - `network`: a DiT of adaLN-Zero blocks and labels.
    - `path`: the folder. It is written as a whole, and replaces one of the same class.
    - `sample_size`: height and width of the latents, which diffusers' model is limited to.
    - `allow_mismatch`: whether to write a network of the official arithmetic, from whose outputs
        diffusers' then depart.

    **Raises:**

    `ValueError` for a network of the official arithmetic without `allow_mismatch`, and for one that
    diffusers' model cannot express; `FileExistsError` if `path` holds something else.
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
        "num_embeds_ada_norm": network.num_classes,
        "num_layers": network.blocks.depth,
        "out_channels": network.out_channels,
        "patch_size": network.patch_size,
        "sample_size": sample_size,
    }
    write_folder(path, config | FIXED, export(network, DIFFUSERS))


def _kind_of(network: DiT) -> str | None:
    """Which arithmetic a network has: that whose skeleton, for its sizes, is the same."""
    if not isinstance(network.conditioner, LabelConditioner):
        return None
    try:
        attention = network.blocks.blocks.attention
        config = Config(
            network.patch_size,
            network.patch_embed.weight.shape[0],
            network.blocks.depth,
            attention.num_heads,
            network.in_channels,
            network.num_classes,
            learn_sigma=network.out_channels != network.in_channels,
            remat=network.blocks.remat,
        )
        make_attention = partial(Attention, attend=attention.attend)
    except AttributeError:
        return None
    for arithmetic in ("official", "diffusers"):
        skeleton = _skeleton(arithmetic, config, make_attention)
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

    **Returns:**

    The autoencoder, with float32 weights and the factors of its config.

    **Raises:**

    As [`equidit.pretrained.load_diffusers_dit`][].
    """
    folder = find(path, subfolder="vae")
    config = read_config(folder, "AutoencoderKL")
    content, file = read_folder(folder)
    weights, _, source = _weights(content, AUTOENCODER, str(file))
    weights = modern_attention(weights, source)
    sizes = autoencoder_sizes(weights, config, folder / "config.json", source)
    skeleton = eqx.filter_eval_shape(Autoencoder, **sizes, key=jax.random.key(0))
    return fill(skeleton, AUTOENCODER, weights, source)


def save_vae(vae: Autoencoder, path: StrPath) -> None:
    """Writes a folder that diffusers' `AutoencoderKL.from_pretrained` reads.

    **Arguments:**

    - `vae`: the autoencoder.
    - `path`: the folder. It is written as a whole, and replaces one of the same class.

    **Raises:**

    `FileExistsError` if `path` holds something else.
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
        "latents_mean": vae.latents_mean,
        "latents_std": vae.latents_std,
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
