"""A small training step: the same function on one device and on a mesh of many."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike, Int, PyTree

from .._base.arguments import accepting
from .._base.common import check_positive, check_share
from ..seams import Loss, Number, Optimizer, PRNGKey
from .ema import Decay, ema_update
from .handover import (
    Metrics,
    buffer,
    check_averages,
    check_batch,
    check_dtype,
    check_held,
    check_network,
    reported,
    unshared,
    updates_of,
    usable,
)
from .sharding import (
    assemble,
    check_sharding,
    global_norm,
    over_devices,
    replicated,
    shardings,
)

Tree = TypeVar("Tree")


class TrainState(eqx.Module):
    """All that a training run carries from step to step, and all that a checkpoint holds.

    **Fields:**

    - `step`: number of updates made.
    - `network`: the weights being trained.
    - `ema`: their exponential moving average: what to sample from. With several decays a
        dictionary of averages, one a name.
    - `opt_state`: the optimizer's.
    """

    step: Int[Array, ""]
    network: PyTree
    ema: PyTree
    opt_state: PyTree


def init_state(
    network: PyTree,
    optimizer: Optimizer,
    *,
    ema_names: Iterable[str] | None = None,
) -> TrainState:
    """The state at step 0, its EMA a copy of the network.

    The state takes over `network`'s arrays: the first training step donates them, after which only
    the state that it returns is alive. To use `network` beside it, pass a copy,
    `jax.tree.map(jnp.copy, network)`.

    **Arguments:**

    - `network`: what is to be trained, any Module: its floating-point arrays are the parameters.
    - `optimizer`: optax's, or any [`equidit.Optimizer`][].
    - `ema_names`: of several averages, e.g. the dictionary that `make_train_step` is given as
        `ema_decay`; each begins as a copy. `None` is one average.

    **Returns:**

    The state, for [`equidit.make_train_step`][].

    **Raises:**

    `ValueError` for a network that a training step has donated, for one that holds the same array
    in two places, and for one without floating-point arrays.
    """
    check_network(network)
    # NumPy's arrays are parameters too, and buffers of a device are what a step donates.
    network = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, network)

    def copy() -> PyTree:
        return jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, network)

    ema = copy() if ema_names is None else {name: copy() for name in ema_names}
    opt_state = optimizer.init(eqx.filter(network, eqx.is_inexact_array))
    # Some optimizers remember the parameters that they began with: the network's own arrays.
    network, opt_state = unshared((network, opt_state), key=buffer)
    return TrainState(jnp.zeros((), jnp.int32), network, ema, opt_state)


def init_sharded(
    make_network: Callable[[], PyTree],
    optimizer: Optimizer,
    mesh: Mesh,
    sharding: str,
    *,
    ema_names: Iterable[str] | None = None,
) -> TrainState:
    """[`equidit.init_state`][] of a network that no device ever holds the whole of.

    **Arguments:**

    - `make_network`: e.g. `lambda: edt.build("DiT-XL/2", key=key)`. It is compiled, and the
        weights are those of a call outside, to float32 rounding.
    - `optimizer`, `ema_names`: as for [`equidit.init_state`][].
    - `mesh`, `sharding`: as in [`equidit.make_train_step`][].

    **Returns:**

    The state, laid out over the mesh as [`equidit.shardings`][] says.
    """
    names = None if ema_names is None else tuple(ema_names)

    def make() -> TrainState:
        return init_state(make_network(), optimizer, ema_names=names)

    shapes = eqx.filter_eval_shape(make)
    layout = shardings(shapes, mesh, sharding)
    arrays = jax.jit(lambda: eqx.filter(make(), eqx.is_array), out_shardings=layout)()
    return eqx.combine(arrays, eqx.filter(shapes, _is_shape, inverse=True))


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """`tree` with its floating-point arrays in `dtype`; all else is left alone.

    **Arguments:**

    - `tree`: a network, or any pytree.
    - `dtype`: e.g. `jnp.bfloat16`, or its name; `ValueError` for one that is no floating-point
        dtype.

    **Returns:**

    A tree of the same structure.
    """
    check_dtype(dtype)
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def make_train_step(
    loss: Loss,
    optimizer: Optimizer,
    *,
    ema_decay: Decay | Mapping[str, Decay] = 0.9999,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    sharding: str = "replicated",
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
    if mesh is not None:
        check_sharding(mesh, sharding)
    elif sharding != "replicated":
        raise ValueError(
            f"sharding={sharding!r} needs a mesh of the devices that share the state: without one, "
            "a single device holds all of it, which is sharding='replicated'"
        )
    if dtype is not None:
        check_dtype(dtype)
    decays = ema_decay if isinstance(ema_decay, Mapping) else {"": ema_decay}
    for name, decay in decays.items():
        check_share(**{f"ema_decay[{name!r}]" if name else "ema_decay": decay})
    devices = 1 if mesh is None else mesh.shape["data"]
    ordered = ordered_sums
    if ordered is None:
        ordered = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    held, rest_of_loss = eqx.partition(_opened(loss), _is_held)
    if mesh is not None:
        check_held(held, ())
        held = replicated(held, mesh)

    def mean_loss(
        params: PyTree, fixed: PyTree, layout: PyTree | None, batch: PyTree, keys: Array
    ) -> tuple[Array, PyTree]:
        static, held = fixed
        network = assemble(params, static, layout, dtype, ordered=ordered)
        loss = eqx.combine(held, rest_of_loss)
        one = lambda example, key: reported(loss(network, example, key))  # noqa: E731
        losses, numbers = jax.vmap(one)(batch, keys)
        return losses.mean(), (losses, numbers)

    def gradient(
        params: PyTree, fixed: PyTree, batch_and_keys: PyTree, layout: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """What one device's examples gave, and the gradient of their mean loss."""

        def micro(part: PyTree) -> tuple[PyTree, PyTree]:
            grad = jax.value_and_grad(mean_loss, has_aux=True)
            (_, results), grads = grad(params, fixed, layout, *part)
            return results, grads

        if accumulate == 1:
            return micro(batch_and_keys)
        split = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch_and_keys)
        first, rest = (jax.tree.map(lambda a, s=s: a[s], split) for s in (0, slice(1, None)))

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
            results, grads = micro(part)
            return jax.tree.map(jnp.add, total, grads), results

        results, grads = micro(first)
        grads, more = jax.lax.scan(add, grads, rest)
        grads = jax.tree.map(lambda grad: grad / accumulate, grads)
        join = lambda a, rest: jnp.concatenate([a, rest.ravel()])  # noqa: E731
        return jax.tree.map(join, results, more), grads

    whole_gradient = (
        gradient if mesh is None else over_devices(gradient, mesh, sharding, ordered=ordered)
    )

    # From here on all is written for whole arrays; XLA divides the work as the state is laid out.
    def update(
        state: TrainState, held: PyTree, batch: PyTree, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        params, static = eqx.partition(state.network, eqx.is_inexact_array)
        index = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, state.step), i))(index)
        (losses, numbers), grads = whole_gradient(params, (static, held), (batch, keys))
        metrics = Metrics(
            loss=losses.mean(),
            losses=losses,
            grad_norm=global_norm(grads, mesh, divided=sharding != "replicated"),
            param_norm=global_norm(params, mesh, divided=sharding == "fsdp"),
        )
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = ~finite
        metrics |= {name: values.mean() for name, values in numbers.items()}
        if max_grad_norm is not None:
            scale = jnp.minimum(1.0, max_grad_norm / metrics["grad_norm"])
            grads = jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)

        updates, opt_state = updates_of(optimizer, grads, state.opt_state, params, metrics["loss"])
        network = eqx.combine(optax.apply_updates(params, updates), static)
        ema = _ema(state, network, ema_decay)
        new = TrainState(state.step, network, ema, opt_state)
        new = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b) if eqx.is_array(a) else a, new, state
        )
        return eqx.tree_at(lambda s: s.step, new, state.step + 1), metrics

    @eqx.filter_jit(donate="all-except-first")
    def run(kept: PyTree, state: TrainState) -> tuple[TrainState, Metrics]:
        new, metrics = update(state, *kept)
        if mesh is None:
            return new, metrics
        return _placed(jax.lax.with_sharding_constraint, new, mesh, sharding), metrics

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


