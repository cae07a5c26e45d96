"""What several processes must do alike."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from .record import CheckpointError, Damaged

Result = TypeVar("Result")


def everywhere(value: int) -> list[int]:
    """The value of every process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    return (
        np.asarray(multihost_utils.process_allgather(np.array([value], np.int32))).ravel().tolist()
    )


def together(call: Callable[[], Result]) -> Result:
    """Calls, and raises on all hosts if it raises on any, so that none waits for another."""
    result, own = None, None
    try:
        result = call()
    except Exception as error:
        own = error
    severity = 0 if own is None else 1 if isinstance(own, Damaged) else 2
    worst = max(everywhere(severity))
    if own is not None and severity == worst:
        raise own
    if worst:
        raise (Damaged if worst == 1 else CheckpointError)("another host refuses it")
    return result  # pyright: ignore[reportReturnType]
