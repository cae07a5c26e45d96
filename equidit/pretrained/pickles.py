"""Files of `torch.save`, of which nothing is executed."""

import argparse
import re
from typing import Any

import numpy as np

from ..seams import StrPath


class _Unread:
    """Stands for what a file holds besides arrays: it does nothing with what it is made of."""

    parts: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *parts: Any):
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Scalar(_Unread):
    """A NumPy scalar becomes a Python number, one that is no number `None`."""

    def __new__(cls, dtype: Any, data: Any) -> Any:
        try:
            code = dtype.state[1] + dtype.parts[0]
            if re.fullmatch(r"[<>|][biuf][1248]", code) and isinstance(data, bytes):
                return np.frombuffer(data, code, 1)[0].item()
        except (TypeError, ValueError, IndexError, AttributeError):
            pass
        return None


class _Dict(_Unread):
    """A dictionary with a default becomes one without."""

    def __new__(cls, *parts: Any) -> Any:
        return {}


def _named(kind: type, name: str) -> type:
    module, _, name = name.rpartition(".")
    return type(name, (kind,), {"__module__": module, "__qualname__": name})


# What training scripts put beside their weights: arguments with NumPy's numbers and with paths, the
# states of generators. Under the names of NumPy 1 and 2, and of older and newer Pythons.
_NUMPY = [f"numpy.{core}.multiarray" for core in ("core", "_core")]
_SAFE: list[Any] = [
    argparse.Namespace,
    dict,
    _named(_Dict, "collections.defaultdict"),
    *(_named(_Scalar, f"{module}.scalar") for module in _NUMPY),
    *(_named(_Unread, f"{module}._reconstruct") for module in _NUMPY),
    *(_named(_Unread, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *(
        _named(_Unread, f"{module}.{pure}{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for kind in ("Posix", "Windows")
    ),
]


def read_torch(path: StrPath) -> Any:
    """What a file holds, its arrays mapped into memory; `ValueError` if it is more than weights."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs PyTorch to be read: pip install torch, or convert it to safetensors",
            name=error.name,
        ) from error
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        text = str(error)
        if found := re.search(r"GLOBAL (\S+)", text):
            raise ValueError(
                f"{path} is more than weights: it holds {found[1][:200]}, and nothing in it was "
                "executed. Download it again, or where you trust its source, load it there and "
                "save the state dict alone"
            ) from error
        if "mmap can only be used" in text:
            raise ValueError(
                f"{path} is truncated, no file of PyTorch's, or older than PyTorch 1.6, and "
                "nothing in it was executed: it cannot be mapped into memory. Download it again, "
                "or load it in PyTorch, where you trust its source, and save it once more"
            ) from error
        raise ValueError(
            f"{path} is truncated, damaged, or holds more than weights, and nothing in it was "
            "executed. Download it again, or get a safetensors file of a source that you trust. "
            f"PyTorch says: {text.splitlines()[0] if text else type(error).__name__}"
        ) from error
