"""Would it fit on a TPU pod, and what bounds it there? Compiled for the pod without one.

The training step or the guided sampler is compiled by the TPU's own compiler (libtpu) for devices
that need not be there. Exact are the memory that it needs and what the devices exchange. The
time of a step is an ESTIMATE, a bound from below by the chip's peak rates (see equidit/devices.py):

    max(FLOPs / peak rate, bytes moved / memory bandwidth) + exchanged bytes / link rate

with nothing overlapped but arithmetic and memory, and nothing lost. FLOPs are those of the matrix
products, counted in the program before compilation; bytes are those that the compiled program's
instructions read and write; both with the bodies of loops as often as they run. On the torus of
links a gather or reduce-scatter of B bytes over n devices takes B (n - 1) / n over all of a chip's
links, an all-reduce twice that, and an all-to-all, whose bytes travel over many links, B times a
quarter of the torus' longest side over the links along it.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import equidit as edt
from equidit import diffusion as dfn
from equidit.devices import CHIPS, Chip, chip_of
from equidit.train import Sharding

from .common import RESULTS, config_names, origin, writable, write
from .hlo import Collective, Program, total
from .memory import placed
from .report import Report, gib, number, write_report

PAPER_STEPS_PER_SECOND = 5.7  # DiT-XL/2 at 256x256, batch 256, TPU v3-256: the paper, section 4
LATENT = {256: 32, 512: 64}
KEYS = ("program", "topology", "config", "resolution", "sharding", "remat", "dtype", "batch_size")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled, and for what."""

    program: str
    topology: str
    config: str
    resolution: int
    sharding: Sharding
    remat: str
    dtype: str
    batch_size: int
    steps: int = 250

    @property
    def shape(self) -> tuple[int, int, int]:
        side = LATENT[self.resolution]
        return 4, side, side


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology such as `v3:16x8`, none of which need exist."""
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit(
            "libtpu is not installed, and compiles for TPUs: pip install 'equidit[tpu]', in an "
            "environment of its own since plain JAX prints alarming lines beside it"
        )
    # Without these libtpu asks a cloud's metadata server what this machine is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No device is taken, so that several may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise SystemExit(
            f"topology {topology!r} is refused by libtpu: {str(error).splitlines()[0][:200]}\n"
            "known are e.g. v3:16x8, v4:2x2x1, v5e:16x16, v5p:4x4x4, v6e:16x16"
        ) from error


def training(case: Case, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The training step, and the shapes of what it takes."""
    optimizer = optax.adam(1e-4)
    schedule = dfn.Schedule(dfn.linear_betas())

    def loss(network: Any, example: Any, key: Any) -> Any:
        return dfn.hybrid_loss(network, schedule, *example, key=key)

    def make() -> edt.TrainState:
        network = edt.build(case.config, key=jax.random.key(0), remat=case.remat)
        return edt.init_state(network, optimizer)

    dtype = None if case.dtype == "float32" else jnp.dtype(case.dtype)
    step = edt.make_train_step(loss, optimizer, dtype=dtype, mesh=mesh, sharding=case.sharding)
    shapes = eqx.filter_eval_shape(make)
    state = placed(shapes, edt.shardings(shapes, mesh, case.sharding))
    latents, labels = _batch(case, mesh)
    return jax.jit(step, donate_argnums=0), (state, (latents, labels), _key(mesh))


