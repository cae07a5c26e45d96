"""`python -m benchmarks` lists the parts; `python -m benchmarks PART ...` runs one."""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

PARTS = (
    "flops",
    "aot",
    "throughput",
    "scaling",
    "compare",
    "train_step",
    "sampling",
    "memory",
    "digits",
    "blocks",
    "optimizers",
    "guidance",
    "autoencoder",
    "loading",
    "data",
    "goodput",
    "faults",
    "kills",
    "incidents",
    "uneven",
    "fuzz",
    "checks",
    "mutations",
)
FOLDER = Path(__file__).parent


def listing() -> str:
    """Each part beside the question that it answers: the first line of its docstring."""
    lines = ["usage: python -m benchmarks PART [options]", ""]
    for part in PARTS:
        text = ast.get_docstring(ast.parse((FOLDER / f"{part}.py").read_text())) or ""
        lines.append(f"  {part:<12} {text.splitlines()[0]}")
    return "\n".join([*lines, "", "python -m benchmarks PART --help shows a part's options."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Lists the parts, or runs the one that is named first."""
    part, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if part in ("--help", "-h", "list"):
        print(listing())
        return
    if part not in PARTS:
        raise SystemExit(f"part {part!r} is unknown: choose from {', '.join(PARTS)}")
    # What the part records as its command.
    sys.argv = [str(FOLDER / f"{part}.py"), *rest]
    importlib.import_module(f"benchmarks.{part}").main(rest)


if __name__ == "__main__":
    main()
