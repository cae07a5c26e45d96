"""How much memory does a device need for training, by layout of the state and by remat policy?

The training step is compiled for eight devices and asked what it needs; nothing is allocated or
run. The devices are those of the CPU, whose compiler orders and fuses otherwise than an
accelerator's: compare the layouts, and take the size of the state as exact.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import equidit as edt
from equidit import diffusion as dfn
from equidit.train import Sharding

from .common import write

SHARDINGS: tuple[Sharding, ...] = ("replicated", "zero1", "fsdp")
REMAT = ("none", "dots", "full")


def placed(shapes: Any, places: Any) -> Any:
    """Shapes of arrays that live at `places`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )


def memory(
    config: str, remat: str, mesh: Mesh, sharding: Sharding, batch_size: int
) -> dict[str, Any]:
    """Bytes a device: of the state, and of all else while a step runs."""
    optimizer = optax.adam(1e-4)
    schedule = dfn.Schedule(dfn.linear_betas())

    def loss(network: Any, example: Any, key: Any) -> Any:
        return dfn.hybrid_loss(network, schedule, *example, key=key)

    def make() -> edt.TrainState:
        return edt.init_state(edt.build(config, key=jax.random.key(0), remat=remat), optimizer)

    def make_batch() -> Any:
        return jnp.zeros((batch_size, 4, 32, 32)), jnp.zeros(batch_size, jnp.int32)

    shapes = eqx.filter_eval_shape(make)
    state = placed(shapes, edt.shardings(shapes, mesh, sharding))
    shapes = jax.eval_shape(make_batch)
    data = NamedSharding(mesh, PartitionSpec("data"))
    batch = placed(shapes, jax.tree.map(lambda _: data, shapes))
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = edt.make_train_step(loss, optimizer, dtype=jnp.bfloat16, mesh=mesh, sharding=sharding)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, key).compile()
    seconds = time.perf_counter() - start
    needs: Any = compiled.memory_analysis()
    return {
        "sharding": sharding,
        "remat": remat,
        "state_bytes": needs.alias_size_in_bytes,
        "temporary_bytes": needs.temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="DiT-XL/2", help="of CONFIGS")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8, help="over all devices")
    options = parser.parse_args(arguments)

    jax.config.update("jax_num_cpu_devices", options.devices)
    mesh = jax.make_mesh((options.devices,), ("data",), axis_types=(AxisType.Auto,))
    print("| sharding | remat | state | temporary | sum |\n|---|---|---|---|---|")
    rows = []
    for sharding, remat in itertools.product(SHARDINGS, REMAT):
        row = memory(options.config, remat, mesh, sharding, options.batch_size)
        state, temporary = row["state_bytes"] / 2**30, row["temporary_bytes"] / 2**30
        total = state + temporary
        print(f"| {sharding} | {remat} | {state:.2f} | {temporary:.2f} | {total:.2f} |", flush=True)
        rows.append(row)
    path = write(
        "memory",
        {
            "config": options.config,
            "devices": options.devices,
            "batch_size": options.batch_size,
            "dtype": "bfloat16",
            "optimizer": "adam",
            "results": rows,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
