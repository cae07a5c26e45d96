"""What a run trains on: its data, and all that follows from them."""

import dataclasses
from typing import Any

import numpy as np

from .. import data
from ..checkpoint import fingerprint
from ..pretrained import load_vae
from .kinds import About
from .settings import Settings


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
    _, path = settings.source
    opened = settings.kind.open(path, settings.size, settings.small)
    source, about = opened.examples, opened.about
    data.check_labels(source.label, about.num_classes)
    if opened.held_out is not None:
        return Task(source, opened.held_out, about, opened.left_out)
    if len(source.label) - settings.held_out < settings.batch_size:
        raise ValueError(
            f"{path} has {len(source.label)} examples, which is too few for batch_size="
            f"{settings.batch_size} beside held_out={settings.held_out}: lower them"
        )
    train, rest = data.held_out(source, settings.held_out)
    return Task(train, _in_memory(rest, settings.skip_corrupt), about, opened.left_out)


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
    if not about.latents or name is None:
        return None
    autoencoder = load_vae(name)
    if (found := fingerprint(autoencoder)) != about.autoencoder:
        raise ValueError(
            f"vae={name} has the fingerprint {found}, but the latents were made by an autoencoder "
            f"with {about.autoencoder}: give that one"
        )
    return autoencoder
