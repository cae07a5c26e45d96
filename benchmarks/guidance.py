"""What do guidance and the number of steps do to the digits?

Trains the default run of `equidit train digits` (or takes the folder of one) and samples from it:
by guidance scale, plain, in an interval of times, and rescaled; and by steps, DDIM and DDPM.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import equidit as edt
from equidit.data import DIGITS_CLASSES, DIGITS_SHAPE, Images, digits
from equidit.runs import report
from equidit.runs.process import Diffusion, Sampler
from equidit.runs.sampling import Sampling, draw
from equidit.runs.state import restore_ema

from .common import RESULTS, write

RULES = {
    "plain": edt.guide,
    "interval 100 to 700": partial(edt.guide, interval=(100.0, 700.0)),
    "rescaled by 0.7": partial(edt.guide, rescale=0.7),
}
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
STEPS = (4, 8, 16, 32, 64, 128, 250)
SCALE = 1.5


def figures(network: Any, sampler: Sampler, steps: int, count: int) -> dict[str, float]:
    """Accuracy, and Frechet distance over its floor, of `count` samples."""
    label = np.arange(count, dtype=np.int32) % DIGITS_CLASSES
    sampling = Sampling(
        network,
        Diffusion(steps),
        null=DIGITS_CLASSES,
        guidance_scale=1.0,
        sampler=sampler,
        shape=DIGITS_SHAPE,
        key=jax.random.key(0),
    )
    image = draw(sampling, label)
    quality = report.quality(Images(image, label), *digits())
    return {
        "accuracy": quality["accuracy"],
        "frechet_over_floor": quality["frechet"] / quality["frechet_floor"],
    }


def study(network: Any, count: int) -> list[dict[str, Any]]:
    """All rows of both tables."""
    rows = []
    for scale in SCALES:
        for rule, guide in RULES.items():
            guided = guide(network, scale, DIGITS_CLASSES)
            row = {"rule": rule, "scale": scale, "sampler": "ddim", "steps": 50}
            rows.append(row | figures(guided, "ddim", 50, count))
            print(rows[-1], flush=True)
    guided = edt.guide(network, SCALE, DIGITS_CLASSES)
    samplers: tuple[Sampler, ...] = ("ddim", "ddpm")
    for steps in STEPS:
        for sampler in samplers:
            row = {"rule": "plain", "scale": SCALE, "sampler": sampler, "steps": steps}
            rows.append(row | figures(guided, sampler, steps, count))
            print(rows[-1], flush=True)
    return rows


def series(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, list[dict[str, Any]]]]:
    """Every line of the picture: its panel's name, the axis, its own name, and its rows."""
    by_scale, by_steps = rows[: len(SCALES) * len(RULES)], rows[len(SCALES) * len(RULES) :]
    lines = [
        ("guidance scale", "scale", rule, [row for row in by_scale if row["rule"] == rule])
        for rule in RULES
    ]
    return lines + [
        ("sampling steps", "steps", name.upper(), [r for r in by_steps if r["sampler"] == name])
        for name in ("ddim", "ddpm")
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Both measures against both axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    measures = {"accuracy": "classifier accuracy", "frechet_over_floor": "Frechet / floor"}
    for label, axis, name, line in series(rows):
        for i, (measure, text) in enumerate(measures.items()):
            panel = panels[i, 0 if axis == "scale" else 1]
            panel.plot([r[axis] for r in line], [r[measure] for r in line], ".-", label=name)
            panel.set(ylabel=text, ylim=None if i else (0.95, 1.003), xlabel=label if i else None)
            if axis == "steps":
                panel.set_xscale("log")
                panel.set_xticks(STEPS, STEPS, minor=False)
                panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    figure.savefig(path)


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy, then Frechet distance over its floor, in each cell."""
    text = ""
    lines = series(rows)
    for axis in ("scale", "steps"):
        chosen = [(name, line) for _, a, name, line in lines if a == axis]
        text += f"| {axis} | {' | '.join(name for name, _ in chosen)} |\n"
        text += "|---" * (len(chosen) + 1) + "|\n"
        for i, row in enumerate(chosen[0][1]):
            cells = [
                f"{line[i]['accuracy']:.3f}, {line[i]['frechet_over_floor']:.2f}"
                for _, line in chosen
            ]
            text += f"| {row[axis]:g} | {' | '.join(cells)} |\n"
        text += "\n"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes the JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run; by default one is trained")
    parser.add_argument("--samples", type=int, default=500, help="for every figure")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.run or Path(temporary) / "digits"
        if options.run is None:
            command = [sys.executable, "-m", "equidit", "train", "digits", "--out", str(folder)]
            subprocess.run(command, check=True)
        network = restore_ema(folder)
        rows = study(network, options.samples)
    path = write("guidance", {"samples": options.samples, "results": rows})
    plot(rows, RESULTS / "guidance.png")
    print(table(rows) + str(path))


if __name__ == "__main__":
    main()
