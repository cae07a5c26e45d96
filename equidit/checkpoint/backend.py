"""The little of orbax that checkpoints are made with.

It is the classic API. The one that is to follow, `orbax.checkpoint.v1`, reads what this writes and
does the same in all but one thing (orbax 0.12.8): where an array cannot be written or read, it
raises while others are still on their way, as does the classic one, but does so from two kinds of
event loops, of which `_run_to_the_end` mends one. `tests/checkpoint` sees when it waits.
"""

import asyncio
import logging
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import jax

from .._base.common import extra

DELETED = ".deleted"
UNFINISHED = ".orbax-checkpoint-tmp"
# Reading for another sharding decodes whole chunks, so that these two bound its memory.
CHUNK_BYTES = 2**26
READ_GIGABYTES = 1


def orbax() -> Any:
    """The package, which is only needed here, made quiet.

    It logs to those alone who ask absl for more than warnings: whatever fails is raised anyway.
    """
    with extra("train"):
        import orbax.checkpoint
    logging.getLogger("absl").addFilter(_only_if_verbose)
    runner = sys.modules.get("orbax.checkpoint._src.asyncio_utils")
    if runner is not None:
        runner.__dict__["_run_sync_via_new_loop"] = _run_to_the_end
    return orbax.checkpoint


def _only_if_verbose(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or logging.getLogger("absl").isEnabledFor(logging.INFO)


def _run_to_the_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Stands in for orbax's own runner, which at the first array that fails leaves the others.

    Each of these prints a traceback later, and may even write into a folder that is gone.
    """

    async def run() -> Any:
        try:
            return await coroutine
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


def open_manager(folder: Path, keep_last: int, keep_every: int | None) -> Any:
    """An asynchronous `CheckpointManager`. Nothing is read or written yet."""
    ocp = orbax()
    policies = [ocp.checkpoint_managers.LatestN(keep_last)]
    if keep_every is not None:
        policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        create=False,
        save_root_metadata=False,
        lightweight_initialize=True,
        # Renamed first, so that one that is killed in the midst leaves no half of a checkpoint.
        todelete_subdir=DELETED,
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
    )
    return ocp.CheckpointManager(folder, options=options)


def write(manager: Any, step: int, arrays: Mapping[str, jax.Array], record: Any) -> None:
    """Begins to write arrays by name, and a record in JSON."""
    ocp = orbax()
    chunked = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(dict(arrays), save_args=chunked),
        record=ocp.args.JsonSave(record),
    )
    manager.save(step, args=items, force=True)


def read_record(folder: Path) -> Any:
    """The record of a finished checkpoint, unverified."""
    ocp = orbax()
    return ocp.JsonCheckpointHandler().restore(_epath(folder / "record"))


def read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Those arrays alone, on the devices of their shardings, unverified. Waits for no other host.

    Shapes that differ are an error, but neither dtypes nor values are looked at.
    """
    ocp = orbax()
    places = {
        name: ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape)
        for name, like in wanted.items()
    }
    how = ocp.args.PyTreeRestore(dict(wanted), restore_args=places, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=READ_GIGABYTES)
    return handler.restore(_epath(folder / "state"), args=how)


def _epath(path: Path) -> Any:
    from etils import epath  # comes with orbax

    return epath.Path(path)
