"""How a training state is laid out over devices, and the gradient over all of them."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, PyTree

from .._base.common import upcast
from .._base.parts import Part, gather, scans, sum_all, sum_scatter, whole
from ..hosts import DATA, over_mesh

Sharding = Literal["replicated", "zero1", "fsdp"]
"""How devices hold a training state: see [`equidit.shardings`][]."""
Gradient = Callable[..., tuple[PyTree, PyTree]]
"""`gradient(params, fixed, batch, layout=None)`: what the examples gave, and the gradient."""
# What of the state each mode divides among the devices; the rest is on all of them.
_DIVIDED: dict[Sharding, tuple[str, ...]] = {
    "replicated": (),
    "zero1": ("ema", "opt_state"),
    "fsdp": ("network", "ema", "opt_state"),
}


def shardings(state: PyTree, mesh: Mesh, sharding: Sharding = "replicated") -> PyTree:
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
    check_mesh(mesh)
    layout = specs(eqx.filter(state, _is_array), mesh, divide=True)

    def place(path: tuple[Any, ...], spec: PartitionSpec) -> NamedSharding:
        divided = path[0].name in _DIVIDED[sharding]
        return NamedSharding(mesh, spec if divided else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, layout)


def replicated(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """`tree`'s arrays, whole on every device of the mesh; without one, as they are."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_mesh(mesh: Mesh) -> None:
    """`ValueError` for a mesh that the training step cannot work with."""
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


def over_devices(gradient: Gradient, mesh: Mesh, sharding: Sharding, *, ordered: bool) -> Gradient:
    """The gradient of the mean loss over a batch that the devices share, in whole arrays.

    **Arguments:**

    - `gradient`: called on each device with its share of the batch, returns what its examples gave
        and its gradient of their mean loss.
    - `ordered`: whether to sum in the order of the mesh.
    """
    count = mesh.shape[DATA]

    def mean(grad: Array, own: PartitionSpec, result: PartitionSpec) -> Array:
        if _axis(own) is not None:  # a part's gradient is summed already
            return grad / count
        axis = _axis(result)
        if axis is None:
            total = sum_all(grad, ordered=ordered)
        else:
            total = sum_scatter(grad, axis, ordered=ordered)
        return total.astype(grad.dtype) / count

    def averaged(params: PyTree, fixed: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        own = specs(params, mesh, divide="network" in _DIVIDED[sharding])
        result = specs(params, mesh, divide="opt_state" in _DIVIDED[sharding])

        def on_device(params: PyTree, fixed: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            # With device-varying parameters the gradient is this device's own, and is averaged
            # once, below. Left replicated, it would be summed behind our back.
            varying = jax.tree.map(
                lambda p, spec: jax.lax.pcast(p, DATA, to="varying") if _axis(spec) is None else p,
                params,
                own,
            )
            results, grads = gradient(varying, fixed, batch, own)
            return jax.tree.map(gather, results), jax.tree.map(mean, grads, own, result)

        specs_in = (own, PartitionSpec(), PartitionSpec(DATA))
        run = over_mesh(on_device, mesh, specs_in, (PartitionSpec(), result))
        return run(params, fixed, batch)

    return averaged


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

    return over_mesh(on_device, mesh, (layout,), PartitionSpec())(tree)


def is_shape(leaf: Any) -> bool:
    """Whether a leaf is what `eqx.filter_eval_shape` makes of an array."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or is_shape(leaf)


def _axis(spec: PartitionSpec) -> int | None:
    """The divided axis, counted from the end."""
    return tuple(spec).index(DATA) - len(spec) if DATA in spec else None
