"""What a run trains on: its data, and all that follows from them."""

import dataclasses
from typing import Any

import numpy as np

from .. import data
from ..checkpoint import fingerprint
from ..data.images import left_out
from ..pretrained import load_vae
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class About:
    """What a network must know of its data: the part of config.json that is not chosen.

    **Fields:**

    - `shape`: of an example, as the network takes it.
    - `classes`: their names; label 0 is the first.
    - `autoencoder`: fingerprint of the one that made the latents, or `None` for pictures.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    autoencoder: str | None

    @property
    def num_classes(self) -> int:
        """Their number, which is also the null label."""
        return len(self.classes)


@dataclasses.dataclass(frozen=True)
class Task:
    """Data to train on, data to validate on (in memory), and what the network must know of them.

    **Fields:**

    - `left_out`: what a folder has beside them, for the user to be told; empty if nothing.
    """

    train: Any
    held_out: Any
    about: About
    left_out: str = ""


def load(settings: Settings) -> Task:
    """Opens the data of a run, and checks the labels.

    **Raises:**

    `FileNotFoundError`, `ValueError` for data that cannot be used: no pictures, labels out of
    range, fewer examples than a batch or than are to be held out.
    """
    kind, path = settings.source
    if kind == "digits":
        train, held_out = data.digits()
        classes = tuple(str(digit) for digit in range(data.DIGITS_CLASSES))
        about = About(data.DIGITS_SHAPE, classes, None)
        data.check_labels(train.label, about.num_classes)
        return Task(train, held_out, about)
    assert path is not None
    words = ""
    if kind == "folder":
        folder = data.image_folder(path)
        words = left_out(folder)
        source: Any = data.FolderSource(folder, settings.size, small=settings.small)
        about = About((3, settings.size, settings.size), folder.classes, None)
    else:
        source = data.LatentSource(path)
        info = source.cache.info
        shape = source.cache.mean.shape[2:]
        about = About(shape, tuple(info["classes"]), info["autoencoder"])
    data.check_labels(source.label, about.num_classes)
    if len(source.label) - settings.held_out < settings.batch_size:
        raise ValueError(
            f"{path} has {len(source.label)} examples, which is too few for batch_size="
            f"{settings.batch_size} beside held_out={settings.held_out}: lower them"
        )
    train, rest = data.held_out(source, settings.held_out)
    return Task(train, _in_memory(rest, settings.skip_corrupt), about, words)


def _in_memory(source: data.Subset, skip_corrupt: bool) -> Any:
    """All examples as one batch; damaged ones are left out."""
    rng, examples = np.random.default_rng(0), []
    for index in range(len(source.label)):
        try:
            examples.append(source.read(index, rng))
        except data.ImageError as error:
            if not (skip_corrupt and error.damaged):
                raise
    return type(examples[0])(*map(np.stack, zip(*examples, strict=True))) if examples else None


def decoder(settings: Settings, about: About, vae: str | None = None) -> Any:
    """The autoencoder of a run's latents: `None` for pictures, or if none is named.

    `ValueError` if it is not the one that the latents were made with.
    """
    name = vae or settings.vae
    if about.autoencoder is None or name is None:
        return None
    autoencoder = load_vae(name)
    if (found := fingerprint(autoencoder)) != about.autoencoder:
        raise ValueError(
            f"vae={name} has the fingerprint {found}, but the latents were made by an autoencoder "
            f"with {about.autoencoder}: give that one"
        )
    return autoencoder
