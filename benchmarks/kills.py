"""Is a run that is killed again and again the same run in the end?

Kills `equidit train digits` (a small network that saves every few steps) at random moments of its
start, its steps and its saves, goes on with it, and compares its weights, averages, moments and
metrics with those of a run that nobody interrupted. No kill may cost a checkpoint that was there.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from equidit.checkpoint import Checkpoints
from equidit.runs.folder import Folder
from equidit.runs.state import state_like

from .common import write

SETTINGS = [
    "--hidden-size",
    "16",
    "--depth",
    "1",
    "--num-heads",
    "2",
    "--batch-size",
    "16",
    "--steps",
    "40",
    "--log-every",
    "4",
    "--sample-every",
    "4",
    "--sampling-steps",
    "2",
]
RATES = {"images_per_second", "mfu", "data_wait"}


def command(out: Path, *more: str) -> list[str]:
    """The run's command."""
    return [sys.executable, "-m", "equidit", "train", "digits", "--out", str(out), *more]


def start(words: list[str], cache: Path) -> subprocess.Popen[bytes]:
    """Starts a process with one device; what it compiles is kept for the next."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def result(out: Path) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """All that a finished run has come to, but for its rates."""
    settings, about = Folder(out).read()
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(state_like(settings, about, None)).state
    rows = [{k: v for k, v in row.items() if k not in RATES} for row in Folder(out).rows()]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], rows


def steps(out: Path) -> list[int]:
    """The checkpoints that are there."""
    if not (out / "checkpoints").exists():
        return []
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


def again(out: Path) -> list[str]:
    """How to go on, however far the run has come."""
    return command(out, "--resume") if (out / "config.json").exists() else command(out, *SETTINGS)


def campaign(kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Kills so many times, in as many runs as that takes, and counts what came of it."""
    rng, counts = random.Random(seed), Counter()
    cache = folder / "cache"
    whole = folder / "whole"
    if start(command(whole, *SETTINGS), cache).wait():
        raise RuntimeError("the run that nobody interrupts has failed")
    began = time.perf_counter()
    if start(command(folder / "second", *SETTINGS), cache).wait():
        raise RuntimeError("the second run that nobody interrupts has failed")
    duration = time.perf_counter() - began
    expected = result(whole)
    out = folder / "killed"
    with tqdm(total=kills, unit="kill") as bar:
        while counts["kills"] < kills:
            shutil.rmtree(out, ignore_errors=True)
            for _ in range(4):
                before = steps(out)
                process = start(again(out), cache)
                try:
                    process.wait(rng.uniform(0, duration))
                    break
                except subprocess.TimeoutExpired:
                    newest = steps(out)
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                counts["kills"] += 1
                bar.update()
                after = steps(out)
                lost = max(before + newest, default=0) > max(after, default=0)
                counts["a checkpoint lost" if lost else "no checkpoint lost"] += 1
                moment = "while it started" if newest == before else "between two checkpoints"
                counts[f"killed {moment}"] += 1
            if start(again(out), cache).wait() and not (out / "report.json").exists():
                counts["could not go on"] += 1
                continue
            found = result(out)
            same = all(map(np.array_equal, found[0], expected[0])) and found[1] == expected[1]
            counts["runs equal bit for bit" if same else "runs that differ"] += 1
    return dict(counts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kills, prints the counts, and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        counts = campaign(options.kills, options.seed, Path(temporary))
    path = write("kills", {"seed": options.seed, "counts": counts})
    print(json.dumps(counts, indent=2), path, sep="\n")


if __name__ == "__main__":
    main()