class _Bound(eqx.Module):
    """A bound method or a `functools.partial` as a tree: JAX sees what is bound."""

    function: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*self.args, *args, **(self.keywords | keywords))


def _opened(tree: Any) -> Any:
    """`tree` with each bound method and `functools.partial` a tree itself."""
    is_bound = lambda node: inspect.ismethod(node) or isinstance(node, partial)  # noqa: E731

    def opened(node: Any) -> Any:
        if inspect.ismethod(node):
            return _Bound(node.__func__, (_opened(node.__self__),), {})
        if isinstance(node, partial):
            return _Bound(*map(_opened, (node.func, node.args, node.keywords)))
        return node

    return jax.tree.map(opened, tree, is_leaf=is_bound)


def _placed(place: Callable[..., Any], state: TrainState, mesh: Mesh, sharding: str) -> TrainState:
    arrays, static = eqx.partition(state, eqx.is_array)
    return eqx.combine(place(arrays, shardings(arrays, mesh, sharding)), static)


def _ema(state: TrainState, network: PyTree, decay: Decay | Mapping[str, Decay]) -> PyTree:
    def update(ema: PyTree, decay: Decay) -> PyTree:
        return ema_update(ema, network, decay(state.step) if callable(decay) else decay)

    if isinstance(decay, Mapping):
        return {name: update(state.ema[name], one) for name, one in decay.items()}
    return update(state.ema, decay)


def _is_held(leaf: Any) -> bool:
    """Whether a leaf of the loss is worth an argument: one number is as good as a Python one."""
    return isinstance(leaf, jax.Array) and leaf.ndim > 0


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
