"""Files that are whole or absent, and folders that one process at a time works in."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np

from ..seams import StrPath


def replace(path: StrPath, text: str) -> None:
    """Writes a text file, replacing an older one only once complete."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces an older one at `path` only once complete."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_disk(path: StrPath) -> None:
    """What was written to a file, or the names in a folder, survive a loss of power from here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|][fiu]\d)', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,18}(?:, |,|(?=\))))*)\), \} *\n",
    re.DOTALL,
)


def mapped(path: StrPath, mode: Literal["r", "r+"] = "r") -> np.memmap:
    """A .npy file of numbers, mapped into memory: `ValueError` if it is no such file, or not whole.

    `numpy.load` evaluates the header, allocates what that says, and with "r+" fills up what a
    truncated file lacks.
    """
    with open(path, "rb") as file:
        header = file.read(2**16 + 10)
    match = _HEADER.match(header)
    if match is None or match.end() != 10 + int.from_bytes(header[8:10], "little"):
        raise ValueError(f"{path} is damaged: it has not the header of an array of numbers")
    try:
        dtype = np.dtype(match[1].decode())
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    shape = tuple(map(int, re.findall(rb"\d+", match[2])))
    size, expected = os.stat(path).st_size, match.end() + math.prod(shape) * dtype.itemsize
    if size != expected or len(shape) > 32 or 0 in shape:
        raise ValueError(f"{path} is damaged: {dtype}{list(shape)} in {size} bytes")
    return np.memmap(os.fspath(path), dtype, mode, match.end(), shape)


def append(path: StrPath, text: str) -> None:
    """Adds to a text file. If that fails, nothing of it stays."""
    with open(path, "ab", buffering=0) as file:
        size, rest = file.tell(), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def locked(path: StrPath) -> Iterator[None]:
    """Holds a lock file, which a killed process gives up: `FileExistsError` if another has it."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows, where there is no such lock
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another process is at work in {Path(path).parent}: wait for it, or end it. If it "
                "is this one, what it opened there before is still open: close that"
            ) from None
        yield
