"""The `equidit` command: what can be asked of it, and how it answers when something is wrong."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from ._common import check_positive, extra

with extra("train"):
    import tyro

from . import _report, _run


def _parse_labels(words: list[str]) -> tuple[int, ...]:
    parts = ",".join(words).split(",")
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError(f"{','.join(words)!r} is no list of whole numbers such as 3,1,4") from None


_Labels = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT,INT,...",
        instance_from_str=_parse_labels,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda labels: [",".join(map(str, labels))],
    ),
]


@dataclasses.dataclass(frozen=True)
class Train(_run.Settings):
    """Train a small class-conditional DiT on images and sample from it.

    Leaves in the run's folder: config.json, metrics.jsonl, loss.png, samples.png, checkpoint.npz
    and report.json. Ctrl-C leaves a checkpoint; --resume goes on from it.
    """

    data: tyro.conf.Positional[Literal["digits"]] = "digits"
    """What to train on: the handwritten digits that ship with scikit-learn."""
    out: Path = Path("runs/digits")
    """The run's folder."""
    resume: bool = False
    """Go on with the run in that folder, to `steps` steps in all."""
    overwrite: bool = False
    """Start over in that folder; the run in it is lost."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw from a trained run, into a picture with one row a label."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    labels: _Labels = tuple(range(10))
    """What to draw, separated by commas or spaces."""
    per_label: int = 10
    """How many of each."""
    guidance_scale: float = 1.5
    """Scale of classifier-free guidance; 1 is none and halves the cost."""
    steps: int = 50
    """Number of sampling steps."""
    sampler: _report.Sampler = "ddim"
    """Deterministic DDIM, or ancestral DDPM with the learned variance (which wants more steps)."""
    seed: int = 0
    """Of the noise. The same seed gives the same images."""
    out: Path | None = None
    """The picture; by default a file in the run's folder, named by these settings."""


def run(arguments: Sequence[str]) -> int:
    """Parses and carries out one command, and returns the exit status."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "sample": Sample},
        prog="equidit",
        description="Diffusion Transformers in JAX.",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    try:
        if isinstance(command, Train):
            return _train(command, _given(arguments))
        _sample(command)
        return 0
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"equidit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("equidit: interrupted", file=sys.stderr)
        return 130


def _given(arguments: Sequence[str]) -> set[str]:
    """The settings that are named on the command line."""
    flags = (word.partition("=")[0] for word in arguments if word.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def _train(command: Train, given: set[str]) -> int:
    if command.resume and command.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    folder = _run.Folder(command.out)
    options = {"resume": command.resume, "overwrite": command.overwrite}
    if not _run.train(command, folder, **options, given=given):
        print(
            f"Stopped; the checkpoint is {folder.checkpoint}. To go on:\n"
            f"  equidit train {command.data} --out {shlex.quote(str(command.out))} --resume"
        )
        return 130
    figures = _run.report(folder)
    quartiles = " ".join(f"{loss:.3f}" for loss in figures["validation_loss_by_quartile"])
    print(
        f"""
Validation loss      {figures["validation_loss"]:.4f} (by quartile of the timestep: {quartiles})
Accuracy             {figures["accuracy"]:.3f} on {figures["samples"]} samples \
({figures["accuracy_held_out"]:.3f} on held-out digits)
Frechet distance     {figures["frechet"]:.2f}, {figures["frechet"] / figures["frechet_floor"]:.2f} \
times the floor of {figures["frechet_floor"]:.2f}
Nearest training     {figures["nearest"]:.2f} away ({figures["nearest_held_out"]:.2f} for held-out \
digits)

Samples              {folder.samples}
Loss curve           {folder.loss}
Metrics              {folder.metrics}
Figures              {folder.report}
Checkpoint, config   {folder.checkpoint}, {folder.config}
Draw more            equidit sample {shlex.quote(str(command.out))} --labels 3,1,4"""
    )
    return 0


def _sample(command: Sample) -> None:
    check_positive(per_label=command.per_label)
    folder = _run.Folder(command.run)
    settings = folder.settings()
    images = _run.sample(
        settings,
        _run.restore(folder, settings).ema,
        np.repeat(np.asarray(command.labels, np.int32), command.per_label),
        guidance_scale=command.guidance_scale,
        sampler=command.sampler,
        steps=command.steps,
        seed=command.seed,
    )
    name = f"{command.sampler}{command.steps}-scale{command.guidance_scale:g}-seed{command.seed}"
    path = command.out or command.run / f"sample-{name}.png"
    rows = images.reshape(len(command.labels), command.per_label, *images.shape[1:])
    _report.grid(path, rows, command.labels)
    print(path)
