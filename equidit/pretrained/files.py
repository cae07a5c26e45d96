"""Weights in files: checked against the file's size before anything is read, nothing executed."""

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._base.common import extra
from .._base.texts import brief, choose_from
from ..seams import StrPath
from .pickles import read_torch

# Of diffusers' files of weights.
STEM = "diffusion_pytorch_model"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# What safetensors itself reads.
_LONGEST_HEADER = 100_000_000


class Tensor(NamedTuple):
    """An array in a file, and how to read it, as float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network's arrays by name, and where they are from.

    **Fields:**

    - `tensors`: the arrays, to be read when they are needed.
    - `source`: the file, and where in it, for errors.
    - `args`: what the file says that the network was made with, by name.
    """

    tensors: dict[str, Tensor]
    source: str
    args: Mapping[str, Any]


def weights_of(
    arrays: Mapping[str, Any], source: str, args: Mapping[str, Any] | None = None
) -> Weights:
    """Arrays of NumPy, JAX, PyTorch or of a file."""
    tensors = {name: _tensor(array, f"{source}: {name}") for name, array in arrays.items()}
    return Weights(tensors, source, args or {})


def _tensor(array: Any, name: str) -> Tensor:
    if isinstance(array, Tensor):
        return array
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        dense = array.is_floating_point() and array.layout == torch.strided
        dense = dense and array.device.type != "meta"
    else:
        dense = isinstance(array, np.ndarray | jax.Array)
        dense = dense and jnp.issubdtype(array.dtype, jnp.floating)
    if not dense:
        raise ValueError(f"{name} is no dense floating-point tensor: leave it out")
    if isinstance(array, np.ndarray | jax.Array):
        return Tensor(array.shape, lambda: np.asarray(array).astype(np.float32, copy=False))
    shape = tuple(array.shape)
    if array.numel() * array.element_size() > array.untyped_storage().nbytes():
        raise ValueError(f"{name} claims {shape}, more than the file holds")
    return Tensor(shape, lambda: array.detach().float().cpu().numpy())


def fetch(path: StrPath, *, file: bool = False, subfolder: str = "") -> Path:
    """A local path, or failing that what the hub of Hugging Face has there, downloaded.

    `owner/name` is a repository, `owner/name/path/of/file` a file in one. Of a pipeline's folder it
    is the subfolder that is meant.
    """
    local = Path(path)
    if not local.exists():
        local = _download(os.fspath(path), file=file, subfolder=subfolder)
    if file and local.is_dir():
        raise ValueError(
            f"{local} is a folder, not a file of weights: load_diffusers_dit reads those"
        )
    if not file and (local / "model_index.json").exists():
        return local / subfolder
    return local


def is_file(path: StrPath) -> bool:
    """Whether a path is that of a file of weights, not of a folder; by its name if not here."""
    return Path(path).is_file() if Path(path).exists() else Path(path).suffix in _READERS


def _download(name: str, *, file: bool, subfolder: str) -> Path:
    owner, *rest = name.split("/")
    wanted = "owner/name/file" if file else "owner/name"
    if (
        not re.fullmatch(r"[\w-]+(/[\w.-]+)+", name)
        or Path(owner).exists()
        or (len(rest) < 2 if file else len(rest) != 1 or Path(name).suffix in _READERS)
    ):
        raise FileNotFoundError(
            f"there is no {name}: give a path that exists, or {wanted} of the Hugging Face hub"
        )
    with extra("pretrained"):
        import huggingface_hub as hub
    if file:
        return Path(hub.hf_hub_download(f"{owner}/{rest[0]}", "/".join(rest[1:])))
    files = ["config.json", f"{STEM}*"]
    patterns = ["model_index.json", *files, *(f"{subfolder}/{file}" for file in files)]
    return Path(hub.snapshot_download(name, allow_patterns=patterns))


def read_file(path: Path) -> Any:
    """What a file of weights holds: arrays by name, or dictionaries of these.

    Nothing in the file is executed, and nothing is allocated on its word: arrays are mapped into
    memory, and must lie within the file.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is of an unknown kind: {choose_from(_READERS, path.suffix)}")
    return _READERS[path.suffix](path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(_safetensors(path))
    except Exception as error:
        raise ValueError(
            f"{path} is truncated or damaged: {brief(str(error))}. Download it again"
        ) from error


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"it claims a header of {length} bytes, but has {size} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    data = np.memmap(path, np.uint8, "r", start) if size > start else np.empty(0, np.uint8)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}, not of {', '.join(_DTYPES)}")
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name} claims {shape} at {begin} to {end}")
        if not 0 <= begin <= end <= data.size or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} claims {shape} at bytes {begin} to {end} of {data.size}")
        # A shape that NumPy does not have is refused here, not when it is read.
        array = data[begin:end].view(dtype).reshape(shape)
        yield name, Tensor(shape, lambda array=array: array.astype(np.float32, copy=False))
    if sum(end - begin for begin, end in (e["data_offsets"] for e in header.values())) > data.size:
        raise ValueError("its arrays overlap")


_READERS = {".safetensors": _read_safetensors} | dict.fromkeys(
    (".pt", ".bin", ".pth", ".ckpt"), read_torch
)
