"""How long does it take to load published weights, and how much memory at most?

Writes random weights of a configuration's size as both kinds of official file, and loads each in a
process of its own. Memory is what the process itself holds, Linux's RssAnon, without what it held
before loading: pages of the file can be dropped by the system at any time and do not count.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import equidit as edt
from equidit import pretrained

from .common import median, write

KINDS = (".safetensors", ".pt")


def rss_anon() -> int:
    """Bytes of anonymous memory that this process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status: this needs Linux")


def load(path: Path) -> dict[str, float]:
    """Loads a file, and returns seconds and bytes."""
    if path.suffix == ".pt":
        __import__("torch")  # Its import is not counted.
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before = peak = rss_anon()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, rss_anon())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    network = jax.block_until_ready(pretrained.load_dit(path))
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(network))
    peak = max(peak, rss_anon())
    return {"seconds": seconds, "size": size, "before": before, "peak": peak}


def random_weights(config: str) -> dict[str, np.ndarray]:
    """A state dict of an official DiT with random arrays."""
    from equidit.pretrained.official import OFFICIAL
    from equidit.pretrained.tables import expected

    skeleton = jax.eval_shape(lambda key: edt.build(config, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in expected(skeleton, OFFICIAL).items()
    }


def write_files(folder: Path, config: str) -> int:
    """Writes both files, and returns the bytes of their arrays."""
    import torch
    from safetensors.numpy import save_file

    weights = random_weights(config)
    save_file(weights, folder / "weights.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, folder / "weights.pt")
    return sum(math.prod(v.shape) * v.itemsize for v in weights.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--config", default="DiT-XL/2", help="of CONFIGS")
    parser.add_argument("--repetitions", type=int, default=3, help="for each kind of file")
    parser.add_argument("--load", type=Path, help="only load this file, and print the figures")
    options = parser.parse_args(arguments)
    if options.load is not None:
        print(json.dumps(load(options.load)))
        return

    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_files(folder, options.config)
        for _ in range(options.repetitions):
            for kind, runs in found.items():
                command = [sys.executable, "-m", "benchmarks.loading"]
                command += ["--load", str(folder / f"weights{kind}")]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout))
    results: dict[str, dict[str, Any]] = {}
    for kind, runs in found.items():
        assert all(run["size"] == size for run in runs)
        results[kind] = {
            "seconds": median([run["seconds"] for run in runs]),
            "ratio": max((run["peak"] - run["before"]) / size for run in runs),
            "runs": runs,
        }
        print(f"{kind}: {results[kind]['seconds']:.1f} s, {results[kind]['ratio']:.3f} of the size")
    print(write("loading", {"config": options.config, "size": size, "results": results}))


if __name__ == "__main__":
    main()
