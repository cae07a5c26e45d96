"""A cache of latents: what an autoencoder makes of pictures, worked out once for all epochs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from .._base.disk import mapped
from ..seams import StrPath

FORMAT = 2
SKIPPED = -1
"""The label of a picture that could not be read."""
_INFO = {"format": int, "count": int, "classes": list, "autoencoder": str}


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Moments of encoded pictures, mapped into memory. `equidit encode` makes such a folder.

    **Fields:**

    - `mean`, `std`: of each picture's latent, in the units that a DiT sees. The second axis is the
        picture as it is, then mirrored.
    - `label`: each picture's class; -1 for a damaged one that was skipped.
    - `info`: what info.json says: `classes`, `size` (side of the pictures), `downsampling`, and
        `autoencoder`, a fingerprint of its weights.
    """

    mean: Float[np.ndarray, "batch 2 channels height width"]
    std: Float[np.ndarray, "batch 2 channels height width"]
    label: Integer[np.ndarray, " batch"]
    info: dict[str, Any]


def open_latents(path: StrPath) -> LatentCache:
    """Opens a cache of latents without reading the latents.

    **Arguments:**

    - `path`: the folder that `equidit encode` made.

    **Returns:**

    The cache, its arrays mapped into memory.

    **Raises:**

    `FileNotFoundError` if there is none, or an unfinished one; `ValueError` if it is damaged, of
    a newer format, or has rows that were never written (some that older versions made).
    """
    path = Path(path)
    if not path.exists() and path.with_name(path.name + ".unfinished").is_dir():
        raise FileNotFoundError(f"{path} is not finished: run the same `equidit encode` again")
    if not (path / "info.json").is_file():
        raise FileNotFoundError(f"{path} is no cache of latents: `equidit encode` makes one")
    try:
        info = json.loads((path / "info.json").read_text())
        version = info["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / 'info.json'} is damaged: {error!r}") from error
    if type(version) is int and version > FORMAT:
        raise ValueError(
            f"{path} is of format {version}, but this version of equidit knows {FORMAT} at most: "
            "update it"
        )
    for name, kind in (_INFO | ({"batch_size": int} if version == 1 else {})).items():
        value = info.get(name)
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"{path / 'info.json'} is damaged: {name} is missing or wrong")
    if not all(isinstance(name, str) for name in info["classes"]):
        raise ValueError(f"{path / 'info.json'} is damaged: classes are not all names")
    try:
        mean, std, label = (mapped(path / f"{name}.npy") for name in ("mean", "std", "label"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    kinds = [(array.dtype.kind, array.ndim) for array in (mean, std, label)]
    if kinds != [("f", 5), ("f", 5), ("i", 1)]:
        raise ValueError(f"{path} is damaged: its arrays are of {kinds}, kinds and axes")
    if mean.shape != std.shape or mean.shape[:2] != (len(label), 2) or len(mean) != info["count"]:
        raise ValueError(
            f"{path} is damaged: mean.npy is {mean.shape}, std.npy {std.shape}, label.npy "
            f"{label.shape}, and info.json says {info['count']} pictures"
        )
    wrong = np.flatnonzero(label < SKIPPED)
    if len(wrong):
        raise ValueError(
            f"{path} has {len(wrong)} rows that were never written, row {wrong[0]} being the first"
        )
    if version == 1 and _out_of_place(info):
        raise ValueError(
            f"{path} has pictures in the rows of others, as an earlier version of equidit made it "
            f"for {info['count']} pictures and batch_size={info['batch_size']}: make it again, by "
            "`equidit encode ... --overwrite`"
        )
    return LatentCache(mean, std, label, info)


def _out_of_place(info: dict[str, Any]) -> bool:
    """Whether format 1 put groups of this many pictures into rows of other groups."""
    count, size = info["count"], info["batch_size"]
    return count > size and -(-count // -(-count // size)) != size
