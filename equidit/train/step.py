"""A small training step: the same function on one device and on a mesh of many."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, DTypeLike, Float, PyTree

from .._base.arguments import accepting
from .._base.common import check_positive, check_share
from ..hosts import DATA
from ..seams import Loss, Number, Optimizer, PRNGKey
from .ema import Decay, ema_update
from .handover import (
    Metrics,
    check_averages,
    check_batch,
    check_dtype,
    reported,
    updates_of,
    usable,
)
from .held import check_held, held_by
from .sharding import (
    Gradient,
    Sharding,
    assemble,
    check_mesh,
    global_norm,
    over_devices,
    replicated,
    shardings,
)
from .state import TrainState

Decays = Decay | Mapping[str, Decay]


def make_train_step(
    loss: Loss,
    optimizer: Optimizer,
    *,
    ema_decay: Decay | Mapping[str, Decay] = 0.9999,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    sharding: Sharding = "replicated",
    accumulate: int = 1,
    max_grad_norm: Number | None = None,
    ordered_sums: bool | None = None,
) -> Callable[[TrainState, PyTree, PRNGKey], tuple[TrainState, dict[str, Array]]]:
    """The compiled training step `step(state, batch, key) -> (state, metrics)`.

    **Arguments:**

    - `loss`: a [`equidit.Loss`][], `loss(network, example, key)`, for one example: returns its
        number, or the pair `(number, {name: number})` of it and numbers to report. JAX's arrays in
        it that have axes, such as a teacher's weights, are arguments of the compiled program, on
        all devices of a mesh, in their own dtype, and not donated: those of a Module, of its bound
        method, or of what `functools.partial` binds. What a plain function closes over cannot be
        seen, and becomes a constant of the program. A teacher that the state is made of must be a
        copy.
    - `optimizer`: from optax, or any [`equidit.Optimizer`][]; sees float32 gradients of the mean
        loss over the whole batch, as whole arrays however they are laid out, so that any optimizer
        is right in any mode. The loss itself is `value=` to those that take it, such as
        `optax.contrib.momo` and `reduce_on_plateau`.
    - `ema_decay`: a number, or a function of the step such as [`equidit.ema_warmup`][] or
        [`equidit.power_ema_decay`][]; or a dictionary of these, for as many averages: pass it to
        [`equidit.init_state`][] too, as `ema_names`.
    - `dtype`: what the loss's network computes in, e.g. `jnp.bfloat16` or its name;
        parameters, gradients, optimizer and EMA keep their own. `None` leaves the network as it is.
    - `mesh`: devices to share the batch, along the mesh's axis `"data"`, on one host or several.
        `None` is one device.
    - `sharding`: what each device of the mesh holds: `"replicated"` all of the state; `"zero1"` a
        part of the optimizer's state and the EMA; `"fsdp"` a part of the network too, which is
        gathered one block at a time while it is needed. See [`equidit.shardings`][].
    - `accumulate`: number of micro-batches that each device takes its share of the batch in, one
        after the other, to save memory. Their gradients are averaged.
    - `max_grad_norm`: the gradient is scaled down to this norm, over all parameters, if it is
        above. `None` leaves it as it is.
    - `ordered_sums`: whether gradients are summed in the mesh's order, so that equal meshes give
        equal bits whether on one host or on several. `None` is: on CPUs, whose own sums depend on
        the processes. On TPUs the order is part of the compiled program, and asking for it costs
        much.

    **Returns:**

    A function of the state (donated: use the one it returns), the batch (a pytree of arrays that
    share a first axis, a multiple of devices times `accumulate`, else `ValueError`) and the run's
    key, the same at every step. The metrics, on all devices, are `loss`, `losses` (each example's),
    `grad_norm` (before scaling), `param_norm` (of the weights before the update), `skipped`, and
    the means over the batch of what the loss reports. They are a dictionary that prints its single
    numbers, and of `losses` the shape.

    A step whose loss or gradient is not finite is `skipped`: network, EMA and optimizer stay as
    they were, bit for bit, and only the step is counted, so that the next has other data and keys.
    The state does not count such steps: whoever reads the metrics knows when many are too many.

    Every example has a key of its own, made from the run's key, the step, and its place in the
    batch. So `mesh`, `sharding` and `accumulate` change nothing but the rounding of what is
    computed.
    """
    check_positive(accumulate=accumulate)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm} must be above 0, or None")
    if dtype is not None:
        check_dtype(dtype)
    _check_decays(ema_decay)
    held, rest_of_loss = held_by(loss)
    if mesh is not None:
        check_mesh(mesh)
        check_held(held, ())
        held = replicated(held, mesh)
    elif sharding != "replicated":
        raise ValueError(
            f"sharding={sharding!r} needs a mesh of the devices that share the state: without one, "
            "a single device holds all of it, which is sharding='replicated'"
        )
    devices = 1 if mesh is None else mesh.shape[DATA]
    ordered = ordered_sums
    if ordered is None:
        ordered = mesh is not None and mesh.devices.flat[0].platform == "cpu"

    def mean_loss(
        params: PyTree, fixed: PyTree, batch: PyTree, layout: PyTree | None
    ) -> tuple[Array, PyTree]:
        """Of the examples that one device has at a time, and what each of them gave."""
        (static, held), (examples, keys) = fixed, batch
        network = assemble(params, static, layout, dtype, ordered=ordered)
        loss = eqx.combine(held, rest_of_loss)
        one = lambda example, key: reported(loss(network, example, key))  # noqa: E731
        losses, numbers = jax.vmap(one)(examples, keys)
        return losses.mean(), (losses, numbers)

    gradient = _accumulated(mean_loss, accumulate)
    if mesh is not None:
        gradient = over_devices(gradient, mesh, sharding, ordered=ordered)

    # From here on all is written for whole arrays; XLA divides the work as the state is laid out.
    def update(
        state: TrainState, held: PyTree, batch: PyTree, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        params, static = eqx.partition(state.network, eqx.is_inexact_array)
        keys = _example_keys(key, state.step, jax.tree.leaves(batch)[0].shape[0])
        (losses, numbers), grads = gradient(params, (static, held), (batch, keys))
        loss = losses.mean()
        grad_norm = global_norm(grads, mesh, divided=sharding != "replicated")
        param_norm = global_norm(params, mesh, divided=sharding == "fsdp")
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        if max_grad_norm is not None:
            grads = _scaled(grads, jnp.minimum(1.0, max_grad_norm / grad_norm))
        updates, opt_state = updates_of(optimizer, grads, state.opt_state, params, loss)
        network = eqx.combine(optax.apply_updates(params, updates), static)
        new = TrainState(state.step, network, _averages(state, network, ema_decay), opt_state)
        new = eqx.tree_at(lambda s: s.step, _chosen(finite, new, state), state.step + 1)

        metrics = Metrics(loss=loss, losses=losses, grad_norm=grad_norm, param_norm=param_norm)
        metrics |= {"skipped": ~finite} | {name: each.mean() for name, each in numbers.items()}
        return new, metrics

    @eqx.filter_jit(donate="all-except-first")
    def run(kept: PyTree, state: TrainState) -> tuple[TrainState, Metrics]:
        new, metrics = update(state, *kept)
        if mesh is not None:
            new = _placed(jax.lax.with_sharding_constraint, new, mesh, sharding)
        return new, metrics

    def step(state: TrainState, batch: PyTree, key: PRNGKey) -> tuple[TrainState, Metrics]:
        check_batch(batch, devices, accumulate)
        if isinstance(ema_decay, Mapping):
            check_averages(state.ema, ema_decay)
        state = usable(state)
        check_held(held, state)
        if mesh is not None:
            # Already there, but for the first step: without it that would compile by itself.
            state = _placed(jax.device_put, state, mesh, sharding)
        if dtype is None:
            return run((held, batch, key), state)
        # The gradient of JAX's own attention in low precision relies on implicit promotion.
        with jax.numpy_dtype_promotion("standard"):
            return run((held, batch, key), state)

    return accepting(step)


def _check_decays(ema_decay: Decays) -> None:
    if isinstance(ema_decay, Mapping):
        check_share(**{f"ema_decay[{name!r}]": decay for name, decay in ema_decay.items()})
    else:
        check_share(ema_decay=ema_decay)


def _accumulated(mean_loss: Callable[..., tuple[Array, PyTree]], count: int) -> Gradient:
    """The gradient of `mean_loss`, which takes the batch in `count` parts, one after the other."""
    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)

    def gradient(
        params: PyTree, fixed: PyTree, batch: PyTree, layout: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        def of(part: PyTree) -> tuple[PyTree, PyTree]:
            (_, results), grads = value_and_grad(params, fixed, part, layout)
            return results, grads

        if count == 1:
            return of(batch)
        parts = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)
        first, rest = (jax.tree.map(lambda a, s=s: a[s], parts) for s in (0, slice(1, None)))

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
            results, grads = of(part)
            return jax.tree.map(jnp.add, total, grads), results

        results, grads = of(first)
        grads, more = jax.lax.scan(add, grads, rest)
        join = lambda a, rest: jnp.concatenate([a, rest.ravel()])  # noqa: E731
        return jax.tree.map(join, results, more), jax.tree.map(lambda g: g / count, grads)

    return gradient


def _example_keys(key: PRNGKey, step: Array, count: int) -> Array:
    """Of each example its own, by the step and its place in the global batch."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, step), i))(
        jnp.arange(count)
    )


def _scaled(grads: PyTree, scale: Float[Array, ""]) -> PyTree:
    return jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)


def _averages(state: TrainState, network: PyTree, decay: Decays) -> PyTree:
    """The state's average, or its averages by name, after one more update."""

    def after(ema: PyTree, decay: Decay) -> PyTree:
        return ema_update(ema, network, decay(state.step) if callable(decay) else decay)

    if isinstance(decay, Mapping):
        return {name: after(state.ema[name], one) for name, one in decay.items()}
    return after(state.ema, decay)


def _chosen(condition: Bool[Array, ""], new: TrainState, old: TrainState) -> TrainState:
    """The arrays of the one state or of the other, bit for bit."""
    choose = lambda a, b: jnp.where(condition, a, b) if eqx.is_array(a) else a  # noqa: E731
    return jax.tree.map(choose, new, old)


def _placed(
    place: Callable[..., Any], state: TrainState, mesh: Mesh, sharding: Sharding
) -> TrainState:
    arrays, static = eqx.partition(state, eqx.is_array)
    return eqx.combine(place(arrays, shardings(arrays, mesh, sharding)), static)
