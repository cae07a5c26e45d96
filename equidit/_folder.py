"""The files of a run."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from . import __version__
from ._settings import Settings
from ._storage import replace
from ._task import About


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
            "equidit": __version__,
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
            return Settings(**record["settings"]), about
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.config} is damaged or of another version: {error}") from error

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, less a last one that was cut short."""
        rows = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows
