"""What share of a run's time is not the training step?

Runs `equidit train` on the digits and on a cache of random latents with DiT-S/2, without validation
in between, and waits for every step to end. What counts beside the steps is what the run's thread
does until it begins the next one (data, counting, logging, the progress bar), in CPU seconds: the
wall clock would count what the backend does after a step, such as giving memory back. A run that
does not wait does most of this while a step is computed, so that the share is an upper bound. The
time spent waiting for data is by the wall clock.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from equidit.runs import loop, task
from equidit.runs.folder import Folder
from equidit.runs.settings import Settings, defaults

from .common import median, write
from .data import make_latents


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """One run's seconds from the end of its first step to the end of its last, and of the rest."""
    out = Folder(folder)
    run = loop._Run(settings, out, task.load(settings))
    step, done, outside = run.step, [], []
    left = [0.0]

    def timed(*arguments: Any) -> Any:
        outside.append(time.thread_time() - left[0])
        result = jax.block_until_ready(step(*arguments))
        done.append(time.perf_counter())
        left[0] = time.thread_time()
        return result

    run.step = timed
    with run.opened(overwrite=False) as state:
        run.train(state, None)
    waits = [row["data_wait"] for row in out.rows() if "data_wait" in row]
    return {
        "seconds": done[-1] - done[0],
        "outside": sum(outside[1:]),
        "data_wait": median(waits),
    }


def share(row: dict[str, Any]) -> list[float]:
    """Of each run's time, what is not its steps'."""
    return [turn["outside"] / turn["seconds"] for turn in row["turns"]]


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| run | images/s | not in the step | waiting for data |", "|---|---|---|---|"]
    for row in results:
        rate = median([row["images"] / turn["seconds"] for turn in row["turns"]])
        waits = median([turn["data_wait"] for turn in row["turns"]])
        name = f"{row['data']}, {row['model']}, batch {row['batch_size']}"
        lines.append(f"| {name} | {rate:.1f} | {median(share(row)):.2%} | {waits:.2%} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of the digits; of latents a tenth")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        latents = f"latents:{make_latents(path / 'latents', 1024)}"
        never: dict[str, Any] = {"sample_every": 10**6}
        digits = Settings(steps=options.steps, log_every=options.steps // 6, **never)
        paper = defaults(latents) | {"model": "DiT-S/2", "batch_size": 8, "held_out": 8} | never
        steps = options.steps // 10
        cached = Settings(data=latents, **paper | {"steps": steps, "log_every": steps // 3})
        results = [
            {
                "data": settings.data.partition(":")[0],
                "model": settings.model,
                "batch_size": settings.batch_size,
                "steps": settings.steps,
                "images": (settings.steps - 1) * settings.batch_size,
                "turns": [measure(settings, path / f"{i} {turn}") for turn in range(turns)],
            }
            for i, (settings, turns) in enumerate(
                [(digits, options.turns), (cached, max(options.turns // 2, 2))]
            )
        ]
    written = write("goodput", {"results": results})
    print(table(results) + str(written))


if __name__ == "__main__":
    main()
