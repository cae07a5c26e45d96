"""How a training state is laid out over devices, and the gradient over all of them."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, PyTree

from .._base.common import upcast
from .._base.parts import DATA, Part, gather, scans, sum_all, sum_scatter, whole
from .._base.texts import check_choice

Sharding = Literal["replicated", "zero1", "fsdp"]
# What of the state each mode divides among the devices; the rest is on all of them.
_DIVIDED: dict[str, tuple[str, ...]] = {
    "replicated": (),
    "zero1": ("ema", "opt_state"),
    "fsdp": ("network", "ema", "opt_state"),
}


def shardings(state: PyTree, mesh: Mesh, sharding: str = "replicated") -> PyTree:
    """Where each array of a [`equidit.TrainState`][] lives.

    **Arguments:**

    - `state`: the state, or its shapes, e.g. from `eqx.filter_eval_shape`.
    - `mesh`: devices with an axis called `"data"`.
    - `sharding`: `"replicated"`: every device holds all of the state. `"zero1"`: the optimizer's
        state and the EMA are divided among the devices. `"fsdp"`: the network too.

    A floating-point array is divided along its largest axis that the number of devices divides,
    the last of several; if there is none, every device holds it. The axis of layers in a
    [`equidit.Stack`][] is never divided: a scan takes one layer after the other, and with a divided
    one all devices would wait for the one that holds it.

    **Returns:**

    `state` with a `NamedSharding` for each array and `None` for all else.

    **Raises:**

    `ValueError` for an unknown `sharding` or a mesh without the axis.

    ??? cite

        [Rajbhandari et al. 2019](https://arxiv.org/abs/1910.02054), stages 1 and 3.
    """
    check_sharding(mesh, sharding)
    arrays = eqx.filter(state, _is_array)
    divided = _DIVIDED[sharding]
    fields = [
        specs(getattr(arrays, name), mesh, divide=name in divided)
        for name in ("step", "network", "ema", "opt_state")
    ]
    leaves = [NamedSharding(mesh, spec) for spec in jax.tree.leaves(fields)]
    return jax.tree.unflatten(jax.tree.structure(arrays), leaves)


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree`'s arrays, whole on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_sharding(mesh: Mesh, sharding: str) -> None:
    """`ValueError` for a mode or a mesh that the training step cannot work with."""
    check_choice("sharding", sharding, get_args(Sharding))
    if DATA not in mesh.axis_names:
        raise ValueError(f"mesh has the axes {mesh.axis_names}: one must be called 'data'")
    if mesh.axis_types[mesh.axis_names.index(DATA)] is not AxisType.Auto:
        raise ValueError(
            "the mesh's axis 'data' must be of type Auto: "
            "jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))"
        )


def specs(tree: PyTree, mesh: Mesh, *, divide: bool, layers: int = 0) -> PyTree:
    """A `PartitionSpec` for each array of `tree`, whose first `layers` axes stay whole."""

    def spec(node: Any) -> Any:
        if scans(node):
            inner, structure = jax.tree.flatten(node, is_leaf=lambda n: n is not node)
            inner = [specs(part, mesh, divide=divide, layers=layers + 1) for part in inner]
            return jax.tree.unflatten(structure, inner)
        count = mesh.shape[DATA]
        axes = [a for a in range(layers, node.ndim) if node.shape[a] % count == 0]
        if not (divide and axes and jnp.issubdtype(node.dtype, jnp.inexact)):
            return PartitionSpec()
        axis = max(axes, key=lambda a: (node.shape[a], a))
        return PartitionSpec(*(DATA if a == axis else None for a in range(node.ndim)))

    return jax.tree.map(spec, tree, is_leaf=scans)


def assemble(
    params: PyTree,
    static: PyTree,
    layout: PyTree | None,
    dtype: DTypeLike | None,
    *,
    ordered: bool,
) -> PyTree:
    """The network of a device's arrays, to compute with: in `dtype`, its arrays whole.

    Those of a `Stack` are gathered by it, one layer at a time. `layout` has their
    `PartitionSpec`s; `None` is whole arrays.
    """
    if layout is None:
        layout = jax.tree.map(lambda _: PartitionSpec(), params)

    def leaf(param: Any, other: Any, spec: Any) -> Any:
        if param is None:
            return other
        low = param.dtype if dtype is None else dtype
        axis = _axis(spec)
        return param.astype(low) if axis is None else Part(param, axis, low, ordered)

    return whole(jax.tree.map(leaf, params, static, layout, is_leaf=lambda node: node is None))


def over_devices(
    gradient: Callable[..., Any], mesh: Mesh, sharding: str, *, ordered: bool
) -> Callable[..., Any]:
    """The gradient of the mean loss over a batch that the devices share.

    **Arguments:**

    - `gradient`: called on each device as `gradient(params, static, batch, layout)` with its share
        of the batch, returns what its examples gave and its gradient of their mean loss.
    - `ordered`: whether to sum in the order of the mesh.

    **Returns:**

    A function `(params, static, batch) -> (results, grads)` of whole arrays.
    """
    count = mesh.shape[DATA]
    everywhere, shared = PartitionSpec(), PartitionSpec(DATA)

    def run(params: PyTree, static: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        arrays, rest = eqx.partition(static, eqx.is_array)
        own = specs(params, mesh, divide="network" in _DIVIDED[sharding])
        result = specs(params, mesh, divide="opt_state" in _DIVIDED[sharding])

        def mean(grad: Array, own: PartitionSpec, result: PartitionSpec) -> Array:
            if _axis(own) is not None:  # a part's gradient is summed already
                return grad / count
            axis = _axis(result)
            if axis is None:
                total = sum_all(grad, ordered=ordered)
            else:
                total = sum_scatter(grad, axis, ordered=ordered)
            return total.astype(grad.dtype) / count

        def on_device(params: PyTree, arrays: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            # With device-varying parameters the gradient is this device's own, and is averaged
            # once, below. Left replicated, it would be summed behind our back.
            varying = jax.tree.map(
                lambda p, spec: jax.lax.pcast(p, DATA, to="varying") if _axis(spec) is None else p,
                params,
                own,
            )
            results, grads = gradient(varying, eqx.combine(arrays, rest), batch, own)
            return jax.tree.map(gather, results), jax.tree.map(mean, grads, own, result)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(own, everywhere, shared),
            out_specs=(everywhere, result),
        )(params, arrays, batch)

    return run


def global_norm(tree: PyTree, mesh: Mesh | None, *, divided: bool) -> Array:
    """The Euclidean norm of all of `tree`'s arrays, whether or not the devices share them."""
    if mesh is None or not divided:
        return optax.tree.norm(tree)
    layout = specs(tree, mesh, divide=True)

    def on_device(tree: PyTree) -> Array:
        total, parts = jnp.zeros(()), []
        for x, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True):
            square = jnp.square(upcast(x)).sum()
            if _axis(spec) is None:
                total += square
            else:
                parts.append(square)
        if parts:
            total += gather(jnp.stack(parts).sum(keepdims=True)).sum()
        return jnp.sqrt(total)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(layout,), out_specs=PartitionSpec())(tree)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _axis(spec: PartitionSpec) -> int | None:
    """The divided axis, counted from the end."""
    return tuple(spec).index(DATA) - len(spec) if DATA in spec else None
