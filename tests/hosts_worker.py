"""One of several processes that train together on CPU devices: see test_hosts.py."""

import sys
from typing import Any

import jax
import numpy as np
import optax
from helpers import images, tiny
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh

import equidit as edt
from equidit import diffusion as dfn


def train(sharding: Any, mesh: Mesh) -> dict[str, np.ndarray]:
    """Three steps on this process's share of the batch: metrics and weights, by name."""
    schedule = dfn.Schedule(dfn.linear_betas())
    optimizer = optax.sgd(0.1, momentum=0.9)

    def loss(network, example, key):
        image, label = example
        return dfn.hybrid_loss(network, schedule, image, label, key=key)

    state = edt.init_state(tiny(hidden_size=16), optimizer)
    step = edt.make_train_step(
        loss, optimizer, ema_decay=0.9, mesh=mesh, sharding=sharding, max_grad_norm=0.5
    )
    batch = (np.asarray(images(16)), np.arange(16) % 10)
    size = 16 // jax.process_count()
    mine = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    batch = edt.hosts.global_batch(jax.tree.map(lambda leaf: leaf[mine], batch), mesh)
    metrics = {}
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(7))
    # Every process can read the metrics, whatever the mode.
    found = {name: np.asarray(value) for name, value in metrics.items()}
    for path, leaf in jax.tree.leaves_with_path(state):
        found[jax.tree_util.keystr(path)] = process_allgather(leaf, tiled=True)
    return found


def main() -> None:
    """`hosts_worker PORT INDEX SHARDING FILE`: process INDEX of two with four devices each."""
    port, index, sharding, file = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    edt.hosts.initialize(f"127.0.0.1:{port}", 2, int(index))
    found = train(sharding, jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)))
    if edt.hosts.is_main():
        arrays: Any = found
        np.savez(file, **arrays)
