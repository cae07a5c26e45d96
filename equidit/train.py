"""A small training step: the same function on one device and on a mesh of many."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from ._common import check_positive, upcast
from ._types import Loss, Number, Scalar

Tree = TypeVar("Tree")
Decay = Number | Callable[[Int[Array, ""]], Float[Array, ""]]


class TrainState(eqx.Module):
    """All that a training run carries from step to step, and all that a checkpoint holds.

    **Fields:**

    - `step`: number of updates made.
    - `network`: the weights being trained.
    - `ema`: their exponential moving average: what to sample from.
    - `opt_state`: the optimizer's.
    """

    step: Int[Array, ""]
    network: PyTree
    ema: PyTree
    opt_state: PyTree


def init_state(network: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0, its EMA a copy of the network.

    The state takes over `network`'s arrays: the first training step donates them, after which only
    the state that it returns is alive.
    """
    ema = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, network)
    opt_state = optimizer.init(eqx.filter(network, eqx.is_inexact_array))
    return TrainState(jnp.zeros((), jnp.int32), network, ema, opt_state)


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """`tree` with its floating-point arrays in `dtype`; all else is left alone."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if _is_float(leaf) else leaf, tree)


def ema_update(ema: Tree, network: Tree, decay: Scalar) -> Tree:
    """`decay * ema + (1 - decay) * network` for floating-point arrays; all else is `network`'s."""

    def update(old: Any, new: Any) -> Any:
        if not _is_float(new):
            return new
        return old + jnp.asarray(1 - decay, old.dtype) * (new.astype(old.dtype) - old)

    return jax.tree.map(update, ema, network)


