"""Official DiT files: checkpoints of the original training and what others make of them."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..configs import CONFIGS, Config
from ..nn.dit import DiT
from ..nn.ops import sincos_2d
from ..seams import StrPath
from .files import Weights, fetch, read_file
from .tables import Table, name_of
from .transformer import Arithmetic, Opened, Time, filled, patches, sizes_of
from .unwrap import network_in

OFFICIAL: Table = {
    "patch_embed": patches("x_embedder.proj"),
    "conditioner.timestep.up": "t_embedder.mlp.0",
    "conditioner.timestep.down": "t_embedder.mlp.2",
    "conditioner.label": "y_embedder.embedding_table",
    "blocks.stacked.attention.qkv": "blocks.#.attn.qkv",
    "blocks.stacked.attention.out": "blocks.#.attn.proj",
    "blocks.stacked.mlp.up": "blocks.#.mlp.fc1",
    "blocks.stacked.mlp.down": "blocks.#.mlp.fc2",
    "blocks.stacked.modulation": "blocks.#.adaLN_modulation.1",
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}
_FIRST = name_of(OFFICIAL, "patch_embed.weight")
_POSITIONS = "pos_embed"


def load_dit(
    path: StrPath,
    *,
    num_heads: int | None = None,
    ema: bool = True,
    select: str | None = None,
    arithmetic: Arithmetic = "official",
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
    opened = open_file(path, num_heads=num_heads, ema=ema, select=select)
    return network_of(opened, arithmetic)


def from_state_dict(
    arrays: Mapping[Any, Any],
    *,
    num_heads: int | None = None,
    ema: bool = True,
    select: str | None = None,
    arithmetic: Arithmetic = "official",
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
    weights = network_in(arrays, _FIRST, "the state dict", ema=ema, select=select)
    return network_of(sized(weights, num_heads), arithmetic)


def open_file(
    path: StrPath, *, num_heads: int | None = None, ema: bool = True, select: str | None = None
) -> Opened:
    """The one network in a file; its weights are not yet read."""
    local = fetch(path, file=True)
    weights = network_in(read_file(local), _FIRST, str(local), ema=ema, select=select)
    sit = str(weights.args.get("model")).startswith("SiT-") or Path(path).name.startswith("SiT")
    return sized(weights, num_heads, "unit" if sit else "steps")


def sized(weights: Weights, num_heads: int | None, time: Time = "steps") -> Opened:
    """With its sizes; without `num_heads`, those that the file's arguments or CONFIGS say."""
    config = sizes_of(weights, OFFICIAL, "an official DiT")
    heads = _num_heads(weights, config) if num_heads is None else num_heads
    if heads < 1 or config.hidden_size % heads:
        raise ValueError(
            f"{weights.source}: num_heads={heads} does not divide hidden_size={config.hidden_size}"
        )
    config = dataclasses.replace(config, num_heads=heads)
    if (positions := weights.tensors.get(_POSITIONS)) is None:
        return Opened(weights, config, None, time)
    shape, dim = positions.shape, config.hidden_size
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if side < 1 or shape != (1, side * side, dim):
        raise ValueError(f"{weights.source}: pos_embed is {shape}, not (1, a square number, {dim})")
    return Opened(weights, config, side * config.patch_size, time)


def _num_heads(weights: Weights, config: Config) -> int:
    if type(heads := weights.args.get("num_heads")) is int:
        return heads
    named = CONFIGS.get(re.sub("^SiT", "DiT", str(weights.args.get("model"))))
    size = (config.hidden_size, config.depth)
    for row in (named, *CONFIGS.values()):
        if row is not None and (row.hidden_size, row.depth) == size:
            return row.num_heads
    raise ValueError(
        f"{weights.source}: the number of attention heads is unknown, since no array tells it and "
        f"no row of CONFIGS has hidden_size={size[0]} and depth={size[1]}: pass num_heads="
    )


def network_of(opened: Opened, arithmetic: Arithmetic) -> DiT:
    """The network, with its weights."""
    weights, config, size, _ = opened
    arrays = {name: tensor for name, tensor in weights.tensors.items() if name != _POSITIONS}
    others = dataclasses.replace(weights, tensors=arrays)
    network = filled(others, OFFICIAL, config, arithmetic)
    if size is not None:
        side = size // config.patch_size
        table = sincos_2d(config.hidden_size, (side, side))
        # Half precision keeps three digits.
        if not np.allclose(weights.tensors[_POSITIONS].read()[0], table, rtol=0, atol=5e-3):
            raise ValueError(
                f"{weights.source}: pos_embed is not the sine-cosine table that DiT computes, but "
                "trained or interpolated. Without it in the file, the weights load with that table"
            )
    return network
