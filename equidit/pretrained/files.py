"""Weights in files: checked against the file's size before anything is read, nothing executed."""

import json
import math
import os
import re
import secrets
import shutil
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

_WEIGHTS = "diffusion_pytorch_model"
_INDEX = f"{_WEIGHTS}.safetensors.index.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


# What safetensors itself reads.
_LONGEST_HEADER = 100_000_000


class Tensor(NamedTuple):
    """An array in a file, and how to read it, as float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Weights = dict[str, Tensor]


def weights_of(arrays: Mapping[str, Any], source: str) -> Weights:
    """Arrays of NumPy, JAX, PyTorch or of a file, to be read when they are needed."""
    return {name: _tensor(array, f"{source}: {name}") for name, array in arrays.items()}


def _tensor(array: Any, name: str) -> Tensor:
    torch = sys.modules.get("torch")
    if isinstance(array, Tensor):
        return array
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_torch(array, name)
    if not isinstance(array, np.ndarray | jax.Array) or not jnp.issubdtype(
        array.dtype, jnp.floating
    ):
        raise ValueError(f"{name} is no dense floating-point tensor: leave it out")
    return Tensor(array.shape, lambda: np.asarray(array).astype(np.float32, copy=False))


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
    files = ["config.json", f"{_WEIGHTS}*"]
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
        raise ValueError(f"{path} is of a {brief(str(found))}, not of diffusers' {class_name}")
    return config


def read_folder(folder: Path) -> tuple[Any, Path]:
    """What is in one of diffusers' folders, in one file or in shards."""
    suffixes = (".safetensors", ".fp16.safetensors", ".bin")
    names = [f"{_WEIGHTS}{suffix}" for suffix in suffixes]
    for path in (folder / name for name in (names[0], _INDEX, *names[1:])):
        if path.is_file():
            return _read_shards(path) if path.name == _INDEX else read_file(path), path
    raise FileNotFoundError(f"there is no {', '.join(names)} or {_INDEX} in {folder}")


def _read_shards(index: Path) -> Weights:
    """The weights in the safetensors files that an index names."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = {str(file) for file in places.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is no index of shards: {brief(repr(error))}. Download it again"
        ) from error
    shards = {}
    for file in sorted(files):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file, re.ASCII):
            raise ValueError(
                f"{index} names {brief(repr(file))}, which is no safetensors file beside it"
            )
        path = index.parent / file
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}, which {index.name} names: download it")
        shards[file] = read_file(path)
    if lost := [name for name, file in places.items() if name not in shards[file]]:
        raise ValueError(f"{index} has {brief(lost[0])} in {places[lost[0]]}, which lacks it")
    for file, shard in shards.items():
        if more := [name for name in shard if places.get(name) != file]:
            raise ValueError(
                f"{index.parent / file} holds {brief(more[0])}, which {index.name} does not say"
            )
    return {name: shards[file][name] for name, file in places.items()}


def read_file(path: Path) -> Any:
    """What a file of weights holds: arrays by name, or dictionaries of these.

    Nothing in the file is executed, and nothing is allocated on its word: arrays are mapped into
    memory, and must lie within the file.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is of an unknown kind: {choose_from(_READERS, path.suffix)}")
    return _READERS[path.suffix](path)


def _of_torch(tensor: Any, name: str) -> Tensor:
    import torch

    if (
        not tensor.is_floating_point()
        or tensor.layout != torch.strided
        or tensor.device.type == "meta"
    ):
        raise ValueError(f"{name} is no dense floating-point tensor: leave it out")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} claims {tuple(tensor.shape)}, more than the file holds")
    return Tensor(tuple(tensor.shape), lambda: tensor.detach().float().cpu().numpy())


def _read_safetensors(path: Path) -> Weights:
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


def write_folder(path: StrPath, config: dict[str, Any], arrays: Mapping[str, Any]) -> None:
    """One of diffusers' folders, in float32.

    It is written beside its place, under a hidden name, and moved there when it is on the disk:
    whatever fails, nothing half-written is ever at `path`, and what was there stays.
    """
    with extra("pretrained"):
        from safetensors.numpy import save_file
    # Of a symbolic link, it is what it leads to that is replaced.
    folder = Path(path).resolve()
    _check_replaceable(folder, config["_class_name"])
    tensors = {name: np.array(array, np.float32) for name, array in arrays.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{mark}.{age}") for age in ("new", "old"))
    try:
        new.mkdir()
        save_file(tensors, new / f"{_WEIGHTS}.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file in (*new.iterdir(), new):
            _to_disk(file)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    _to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(folder: Path, class_name: str) -> None:
    """`FileExistsError` unless a folder is absent, empty, or one of the same class."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give the path of a folder")
    names = [path.name for path in folder.iterdir()]
    if not names:
        return
    others = [n for n in names if n != "config.json" and not n.startswith(_WEIGHTS)]
    try:
        if others:
            raise ValueError(f"it holds {sorted(others)[0]}")
        read_config(folder, class_name)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"{folder} holds something else than a {class_name} and would be replaced: {error}. "
            "Give a new path, or remove it"
        ) from error


def _to_disk(path: Path) -> None:
    """What was written to a file, or the names in a folder, survive a loss of power from here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