def ema_warmup(decay: Number = 0.9999) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """An `ema_decay` that grows as `min(decay, (1 + n) / (10 + n))` with the step `n`.

    A constant 0.9999 would be mostly initialisation for the first ten thousand steps.
    """

    def at(step: Int[Array, ""]) -> Float[Array, ""]:
        n = step.astype(jnp.float32)
        return jnp.minimum(decay, (1 + n) / (10 + n))

    return at


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: Decay = 0.9999,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    accumulate: int = 1,
) -> Callable[[TrainState, PyTree, PRNGKeyArray], tuple[TrainState, dict[str, Array]]]:
    """The compiled training step `step(state, batch, key) -> (state, metrics)`.

    **Arguments:**

    - `loss`: a [`equidit.Loss`][], `loss(network, example, key)`, for one example.
    - `optimizer`: from optax; sees float32 gradients of the mean loss over the whole batch.
    - `ema_decay`: a number, or a function of the step such as [`equidit.ema_warmup`][].
    - `dtype`: what the loss's network computes in, e.g. `jnp.bfloat16`; parameters, gradients,
        optimizer and EMA keep their own. `None` leaves the network as it is.
    - `mesh`: devices to share the batch, along the mesh's axis `"data"`; the state is replicated.
        `None` is one device.
    - `accumulate`: number of micro-batches that each device takes its share of the batch in, one
        after the other, to save memory. Their gradients are averaged.

    **Returns:**

    A function of the state (donated: use the one it returns), the batch (a pytree whose leaves
    share a first axis, a multiple of devices times `accumulate`, else `ValueError`) and the run's
    key, the same at every step. The metrics are `loss`, `grad_norm`, and `losses`, each example's.

    Every example has a key of its own, made from the run's key, the step, and its place in the
    batch. So neither `mesh` nor `accumulate` changes what is computed.
    """
    check_positive(accumulate=accumulate)
    if mesh is not None and "data" not in mesh.axis_names:
        raise ValueError(f"mesh has the axes {mesh.axis_names}: one must be called 'data'")
    if mesh is not None and mesh.axis_types[mesh.axis_names.index("data")] is not AxisType.Auto:
        raise ValueError(
            "the mesh's axis 'data' must be of type Auto: "
            "jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))"
        )
    axis = None if mesh is None else "data"
    devices = 1 if mesh is None else mesh.shape["data"]

    def mean_loss(
        params: PyTree, static: PyTree, batch: PyTree, keys: Array
    ) -> tuple[Array, Array]:
        network = eqx.combine(params, static)
        if dtype is not None:
            network = cast(network, dtype)
        losses = jax.vmap(lambda example, key: loss(network, example, key))(batch, keys)
        if not eqx.is_array(losses) or losses.shape != keys.shape:
            shapes = jax.tree.map(lambda leaf: leaf.shape[1:], losses)
            raise ValueError(f"the loss must return one number an example, but returned {shapes}")
        losses = upcast(losses)
        return losses.mean(), losses

    def update(
        state: TrainState, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        params, static = eqx.partition(state.network, eqx.is_inexact_array)
        size = jax.tree.leaves(batch)[0].shape[0]
        index = jnp.arange(size)
        local = params
        if axis is not None:
            index = index + size * jax.lax.axis_index(axis)
            # Device-varying parameters have device-local gradients, averaged once below, however
            # many micro-batches there are. Left replicated, theirs would already be summed.
            local = jax.lax.pcast(params, axis, to="varying")
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, state.step), i))(index)

        def gradient(part: PyTree) -> tuple[Array, PyTree]:
            (_, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(local, static, *part)
            return losses, grads

        if accumulate == 1:
            losses, grads = gradient((batch, keys))
        else:
            split = jax.tree.map(
                lambda a: a.reshape(accumulate, size // accumulate, *a.shape[1:]), (batch, keys)
            )
            first, rest = (jax.tree.map(lambda a, s=s: a[s], split) for s in (0, slice(1, None)))

            def add(total: PyTree, part: PyTree) -> tuple[PyTree, Array]:
                losses, grads = gradient(part)
                return jax.tree.map(jnp.add, total, grads), losses

            losses, grads = gradient(first)
            grads, more = jax.lax.scan(add, grads, rest)
            grads = jax.tree.map(lambda grad: grad / accumulate, grads)
            losses = jnp.concatenate([losses, more.ravel()])
        mean = losses.mean()
        if axis is not None:
            mean, grads = jax.lax.pmean((mean, grads), axis)

        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(grads, state.opt_state, params)
        network = eqx.combine(optax.apply_updates(params, updates), static)
        decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
        ema = ema_update(state.ema, network, decay)
        metrics = {"loss": mean, "grad_norm": optax.tree.norm(grads), "losses": losses}
        return TrainState(state.step + 1, network, ema, opt_state), metrics

    @eqx.filter_jit(donate="all-except-first")
    def run(batch_and_key: PyTree, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        if mesh is None:
            return update(state, *batch_and_key)
        arrays, static = eqx.partition(state, eqx.is_array)

        def update_arrays(arrays: PyTree, batch: PyTree, key: PRNGKeyArray) -> Any:
            state, metrics = update(eqx.combine(arrays, static), batch, key)
            return eqx.filter(state, eqx.is_array), metrics

        everywhere, shared = PartitionSpec(), PartitionSpec(axis)
        arrays, metrics = jax.shard_map(
            update_arrays,
            mesh=mesh,
            in_specs=(everywhere, shared, everywhere),
            out_specs=(everywhere, {"loss": everywhere, "grad_norm": everywhere, "losses": shared}),
        )(arrays, *batch_and_key)
        return eqx.combine(arrays, static), metrics

    def step(
        state: TrainState, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        _check_batch(batch, devices, accumulate)
        if mesh is not None:
            # Already there, but for the first step: without it that would compile by itself.
            arrays, static = eqx.partition(state, eqx.is_array)
            arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
            state = eqx.combine(arrays, static)
        if dtype is None:
            return run((batch, key), state)
        # The gradient of JAX's own attention in low precision relies on implicit promotion.
        with jax.numpy_dtype_promotion("standard"):
            return run((batch, key), state)

    return step


def _is_float(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf)


def _check_batch(batch: PyTree, devices: int, accumulate: int) -> None:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"the leaves of a batch must share their first axis, but have {sizes}")
    ((size,),) = sizes
    unit = devices * accumulate
    if size < 1 or size % unit:
        fit = max(unit, size // unit * unit)
        raise ValueError(
            f"a batch of {size} does not divide over {devices} devices x {accumulate} "
            f"micro-batches: take a multiple of {unit} such as {fit} or {fit + unit}"
        )
