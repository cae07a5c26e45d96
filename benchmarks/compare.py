"""How fast are the forward pass and the training step beside PyTorch's, at the same sizes?

Against diffusers' DiTTransformer2DModel, and the paper's arithmetic in plain PyTorch modules
(plain_torch.py), each eager and under torch.compile. All have the same weights, dtype, batch,
output channels and loss (the noise's mean squared error at random steps), Adam and the EMA, and as
many threads; bfloat16 means weights in it for the forward pass, and for training a float32 state of
which a copy is cast (equidit) or autocast (PyTorch). All run on JAX's default device, a CPU or a
GPU; on a GPU float32 products may use TF32 on both sides, as JAX's do by default. Each has a
process of its own, and all take turns, so that noise of the machine falls
on all alike. A turn is one run that is not timed and one that is, as in training, where a step
follows a step: after a pause the machine may first have to find the memory again. CPU time is given
beside wall time. On a busy machine PyTorch's threads lose much of both in waiting for one another:
there only `--threads 1` compares the work itself. `--huge-pages` asks glibc for memory in huge
pages, for all sides. Ratios are medians over the turns.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import equidit as edt
from equidit import diffusion as dfn, pretrained

from .common import RESULTS, config_names, machine, median, origin, writable, write
from .report import Report, write_report
from .throughput import DTYPES

SIDES = ("equidit", "diffusers", "diffusers compiled", "plain", "plain compiled")
TASKS = ("forward", "train")
BETAS = dfn.linear_betas()
Tasks = dict[str, Callable[[], Any]]


def write_inputs(folder: Path, name: str, batch_size: int) -> None:
    """Random weights, of which none is zero, and a batch."""
    network = edt.build(name, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(network)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.03 * rng.standard_normal(x.shape, np.float32)) for x in leaves]
    network = jax.tree.unflatten(structure, drawn)
    pretrained.save_diffusers_dit(network, folder / "dit", allow_mismatch=True)
    x = rng.standard_normal((batch_size, 4, 32, 32), np.float32)
    t, label = rng.integers(0, 1000, batch_size), rng.integers(0, 1000, batch_size)
    np.savez(folder / "inputs.npz", x=x, t=t, label=label)


def ours(folder: Path, dtype: str) -> tuple[Tasks, dict[str, Any]]:
    """The tasks, and the outputs in the official arithmetic and in that of diffusers."""
    inputs = np.load(folder / "inputs.npz")
    x = jnp.asarray(inputs["x"])
    t, label = (jnp.asarray(inputs[n], jnp.int32) for n in ("t", "label"))
    forward = jax.jit(lambda n, x, t, label: jax.vmap(n)(x, t, label))
    networks = {
        kind: pretrained.load_diffusers_dit(folder / "dit", arithmetic=kind)
        for kind in ("official", "diffusers")
    }
    fast = {kind: edt.cast(network, jnp.dtype(dtype)) for kind, network in networks.items()}
    outputs = {kind: forward(network, x, t, label) for kind, network in fast.items()}
    network, schedule, optimizer = networks["official"], dfn.Schedule(BETAS), optax.adam(1e-4)

    def loss(network: Any, example: Any, key: Any) -> Any:
        return dfn.simple_loss(network, schedule, *example, key=key)

    step = edt.make_train_step(loss, optimizer, dtype=DTYPES[dtype])
    # A copy: the step takes over what it is given.
    state = edt.init_state(jax.tree.map(jnp.copy, network), optimizer)

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, (x, label), jax.random.key(0))
        return jax.block_until_ready(metrics["loss"])

    tasks = {
        "forward": lambda: jax.block_until_ready(forward(fast["official"], x, t, label)),
        "train": train,
    }
    return tasks, outputs


def theirs(folder: Path, options: Any) -> tuple[Tasks, dict[str, Any]]:
    """The same in PyTorch."""
    import torch
    from safetensors.torch import load_file

    place = {"cpu": "cpu", "gpu": "cuda"}[options.device]
    half = options.dtype == "bfloat16"
    torch.set_num_threads(options.threads)
    if place == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    inputs = np.load(folder / "inputs.npz")
    x, t, label = (torch.from_numpy(inputs[n]).to(place) for n in ("x", "t", "label"))
    if options.side.startswith("plain"):
        from .plain_torch import from_diffusers

        weights = load_file(folder / "dit" / "diffusion_pytorch_model.safetensors")
        model: Any = from_diffusers(edt.CONFIGS[options.configs[0]], weights)
    else:
        diffusers: Any = importlib.import_module("diffusers")
        model = diffusers.DiTTransformer2DModel.from_pretrained(folder / "dit")
    model = model.to(place).eval()  # no label dropout of its own, as on the other sides

    def caller(model: Any) -> Any:
        def call(x: Any, t: Any, label: Any) -> Any:
            if options.side.startswith("plain"):
                return model(x, t, label)
            return model(x, timestep=t, class_labels=label, return_dict=False)[0]

        return torch.compile(call) if options.side.endswith("compiled") else call

    run = caller(model)
    run_fast = caller(copy.deepcopy(model).to(torch.bfloat16)) if half else run
    x_fast = x.to(torch.bfloat16) if half else x
    foreach_lerp: Any = vars(torch)["_foreach_lerp_"]
    kept = torch.tensor(np.cumprod(1 - BETAS), dtype=torch.float32, device=place)
    parameters = [p.requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    ema = [p.detach().clone() for p in parameters]

    def finish() -> None:
        if place == "cuda":
            torch.cuda.synchronize()

    def forward() -> Any:
        with torch.no_grad():
            output = run_fast(x_fast, t, label)
        finish()
        return output

    def train() -> float:
        t, noise = torch.randint(0, 1000, (len(x),), device=place), torch.randn_like(x)
        share = kept[t][:, None, None, None]
        noisy = share.sqrt() * x + (1 - share).sqrt() * noise
        with torch.autocast(place, torch.bfloat16, enabled=half):
            output = run(noisy, t, label)
        loss = (output[:, : x.shape[1]].float() - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            foreach_lerp(ema, parameters, 1 - 0.9999)
        finish()
        return loss.item()

    output = forward().float().cpu().numpy()
    return {"forward": forward, "train": train}, {"output": output}


def work(options: Any) -> None:
    """Runs a task for every line that is read, and answers with its seconds and CPU seconds."""
    if options.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    start = time.perf_counter()
    folder, mine = options.folder, options.side == SIDES[0]
    tasks, outputs = ours(folder, options.dtype) if mine else theirs(folder, options)
    np.savez(folder / f"{options.side}.npz", **outputs)
    for task in TASKS:
        for _ in range(2):
            tasks[task]()
    print(json.dumps({"start": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        tasks[line.strip()]()
        wall, cpu = time.perf_counter(), time.process_time()
        tasks[line.strip()]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


def device_of(backend: str) -> str:
    """Where all sides run: `SystemExit` where PyTorch cannot."""
    if backend not in ("cpu", "gpu"):
        raise SystemExit(
            f"PyTorch has no {backend} to be compared on: JAX_PLATFORMS=cpu compares on the CPU"
        )
    if backend == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(
                "this PyTorch sees no GPU: install a build with CUDA, or set JAX_PLATFORMS=cpu"
            )
    return backend


def measure(
    folder: Path, name: str, sides: Sequence[str], options: argparse.Namespace, bar: Any
) -> tuple[dict[str, dict[str, list[Any]]], dict[str, float]]:
    """The answers of all sides to each task, in turns; and how long each took to be ready."""
    workers, ready = {}, {}
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.compare", "--threads", str(options.threads)]
        command += ["--side", side, "--folder", str(folder), "--configs", name]
        command += ["--dtype", options.dtype, "--device", options.device]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        if options.huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        worker = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **pipes)
        line = worker.stdout.readline() if worker.stdout else ""
        if not line:  # its own words say why
            raise RuntimeError(f"{side} failed: {worker.communicate()[1][-2000:]}")
        workers[side], ready[side] = worker, json.loads(line)["start"]
        bar.update()
    found: dict[str, dict[str, list[Any]]] = {t: {side: [] for side in sides} for t in TASKS}
    for _ in range(options.repetitions):
        for task in TASKS:
            for side, worker in workers.items():
                print(task, file=worker.stdin, flush=True)
                found[task][side].append(json.loads(worker.stdout.readline()))
        bar.update()
    for worker in workers.values():
        worker.communicate()
    return found, ready


def difference(folder: Path, side: str) -> float:
    """The largest difference from ours in the same arithmetic, over the largest entry."""
    a = np.load(folder / f"{SIDES[0]}.npz")["official" if side.startswith("plain") else "diffusers"]
    b = np.load(folder / f"{side}.npz")["output"]
    return float(np.abs(a - b).max() / np.abs(b).max())


def compared(its: list[Any], ours: list[Any]) -> dict[str, Any]:
    """Medians of both sides and of the ratios of the turns."""
    row: dict[str, Any] = {"runs": its, "our_runs": ours}
    for clock in ("wall", "cpu"):
        row[clock] = median([run[clock] for run in its])
        row[f"our_{clock}"] = median([run[clock] for run in ours])
        pairs = zip(its, ours, strict=True)
        row[f"ratio_{clock}"] = median([a[clock] / b[clock] for a, b in pairs])
    return row


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a new measurement replaces an old one of."""
    keys = ("dtype", "threads", "huge_pages", "batch_size", "config", "task", "side")
    return tuple(row[key] for key in keys)


