"""What the tests of the commands share."""

import dataclasses
import json
from typing import Any

import pytest

from equidit import cli
from equidit.checkpoint import Checkpoints
from equidit.runs import loop
from equidit.runs.folder import Folder
from equidit.runs.kinds import About
from equidit.runs.settings import Settings
from equidit.runs.state import state_like


def run(*arguments: Any) -> int:
    """The command's exit status."""
    return cli.run([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command that fails says; the parser's own errors are boxed, and exit with 2."""
    capsys.readouterr()
    try:
        assert run(*arguments) == 1
    except SystemExit as exit:
        assert exit.code == 2  # noqa: PT017
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.replace("│", " ").split())


def saved(out: Any) -> Any:
    """The state of a run's newest checkpoint."""
    settings, about = Folder(out).read()
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore(state_like(settings, about, None)).state


def share_steps(patch: pytest.MonkeyPatch) -> None:
    """Has runs that compute the same compile one step, which is most of what a short run costs."""
    made: dict[str, Any] = {}
    make = loop.training_step

    def training_step(settings: Settings, about: About, mesh: Any) -> Any:
        depends = (settings.fixed(), settings.sharding, settings.remat, dataclasses.asdict(about))
        key = json.dumps([*depends, str(mesh)])
        if key not in made:
            made[key] = make(settings, about, mesh)
        return made[key]

    patch.setattr(loop, "training_step", training_step)
