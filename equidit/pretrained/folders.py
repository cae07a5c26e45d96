"""diffusers' folders: weights beside a config.json, read and written as a whole."""

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from .._base.common import extra
from .._base.disk import to_disk
from .._base.texts import brief
from ..seams import StrPath
from .files import STEM, Tensor, Weights, fetch, read_file
from .sizes import Declared
from .unwrap import network_in

INDEX = f"{STEM}.safetensors.index.json"


def open_folder(
    path: StrPath, classes: tuple[str, ...], *, subfolder: str, anchor: str
) -> tuple[Weights, Declared]:
    """The one network in a folder, its weights not yet read, and what its config says.

    **Arguments:**

    - `classes`: diffusers' class of such a network, and what this was called before.
    - `subfolder`: where a pipeline's folder has it.
    - `anchor`: see [`equidit.pretrained.unwrap.network_in`][].
    """
    folder = fetch(path, subfolder=subfolder)
    declared = _read_config(folder, classes)
    content, file = _read_weights(folder)
    return network_in(content, anchor, str(file)), declared


def _read_config(folder: Path, classes: tuple[str, ...]) -> Declared:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: a folder of diffusers' {classes[0]} holds config.json beside "
            "its weights"
        )
    try:
        config = json.loads(path.read_text())
        found = config.get("_class_name")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON of diffusers: {error}. Download it again") from error
    if found not in classes:
        raise ValueError(f"{path} is of a {brief(str(found))}, not of diffusers' {classes[0]}")
    return Declared(config, str(path))


def _read_weights(folder: Path) -> tuple[Any, Path]:
    """What the file of weights holds, or the shards."""
    suffixes = (".safetensors", ".fp16.safetensors", ".bin")
    names = [f"{STEM}{suffix}" for suffix in suffixes]
    for path in (folder / name for name in (names[0], INDEX, *names[1:])):
        if path.is_file():
            return _read_shards(path) if path.name == INDEX else read_file(path), path
    raise FileNotFoundError(f"there is no {', '.join(names)} or {INDEX} in {folder}")


def _read_shards(index: Path) -> dict[str, Tensor]:
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


def write_folder(
    path: StrPath, config: dict[str, Any], arrays: Mapping[str, Array | np.ndarray]
) -> None:
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
        save_file(tensors, new / f"{STEM}.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file in (*new.iterdir(), new):
            to_disk(file)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    to_disk(folder.parent)
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
    others = [n for n in names if n != "config.json" and not n.startswith(STEM)]
    try:
        if others:
            raise ValueError(f"it holds {sorted(others)[0]}")
        _read_config(folder, (class_name,))
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"{folder} holds something else than a {class_name} and would be replaced: {error}. "
            "Give a new path, or remove it"
        ) from error
