"""What every benchmark shares: the record of where and how, and timing that survives noise."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

import equidit as edt

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("equidit", "jax", "jaxlib", "equinox", "optax", "numpy")


def environment() -> dict[str, Any]:
    """Machine, devices, versions, date and command."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
        ),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def origin() -> dict[str, Any]:
    """Date and command, for rows that are kept beside those of other runs."""
    found = environment()
    return {name: found[name] for name in ("date", "command")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def interleaved(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each call, taken in turns so that noise falls on all alike.

    A call is made once beforehand, to compile. What it returns is waited for.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """The median."""
    return statistics.median(seconds)


def machine() -> str:
    """The machine's name in file names: device kind (processor, for a CPU) and count of devices."""
    found = environment()
    device, processor = found["device"], found["machine"]
    name = device["kind"]
    if device["platform"] == "cpu":
        name = f"{processor['processor']} {processor['cores']} cores"
    if device["count"] > 1:
        name += f" x{device['count']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def config_names(names: Iterable[str]) -> list[str]:
    """`names` if all are in CONFIGS, else an end that lists those that are."""
    names = list(names)
    if unknown := [name for name in names if name not in edt.CONFIGS]:
        raise SystemExit(f"config {unknown[0]!r} is unknown: choose from {', '.join(edt.CONFIGS)}")
    return names


def writable(folder: Path = RESULTS) -> Path:
    """`folder`, made if need be; an end if nothing can be written there, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SystemExit(
            f"results cannot be written to {folder} ({error.strerror}): pass --results FOLDER"
        ) from error
    return folder


def write(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `results` beside the environment to `folder/name.json`."""
    path = writable(folder) / f"{name}.json"
    path.write_text(json.dumps(environment() | results, indent=2) + "\n")
    return path
