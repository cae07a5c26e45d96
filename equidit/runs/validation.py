"""How a run is validated: what it minimises, on examples that it never sees."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from ..hosts import DATA, over_mesh
from ..seams import Network, PRNGKey
from ..train import TrainState
from .process import Process
from .settings import Settings


@eqx.filter_jit
def validate(
    network: Network, process: Process, examples: PyTree, key: PRNGKey, mesh: Mesh | None
) -> Float[Array, "batch quartiles"]:
    """The process's loss of examples, at one fixed time from each quarter."""

    def terms(network: Network, example: Any, index: Array) -> Float[Array, " quartiles"]:
        clean_key, time_key, noise_key = jax.random.split(jax.random.fold_in(key, index), 3)
        clean = example.clean(clean_key)
        return process.losses_by_quartile(
            network, clean, example.label, time_key=time_key, noise_key=noise_key
        )

    many = jax.vmap(terms, (None, 0, 0))
    index = jnp.arange(examples.label.shape[0])
    losses = over_mesh(many, mesh)(network, examples, index)
    if mesh is None:
        return losses
    return jax.lax.with_sharding_constraint(losses, NamedSharding(mesh, PartitionSpec()))


def validation(
    settings: Settings, state: TrainState, held_out: Any, mesh: Mesh | None
) -> dict[str, Any]:
    """A row of metrics.jsonl: the EMA's loss on the held-out examples."""
    if held_out is None:
        return {}
    count, devices = len(held_out.label), 1 if mesh is None else mesh.size
    # Filled up, so that the devices divide them.
    rows = np.arange(-(-count // devices) * devices) % count
    examples = jax.tree.map(lambda leaf: leaf[rows], held_out)
    if mesh is not None:
        shared = NamedSharding(mesh, PartitionSpec(DATA))
        examples = jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, shared, lambda index: a[index]),
            examples,
        )
    losses = validate(state.ema, settings.process, examples, settings.key("validate"), mesh)
    # On the host, in an order that no number of devices changes.
    quartiles = np.asarray(losses, np.float64)[:count].mean(axis=0)
    return {
        "validation_loss": float(quartiles.mean()),
        "validation_loss_by_quartile": quartiles.tolist(),
    }
