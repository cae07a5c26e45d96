"""The `equidit` command: what can be asked of it, and how it answers when something is wrong."""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np

from .._base.common import check_positive, choose_from, extra

with extra("train"):
    import tyro

from .. import diffusion as dfn, hosts, pretrained
from ..checkpoint import fingerprint
from ..data import check_labels
from ..data.images import Small, image_folder, left_out
from ..runs import loop, report
from ..runs.folder import Folder
from ..runs.sampling import Sampler, Sampling, draw
from ..runs.settings import SCHEDULE_STEPS, Settings, defaults
from ..train import cast
from .encoding import encode
from .npz import random_labels, write_npz
from .sources import Source, of_run, of_weights

_Labels = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="LABEL,LABEL,...",
        instance_from_str=lambda words: tuple(",".join(words).split(",")),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda labels: [",".join(labels)],
    ),
]


def _numbers(labels: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Labels as numbers, where classes with names may be given by these.

    What is written as a number is one; a class of such a name is asked for by `=NAME`.
    """
    numbers = []
    for label in labels:
        name = label.removeprefix("=")
        if re.fullmatch(r"\s*[+-]?\d+\s*", label):
            number = int(label)
            if label in classes and classes.index(label) != number:
                raise ValueError(
                    f"labels={','.join(labels)!r}: {label!r} is the name of class number "
                    f"{classes.index(label)}: write ={label} for that, or +{label} for number "
                    f"{number}"
                )
            numbers.append(number)
        elif name in classes:
            numbers.append(classes.index(name))
        else:
            among = f" and no class of the run: {choose_from(classes, name)}" if classes else ""
            raise ValueError(
                f"labels={','.join(labels)!r}: {label!r} is no whole number such as those of "
                f"3,1,4{among}"
            )
    return numbers


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


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw from a trained run or from published weights.

    Into a picture with one row a label; with --npz into the file that ADM's evaluator reads, where
    an interrupted command goes on if it is given again. An image depends on its label, its index
    and the seed, however many devices there are.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Folder of the run."""
    weights: str | None = None
    """Published weights instead: an official .pt or .safetensors file, a checkpoint with such
    weights in it, a folder of diffusers', or a name on the Hugging Face hub."""
    vae: str | None = None
    """Folder of the autoencoder that decodes latents, or its name on the Hugging Face hub; of a run
    by default the one that it was trained with."""
    size: int | None = None
    """Side of the images of published weights, in pixels; by default what they were trained for."""
    num_heads: int | None = None
    """Attention heads of published weights, where nothing tells."""
    select: str | None = None
    """Of several networks in a file of weights, which one: the error for such a file lists them."""
    arithmetic: Literal["official", "diffusers"] | None = None
    """What published weights are computed in; to be given for a folder of diffusers'."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in."""
    labels: _Labels | None = None
    """What to draw, separated by commas or spaces: numbers from 0 or, of a run, names of classes
    (=NAME where a name is a number).
    By default the first ten classes; with --npz every image's label is drawn at random."""
    per_label: int | None = None
    """How many of each in the picture; by default 10 of a run, 1 of published weights."""
    guidance_scale: float = 1.5
    """Scale of classifier-free guidance; 1 is none and halves the cost."""
    guidance_channels: int | None = None
    """How many channels are guided; by default all. 3 reproduces the paper's tables."""
    steps: int = 50
    """Number of sampling steps."""
    sampler: Sampler | None = None
    """Deterministic ddim, or ancestral ddpm with the learned variance (which wants more steps). By
    default ddim for a run, ddpm for published weights."""
    seed: int = 0
    """Of the noise. The same seed gives the same images."""
    npz: bool = False
    """Write all images into one .npz file."""
    count: int = 50_000
    """With --npz: how many images. Labels that are given are gone through again and again."""
    batch_size: int = 32
    """Images at a time on a device."""
    out: Path | None = None
    """The file; by default named by these settings, in the run's folder or here."""
    overwrite: bool = False
    """With --npz: replace a finished file."""


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encode a folder of pictures into a cache of latents that training reads.

    Pictures lie in one folder a class. Of each the middle square is taken, as it is and mirrored,
    and the mean and standard deviation of its latent are kept. Where the command was interrupted,
    it goes on if it is given again.
    """

    images: Path
    """Folder of the class folders."""
    vae: str
    """Folder of the autoencoder, or its name on the Hugging Face hub."""
    out: Path
    """Folder of the latents."""
    size: int = 256
    """Side of the pictures, in pixels."""
    small: Small = "refuse"
    """What to do with pictures that are smaller."""
    skip_corrupt: bool = False
    """Count damaged pictures rather than stop at the first."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the latents on disk; float16 halves them."""
    batch_size: int = 8
    """Pictures at a time on a device."""
    overwrite: bool = False
    """Replace the latents that are there."""


def run(arguments: Sequence[str]) -> int:
    """Parses and carries out one command, and returns the exit status."""
    words, given = _words(arguments)
    try:
        command = tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train", default=_preset(words))]  # pyright: ignore
            | Annotated[Sample, tyro.conf.subcommand("sample")]
            | Annotated[Encode, tyro.conf.subcommand("encode")],
            prog="equidit",
            description="Diffusion Transformers in JAX.",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
        if isinstance(command, Train):
            return _train(command, given)
        _sample(command) if isinstance(command, Sample) else _encode(command)
        return 0
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"equidit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "equidit: interrupted; train goes on with --resume, encode and sample --npz go on if "
            "given again",
            file=sys.stderr,
        )
        return 130


