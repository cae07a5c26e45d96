"""How does the training step scale over this host's devices, with the batch and without?

Weak: the batch grows with the devices, and the step should take as long as on one. Strong: the
batch stays, and the step should take a share of the time. Efficiency is images/s a device over that
of one device. The devices of a CPU share its cores, so that there 1 / devices is what to expect: a
check that it runs, no measurement of a network.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AxisType

import equidit as edt
from equidit.train import Sharding

from .common import RESULTS, config_names, interleaved, machine, median, writable, write
from .report import Report, number, write_report
from .throughput import DTYPES, inputs, step_of


def counts(most: int) -> list[int]:
    """1, 2, 4, ... and all devices."""
    return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})


def call_of(name: str, devices: int, batch_size: int, sharding: Sharding, dtype: str) -> Any:
    """A call that makes one more training step on that many devices."""
    places = jax.local_devices()[:devices]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=places)
    step, optimizer = step_of(DTYPES[dtype], mesh=mesh, sharding=sharding)
    build = lambda: edt.build(name, key=jax.random.key(0))  # noqa: E731
    state = edt.init_sharded(build, optimizer, mesh, sharding)
    batch = inputs(batch_size, 32)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch, jax.random.key(2))
        return eqx.filter(metrics, eqx.is_array)

    return call


REPORT = Report(
    part="scaling",
    columns={
        "config": lambda row: row["config"],
        "state": lambda row: row["sharding"],
        "kind": lambda row: row["kind"],
        "devices": lambda row: str(row["devices"]),
        "batch": lambda row: str(row["batch_size"]),
        "s a step": lambda row: number(median(row["seconds"]), 3),
        "images/s": lambda row: number(row["images_per_second"]),
        "efficiency": lambda row: number(row["efficiency"]),
    },
    bar=lambda row: row["efficiency"],
    label=lambda row: f"{row['config']} {row['sharding']} {row['kind']} {row['devices']}",
    unit="images/s a device over those of one device",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="DiT-S/8", help="of CONFIGS")
    add("--sharding", choices=("replicated", "zero1", "fsdp"), default="replicated")
    add("--dtype", choices=DTYPES, default="float32")
    add("--batch-size", type=int, default=8, help="a device in weak, over all in strong scaling")
    add("--cpu-devices", type=int, help="make a CPU that many devices")
    add("--repetitions", type=int, default=5)
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    config_names([options.config])
    folder = writable(options.results)
    if options.cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)

    from tqdm import tqdm

    available = counts(jax.local_device_count())
    rows: list[dict[str, Any]] = []
    for kind in tqdm(("weak", "strong"), disable=None):
        batch = {n: options.batch_size * (n if kind == "weak" else 1) for n in available}
        used = [n for n in available if batch[n] % n == 0]
        calls = {
            str(n): call_of(options.config, n, batch[n], options.sharding, options.dtype)
            for n in used
        }
        seconds = interleaved(calls, options.repetitions)
        rates = {n: batch[n] / median(seconds[str(n)]) for n in used}
        rows += [
            {
                "config": options.config,
                "sharding": options.sharding,
                "dtype": options.dtype,
                "kind": kind,
                "devices": n,
                "batch_size": batch[n],
                "images_per_second": rates[n],
                "efficiency": rates[n] / n / rates[1],
                "seconds": seconds[str(n)],
            }
            for n in used
        ]
    path = write(f"scaling-{machine()}", {"conventions": __doc__, "results": rows}, folder)
    print(write_report(REPORT, folder))
    print(path)


if __name__ == "__main__":
    main()
