"""The `equidit` command: what can be asked of it, and how it answers when something is wrong."""

import sys
from collections.abc import Sequence
from typing import Annotated

from .._base.common import extra

with extra("train"):
    import tyro

from .encode import Encode, encode_command
from .sample import Sample, sample_command
from .train import Train, preset, train_command


def run(arguments: Sequence[str]) -> int:
    """Parses and carries out one command, and returns the exit status."""
    words, given = _words(arguments)
    try:
        command = tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train", default=preset(words))]  # pyright: ignore
            | Annotated[Sample, tyro.conf.subcommand("sample")]
            | Annotated[Encode, tyro.conf.subcommand("encode")],
            prog="equidit",
            description="Diffusion Transformers in JAX.",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
        if isinstance(command, Train):
            return train_command(command, given)
        sample_command(command) if isinstance(command, Sample) else encode_command(command)
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