def _words(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """The arguments with the data in its place, and the settings that they name."""
    words = list(arguments)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    given = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    if words[:1] == ["train"]:
        # `--data X` is the same as `X`.
        if "--data" in words[:-1]:
            at = words.index("--data")
            words = ["train", words[at + 1], *words[1:at], *words[at + 2 :]]
        words = [word.removeprefix("--data=") for word in words]
        if len(words) > 1 and not words[1].startswith("-"):
            given.add("data")
    return words, given


def _preset(words: list[str]) -> Train:
    """The defaults for the kind of data that the words name."""
    named = [word for word in words[1:2] if not word.startswith("-")]
    if words[:1] != ["train"] or not named:
        return Train()
    return Train(data=named[0], **defaults(named[0]))


def _train(command: Train, given: set[str]) -> int:
    if command.resume and command.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
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
        given=given,
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
        + shlex.quote(_example(folder.read()[1].classes)),
    ]
    return "\n" + "\n".join(lines)


def _example(classes: Sequence[str]) -> str:
    """Some labels that there are, by name where that can be typed."""
    some = [3, 1, 4] if len(classes) > 4 else range(min(3, len(classes)))
    names = [classes[label] for label in some]
    plain = not any("," in name or name != name.strip() or name[:1] == "-" for name in names)
    return ",".join(names if plain else map(str, some))


def _sample(command: Sample) -> None:
    for name in ("per_label", "count", "batch_size"):
        if (value := getattr(command, name)) is not None:
            check_positive(**{name: value})
    if (command.run is None) == (command.weights is None):
        raise ValueError("give either a run's folder, or --weights")
    source = _source_of(command)
    sampler = command.sampler or ("ddpm" if source.published else "ddim")
    given = None if command.labels is None else _numbers(command.labels, source.classes)
    labels = _labels_of(command, given, source)
    check_labels(labels, source.num_classes)
    steps = dfn.space_timesteps(SCHEDULE_STEPS, command.steps)
    network = source.network
    sampling = Sampling(
        network if command.dtype == "float32" else cast(network, command.dtype),
        dfn.Schedule(dfn.linear_betas(SCHEDULE_STEPS), steps),
        null=source.num_classes,
        guidance_scale=command.guidance_scale,
        guidance_channels=command.guidance_channels,
        sampler=sampler,
        shape=source.shape,
        key=jax.random.key(command.seed),
        decoder=source.decoder,
    )
    name = f"sample-{sampler}{command.steps}-scale{command.guidance_scale:g}-seed{command.seed}"
    path = command.out or (command.run or Path()) / f"{name}{'.npz' if command.npz else '.png'}"
    if command.npz:
        named = ("count", "steps", "guidance_scale", "guidance_channels", "seed", "dtype")
        record = {name: getattr(command, name) for name in named} | {
            "labels": given,
            "network": fingerprint(network),
            "decoder": fingerprint(source.decoder),
            "shape": source.shape,
            "sampler": sampler,
        }
        write_npz(
            path,
            sampling,
            labels,
            batch_size=command.batch_size,
            record=record,
            overwrite=command.overwrite,
        )
    else:
        images = draw(sampling, labels, batch_size=command.batch_size)
        rows = images.reshape(-1, _per_label(command, source), *images.shape[1:])
        of_rows = labels[:: rows.shape[1]]
        names = [source.classes[label] for label in of_rows] if source.classes else of_rows
        report.grid(path, rows, names)
    print(path)


def _source_of(command: Sample) -> Source:
    if command.weights is None:
        assert command.run is not None
        if given := [
            n for n in ("size", "num_heads", "select", "arithmetic") if getattr(command, n)
        ]:
            raise ValueError(f"--{given[0].replace('_', '-')} belongs to --weights, not to a run")
        return of_run(command.run, command.vae)
    return of_weights(
        command.weights,
        command.vae,
        size=command.size,
        num_heads=command.num_heads,
        select=command.select,
        arithmetic=command.arithmetic,
    )


def _per_label(command: Sample, source: Source) -> int:
    return command.per_label or (1 if source.published else 10)


def _labels_of(command: Sample, given: list[int] | None, source: Source) -> np.ndarray:
    """One label an image."""
    if not command.npz:
        rows = range(min(10, source.num_classes)) if given is None else given
        return np.repeat(np.asarray(rows, np.int32), _per_label(command, source))
    if given is None:
        key = jax.random.fold_in(jax.random.key(command.seed), 1)
        return random_labels(command.count, source.num_classes, key)
    return np.resize(np.asarray(given, np.int32), command.count)


def _encode(command: Encode) -> None:
    folder = image_folder(command.images)
    skipped = encode(
        pretrained.load_vae(command.vae),
        folder,
        command.out,
        size=command.size,
        small=command.small,
        skip_corrupt=command.skip_corrupt,
        dtype=command.dtype,
        batch_size=command.batch_size,
        overwrite=command.overwrite,
    )
    print(f"{len(folder.files) - len(skipped)} pictures of {len(folder.classes)} classes")
    if skipped:
        print(f"{len(skipped)} damaged ones were skipped: {', '.join(skipped[:5])}")
    if folder.ignored:
        print(left_out(folder))
    print(command.out)
