"""A folder of checkpoints, over orbax: what was saved is what is restored, or it is refused."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from .._base.common import check_positive
from .._base.disk import locked
from .._base.trees import is_array, named
from ..hosts import data_mesh
from ..seams import StrPath
from . import backend
from .hashing import fingerprints
from .record import CheckpointError, Damaged, Record
from .together import everywhere, together


class Restored(NamedTuple):
    """What a checkpoint held.

    **Fields:**

    - `step`: the training step that it was saved at.
    - `state`: of the structure that was asked for.
    - `data`: the position in the data.
    - `config`: the run's configuration.
    - `fell_back`: why newer checkpoints were not taken, one reason each; usually empty.
    """

    step: int
    state: Any
    data: dict[str, Any]
    config: dict[str, Any]
    fell_back: list[str]


class Checkpoints:
    """The checkpoints of a run, in a folder that all its hosts share.

    Saving is atomic and asynchronous: a process that is killed at any moment leaves the earlier
    checkpoints whole. Every array has a fingerprint, computed on the devices before it is written
    and again after it is read, so that nothing damaged is ever restored. Meshes, shardings and the
    number of hosts may change in between.

    With several processes all must open, save, restore and close together. Use it in `with`, or
    call `close`.
    """

    def __init__(
        self,
        folder: StrPath,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        """**Arguments:**

        - `folder`: made if it is missing. What killed saves have left in it is removed.
        - `keep_last`: how many of the newest checkpoints to keep, at least 1.
        - `keep_every`: keep those of all multiples of it as well; `None` keeps none.
        - `read_only`: nothing is touched, and another process may be saving at the same time.

        **Raises:**

        `FileExistsError` if another process has the folder open to save; `ModuleNotFoundError`
        without `equidit[train]`.
        """
        check_positive(keep_last=keep_last, keep_every=1 if keep_every is None else keep_every)
        self.folder = Path(folder).absolute()
        self._keep = keep_last, keep_every
        self._saving: int | None = None
        self._refused: set[int] = set()
        self._manager: Any = None
        self._held = contextlib.ExitStack()
        backend.orbax()
        if not read_only:
            together(self._take)
            self._manager = backend.open_manager(self.folder, *self._keep)

    def _take(self) -> None:
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(self.folder / "lock"))
            self._tidy()

    def _tidy(self) -> None:
        """Removes what no checkpoint is made of: what killed saves and deletions have left."""
        if jax.process_index() == 0:
            for path in self.folder.iterdir():
                if path.name == backend.DELETED or backend.UNFINISHED in path.name:
                    shutil.rmtree(path)

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """Begins to save, once an earlier save is finished; returns when `state` may be donated.

        **Arguments:**

        - `step`: newer than any checkpoint that is there.
        - `state`: its arrays are saved; other leaves are left to `like` when restoring.
        - `data`: the position in the data, as JSON; that of the first process counts. `None` is
            `{}`.
        - `config`: the run's configuration, as JSON. `None` is `{}`.

        **Raises:**

        [`equidit.checkpoint.CheckpointError`][] if the *earlier* save failed, or if there is a
        checkpoint of this step or a newer one; `ValueError` for what cannot be saved.
        """
        if self._manager is None:
            raise ValueError(
                f"{self.folder} was closed, or opened with read_only=True: nothing can be saved"
            )
        self.wait()
        arrays = {name: _savable(name, leaf) for name, leaf in named(state).items()}
        if not arrays:
            raise ValueError("the state has no arrays")
        self._set_aside()
        if newer := [there for there in self.steps() if there >= step]:
            raise CheckpointError(
                f"{self.folder} holds {_steps(newer)} already: to go on from before, move those "
                f"folders away; else save step {step} elsewhere"
            )
        digits = fingerprints(arrays)
        described = {n: [str(a.dtype), list(a.shape), digits[n]] for n, a in arrays.items()}
        record = Record(step, data or {}, config or {}, described).to_json()
        self._saving = step
        try:
            backend.write(self._manager, step, arrays, record)
        except Exception as error:
            raise self._failed(error) from error

    def _set_aside(self) -> None:
        """Damaged checkpoints that were passed over make room for those of the same steps."""
        if self._refused and jax.process_index() == 0:
            for step in self._refused.intersection(self.steps()):
                path = self.folder / f"{step}.damaged"
                while path.exists():
                    path = path.with_name(path.name + "_")
                (self.folder / str(step)).rename(path)
        if self._refused:
            everywhere(0)
            self._manager.reload()
            self._refused.clear()

    def wait(self) -> None:
        """Returns when the save that is under way, if any, is finished.

        **Raises:**

        [`equidit.checkpoint.CheckpointError`][] if it failed. Nothing is left of it then, and the
        earlier checkpoints are whole.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            if self._saving not in self.steps():
                raise FileNotFoundError(f"{self.folder / str(self._saving)} did not come to be")
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None
        self._tidy()

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._saving = self._saving, None
        with contextlib.suppress(Exception):
            self._manager.close()
        self._tidy()
        # One that failed has forgotten which checkpoints it was about to delete.
        self._manager = backend.open_manager(self.folder, *self._keep)
        return CheckpointError(
            f"the checkpoint of step {step} could not be saved in {self.folder} (whole: "
            f"{_steps(self.steps())}): {_brief(error)}"
        )

    def steps(self) -> list[int]:
        """Which checkpoints there are.

        **Returns:**

        The steps of the finished ones, ascending.
        """
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        names = [path.name for path in paths if re.fullmatch(r"0|[1-9]\d*", path.name)]
        return sorted(int(name) for name in names if (self.folder / name).is_dir())

    def restore(
        self, like: PyTree, *, step: int | None = None, config: dict[str, Any] | None = None
    ) -> Restored:
        """Reads a whole checkpoint: the newest that is undamaged, or that of a step.

        Nothing is initialised. Memory holds the state once, and up to about 1.5 GB beside it.

        **Arguments:**

        - `like`: a tree of the structure that was saved, whose arrays may be
            `jax.ShapeDtypeStruct`s, e.g. from `eqx.filter_eval_shape`. An array goes where the
            `sharding` of its place says; without one, onto the first device, or onto all devices
            of several processes. Leaves that are no arrays are taken from it.
        - `step`: this checkpoint and no other.
        - `config`: what the checkpoint's must be equal to; `None` accepts any.

        **Returns:**

        The state, filled in, and what was saved beside it.

        **Raises:**

        [`equidit.checkpoint.CheckpointError`][] if there is no undamaged checkpoint, and for one of
        another model, of another config (it names the fields) or of a newer format.
        """
        return self._restore(like, None, step, config)

    def restore_part(self, like: PyTree, name: str, *, step: int | None = None) -> Restored:
        """Reads one part of the state, and none of the bytes of the others.

        **Arguments:**

        - `like`: a tree of the part's structure, as in `restore`.
        - `name`: the part's path, e.g. `"ema"`.
        - `step`: this checkpoint and no other; `None` is the newest whose part is undamaged.

        **Returns:**

        As `restore` does, `state` being the part.

        **Raises:**

        As `restore` does.
        """
        return self._restore(like, name, step, None)

    def _restore(
        self, like: PyTree, part: str | None, step: int | None, config: dict[str, Any] | None
    ) -> Restored:
        self.wait()
        wanted = {_join(part, name): _placed(name, leaf) for name, leaf in named(like).items()}
        remaining = self.steps()
        if step is not None:
            remaining = [step] if step in remaining else []
        refused: dict[int, str] = {}
        # The hosts may see different steps, but must go through them alike.
        while (newest := max(everywhere(remaining[-1] if remaining else -1))) >= 0:
            try:
                record, arrays = self._read(newest, wanted, part, config)
            except Damaged as error:
                refused[newest] = str(error)
                remaining = [other for other in remaining if other < newest]
                continue
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder / str(newest)}: {error}") from error
            self._refused |= refused.keys() if self._manager is not None else set()
            state = _filled(like, iter(arrays))
            reasons = [f"step {other} is not whole: {why}" for other, why in refused.items()]
            return Restored(newest, state, record.data, record.config, reasons)
        if refused:
            listed = "; ".join(f"step {other}: {why}" for other, why in refused.items())
            raise CheckpointError(f"no checkpoint in {self.folder} is whole: {listed}")
        which = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise CheckpointError(f"{self.folder} has not {which}; it has {_steps(self.steps())}")

    def _read(
        self,
        step: int,
        wanted: dict[str, jax.ShapeDtypeStruct],
        part: str | None,
        config: dict[str, Any] | None,
    ) -> tuple[Record, list[jax.Array]]:
        folder = self.folder / str(step)

        def read_record() -> Record:
            with _damage_in("its record"):
                found = backend.read_record(folder)
            record = Record.from_json(found)
            if record.step != step:
                raise Damaged(f"it was saved as step {record.step}")
            if config is not None:
                record.check_config(config)
            record.check_arrays(_as_saved(wanted, record), part)
            return record

        def read_arrays() -> dict[str, jax.Array]:
            with _damage_in("its arrays"):
                arrays = backend.read_arrays(folder, wanted)
            for name, like in wanted.items():
                found = arrays.get(name)
                # What its metadata does not list, orbax leaves as it was asked for.
                if not isinstance(found, jax.Array):
                    raise Damaged(f"its array {name} is missing")
                if (found.dtype, found.shape) != (like.dtype, like.shape):
                    raise Damaged(f"its array {name} has another dtype or shape than was saved")
            return arrays

        record = together(read_record)
        wanted = _as_saved(wanted, record)
        arrays = together(read_arrays)
        record.check_fingerprints(fingerprints(arrays))
        return record, [arrays[name] for name in wanted]

    def close(self) -> None:
        """Waits for a save that is under way, and gives up the folder. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()
            self._held.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _as_saved(
    wanted: dict[str, jax.ShapeDtypeStruct], record: Record
) -> dict[str, jax.ShapeDtypeStruct]:
    """What is wanted, in its order, by the names in the checkpoint."""
    names = record.saved_names(wanted)
    return {names[name]: like for name, like in wanted.items()}


def _savable(name: str, leaf: Any) -> jax.Array:
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise ValueError(f"{name} is a PRNG key: save jax.random.key_data of it")
    if isinstance(leaf, jax.ShapeDtypeStruct) or dtype.kind == "c":
        raise ValueError(f"{name} is {leaf}, which cannot be saved")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} is {dtype}, which JAX has with jax_enable_x64 alone")
    array = jnp.asarray(leaf)
    if jax.process_count() > 1 and array.is_fully_addressable:
        raise ValueError(
            f"{name} is on the devices of this process alone: jax.device_put it with a sharding "
            "over those of all processes"
        )
    return array


def _placed(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = _default_sharding()
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        raise ValueError(f"{name} of {leaf.shape} cannot be placed: {error}") from error
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _default_sharding() -> Sharding:
    mesh = None if jax.process_count() == 1 else data_mesh()
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, PartitionSpec())


def _filled(like: PyTree, arrays: Iterator[jax.Array]) -> PyTree:
    return jax.tree.map(lambda leaf: next(arrays) if is_array(leaf) else leaf, like)


def _join(part: str | None, name: str) -> str:
    return "/".join(filter(None, (part, name)))


def _steps(steps: list[int]) -> str:
    return f"step {', '.join(map(str, steps))}" if steps else "none"


def _brief(error: BaseException) -> str:
    """The beginning and the end of what TensorStore says, after the reason that may lie between."""
    text = " ".join((str(error) or type(error).__name__).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        text = f"{os.strerror(int(code[1]))}: {text}"
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


@contextlib.contextmanager
def _damage_in(what: str) -> Iterator[None]:
    """Whatever reading a damaged file raises; what the machine lacks is no damage."""
    try:
        yield
    except Exception as error:
        lacking = isinstance(error, jax.errors.JaxRuntimeError) and "EXHAUSTED" in str(error)
        if lacking or isinstance(error, MemoryError):
            raise
        raise Damaged(f"{what} cannot be read: {_brief(error)}") from error
