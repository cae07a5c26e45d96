"""A training run in a folder: what it computes, and how it begins, goes on and ends."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from .. import hosts
from .._base.disk import locked, replace
from .._base.records import plain
from ..checkpoint import CheckpointError, Checkpoints
from ..data import Images, batches
from ..train import TrainState
from . import report
from .folder import Folder
from .log import Log, ideal_seconds, tell
from .sampling import sample
from .settings import Settings
from .state import new_state, state_like, training_step
from .task import Task, decoder, load
from .validation import validation
from .watch import Guard, Interrupts, Trace


def train(
    settings: Settings,
    folder: Folder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    profile: int | None = None,
) -> bool:
    """Trains to the end, or until it is asked to stop: whether it got to the end.

    **Arguments:**

    - `settings`, `folder`: what is computed, and where it is kept.
    - `resume`: whether to go on with the run in the folder, from whose settings these may differ
        where that does not make it another run.
    - `overwrite`: whether to start over in the folder of another run.
    - `profile`: a step from which on five are traced.

    **Raises:**

    `FileExistsError` for a folder that holds a run, unless told what to do with it, or that another
    process works in; `ValueError` for settings that do not fit each other, the devices, the data,
    or the run to go on with; `ArithmeticError` after too many steps that are not finite.
    """
    saved_about = None
    if resume:
        saved, saved_about = folder.read()
        settings.check_resumes(saved)
    else:
        folder.check(overwrite=overwrite)
    task = load(settings)
    if saved_about not in (None, task.about):
        raise ValueError(
            f"{settings.data} is not what the run was begun with: {task.about}, was {saved_about}"
        )
    if task.left_out:
        tell(task.left_out)
    run = _Run(settings, folder, task)
    if not resume:
        # What is wrong is said before a file is written.
        run.check()
        Trace(folder, profile, 0, settings.steps)
    _all_say("every process has checked the folder")
    with run.opened(overwrite=overwrite) as state:
        return run.train(state, profile)


def _all_say(what: str) -> None:
    """Of several hosts, each waits for the others to be as far."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class _Run:
    """What the parts of a run share."""

    def __init__(self, settings: Settings, folder: Folder, task: Task):
        self.settings, self.folder, self.task = settings, folder, task
        self.mesh = hosts.data_mesh()
        if self.mesh is None and settings.sharding != "replicated":
            raise ValueError(
                f"sharding={settings.sharding!r} divides the state among devices, but there is "
                "one: --sharding replicated trains on it, whatever the run was begun with"
            )
        self.decoder = decoder(settings, task.about)
        self.step = training_step(settings, task.about, self.mesh)

    def stream(self, start: int) -> Any:
        """The batches from a step on: this process's share."""
        settings = self.settings
        return batches(
            self.task.train,
            settings.batch_size,
            seed=settings.seed,
            start=start,
            workers=settings.workers,
            skip_corrupt=settings.skip_corrupt,
            process=(jax.process_index(), jax.process_count()),
        )

    def check(self) -> None:
        """What does not fit the devices or each other fails here, before a file is written."""
        like = state_like(self.settings, self.task.about, None)
        about = self.task.about
        size = self.settings.batch_size
        clean: Any = jax.ShapeDtypeStruct((size, *about.shape), np.float32)
        label: Any = jax.ShapeDtypeStruct((size,), np.int32)
        eqx.filter_eval_shape(self.step, like, Images(clean, label), self.settings.key("train"))

    @contextlib.contextmanager
    def opened(self, *, overwrite: bool) -> Iterator[TrainState]:
        """Locks the folder, and gives the state to go on from."""
        settings, folder, about = self.settings, self.folder, self.task.about
        with contextlib.ExitStack() as stack:
            if hosts.is_main():
                folder.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder.lock))
                if overwrite:
                    folder.clear()
                if not folder.config.exists():
                    # Before all else: with it a run that is killed from here on can go on.
                    folder.begin(settings, about, 0)
            _all_say("the folder is ready")
            self.checkpoints = stack.enter_context(
                Checkpoints(
                    folder.checkpoints,
                    keep_last=settings.keep_last,
                    keep_every=settings.keep_every,
                )
            )
            start = 0
            if self.checkpoints.steps():
                like = state_like(settings, about, self.mesh)
                restored = self.checkpoints.restore(like, config=self.identity())
                for reason in restored.fell_back:
                    tell(reason)
                state, start = restored.state, restored.step
                if start > settings.steps:
                    raise ValueError(
                        f"{folder.path} is at step {start}, beyond steps={settings.steps}"
                    )
            else:
                state = new_state(settings, about, self.mesh)
            if hosts.is_main():
                folder.begin(settings, about, start)
            yield state

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return plain(self.settings.fixed() | dataclasses.asdict(self.task.about), "settings")

    def train(self, state: TrainState, profile: int | None) -> bool:
        settings, folder = self.settings, self.folder
        start, key = int(state.step), settings.key("train")
        about = self.task.about
        config = settings.network(about.shape[0], about.num_classes)
        ideal = ideal_seconds(config, *about.shape[1:])
        guard = Guard()
        corrupt = 0
        trace = Trace(folder, profile, start, settings.steps)
        log = Log(
            folder,
            start=start,
            steps=settings.steps,
            batch_size=settings.batch_size,
            main=hosts.is_main(),
        )
        with Interrupts() as interrupts, log, self.stream(start) as stream, trace:
            for done in range(start + 1, settings.steps + 1):
                begun = time.perf_counter()
                try:
                    batch, damaged = next(stream)
                except (OSError, ValueError):
                    # What is computed so far is good. Of several hosts one alone cannot save.
                    unsaved = start < done - 1 and (done - 1) % settings.sample_every
                    if unsaved and jax.process_count() == 1:
                        self._save(done - 1, state, log, last=True)
                    raise
                log.step(time.perf_counter() - begun)
                corrupt += damaged
                if self.mesh is not None:
                    batch = hosts.global_batch(batch, self.mesh)
                trace.before(done)
                state, metrics = self.step(state, batch, key)
                trace.after(done, metrics)
                if done == start + 1:
                    # The step is compiled by now, which the rates leave out.
                    jax.block_until_ready(metrics)
                    log.restart()
                guard.add(metrics["skipped"])
                stop = interrupts.stop(done) or done == settings.steps
                save = stop or done % settings.sample_every == 0
                if save or done % settings.log_every == 0:
                    names = ("loss", "grad_norm", "param_norm")
                    row = {name: float(metrics[name]) for name in names}
                    row |= log.rates(ideal) | {"skipped": guard.count(), "corrupt": corrupt}
                    corrupt = 0
                    with self._saving():
                        log.write(done, row)
                    log.show(row)
                if guard.in_a_row >= settings.max_skipped:
                    raise ArithmeticError(self._not_finite(done, metrics))
                if save:
                    self._save(done, state, log, last=stop)
                    log.restart()
                if stop:
                    break
        with self._saving():
            self.checkpoints.wait()
        finished = int(state.step) == settings.steps
        if finished:
            self._report(state)
        return finished

    def _save(self, done: int, state: TrainState, log: Log, *, last: bool) -> None:
        """A validation, a checkpoint, and pictures."""
        settings, folder = self.settings, self.folder
        row = validation(settings, state, self.task.held_out, self.mesh)
        with self._saving():
            log.write(done, row)
        # That an earlier save failed does not keep this one from being tried.
        with self._saving():
            self.checkpoints.wait()
        with self._saving():
            self.checkpoints.save(done, state, data={"step": done}, config=self.identity())
        with self._saving():
            if hosts.is_main():
                report.loss_curve(folder.loss, folder.rows())
        # Apart: all hosts gather what is drawn, whatever became of the first one's curve.
        with self._saving():
            if not last:
                self._picture(state)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """What becomes of a save that fails is a setting's to say."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            if self.settings.save_errors == "stop":
                raise
            tell(str(error))

    def _picture(self, state: TrainState) -> None:
        """Samples of the first ten classes, a row each."""
        about = self.task.about
        if about.latents and self.decoder is None:
            return
        ema = hosts.gathered(state.ema, self.mesh)
        if hosts.is_main():
            rows = min(10, about.num_classes)
            columns = 4 if about.latents else 10
            labels = np.repeat(np.arange(rows), columns)
            images = sample(self.settings, about, ema, labels, self.decoder)
            images = images.reshape(rows, columns, *images.shape[1:])
            report.grid(self.folder.samples, images, about.classes[:rows])

    def _report(self, state: TrainState) -> None:
        """What a finished run says of itself: report.json, and a last picture."""
        row = validation(self.settings, state, self.task.held_out, self.mesh)
        figures = {"step": int(state.step)} | row
        self._picture(state)
        if (judge := self.settings.kind.judge) is not None:
            ema = hosts.gathered(state.ema, self.mesh)
            if hosts.is_main():
                count = self.settings.report_samples
                label = np.arange(count, dtype=np.int32) % self.task.about.num_classes
                images = sample(self.settings, self.task.about, ema, label)
                figures |= judge(Images(images, label))
        if hosts.is_main():
            replace(self.folder.report, json.dumps(figures, indent=2) + "\n")

    def _not_finite(self, done: int, metrics: dict[str, Array]) -> str:
        steps = self.checkpoints.steps()
        last = f"step {steps[-1]} in {self.folder.checkpoints}" if steps else "none"
        return (
            f"at step {done} the loss is {float(metrics['loss'])} and the gradient norm "
            f"{float(metrics['grad_norm'])}, the last of {self.settings.max_skipped} such steps in "
            f"a row, none of which touched the weights: try a lower --learning-rate. The last good "
            f"checkpoint is {last}"
        )
