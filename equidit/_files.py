"""Weights in files: checked against the file's size before anything is read, nothing executed."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._common import extra

StrPath = str | os.PathLike[str]

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


class Tensor(NamedTuple):
    """An array in a file, and how to read it, as float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Weights = dict[str, Tensor]


def from_arrays(arrays: Mapping[str, Any]) -> Weights:
    return {
        name: Tensor(tuple(a.shape), lambda a=a: np.asarray(a).astype(np.float32, copy=False))
        for name, a in arrays.items()
    }


def find(path: StrPath, *, file: bool = False, subfolder: str = "") -> Path:
    """A local path, or failing that what the Hugging Face hub has under such a name.

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
    files = ["config.json", "diffusion_pytorch_model.*"]
    patterns = ["model_index.json", *files, *(f"{subfolder}/{file}" for file in files)]
    return Path(hub.snapshot_download(name, allow_patterns=patterns))


def read_config(folder: Path, class_name: str, *older: str) -> dict[str, Any]:
    """The config.json of one of diffusers' folders; `older`: what the class was called before."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: a folder of diffusers' {class_name} holds config.json beside "
            "its weights"
        )
    try:
        config = json.loads(path.read_text())
        found = config.get("_class_name")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON of diffusers: {error}. Download it again") from error
    if found not in (class_name, *older):
        raise ValueError(f"{path} is of a {found}, not of diffusers' {class_name}")
    return config


def read_folder(folder: Path) -> tuple[Weights, Path]:
    """The weights in one of diffusers' folders."""
    names = [f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin")]
    for path in (folder / name for name in names):
        if path.is_file():
            return read_file(path)[0], path
    raise FileNotFoundError(f"there is no {' or '.join(names)} in {folder}")


def read_file(path: Path, *, ema: bool = True) -> tuple[Weights, Any]:
    """The weights in a file, and the arguments that a training checkpoint says it was made with.

    Nothing in the file is executed, and nothing is allocated on its word: arrays are mapped into
    memory, and must lie within the file.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is of an unknown kind: choose from {', '.join(_READERS)}")
    return _READERS[path.suffix](path, ema)


def _read_torch(path: Path, ema: bool) -> tuple[Weights, Any]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs PyTorch to be read: pip install torch, or convert it to safetensors",
            name=error.name,
        ) from error
    import argparse

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is truncated, damaged, or holds more than weights, and nothing in it was "
            "executed. Download it again, or get a safetensors file of a source that you trust. "
            f"PyTorch says: {str(error).splitlines()[0]}"
        ) from error
    args = None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        args = content.get("args")
        content = content["ema" if ema and "ema" in content else "model"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return {name: _of_torch(path, name, tensor) for name, tensor in content.items()}, args


def _of_torch(path: Path, name: str, tensor: Any) -> Tensor:
    import torch

    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{path}: {name} is no floating-point tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {name} claims {tuple(tensor.shape)}, more than the file holds")
    return Tensor(tuple(tensor.shape), lambda: tensor.detach().float().numpy())


def _read_safetensors(path: Path, ema: bool) -> tuple[Weights, Any]:
    try:
        return dict(_safetensors(path)), None
    except Exception as error:
        raise ValueError(f"{path} is truncated or damaged: {error}. Download it again") from error


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
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
        if not 0 <= begin <= end <= data.size or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} claims {shape} at bytes {begin} to {end} of {data.size}")

        def read(part=data[begin:end], dtype=dtype, shape=shape) -> np.ndarray:
            return part.view(dtype).reshape(shape).astype(np.float32, copy=False)

        yield name, Tensor(shape, read)


_READERS = {".safetensors": _read_safetensors, ".pt": _read_torch, ".bin": _read_torch}


def write_folder(path: StrPath, config: dict[str, Any], arrays: Mapping[str, Array]) -> None:
    """One of diffusers' folders, in float32."""
    with extra("pretrained"):
        from safetensors.numpy import save_file
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.array(array, np.float32) for name, array in arrays.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
