"""How many images a second: forward, training step and guided sampling, and what share of the peak?

On one device. FLOPs are those of the model's matrix products, two a multiply-add: a forward pass,
three for a training step (what remat computes again does not count), two for every step of a guided
sample. Their share of the device's peak bfloat16 rate is the MFU, for float32 too; on a
CPU the peak is the best rate of a float32 matrix product so far, measured in turns with the cases.
A call is made once to warm up, unless that takes more than a minute: then it counts, alone. Peak
memory is what the compiler reserves. A batch that does not fit is recorded, and ends its sweep.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import equidit as edt
from equidit import diffusion as dfn
from equidit.devices import CHIPS, chip_of

from .common import RESULTS, config_names, interleaved, machine, median, origin, writable, write
from .report import Report, Row, gib, number, write_report
from .train_step import matmul

PROGRAMS = ("forward", "train", "sample")
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
LATENT = {256: 32, 512: 64}
MATMUL_SIZE = 2048
# On a CPU a larger batch is no faster, and its memory is that of the machine.
MAX_BATCH_SIZE = {"cpu": 8}
# Seconds after which a call is too long for its warm-up to show in it, or for repetitions.
LONG = 60.0


def network_of(name: str, remat: str = "none", *, quick: bool = False) -> Any:
    """The network, initialised as the paper does; if `quick`, with equal weights."""
    build = partial(edt.build, name, key=jax.random.key(0), remat=remat)
    if not quick:
        return eqx.filter_jit(build)()
    return jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), eqx.filter_eval_shape(build))


def inputs(batch_size: int, side: int) -> tuple[Any, Any]:
    """Latents and labels."""
    x = jax.random.normal(jax.random.key(1), (batch_size, 4, side, side))
    return x, jnp.arange(batch_size, dtype=jnp.int32) % 1000


def step_of(dtype: Any, **options: Any) -> tuple[Any, optax.GradientTransformation]:
    """The training step of the paper's loss, and its optimizer."""
    optimizer, schedule = optax.adam(1e-4), dfn.Schedule(dfn.linear_betas())

    def loss(network: Any, example: Any, key: Any) -> Any:
        return dfn.hybrid_loss(network, schedule, *example, key=key)

    return edt.make_train_step(loss, optimizer, dtype=dtype, **options), optimizer


def program_of(
    program: str, network: Any, dtype: Any, batch: tuple[Any, Any], steps: int
) -> tuple[Any, list[Any], bool]:
    """The function, its arguments, and whether its first result is its next first argument."""
    x, label = batch
    if program == "train":
        step, optimizer = step_of(dtype)
        # A copy: the step takes over what it is given.
        state = edt.init_state(jax.tree.map(jnp.copy, network), optimizer)
        return jax.jit(step, donate_argnums=0), [state, batch, jax.random.key(0)], True
    if dtype is not None:
        network = edt.cast(network, dtype)
    if program == "forward":
        t = jnp.full(len(label), 500, jnp.int32)
        return jax.jit(lambda n, x, t, c: jax.vmap(n)(x, t, c)), [network, x, t, label], False
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, steps))

    def one(network: Any, noise: Any, label: Any, key: Any) -> Any:
        guided = edt.guide(network, 1.5, jnp.asarray(1000, jnp.int32), channels=3)
        step = partial(dfn.ddpm_step, guided, schedule, variance="learned")
        return dfn.sample(step, schedule, noise, label, key=key)

    keys = jax.random.split(jax.random.key(0), len(label))
    return jax.jit(jax.vmap(one, (None, 0, 0, 0))), [network, x, label, keys], False


