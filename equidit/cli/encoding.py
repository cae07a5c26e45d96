"""From a folder of pictures to a cache of latents."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from .._base.common import check_positive, extra
from .._base.disk import replace, replacing
from .._base.records import crc32
from ..checkpoint import fingerprint
from ..data.images import ImageError, ImageFolder, Small, read_image
from ..data.latents import FORMAT, SKIPPED, open_latents
from ..hosts import data_mesh, over_mesh
from ..seams import StrPath
from ..train.sharding import replicated
from ..vae import Autoencoder
from .resumable import Unfinished

with extra("train"):
    from tqdm import tqdm


Dtype = Literal["float32", "float16"]


def encode(
    vae: Autoencoder,
    folder: ImageFolder,
    out: StrPath,
    *,
    size: int,
    small: Small = "refuse",
    skip_corrupt: bool = False,
    dtype: Dtype = "float32",
    batch_size: int = 8,
    overwrite: bool = False,
) -> list[str]:
    """Encodes every picture and its mirror image; goes on where it was interrupted.

    **Arguments:**

    - `size`, `small`: see [`equidit.data.read_image`][].
    - `skip_corrupt`: whether damaged pictures get the label -1 rather than end the work.
    - `dtype`: of the moments on disk.
    - `batch_size`: pictures at a time on a device.

    **Returns:**

    The pictures that were skipped.

    **Raises:**

    `ImageError` naming a picture that cannot be used; `ValueError` if the size does not suit the
    autoencoder; `ArithmeticError` naming a picture whose moments are not finite.
    """
    check_positive(size=size, batch_size=batch_size)
    out = Path(out)
    if size % vae.downsampling:
        raise ValueError(
            f"size={size} must be a multiple of {vae.downsampling}, the autoencoder's downsampling"
        )
    count = len(folder.files)
    names = "\n".join(folder.files)
    settings = {
        "format": FORMAT,
        "autoencoder": fingerprint(vae),
        "pictures": crc32(os.fsencode(names)),
        "count": count,
        "size": size,
        "small": small,
        "skip_corrupt": skip_corrupt,
        "dtype": dtype,
        "batch_size": batch_size,
    }
    latent = eqx.filter_eval_shape(vae.encode, jax.ShapeDtypeStruct((3, size, size), np.float32))
    moments = (count, 2, *latent.mean.shape), dtype
    arrays = {"mean": moments, "std": moments, "label": ((count,), "int32")}
    work = Unfinished(out)
    if not overwrite and (info := _finished(out, settings)):
        work.tidy()
        return info.get("skipped", [])

    def load(row: int) -> np.ndarray | None:
        try:
            return read_image(folder.root / folder.files[row], size, small=small)
        except ImageError as error:
            if skip_corrupt and error.damaged:
                return None
            raise

    with work.open(settings, arrays, batch_size, overwrite=overwrite):
        todo = work.remaining()
        groups = [list(work.rows(group)) for group in todo]
        encoded = _encoded(vae, groups, load, (3, size, size), batch_size)
        done = count - sum(map(len, groups))
        with tqdm(total=count, initial=done, unit="picture") as bar:
            for group, rows, (pictures, *values) in zip(todo, groups, encoded, strict=True):
                mean, std = (value[: len(rows)].astype(dtype) for value in values)
                for row, *finite in zip(rows, _finite(mean), _finite(std), strict=True):
                    if not all(finite):
                        raise ArithmeticError(
                            f"the moments of {folder.root / folder.files[row]} are not finite in "
                            f"{dtype}: is the autoencoder whole?"
                        )
                missing = np.array([picture is None for picture in pictures])
                label = np.where(missing, SKIPPED, folder.label[rows]).astype(np.int32)
                work.write(group, mean=mean, std=std, label=label)
                bar.update(len(rows))
        label = np.load(work.array_path("label"))
        skipped = [folder.files[row] for row in np.flatnonzero(label == SKIPPED)]
        if len(skipped) == count:
            raise ImageError(f"none of the {count} pictures of {folder.root} can be read")
        more = {
            "classes": folder.classes,
            "downsampling": vae.downsampling,
            "skipped": skipped,
        }
        with replacing(work.folder / "files.txt") as file:
            file.write(os.fsencode(names + "\n"))
        replace(work.folder / "info.json", json.dumps(settings | more, indent=2) + "\n")
        work.finish_folder()
    return skipped


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a cache made with these settings says of itself, if there is one."""
    try:
        info = open_latents(out).info
    except (OSError, ValueError):
        return None
    # An older format that opens holds the same.
    same = settings.items() <= (info | {"format": FORMAT}).items()
    return info if same else None


def _finite(moments: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(moments).all(axis=(1, 2, 3, 4)))


def _encoded(
    vae: Autoencoder,
    groups: list[list[int]],
    load: Callable[[int], np.ndarray | None],
    shape: tuple[int, ...],
    batch_size: int,
) -> Iterator[tuple[list[np.ndarray | None], np.ndarray, np.ndarray]]:
    """Pictures and moments of groups of rows, one group a device; reads ahead while it encodes."""
    if not groups:
        return
    devices = jax.local_devices()
    parts = [groups[i : i + len(devices)] for i in range(0, len(groups), len(devices))]
    mesh = data_mesh(devices)
    vae = replicated(vae, mesh)
    with ThreadPoolExecutor() as pool:

        def begin(part: list[list[int]]) -> list[list[Future[np.ndarray | None]]]:
            return [[pool.submit(load, row) for row in group] for group in part]

        ahead = begin(parts[0])
        for following in [*parts[1:], []]:
            pictures = [[future.result() for future in group] for group in ahead]
            ahead = begin(following)
            # Every device encodes `batch_size`, whatever is asked of it: one program serves all.
            pixels = np.zeros((len(devices), batch_size, *shape), np.uint8)
            for i, group in enumerate(pictures):
                for j, picture in enumerate(group):
                    if picture is not None:
                        pixels[i, j] = picture
            moments = _moments(vae, mesh, jnp.asarray(pixels.reshape(-1, *shape)))
            mean, std = (np.split(np.asarray(moment), len(devices)) for moment in moments)
            yield from zip(pictures, mean, std, strict=False)


@eqx.filter_jit
def _moments(vae: Autoencoder, mesh: Mesh | None, pixels: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of pictures, and of their mirror images."""

    def one(picture: Array) -> tuple[Array, Array]:
        latent = vae.encode(picture.astype(jnp.float32) / 127.5 - 1)
        return latent.mean, jnp.exp(latent.log_variance / 2)

    def local(vae: Autoencoder, pixels: Array) -> tuple[Array, Array]:
        both = jnp.stack([pixels, pixels[..., ::-1]], axis=1)
        flat = both.reshape(-1, *both.shape[2:])
        # One at a time: an encoder's activations are a thousand times its latent.
        moments = jax.lax.map(one, flat)
        return jax.tree.map(lambda m: m.reshape(-1, 2, *m.shape[1:]), moments)

    return over_mesh(local, mesh)(vae, pixels)
