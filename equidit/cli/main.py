"""The `equidit` command: what can be asked of it, and how it answers when something is wrong."""

import re
import sys
from collections.abc import Sequence
from typing import Annotated

from .._base.common import extra

with extra("train"):
    import tyro

from .encode import Encode, encode_command
from .sample import Sample, sample_command
from .train import Train, train_command


def run(arguments: Sequence[str]) -> int:
    """Parses and carries out one command, and returns the exit status."""
    try:
        command = _asked(arguments)
        if isinstance(command, Train):
            return train_command(command)
        sample_command(command) if isinstance(command, Sample) else encode_command(command)
        return 0
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"equidit: {_with_flags(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "equidit: interrupted; train goes on with --resume, encode and sample --npz go on if "
            "given again",
            file=sys.stderr,
        )
        return 130


def _asked(arguments: Sequence[str]) -> Train | Sample | Encode:
    """What is asked for, where settings of training that are not given are those of its data."""
    words = list(arguments)
    if words[:1] != ["train"]:
        return _parsed(words, Train())
    # `--data X` is the same as `X`.
    if "--data" in words[:-1]:
        at = words.index("--data")
        words = ["train", words[at + 1], *words[1:at], *words[at + 2 :]]
    words = [word.removeprefix("--data=") for word in words]
    # Help shows the defaults, and these depend on what else is asked for.
    first = _parsed([word for word in words if word not in ("-h", "--help")], Train())
    assert isinstance(first, Train)
    return _parsed(words, first.preset())


def _parsed(words: list[str], default: Train) -> Train | Sample | Encode:
    return tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=default)]  # pyright: ignore
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Encode, tyro.conf.subcommand("encode")],
        prog="equidit",
        description="Diffusion Transformers in JAX.",
        args=words,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def _with_flags(text: str) -> str:
    """An error's text, in which an argument that it suggests in parentheses is a flag."""
    return re.sub(r"\((\w+)='(\w+)'\)", lambda m: f"(--{m[1].replace('_', '-')} {m[2]})", text)
