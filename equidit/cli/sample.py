"""`equidit sample`."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np

from .._base.common import check_positive, extra
from .._base.texts import choose_from

with extra("train"):
    import tyro

from ..checkpoint import fingerprint
from ..data import check_labels
from ..runs import report
from ..runs.process import Sampler
from ..runs.sampling import Sampling, draw
from ..train import cast
from .npz import random_labels, write_npz
from .sources import Arithmetic, Drawable, of_run, of_weights

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
    arithmetic: Arithmetic | None = None
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
    count: int | None = None
    """With --npz: how many images, by default 50,000. Labels that are given are gone through again
    and again."""
    batch_size: int = 32
    """Images at a time on a device."""
    out: Path | None = None
    """The file; by default named by these settings, in the run's folder or here."""
    overwrite: bool = False
    """With --npz: replace a finished file."""


def sample_command(command: Sample) -> None:
    for name in ("per_label", "count", "batch_size"):
        if (value := getattr(command, name)) is not None:
            check_positive(**{name: value})
    if (command.run is None) == (command.weights is None):
        raise ValueError("give either a run's folder, or --weights")
    if command.npz and command.per_label is not None:
        raise ValueError("--per-label belongs to a picture, not to --npz: give --count")
    unused = [name for name in ("count", "overwrite") if getattr(command, name)]
    if unused and not command.npz:
        raise ValueError(f"--{unused[0]} belongs to --npz: a picture has --labels and --per-label")
    source = _source_of(command)
    sampler = command.sampler or ("ddpm" if source.published else "ddim")
    given = None if command.labels is None else numbers_of(command.labels, source.classes)
    labels = _labels_of(command, given, source)
    check_labels(labels, source.num_classes)
    network = source.network
    sampling = Sampling(
        network if command.dtype == "float32" else cast(network, command.dtype),
        source.process.spaced(command.steps),
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
    _check_writable(path)
    if command.npz:
        named = ("steps", "guidance_scale", "guidance_channels", "seed", "dtype")
        record = {name: getattr(command, name) for name in named} | {
            "count": len(labels),
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


def _check_writable(path: Path) -> None:
    """`OSError` if no file can be put there, before any work is done for it."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: choose another --out, a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to: choose another --out")


def _source_of(command: Sample) -> Drawable:
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


def _per_label(command: Sample, source: Drawable) -> int:
    return command.per_label or (1 if source.published else 10)


def numbers_of(labels: Sequence[str], classes: Sequence[str]) -> list[int]:
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


def _labels_of(command: Sample, given: list[int] | None, source: Drawable) -> np.ndarray:
    """One label an image."""
    if not command.npz:
        rows = range(min(10, source.num_classes)) if given is None else given
        return np.repeat(np.asarray(rows, np.int32), _per_label(command, source))
    count = command.count or 50_000
    if given is None:
        key = jax.random.fold_in(jax.random.key(command.seed), 1)
        return random_labels(count, source.num_classes, key)
    return np.resize(np.asarray(given, np.int32), count)