def out_of_memory(error: Exception) -> bool:
    """Whether that is why."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def measure(
    function: Any, arguments: list[Any], feeds_back: bool, repetitions: int, other: Callable
) -> dict[str, Any]:
    """Compiles and times it, in turns with `other`; or says that it does not fit."""
    start = time.perf_counter()
    found: dict[str, Any] = {"error": None}
    try:
        with jax.numpy_dtype_promotion("standard"):
            compiled = function.lower(*arguments).compile()
        found["compile_seconds"] = time.perf_counter() - start
        needs = compiled.memory_analysis()
        found["peak_bytes"] = (
            needs.argument_size_in_bytes
            + needs.output_size_in_bytes
            - needs.alias_size_in_bytes
            + needs.temp_size_in_bytes
        )
        seconds, others = [], []
        for repetition in range(repetitions + 1):
            start = time.perf_counter()
            result = jax.block_until_ready(compiled(*arguments))
            spent = time.perf_counter() - start
            if repetition or spent > LONG:  # the first warms up
                seconds.append(spent)
            if feeds_back:
                arguments[0] = result[0]
            del result
            start = time.perf_counter()
            jax.block_until_ready(other())
            others.append(time.perf_counter() - start)
            if spent > LONG:
                break
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"error": "out of memory", "message": str(error)[:300]}
    return found | {"seconds": seconds, "matmul_seconds": others}


def model_flops(name: str, program: str, batch_size: int, side: int, steps: int) -> float:
    """Of one call."""
    passes = {"forward": 1, "train": 3, "sample": 2 * steps}[program]
    return 2.0 * edt.num_macs(name, side, side) * passes * batch_size


def peak_of(device: Any, matmul_seconds: list[float]) -> tuple[float | None, str]:
    """FLOP/s that the device could do, and by whose word."""
    if device.platform == "cpu":
        # The fastest: what else the machine does makes a peak lower, never higher.
        return 2 * MATMUL_SIZE**3 / min(matmul_seconds), "measured matrix product"
    chip = chip_of(device.device_kind)
    if chip is None:
        known = ", ".join(chip.name for chip in CHIPS)
        return None, f"the peak of {device.device_kind!r} is unknown; known are {known}"
    return chip.flops / chip.devices, chip.source


def sizes(options: Any, platform: str) -> Iterator[int]:
    """Batch sizes, ever larger."""
    if options.batch_sizes:
        yield from options.batch_sizes
        return
    most = options.max_batch_size or MAX_BATCH_SIZE.get(platform, 4096)
    yield from (2**i for i in range(int(math.log2(most)) + 1) if 2**i >= min(8, most))


def run(options: Any, names: list[str], bar: Any) -> Iterator[Row]:
    """A row for every case, the sweep of a program ending where memory does."""
    device, side = jax.devices()[0], LATENT[options.resolution]
    other = matmul(MATMUL_SIZE) if device.platform == "cpu" else lambda: None
    products = interleaved({"matmul": other}, options.repetitions)["matmul"]
    for name in names:
        programs = options.programs
        if options.quick and name != names[0]:
            programs = ["forward"]
        for program, dtype in itertools.product(programs, options.dtypes):
            for remat in options.remat if program == "train" else ["none"]:
                network = network_of(name, remat, quick=options.quick)
                for batch_size in sizes(options, device.platform):
                    bar.set_postfix_str(f"{name} {program} {dtype} {remat} {batch_size}")
                    found: Row
                    try:
                        case = program_of(
                            program, network, DTYPES[dtype], inputs(batch_size, side), options.steps
                        )
                        found = measure(*case, options.repetitions, other)
                        products += found.get("matmul_seconds", [])
                        del case
                    except Exception as error:  # already the state may be too large
                        if not out_of_memory(error):
                            raise
                        found = {"error": "out of memory", "message": str(error)[:300]}
                    bar.update()
                    peak = peak_of(device, products)
                    yield {
                        **origin(),
                        "config": name,
                        "program": program,
                        "dtype": dtype,
                        "remat": remat,
                        "resolution": options.resolution,
                        "batch_size": batch_size,
                        "steps": options.steps if program == "sample" else None,
                        **found,
                        **rates(found, peak, name, program, batch_size, side, options.steps),
                    }
                    jax.clear_caches()
                    if found["error"]:
                        break


def rates(
    found: Row,
    peak_and_source: tuple[float | None, str],
    name: str,
    program: str,
    batch_size: int,
    side: int,
    steps: int,
) -> Row:
    """What follows from the seconds."""
    if found["error"]:
        return {}
    flops = model_flops(name, program, batch_size, side, steps) / median(found["seconds"])
    peak, source = peak_and_source
    return {
        "images_per_second": batch_size / median(found["seconds"]),
        "steps_per_second": 1 / median(found["seconds"]),
        "flops_per_second": flops,
        "peak_flops_per_second": peak,
        "peak_source": source,
        "mfu": None if peak is None else flops / peak,
    }


def case_of(row: Row) -> tuple[Any, ...]:
    """What a new measurement replaces an old one of."""
    keys = ("config", "program", "dtype", "remat", "resolution", "batch_size", "steps")
    return tuple(row[key] for key in keys)


REPORT = Report(
    part="throughput",
    columns={
        "config": lambda row: f"{row['config']} {row['resolution']}px",
        "program": lambda row: f"sample, {row['steps']} steps" if row["steps"] else row["program"],
        "dtype": lambda row: row["dtype"],
        "remat": lambda row: row["remat"],
        "batch": lambda row: str(row["batch_size"]),
        "images/s": lambda row: row["error"] or number(row["images_per_second"]),
        "steps/s": lambda row: number(row.get("steps_per_second")),
        "GFLOP/s": lambda row: None if row["error"] else number(row["flops_per_second"] / 1e9, 1),
        "MFU": lambda row: number(row.get("mfu")),
        "peak GiB": lambda row: gib(row.get("peak_bytes")),
        "compiled in s": lambda row: number(row.get("compile_seconds"), 1),
    },
    bar=lambda row: row.get("images_per_second"),
    label=lambda row: (
        f"{row['config']} {row['program']} {row['dtype']} {row['remat']} {row['batch_size']}"
        + (f", {row['steps']} steps" if row["steps"] else "")
    ),
    unit="images/s",
    log=True,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON after every case, beside those of before."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--configs", nargs="+", default=list(edt.CONFIGS), help="of CONFIGS")
    add("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--remat", nargs="+", choices=("none", "dots", "full"), default=["none", "dots", "full"])
    add("--resolution", type=int, choices=LATENT, default=256)
    add("--batch-sizes", type=int, nargs="+", help="default: doubled while they fit")
    add("--max-batch-size", type=int, help="where doubling ends: 8 on a CPU, else 4096")
    add("--steps", type=int, default=250, help="of a sample")
    add("--repetitions", type=int, default=5)
    add(
        "--quick", action="store_true", help="every forward pass; the first config in full; float32"
    )
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    names, folder = config_names(options.configs), writable(options.results)
    if options.quick:
        options.dtypes, options.remat, options.batch_sizes = ["float32"], ["none"], [1]
        options.repetitions, options.steps = 2, 2

    from tqdm import tqdm

    name = f"throughput-{'quick-' if options.quick else ''}{machine()}"
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    with tqdm(disable=None) as bar:
        for row in run(options, names, bar):
            rows = [old for old in rows if case_of(old) != case_of(row)] + [row]
            path = write(name, {"conventions": __doc__, "results": rows}, folder)
    print(write_report(REPORT, folder))
    print(path)


if __name__ == "__main__":
    main()