REPORT = Report(
    part="compare",
    columns={
        "config": lambda row: row["config"],
        "task": lambda row: row["task"],
        "dtype": lambda row: row["dtype"],
        "batch": lambda row: str(row["batch_size"]),
        "threads": lambda row: str(row["threads"]),
        "huge pages": lambda row: "yes" if row["huge_pages"] else "no",
        "against": lambda row: row["side"],
        "equidit, wall (CPU)": lambda row: f"{row['our_wall']:.3f} s ({row['our_cpu']:.3f} s)",
        "it, wall (CPU)": lambda row: f"{row['wall']:.3f} s ({row['cpu']:.3f} s)",
        "it / equidit, wall (CPU)": lambda row: f"{row['ratio_wall']:.2f} ({row['ratio_cpu']:.2f})",
        "difference": lambda row: f"{row['difference']:.1e}",
    },
    bar=lambda row: row["ratio_wall"],
    mark=lambda row: row["ratio_cpu"],
    mark_label="in CPU time",
    label=lambda row: (
        f"{row['config']} {row['task']} {row['dtype']} {row['side']} {row['threads']} threads"
        + ", huge pages" * row["huge_pages"]
    ),
    unit="its wall time / equidit's (above 1: equidit is faster)",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--configs", nargs="+", default=["DiT-S/4", "DiT-S/2", "DiT-B/4"], help="of CONFIGS")
    add("--sides", nargs="+", choices=SIDES[1:], default=SIDES[1:], help="to compare with")
    add("--dtype", choices=DTYPES, default="float32")
    add("--batch-size", type=int, default=8)
    add("--threads", type=int, default=2)
    add("--huge-pages", action="store_true", help="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (Linux)")
    add("--repetitions", type=int, default=7)
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    add("--side", choices=SIDES, help="be the worker of one side")
    add("--folder", type=Path, help="of the worker's inputs")
    add("--device", choices=("cpu", "gpu"), help="of the worker")
    options = parser.parse_args(arguments)
    if options.side is not None:
        work(options)
        return
    names, folder = config_names(options.configs), writable(options.results)
    sides = [SIDES[0], *options.sides]
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("PyTorch is not installed: pip install torch 'equidit[pretrained]'")
    # The sides share a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options.device = device_of(jax.default_backend())

    from tqdm import tqdm

    path = folder / f"compare-{machine()}.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    fixed = ("dtype", "batch_size", "threads", "huge_pages", "repetitions")
    settings = {name: getattr(options, name) for name in fixed}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    with tqdm(total=len(names) * (len(sides) + options.repetitions), disable=None) as bar:
        for name in names:
            with tempfile.TemporaryDirectory() as temporary:
                inputs = Path(temporary)
                write_inputs(inputs, name, options.batch_size)
                found, ready = measure(inputs, name, sides, options, bar)
                apart = {side: difference(inputs, side) for side in options.sides}
            for task, side in ((task, side) for task in TASKS for side in options.sides):
                row = origin() | {"config": name, "task": task, "side": side} | settings
                row |= compared(found[task][side], found[task][SIDES[0]])
                row |= {"difference": apart[side], "ready_seconds": ready[side]}
                rows = [old for old in rows if case_of(old) != case_of(row)] + [row]
            rows.sort(key=case_of)
            path = write(
                path.stem,
                {"others": versions, "shape": [4, 32, 32], "results": rows},
                folder,
            )
    print(write_report(REPORT, folder))
    print(path)


if __name__ == "__main__":
    main()