def sampling(case: Case, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The guided sampler (scale 1.5, learned variance), each device with its share of the batch."""
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, case.steps))
    shared, everywhere = PartitionSpec("data"), PartitionSpec()

    def one(network: Any, noise: Any, label: Any, key: Any) -> Any:
        guided = edt.guide(network, 1.5, jnp.asarray(1000, jnp.int32), channels=3)

        def step(x: Any, t: Any, cond: Any, *, key: Any) -> Any:
            return dfn.ddpm_step(guided, schedule, x, t, cond, key=key, variance="learned")

        return dfn.sample(step, schedule, noise, label, key=key)

    def many(network: Any, noise: Any, label: Any, key: Any) -> Any:
        index = jnp.arange(len(label)) + jax.lax.axis_index("data") * len(label)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        return jax.vmap(one, (None, 0, 0, 0))(network, noise, label, keys)

    def make() -> Any:
        return edt.cast(edt.build(case.config, key=jax.random.key(0)), jnp.dtype(case.dtype))

    specs = (everywhere, shared, shared, everywhere)
    run = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=shared))
    shapes = eqx.filter_eval_shape(make)
    whole = jax.tree.map(lambda _: NamedSharding(mesh, everywhere), shapes)
    return run, (placed(shapes, whole), *_batch(case, mesh), _key(mesh))


def _batch(case: Case, mesh: Mesh) -> tuple[Any, Any]:
    place = NamedSharding(mesh, PartitionSpec("data"))
    return (
        jax.ShapeDtypeStruct((case.batch_size, *case.shape), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((case.batch_size,), jnp.int32, sharding=place),
    )


def _key(mesh: Mesh) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return placed(key, NamedSharding(mesh, PartitionSpec()))


def analytic_flops(case: Case) -> float:
    """FLOPs of the matrix products by the sizes alone: three forward passes and what remat repeats,
    or two evaluations a step of the sampler.
    """
    parts = edt.macs_by_part(case.config, *case.shape[1:])
    forward = sum(parts.values())
    blocks = ("attention projections", "attention products", "mlp", "modulation")
    again = {"none": (), "dots": ("attention products",), "full": blocks}[case.remat]
    passes = 3 * forward + sum(parts[name] for name in again)
    if case.program == "sample":
        passes = 2 * case.steps * forward
    return 2.0 * passes * case.batch_size


def link_seconds(collectives: list[Collective], chip: Chip, grid: Sequence[int]) -> float:
    """Time of the exchanges at the links' full rate, on a torus of chips of that size."""
    used = [2 if side > 2 else 1 for side in grid if side > 1]
    if not used:
        return 0.0
    rate = chip.link * sum(used) / chip.devices  # one direction, for each of a chip's devices
    longest = max(grid)
    along = chip.link * (2 if longest > 2 else 1) / chip.devices

    def seconds(c: Collective) -> float:
        share = c.bytes * (c.group - 1) / c.group if c.group else float(c.bytes)
        if "all-to-all" in c.kind:
            return max(share / rate, share * longest / 4 / along)
        return (2 if c.kind == "all-reduce" else 1) * share / rate

    return sum(total(collectives, seconds).values())


def grid_of(devices: list[Any]) -> list[int]:
    """The sides of the torus of chips."""
    coordinates = [device.coords for device in devices]
    return [max(c[i] for c in coordinates) + 1 for i in range(len(coordinates[0]))]


def roofline(row: dict[str, Any], collectives: list[Collective], grid: list[int]) -> dict[str, Any]:
    """The estimate of one run of the program, and what bounds it."""
    chip = chip_of(row["device_kind"])
    if chip is None:
        known = ", ".join(chip.name for chip in CHIPS)
        return {"estimate": None, "why_no_estimate": f"{row['device_kind']} is not among {known}"}
    terms = {
        "compute": row["matmul_flops_per_device"] / (chip.flops / chip.devices),
        "memory": row["bytes_per_device"] / (chip.bandwidth / chip.devices),
        "links": link_seconds(collectives, chip, grid),
    }
    seconds = max(terms["compute"], terms["memory"]) + terms["links"]
    return {
        "estimate": {
            "seconds": seconds,
            "terms": terms,
            "bound": max(terms, key=lambda name: terms[name]),
            "per_second": 1 / seconds,
        }
    }


def capacity(kind: str) -> int | None:
    """Bytes of memory of a device of that kind."""
    chip = chip_of(kind)
    return None if chip is None else chip.memory // chip.devices


def examine(case: Case, devices: list[Any], keep: Path | None = None) -> dict[str, Any]:
    """Compiles the case, and reads off what it needs and does."""
    import numpy as np

    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    make = training if case.program == "train" else sampling
    function, arguments = make(case, mesh)
    kind = devices[0].device_kind
    row: dict[str, Any] = dataclasses.asdict(case) | {
        **origin(),
        "libtpu": importlib.metadata.version("libtpu"),
        "device_kind": kind,
        "devices": len(devices),
        "device_memory_bytes": capacity(kind),
        "analytic_flops_per_device": analytic_flops(case) / len(devices),
        "fits": False,
        "error": None,
    }
    with jax.numpy_dtype_promotion("standard"):
        row["matmul_flops_per_device"] = 2 * edt.count_macs(function, *arguments) / len(devices)
        lowered = function.lower(*arguments)
    row["matmul_over_analytic"] = row["matmul_flops_per_device"] / row["analytic_flops_per_device"]
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["error"] = str(error)[:400]
        return row
    finally:
        row["compile_seconds"] = time.perf_counter() - start
    needs, analysis, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    if keep is not None:
        writable(keep)
        name = "-".join(str(getattr(case, key)) for key in KEYS)
        (keep / f"{name.replace('/', '').replace(':', '')}.hlo").write_text(text)
    program = Program(text)
    collectives = program.collectives()
    state = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    peak = state + needs.temp_size_in_bytes + needs.generated_code_size_in_bytes
    row |= {
        "argument_bytes": needs.argument_size_in_bytes,
        "temporary_bytes": needs.temp_size_in_bytes,
        "code_bytes": needs.generated_code_size_in_bytes,
        "peak_bytes": peak,
        "fits": row["device_memory_bytes"] is not None and peak <= row["device_memory_bytes"],
        "compiler_flops_loops_once": analysis.get("flops"),
        "compiler_bytes_loops_once": analysis.get("bytes accessed"),
        "bytes_loops_once": program.traffic(once=True),
        "bytes_per_device": program.traffic(),
        "collective_bytes": total(collectives, lambda c: c.bytes),
        "collective_count": total(collectives, lambda c: 1),
    }
    return row | roofline(row, collectives, grid_of(devices))


def _rate(row: dict[str, Any]) -> float | None:
    return row["estimate"]["per_second"] if row.get("estimate") else None


def _paper(row: dict[str, Any]) -> float | None:
    case = ("train", "v3:16x8", "DiT-XL/2", 256, 256)
    same = case == tuple(
        row[k] for k in ("program", "topology", "config", "resolution", "batch_size")
    )
    return PAPER_STEPS_PER_SECOND if same else None


def _term(name: str) -> Any:
    return lambda row: (
        number(1e3 * row["estimate"]["terms"][name], 1) if row.get("estimate") else None
    )


REPORT = Report(
    part="aot",
    columns={
        "program": lambda row: row["program"],
        "topology": lambda row: f"{row['topology']} ({row['devices']} x {row['device_kind']})",
        "config": lambda row: f"{row['config']} {row['resolution']}px",
        "state": lambda row: row["sharding"] if row["program"] == "train" else "-",
        "remat": lambda row: row["remat"],
        "batch": lambda row: str(row["batch_size"]),
        "peak GiB": lambda row: gib(row.get("peak_bytes")),
        "of GiB": lambda row: gib(row["device_memory_bytes"]),
        "fits": lambda row: "yes" if row["fits"] else "NO",
        "GFLOPs": lambda row: number(row["matmul_flops_per_device"] / 1e9, 0),
        "of analytic": lambda row: number(row["matmul_over_analytic"], 3),
        "GB moved": lambda row: number(row["bytes_per_device"] / 1e9, 1) if row["fits"] else None,
        "GB exchanged": lambda row: (
            number(sum(row["collective_bytes"].values()) / 1e9, 2) if row["fits"] else None
        ),
        "compute ms": _term("compute"),
        "memory ms": _term("memory"),
        "links ms": _term("links"),
        "estimate /s": lambda row: number(_rate(row)),
        "the paper's /s": lambda row: number(_paper(row), 1),
        "compiled in s": lambda row: number(row["compile_seconds"], 0),
    },
    bar=lambda row: _rate(row) if row["program"] == "train" else None,
    label=lambda row: f"{row['config']} {row['resolution']}px {row['sharding']} {row['topology']}",
    unit="steps/s: an estimate from peak rates, not a measurement",
    mark=_paper,
    mark_label="measured by the paper",
    log=True,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles, prints the table and writes the JSON after every case, beside those of before."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--topologies", nargs="+", default=["v3:16x8"], help="as libtpu names them")
    add("--configs", nargs="+", default=["DiT-XL/2"], help="of CONFIGS")
    add("--resolutions", type=int, nargs="+", choices=LATENT, default=[256])
    add("--shardings", nargs="+", default=["replicated", "zero1", "fsdp"])
    add("--remat", nargs="+", choices=("none", "dots", "full"), default=["none"])
    add("--programs", nargs="+", choices=("train", "sample"), default=["train"])
    add("--batch-size", type=int, default=256, help="over all devices")
    add("--steps", type=int, default=250, help="of the sampler")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--keep", type=Path, help="folder for the compiled programs' text")
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    names, folder = config_names(options.configs), writable(options.results)
    jax.config.update("jax_platforms", "cpu")

    from tqdm import tqdm

    devices = {name: devices_of(name) for name in options.topologies}
    product = itertools.product(
        options.programs,
        options.topologies,
        names,
        options.resolutions,
        options.shardings,
        options.remat,
    )
    cases = [Case(*case, options.dtype, options.batch_size, options.steps) for case in product]
    path = folder / "aot.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    for case in tqdm(cases, disable=None):
        if case.program == "sample":  # has no state to lay out, and no backward pass
            case = dataclasses.replace(case, sharding="replicated", remat="none")
        row = examine(case, devices[case.topology], options.keep)
        same = [str(row[key]) for key in KEYS]
        rows = [old for old in rows if [str(old[key]) for key in KEYS] != same] + [row]
        write("aot", {"conventions": __doc__, "results": rows}, folder)
        jax.clear_caches()
    print(write_report(REPORT, folder))
    print(path)


if __name__ == "__main__":
    main()
