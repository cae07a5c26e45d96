"""Files that are whole or absent, and folders that one process at a time works in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ._types import StrPath


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
                f"another process is at work in {Path(path).parent}: wait for it, or end it"
            ) from None
        yield
