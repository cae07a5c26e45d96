"""What goes on beside a run's steps: requests to stop, steps that are not finite, traces."""

import collections
import signal
from threading import current_thread, main_thread
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import Array

from .folder import Folder


class Interrupts:
    """Within `with`, the first Ctrl-C or SIGTERM only asks for a stop; a second acts as usual.

    Signals reach the main thread: a run in another one is stopped as that one decides.
    """

    requested = False

    def __enter__(self) -> "Interrupts":
        # On many hosts JAX itself hears SIGTERM, and has all of them agree on a step.
        hears = jax.process_count() == 1 and current_thread() is main_thread()
        signals = [signal.SIGINT, signal.SIGTERM] if hears else []
        self.previous = {number: signal.signal(number, self._request) for number in signals}
        return self

    def _request(self, number: int, _: Any) -> None:
        self.requested = True
        self.__exit__()

    def stop(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Guard:
    """Counts steps that were not finite, a few steps late, so that nothing waits for the device."""

    def __init__(self):
        self.pending: collections.deque[Array] = collections.deque()
        self.in_a_row, self.total = 0, 0

    def add(self, skipped: Array) -> None:
        self.pending.append(skipped)
        if len(self.pending) > 4:
            self._look()

    def count(self) -> int:
        """How many there were since the last call."""
        while self.pending:
            self._look()
        total, self.total = self.total, 0
        return total

    def _look(self) -> None:
        skipped = bool(self.pending.popleft())
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0


class Trace:
    """Traces `TRACED` steps from `first` on, or as many as there are, for TensorBoard to show."""

    TRACED = 5

    def __init__(self, folder: Folder, first: int | None, start: int, steps: int):
        if first is not None and not start < first <= steps:
            raise ValueError(
                f"profile={first} is not among the steps to do, {start + 1} to {steps}"
            )
        self.folder, self.first, self.running = folder, first, False
        self.last = None if first is None else first + self.TRACED - 1

    def __enter__(self) -> None:
        pass

    def before(self, step: int) -> None:
        if step == self.first:
            jax.profiler.start_trace(self.folder.profile)
            self.running = True

    def after(self, step: int, metrics: Any) -> None:
        if step == self.last:
            # The device is behind the host.
            jax.block_until_ready(metrics)
            self.__exit__()

    def __exit__(self, *_: Any) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
