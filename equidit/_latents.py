"""A cache of latents: what an autoencoder makes of pictures, worked out once for all epochs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

FORMAT = 1


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


def open_latents(path: Path) -> LatentCache:
    """Opens a cache of latents without reading the latents.

    **Arguments:**

    - `path`: the folder that `equidit encode` made.

    **Returns:**

    The cache, its arrays mapped into memory.

    **Raises:**

    `FileNotFoundError` if there is none, or an unfinished one; `ValueError` if it is damaged or of
    a newer format.
    """
    if path.with_name(path.name + ".unfinished").is_dir() and not path.exists():
        raise FileNotFoundError(f"{path} is not finished: run the same `equidit encode` again")
    if not (path / "info.json").is_file():
        raise FileNotFoundError(f"{path} is no cache of latents: `equidit encode` makes one")
    try:
        info = json.loads((path / "info.json").read_text())
        version = info["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'info.json'} is damaged: {error}") from error
    if version > FORMAT:
        raise ValueError(
            f"{path} is of format {version}, but this version of equidit knows {FORMAT} at most: "
            "update it"
        )
    try:
        mean, std, label = (
            np.load(path / f"{name}.npy", mmap_mode="r") for name in ("mean", "std", "label")
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if mean.shape != std.shape or mean.shape[:2] != (len(label), 2) or len(mean) != info["count"]:
        raise ValueError(
            f"{path} is damaged: mean.npy is {mean.shape}, std.npy {std.shape}, label.npy "
            f"{label.shape}, and info.json says {info['count']} pictures"
        )
    return LatentCache(mean, std, label, info)
