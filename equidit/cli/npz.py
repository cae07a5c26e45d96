"""Many samples into the file that ADM's evaluator reads."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from .._base.common import check_positive, extra
from .._base.disk import replacing
from .._base.records import checksum
from ..runs.sampling import Sampling, batches
from ..seams import PRNGKey, StrPath
from .resumable import Unfinished

with extra("train"):
    from tqdm import tqdm

# Of what a file holds, in its mark: 1 had no labels, and images out of place at some counts.
FORMAT = 2


def write_npz(
    path: StrPath,
    sampling: Sampling,
    labels: Integer[np.ndarray, " batch"],
    *,
    batch_size: int,
    record: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Draws one image a label into `arr_0`, bytes of shape (batch, height, width, channels), with
    the labels beside them as `arr_1`, as ADM's own sampler does.

    **Arguments:**

    - `path`: the file. While it is made, there is a folder `path` + ".unfinished"; interrupted in
        whatever way, the same call goes on, and gives the same bytes.
    - `batch_size`: images at a time on a device.
    - `record`: what the images depend on, beside `batch_size` and the labels, as JSON; a call with
        another one is refused. If the file is there and was made with the same, nothing is done.
    """
    check_positive(batch_size=batch_size, count=len(labels))
    path = Path(path)
    channels, height, width = jax.eval_shape(
        sampling.many, *(jax.ShapeDtypeStruct((1,), np.int32),) * 2
    ).shape[1:]
    arrays = {"arr_0": ((len(labels), height, width, channels), np.uint8)}
    work = Unfinished(path)
    settings = record | {"batch_size": batch_size, "format": FORMAT}
    if not overwrite and _made_with(path) == _mark(settings):
        work.clear()
        return
    with work.open(settings, arrays, batch_size, overwrite=overwrite):
        todo = work.remaining()
        done = len(labels) - sum(len(work.rows(group)) for group in todo)
        with tqdm(total=len(labels), initial=done, unit="image") as bar:
            images = batches(sampling, labels, [work.rows(group) for group in todo], batch_size)
            for group, drawn in zip(todo, images, strict=True):
                work.write(group, arr_0=to_bytes(drawn))
                bar.update(len(drawn))
        work.check_complete()
        _wrap(work.array_path("arr_0"), labels, path, _mark(settings))
        work.finish_file()


def random_labels(count: int, num_classes: int, key: PRNGKey) -> Int[np.ndarray, " batch"]:
    """Labels drawn uniformly, each belonging to its index: more of them begin with the same."""

    def one(index: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, index), (), 0, num_classes)

    return np.asarray(jax.jit(jax.vmap(one))(np.arange(count, dtype=np.int32)))


def to_bytes(
    images: Float[np.ndarray, "batch channels height width"],
) -> UInt8[np.ndarray, "batch height width channels"]:
    """Images in [-1, 1] as `clip(127.5 x + 128)`, cut to whole grey levels, channels last."""
    return np.clip(127.5 * images + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _mark(settings: dict[str, Any]) -> bytes:
    """What tells a file that was made with these settings from others."""
    return f"equidit {checksum(settings)}".encode()


def _made_with(path: Path) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except Exception:  # Of what is no such archive zipfile says so in many ways.
        return None


def _wrap(images: Path, labels: np.ndarray, path: Path, mark: bytes) -> None:
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = mark
        # Of a fixed date: the same arrays, the same bytes.
        info = zipfile.ZipInfo("arr_0.npy")
        with images.open("rb") as source, archive.open(info, "w", force_zip64=True) as member:
            shutil.copyfileobj(source, member, 1 << 24)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, labels.astype(np.int64))
