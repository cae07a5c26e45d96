"""Arrays on disk that are filled group by group, and go on after any interruption."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._base.common import check_positive
from .._base.disk import locked, mapped, replace
from .._base.records import differences, plain
from ..seams import StrPath


class Unfinished:
    """A folder of unfinished arrays, beside the place where the result will be.

    A group that was marked as done is on disk, whatever happens to the process; any other is made
    again. The settings say what the groups depend on: others are refused.
    """

    def __init__(self, result: StrPath):
        self.result = Path(result)
        whole = self.result.absolute()  # "." has no name
        self.folder = whole.with_name(whole.name + ".unfinished")

    _settings = property(lambda self: self.folder / "settings.json")
    _done = property(lambda self: self.folder / "done")
    _finished = property(lambda self: self.result.with_name(self.result.name + ".finished"))
    _lock = property(lambda self: self.folder / "lock")

    def array_path(self, name: str) -> Path:
        """Where an array lies."""
        return self.folder / f"{name}.npy"

    @contextlib.contextmanager
    def open(
        self,
        settings: dict[str, Any],
        arrays: Mapping[str, tuple[tuple[int, ...], Any]],
        size: int,
        *,
        overwrite: bool = False,
    ) -> Iterator[None]:
        """Begins, or goes on: within it the groups may be written, by this process alone.

        **Arguments:**

        - `settings`: what the arrays depend on, as JSON.
        - `arrays`: their shapes and dtypes. Along the first axis, which is as long in all of them,
            they are cut into groups of `size` rows; the last may have fewer.
        - `overwrite`: whether a finished result may be replaced in the end, and unfinished work of
            other settings now. Of that, what has no group yet may go in any case.

        **Raises:**

        `FileExistsError` if there is a result, or another process at work; `ValueError` if what is
        there was made with other settings, or is damaged; `OSError` if there is no room.
        """
        (count,) = {shape[0] for shape, _ in arrays.values()}
        check_positive(rows=count, size=size)
        groups = -(-count // size)
        # Before format 2 a group could lie in rows that were another's.
        settings = settings | {"format of unfinished work": 2}
        # What is refused leaves nothing; only what is found under the lock stays as it is.
        self._check(settings, overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self._lock):
            if self._check(settings, overwrite):
                for path in (self._settings, self._done, *self.folder.glob("*.npy")):
                    path.unlink(missing_ok=True)
            if not self._settings.exists():
                for name, (shape, dtype) in arrays.items():
                    _allocate(self.array_path(name), shape, np.dtype(dtype))
                self._done.write_bytes(bytes(groups))
                # The last file: with it the folder is whole.
                replace(self._settings, json.dumps(settings, indent=2) + "\n")
            self._count, self._size = count, size
            self._arrays = {n: self._load(n, shape, dtype) for n, (shape, dtype) in arrays.items()}
            done = self._done.read_bytes() if self._done.is_file() else b""
            if len(done) != groups or set(done) - {0, 1}:
                raise self._damaged("done")
            yield
            del self._arrays

    def _load(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.memmap:
        try:
            array = mapped(self.array_path(name), "r+")
        except (ValueError, OSError) as error:
            raise self._damaged(f"{name}.npy", f": {error}") from error
        if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
            raise self._damaged(f"{name}.npy")
        return array

    def _damaged(self, name: str, why: str = "") -> ValueError:
        return ValueError(
            f"{self.folder / name} is damaged{why}: delete that folder, and the work begins anew"
        )

    def _check(self, settings: dict[str, Any], overwrite: bool) -> bool:
        """Whether what is there is of other settings, but may go: no group of it, or unwanted."""
        if self.folder.exists():
            # The last two are of a result that is nearly there.
            known = {"lock", "done", "settings.json", "files.txt", "info.json"}
            names = {path.name.removesuffix(".partial") for path in self.folder.iterdir()}
            if any(not name.endswith(".npy") for name in names - known):
                raise FileExistsError(f"{self.folder} holds other things: choose another --out")
        saved, other = None, False
        if self._settings.exists():
            try:
                saved = json.loads(self._settings.read_text())
                if not isinstance(saved, dict):
                    raise ValueError("it is no JSON object")
            except (ValueError, RecursionError) as error:
                raise self._damaged("settings.json", f": {error}") from error
            differ = differences(plain(settings, "settings"), saved)
            # Ours has `done`, made before its settings: what lacks it is not ours to delete.
            begun = self._done.read_bytes() if self._done.is_file() else None
            if differ and begun is not None and (overwrite or not any(begun)):
                saved, other = None, True
            elif differ:
                raise ValueError(
                    f"{self.folder} was begun with other settings: {differ}. Go on with those, "
                    "begin anew (--overwrite), or choose another --out"
                )
        if self.result.exists() and not overwrite and not (saved and self.complete()):
            raise FileExistsError(
                f"{self.result} exists: choose another --out, or replace it (--overwrite)"
            )
        return other

    def complete(self) -> bool:
        """Whether every group is done."""
        return self._done.exists() and all(self._done.read_bytes())

    def remaining(self) -> list[int]:
        """The groups that are not done yet."""
        return [i for i, done in enumerate(self._done.read_bytes()) if not done]

    def rows(self, group: int) -> range:
        """The rows that a group owns."""
        return range(group * self._size, min((group + 1) * self._size, self._count))

    def write(self, group: int, **values: np.ndarray) -> None:
        """Fills one group, in all arrays, and marks it as done once it is on disk.

        `ValueError` for values that are not as many as the group's rows, and for a group that is
        done: no row is written twice, and none by another group.
        """
        rows = self.rows(group)
        lengths = {name: len(value) for name, value in values.items()}
        if lengths != dict.fromkeys(self._arrays, len(rows)):
            raise ValueError(
                f"group {group} has {len(rows)} rows of {', '.join(self._arrays)}, but was given "
                f"{lengths}"
            )
        with open(self._done, "rb") as file:
            file.seek(group)
            if file.read(1) != b"\0":
                raise ValueError(f"group {group} is written already")
        for name, value in values.items():
            self._arrays[name][rows.start : rows.stop] = value
            self._arrays[name].flush()
        with open(self._done, "r+b") as file:
            file.seek(group)
            file.write(b"\1")
            file.flush()
            os.fsync(file.fileno())

    def check_complete(self) -> None:
        """`ValueError` if a group was never written."""
        if missing := self.remaining():
            raise ValueError(f"{self.folder}: {len(missing)} groups of rows were never written")

    def finish_folder(self) -> None:
        """Makes the folder of arrays, and what was put beside them, the result.

        `ValueError` if a group was never written.
        """
        self.check_complete()
        if self.result.exists():
            shutil.rmtree(self.result)
        self.folder.rename(self.result)
        self.tidy()

    def tidy(self) -> None:
        """Removes from a result what only an unfinished one needs."""
        for path in (self._done, self._settings, self._lock):
            (self.result / path.name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes what is left beside a finished file, unless another process is at work on it."""
        if self.folder.exists():
            with contextlib.suppress(FileExistsError), locked(self._lock):
                self.finish_file()

    def finish_file(self) -> None:
        """Deletes the folder, once the result is a file in its place."""
        # Renamed first: half of the folder would look like unfinished work.
        if self.folder.exists():
            self.folder.rename(self._finished)
        if self._finished.exists():
            shutil.rmtree(self._finished)


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if dtype.kind == "i":
        # No label: a row that is never written can be told.
        array[:] = np.iinfo(dtype).min
    array.flush()
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            # Without it a full disk would be a bus error in the middle of the work.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
