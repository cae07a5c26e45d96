"""`equidit train`."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from .._base.common import extra

with extra("train"):
    import tyro

from .. import hosts
from ..runs import loop
from ..runs.folder import Folder
from ..runs.settings import Settings, defaults


@dataclasses.dataclass(frozen=True)
class Train(Settings):
    """Train a class-conditional DiT on images or latents and sample from it.

    The defaults shown are those of the kind of data: for folders and latents the paper's recipe.
    Leaves in the run's folder: config.json, metrics.jsonl, loss.png, samples.png, checkpoints,
    TensorBoard's events and report.json. Ctrl-C and SIGTERM leave a checkpoint; --resume goes on.
    """

    data: tyro.conf.Positional[str] = "digits"
    """What to train on: "digits", the handwritten digits that ship with scikit-learn; "folder:DIR",
    pictures in one folder a class; or "latents:DIR", what `equidit encode` made."""
    out: Path | None = None
    """The run's folder; by default runs/ and the name of the data."""
    resume: bool = False
    """Go on with the run in that folder, to `steps` steps in all."""
    overwrite: bool = False
    """Start over in that folder; the run in it is lost."""
    profile: int | None = None
    """A step from which on five are traced, for TensorBoard or Perfetto."""
    distributed: bool = False
    """Train together with other processes, as the environment says: on TPU pods, under SLURM."""
    coordinator: str | None = None
    """Elsewhere: host:port of process 0."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: this one's number, from 0."""
    heartbeat: int = 100
    """Of several processes: seconds without a sign of life after which one counts as dead, and the
    others end."""

    @property
    def folder(self) -> Folder:
        """The run's folder."""
        _, path = self.source
        return Folder(self.out or Path("runs") / (path.resolve().name if path else self.data))

    def preset(self) -> "Train":
        """What holds where nothing is given: of a run to go on with its own settings, else those
        of the kind of data."""
        if not self.resume:
            return Train(data=self.data, **defaults(self.data))
        if self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        saved, _ = self.folder.read()
        return Train(**saved.record())


def train_command(command: Train) -> int:
    if command.distributed or command.coordinator is not None:
        hosts.initialize(
            command.coordinator,
            command.num_processes,
            command.process_id,
            heartbeat=command.heartbeat,
        )
        # JAX ends a process from outside of Python: nothing can be said then.
        print(
            f"equidit: process {jax.process_index()} of {jax.process_count()}. If another dies, "
            f"this one ends within {command.heartbeat} s, and JAX says that another task died: the "
            "same command with --resume goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    folder = command.folder
    finished = loop.train(
        command,
        folder,
        resume=command.resume,
        overwrite=command.overwrite,
        profile=command.profile,
    )
    if hosts.is_main():
        print(_finished(folder) if finished else _stopped(folder))
    return 0


def _stopped(folder: Folder) -> str:
    settings, _ = folder.read()
    return (
        f"Stopped; the checkpoints are in {folder.checkpoints}. To go on:\n"
        f"  equidit train {settings.data} --out {shlex.quote(str(folder.path))} --resume"
    )


def _finished(folder: Folder) -> str:
    """What a run has come to, and where it lies."""
    figures = json.loads(folder.report.read_text())
    lines = []
    if "validation_loss" in figures:
        quartiles = " ".join(f"{loss:.3f}" for loss in figures["validation_loss_by_quartile"])
        lines.append(
            f"Validation loss      {figures['validation_loss']:.4f} "
            f"(by quartile of the timestep: {quartiles})"
        )
    if "accuracy" in figures:
        ratio = figures["frechet"] / figures["frechet_floor"]
        lines += [
            f"Accuracy             {figures['accuracy']:.3f} on {figures['samples']} samples "
            f"({figures['accuracy_held_out']:.3f} on held-out digits)",
            f"Frechet distance     {figures['frechet']:.2f}, {ratio:.2f} times the floor of "
            f"{figures['frechet_floor']:.2f}",
            f"Nearest training     {figures['nearest']:.2f} away "
            f"({figures['nearest_held_out']:.2f} for held-out digits)",
        ]
    samples = folder.samples if folder.samples.exists() else "none: latents want --vae"
    lines += [
        "",
        f"Samples              {samples}",
        f"Loss curve           {folder.loss}",
        f"Metrics              {folder.metrics}, {folder.events}",
        f"Figures              {folder.report}",
        f"Checkpoints, config  {folder.checkpoints}, {folder.config}",
        f"Draw more            equidit sample {shlex.quote(str(folder.path))} --labels "
        + shlex.quote(example_labels(folder.read()[1].classes)),
    ]
    return "\n" + "\n".join(lines)


def example_labels(classes: Sequence[str]) -> str:
    """Some labels that there are, by name where that can be typed."""
    some = [3, 1, 4] if len(classes) > 4 else range(min(3, len(classes)))
    names = [classes[label] for label in some]
    plain = not any("," in name or name != name.strip() or name[:1] == "-" for name in names)
    return ",".join(names if plain else map(str, some))
