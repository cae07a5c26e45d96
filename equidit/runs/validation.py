"""What a run minimises, and how it is validated."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from .. import diffusion as dfn
from ..guidance import drop_label
from ..seams import Loss, Network, PRNGKey
from ..train import TrainState
from .settings import SCHEDULE_STEPS, Settings


def hybrid_loss(schedule: dfn.Schedule, num_classes: int, label_dropout: float) -> Loss:
    """The paper's objective: the hybrid loss, with labels dropped now and then."""

    def loss(network: Network, example: Any, key: PRNGKey) -> Float[Array, ""]:
        clean_key, drop_key, diffusion_key = jax.random.split(key, 3)
        label = drop_label(example.label, num_classes, label_dropout, key=drop_key)
        clean = example.clean(clean_key)
        return dfn.hybrid_loss(network, schedule, clean, label, key=diffusion_key)

    return loss


@eqx.filter_jit
def validate(
    network: Network, schedule: dfn.Schedule, examples: PyTree, key: PRNGKey, mesh: Mesh | None
) -> Float[Array, "batch quartiles"]:
    """The hybrid loss of examples, at one fixed step from each quartile of the schedule."""

    def terms(network: Network, example: Any, index: Array) -> Float[Array, " quartiles"]:
        clean_key, step_key, noise_key = jax.random.split(jax.random.fold_in(key, index), 3)
        clean = example.clean(clean_key)
        quarter = schedule.steps // 4
        t = jax.random.randint(step_key, (4,), 0, quarter) + quarter * jnp.arange(4)
        noise = jax.random.normal(noise_key, (4, *clean.shape))

        def term(t: Array, noise: Array) -> Float[Array, ""]:
            return dfn.hybrid_loss(
                network, schedule, clean, example.label, key=step_key, t=t, noise=noise
            )

        return jax.vmap(term)(t, noise)

    many = jax.vmap(terms, (None, 0, 0))
    index = jnp.arange(examples.label.shape[0])
    if mesh is None:
        return many(network, examples, index)
    arrays, static = eqx.partition(network, eqx.is_array)
    everywhere, shared = PartitionSpec(), PartitionSpec("data")
    losses = jax.shard_map(
        lambda arrays, *rest: many(eqx.combine(arrays, static), *rest),
        mesh=mesh,
        in_specs=(everywhere, shared, shared),
        out_specs=shared,
    )(arrays, examples, index)
    return jax.lax.with_sharding_constraint(losses, NamedSharding(mesh, everywhere))


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
        shared = NamedSharding(mesh, PartitionSpec("data"))
        examples = jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, shared, lambda index: a[index]),
            examples,
        )
    schedule = dfn.Schedule(dfn.linear_betas(SCHEDULE_STEPS))
    losses = validate(state.ema, schedule, examples, settings.key(2), mesh)
    # On the host, in an order that no number of devices changes.
    quartiles = np.asarray(losses, np.float64)[:count].mean(axis=0)
    return {
        "validation_loss": float(quartiles.mean()),
        "validation_loss_by_quartile": quartiles.tolist(),
    }
