"""What share of a run's time is the training step?

Runs `equidit train` on the digits and on a cache of random latents with DiT-S/2, without validation
in between, and beside it the run's own training step alone, on one batch that is there already. The
rest of a run is waiting for data, counting, logging and the progress bar. Turns alternate, and the
figure is the median rate of the one over the median rate of the other.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from equidit import _run, _task
from equidit._folder import Folder
from equidit._settings import Settings, defaults

from .common import median, write
from .data import make_latents


def bare(run: Any, state: Any, steps: int) -> tuple[float, Any]:
    """Images a second of the training step alone, and the state after it."""
    key = run.settings.key(1)
    with run.stream(0) as stream:
        batch, _ = next(stream)
    batch = jax.device_put(batch)
    state, metrics = run.step(state, batch, key)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = run.step(state, batch, key)
    jax.block_until_ready(metrics)
    return steps * run.settings.batch_size / (time.perf_counter() - start), state


def measure(settings: Settings, folder: Path, turns: int) -> dict[str, Any]:
    """Rates of the whole and of the step alone, in turns."""
    task = _task.load(settings)
    run = _run._Run(settings, Folder(folder), task)
    state = _run.new_state(settings, task.about, run.mesh)
    whole, alone, waited = [], [], 0.0
    for turn in range(turns):
        rate, state = bare(run, state, settings.steps)
        alone.append(rate)
        out = Folder(folder / str(turn))
        _run.train(settings, out)
        rows = [row for row in out.rows() if "images_per_second" in row]
        whole.append(median([row["images_per_second"] for row in rows]))
        waited = float(np.median([row["data_wait"] for row in rows]))
    return {
        "data": settings.data.partition(":")[0],
        "model": settings.model,
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "images_per_second": whole,
        "step_alone": alone,
        "goodput": median(whole) / median(alone),
        "data_wait": waited,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| run | images/s | step alone | share of the step | waiting for data |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        lines.append(
            f"| {row['data']}, {row['model']}, batch {row['batch_size']} | "
            f"{median(row['images_per_second']):.1f} | {median(row['step_alone']):.1f} | "
            f"{row['goodput']:.3f} | {row['data_wait']:.2%} |"
        )
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
            measure(digits, path / "digits", options.turns),
            measure(cached, path / "cached", max(options.turns // 2, 2)),
        ]
    written = write("goodput", {"results": results})
    print(table(results) + str(written))


if __name__ == "__main__":
    main()
