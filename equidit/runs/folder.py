"""The files of a run."""

import contextlib
import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beartype.door import is_bearable

from .._base.disk import replace
from .._base.texts import brief
from .kinds import About
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Folder:
    """The files of a run."""

    path: Path

    config = property(lambda self: self.path / "config.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")
    events = property(lambda self: self.path / "tensorboard")
    profile = property(lambda self: self.path / "profile")
    samples = property(lambda self: self.path / "samples.png")
    loss = property(lambda self: self.path / "loss.png")
    report = property(lambda self: self.path / "report.json")
    lock = property(lambda self: self.path / "lock")

    def check(self, *, overwrite: bool) -> None:
        """`FileExistsError` if a new run may not be put here."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} exists and is no folder: choose another --out")
        # What a run leaves that was killed before it had begun.
        begun = {self.lock, self.config.with_name("config.json.partial")}
        if self.path.is_dir() and {*self.path.iterdir()} - begun:
            if not self.config.exists():
                raise FileExistsError(f"{self.path} holds other things: choose another --out")
            if not overwrite:
                raise FileExistsError(
                    f"{self.path} holds a run: go on with it (--resume), start over (--overwrite), "
                    "or choose another --out"
                )

    def clear(self) -> None:
        """Deletes the run that is there."""
        for folder in (self.checkpoints, self.events, self.profile):
            if folder.exists():
                shutil.rmtree(folder)
        # The config last: killed before, the folder is still seen to hold a run.
        for file in (self.metrics, self.samples, self.loss, self.report, self.config):
            file.unlink(missing_ok=True)

    def begin(self, settings: Settings, about: About, step: int) -> None:
        """Makes the folder ready for training from `step` on."""
        record = {
            "equidit": version("equidit"),
            "settings": settings.record(),
            "about": dataclasses.asdict(about),
        }
        replace(self.config, json.dumps(record, indent=2) + "\n")
        # Rows beyond a checkpoint belong to steps that will be made again.
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        replace(self.metrics, "".join(kept))

    def read(self) -> tuple[Settings, About]:
        """The settings of the run that is there, and what it knows of its data."""
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} is no run: it has no config.json")
        try:
            record = json.loads(self.config.read_text())
            about = record["about"]
            about = About(tuple(about["shape"]), tuple(about["classes"]), about["autoencoder"])
            settings = Settings(**record["settings"])
            _check_types(settings, about)
            # What its model cannot be is said here, beside the file's name.
            settings.network(about.shape[0], about.num_classes)
            return settings, about
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.config} is damaged or of another version: {brief(str(error))}"
            ) from error

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, less a last one that was cut short, and damaged ones."""
        rows = []
        text = self.metrics.read_text(errors="replace") if self.metrics.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
        return [row for row in rows if _is_row(row)]


def _check_types(settings: Settings, about: About) -> None:
    """`TypeError` naming the first value that is not of its field's type."""
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        # To Python true and false are numbers too.
        wrong = type(value) is bool and field.type is not bool
        if wrong or not is_bearable(value, field.type):  # pyright: ignore[reportArgumentType]
            raise TypeError(f"{field.name}={value!r} is of another type")
    shape, classes = about.shape, about.classes
    if [type(size) for size in shape] != [int] * 3 or not all(0 < n < 2**31 for n in shape):
        raise TypeError(f"shape={shape} must be three sizes")
    if not classes or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes={classes} must be names")
    if not isinstance(about.autoencoder, str | None):
        raise TypeError(f"autoencoder={about.autoencoder!r} must be a fingerprint or null")


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_row(row: Any) -> bool:
    """Whether a line says what a run's rows say: numbers at a step."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    if "validation_loss" in row:
        quartiles = row.get("validation_loss_by_quartile")
        if not isinstance(quartiles, list) or list(map(_is_number, quartiles)) != [True] * 4:
            return False
    loss = {"loss", "validation_loss"} & row.keys()
    values = (v for value in row.values() for v in (value if isinstance(value, list) else [value]))
    numbers = all(value is None or _is_number(value) for value in values)
    return numbers and all(_is_number(row[name]) for name in loss)
