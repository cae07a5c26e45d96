"""Does Muon draw better digits than Adam, and does it matter which arrays it is given?

Four optimizers, at the same learning rate, steps, batches and noise: Adam; `optax.contrib.muon` by
its own rule, which takes whatever has two axes; `equidit.muon` with fused matrices taken whole; and
`equidit.muon`. All scale Muon's updates to Adam's usual size. Rows that are there already, of the
same steps and learning rate, are kept.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import equidit as edt
from equidit.data import Images, batches, digits
from equidit.runs import report
from equidit.runs.process import training_loss
from equidit.runs.sampling import sample
from equidit.runs.settings import Settings
from equidit.runs.task import load
from equidit.runs.validation import validation

from .common import RESULTS, median, origin, writable, write


def whole(network: Any) -> Any:
    """What the parameters are, but for the parts of fused matrices."""
    kinds = edt.parameter_kinds(network)
    return jax.tree.map(lambda kind: dataclasses.replace(kind, parts=1), kinds)


OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "Adam": optax.adam,
    "optax.contrib.muon": partial(optax.contrib.muon, consistent_rms=0.2),
    "edt.muon, fused matrices whole": partial(edt.muon, kinds=whole),
    "edt.muon": edt.muon,
}


def train(name: str, settings: Settings, samples: int) -> dict[str, Any]:
    """The figures of one run, by the recipe of `equidit train digits` but for the optimizer."""
    start = time.perf_counter()
    task = load(settings)
    optimizer = OPTIMIZERS[name](settings.learning_rate)
    about = task.about
    config = settings.network(about.shape[0], about.num_classes)
    state = edt.init_state(edt.build(config, key=settings.key("init")), optimizer)
    step = edt.make_train_step(
        training_loss(settings.process, about.num_classes, settings.label_dropout),
        optimizer,
        ema_decay=edt.ema_warmup(settings.ema_decay),
    )
    with batches(task.train, settings.batch_size, seed=settings.seed) as stream:
        for _ in range(settings.steps):
            batch, _ = next(stream)
            state, _ = step(state, batch, settings.key("train"))
    figures = validation(settings, state, task.held_out, None)
    label = np.arange(samples, dtype=np.int32) % about.num_classes
    images = Images(sample(settings, about, state.ema, label), label)
    figures |= report.quality(images, *digits())
    return {"seconds": time.perf_counter() - start} | figures


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a measurement is of."""
    return tuple(row[name] for name in ("steps", "learning_rate", "optimizer", "seed"))


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the seeds, and every seed's loss."""
    text = "| optimizer | validation loss | accuracy | Frechet / floor | loss by seed |\n"
    text += "|---|---|---|---|---|\n"
    for steps, rate, name in dict.fromkeys(case_of(row)[:3] for row in rows):
        of = [row for row in rows if case_of(row)[:3] == (steps, rate, name)]
        cells = [
            f"{name}, {steps} steps at {rate:g}",
            f"{median([row['validation_loss'] for row in of]):.4f}",
            f"{median([row['accuracy'] for row in of]):.3f}",
            f"{median([row['frechet'] / row['frechet_floor'] for row in of]):.2f}",
            " ".join(f"{row['validation_loss']:.4f}" for row in of),
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not there yet, writes the JSON after every run, and at the end a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=1000, help="of training")
    add("--learning-rate", type=float, default=Settings.learning_rate)
    add("--samples", type=int, default=500, help="for the accuracy")
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    path = writable(options.results) / "optimizers.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    # Seeds outside, so that what there is compares even if the rest is never run.
    for seed in options.seeds:
        for name in options.optimizers:
            case = {"steps": options.steps, "learning_rate": options.learning_rate}
            case |= {"optimizer": name, "seed": seed}
            if case_of(case) not in map(case_of, rows):
                settings = Settings(
                    seed=seed, steps=options.steps, learning_rate=options.learning_rate
                )
                row = origin() | case | train(name, settings, options.samples)
                rows = sorted([*rows, row], key=order)
                write("optimizers", {"results": rows}, options.results)
                print(f"seed {seed}, {name}: {row['validation_loss']:.4f}", flush=True)
    path.with_suffix(".md").write_text(table(rows))
    print(table(rows) + str(path))


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """By steps, learning rate, optimizer as above, and seed."""
    steps, rate, name, seed = case_of(row)
    return steps, rate, list(OPTIMIZERS).index(name), seed


if __name__ == "__main__":
    main()
