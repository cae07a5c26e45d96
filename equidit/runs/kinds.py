"""The kinds of data that a run may train on: what each means for it is a row of one table."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import data
from ..data.images import left_out
from . import report


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

    @property
    def latents(self) -> bool:
        """Whether an example is a latent, which wants a decoder to be seen."""
        return self.autoencoder is not None


class Opened(NamedTuple):
    """Data that a run may train on.

    **Fields:**

    - `examples`: a [`equidit.data.Source`][], or a pytree of arrays.
    - `about`: what the network must know of them.
    - `held_out`: examples for validation, in memory; `None` where they are still to be split off.
    - `left_out`: what lies beside the examples, for the user to be told; empty if nothing.
    """

    examples: Any
    about: About
    held_out: Any = None
    left_out: str = ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of data.

    **Fields:**

    - `open`: from the path, and the setting `size` and `small`.
    - `has_path`: whether it is named with a path, as in `folder:DIR`.
    - `recipe`: the settings whose defaults are others than the digits'.
    - `judge`: figures of quality of labelled samples, for the report; `None` if there are none.
    """

    open: Callable[[Path | None, int, data.Small], Opened]
    has_path: bool
    recipe: Mapping[str, Any]
    judge: Callable[[data.Images], dict[str, float | int]] | None = None


def _digits(path: Path | None, size: int, small: data.Small) -> Opened:
    train, held_out = data.digits()
    classes = tuple(str(digit) for digit in range(data.DIGITS_CLASSES))
    return Opened(train, About(data.DIGITS_SHAPE, classes, None), held_out)


def _judge_digits(samples: data.Images) -> dict[str, float | int]:
    return report.quality(samples, *data.digits())


def _folder(path: Path | None, size: int, small: data.Small) -> Opened:
    assert path is not None
    folder = data.image_folder(path)
    source = data.FolderSource(folder, size, small=small)
    return Opened(source, About((3, size, size), folder.classes, None), None, left_out(folder))


def _latents(path: Path | None, size: int, small: data.Small) -> Opened:
    assert path is not None
    source = data.LatentSource(path)
    info = source.cache.info
    shape = source.cache.mean.shape[2:]
    return Opened(source, About(shape, tuple(info["classes"]), info["autoencoder"]))


PAPER: dict[str, Any] = {
    "model": "DiT-XL/2",
    "steps": 400_000,
    "batch_size": 256,
    "learning_rate": 1e-4,
    "ema_decay": 0.9999,
    "log_every": 100,
    "sample_every": 10_000,
    "guidance_scale": 4.0,
    "workers": 2,
}
"""The paper's recipe, section 4."""

KINDS = {
    "digits": Kind(_digits, has_path=False, recipe={}, judge=_judge_digits),
    "folder": Kind(_folder, has_path=True, recipe=PAPER),
    "latents": Kind(_latents, has_path=True, recipe=PAPER),
}
"""By the word before the colon."""
