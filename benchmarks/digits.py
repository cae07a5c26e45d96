"""How good are the digits of the default run, and how long does it take, over several seeds?"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import write


def train(*options: str | int) -> dict[str, Any]:
    """The figures of one `equidit train digits` run, and its wall time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digits"
        command = [sys.executable, "-m", "equidit", "train", "digits", "--out", str(out)]
        start = time.perf_counter()
        subprocess.run([*command, *map(str, options)], check=True)
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | json.loads(out.joinpath("report.json").read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains once a seed, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)

    rows = [{"seed": seed} | train("--seed", seed) for seed in options.seeds]
    path = write("digits", {"results": rows})
    print(
        "| seed | wall time | accuracy | Frechet / floor | nearest / held out | validation loss |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['seed']} | {row['seconds']:.0f} s | {row['accuracy']:.3f} "
            f"| {row['frechet'] / row['frechet_floor']:.2f} "
            f"| {row['nearest'] / row['nearest_held_out']:.2f} | {row['validation_loss']:.4f} |"
        )
    print(path)


if __name__ == "__main__":
    main()
