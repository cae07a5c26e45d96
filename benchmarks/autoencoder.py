"""How fast is Stable Diffusion's autoencoder on a CPU beside diffusers' in PyTorch, and how equal?

Both load the same random weights, each in a process of its own with as many threads, and encode
and decode in turns, so that noise of the machine falls on both alike.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import equidit as edt
from equidit import pretrained

from .common import median, write

SIDES = ("ours", "diffusers")
TASKS = ("decode", "encode")


def write_inputs(folder: Path, image_size: int) -> None:
    """A folder with random weights of the full size, an image and a latent."""
    skeleton = eqx.filter_eval_shape(edt.Autoencoder, key=jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        scale = 0.5 if leaf.ndim == 1 else math.prod(leaf.shape[1:]) ** -0.5
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    vae = jax.tree.map(draw, skeleton)
    pretrained.save_vae(vae, folder / "vae")
    size = image_size // vae.downsampling
    image = rng.uniform(-1, 1, (3, image_size, image_size)).astype(np.float32)
    np.savez(folder / "inputs.npz", image=image, z=rng.standard_normal((4, size, size), np.float32))


def ours(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Both tasks, as functions without arguments."""
    vae = pretrained.load_vae(folder / "vae")
    inputs = {name: jnp.asarray(array) for name, array in np.load(folder / "inputs.npz").items()}
    encode, decode = jax.jit(lambda vae, x: vae.encode(x)), jax.jit(lambda vae, z: vae.decode(z))

    def run_encode() -> dict[str, Any]:
        posterior = jax.block_until_ready(encode(vae, inputs["image"]))
        return {"mean": posterior.mean, "log_variance": posterior.log_variance}

    return {
        "decode": lambda: {"image": jax.block_until_ready(decode(vae, inputs["z"]))},
        "encode": run_encode,
    }


def theirs(folder: Path, threads: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """The same in diffusers, in the units of ours."""
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    torch.set_num_threads(threads)
    model = diffusers.AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    model.eval()
    scale = model.config["scaling_factor"]
    inputs = {n: torch.from_numpy(a)[None] for n, a in np.load(folder / "inputs.npz").items()}

    def run_encode() -> dict[str, Any]:
        with torch.inference_mode():
            posterior = model.encode(inputs["image"]).latent_dist
        log_variance = posterior.logvar[0].numpy() + 2 * math.log(scale)
        return {"mean": scale * posterior.mean[0].numpy(), "log_variance": log_variance}

    def run_decode() -> dict[str, Any]:
        with torch.inference_mode():
            return {"image": model.decode(inputs["z"] / scale).sample[0].numpy()}

    return {"decode": run_decode, "encode": run_encode}


def work(side: str, folder: Path, threads: int) -> None:
    """Runs a task for every line that is read, and answers with its seconds and CPU seconds."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    tasks = ours(folder) if side == "ours" else theirs(folder, threads)
    outputs: dict[str, Any] = {}
    for task in TASKS:
        outputs |= tasks[task]()
    np.savez(folder / f"{side}.npz", **outputs)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        tasks[line.strip()]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


def measure(folder: Path, threads: int, repetitions: int) -> dict[str, dict[str, list[Any]]]:
    """The answers of both sides to each task, in turns."""
    workers = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.autoencoder", "--threads", str(threads)]
        command += ["--side", side, "--folder", str(folder)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[side] = subprocess.Popen(command, **pipes)
        workers[side].stdout.readline()  # One has compiled before the other starts.
    found: dict[str, dict[str, list[Any]]] = {t: {side: [] for side in SIDES} for t in TASKS}
    for _ in range(repetitions):
        for task in TASKS:
            for side, worker in workers.items():
                print(task, file=worker.stdin, flush=True)
                found[task][side].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return found


def difference(folder: Path, name: str) -> float:
    """The largest difference of an output, relative to its largest entry in diffusers."""
    a, b = (np.load(folder / f"{side}.npz")[name].astype(np.float64) for side in SIDES)
    return float(np.abs(a - b).max() / np.abs(b).max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoencoder", description=__doc__)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--side", choices=SIDES, help="be the worker of one side")
    parser.add_argument("--folder", type=Path, help="of the worker's inputs")
    options = parser.parse_args(arguments)
    if options.side is not None:
        work(options.side, options.folder, options.threads)
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, options.image_size)
        found = measure(folder, options.threads, options.repetitions)
        outputs = ("image", "mean", "log_variance")
        differences = {name: difference(folder, name) for name in outputs}
    results: dict[str, Any] = {"difference": differences}
    for task, runs in found.items():
        row = {
            f"{side} {clock}": median([run[clock] for run in runs[side]])
            for side in SIDES
            for clock in ("wall", "cpu")
        }
        for clock in ("wall", "cpu"):
            pairs = zip(runs["ours"], runs["diffusers"], strict=True)
            row[f"ratio {clock}"] = median([b[clock] / a[clock] for a, b in pairs])
        results[task] = row | {"runs": runs}
        print(task, {name: round(value, 3) for name, value in row.items()})
    print(differences)
    settings = {name: getattr(options, name) for name in ("image_size", "threads", "repetitions")}
    print(write("autoencoder", settings | {"results": results}))


if __name__ == "__main__":
    main()
