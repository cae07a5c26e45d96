"""Arrays of which every device holds a part, and sums over devices.

What a backend's own reductions add first may depend on how the processes are connected, as on CPUs.
`ordered` sums do not: every device receives the addends and sums them in the order of the mesh,
which gives the same bits on one host and on many. On a torus of TPUs that is dear, since most
addends travel over many links; there the compiled program fixes the order by itself.

All functions are for use inside `jax.shard_map`, over the mesh's axis `"data"`. An `axis` counts
from the end, so that it stays right when a scan takes the first axis off.
"""

from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from .common import upcast

DATA = "data"
"""The axis of a mesh along which devices share a batch, and what is divided of a state."""
Tree = TypeVar("Tree")


def gather(part: Array, axis: int = -1, *, to: str = "invarying") -> Array:
    """The whole array, from the part that each device holds."""
    return jax.lax.all_gather(part, DATA, axis=axis % part.ndim, tiled=True, to=to)


def sum_scatter(x: Array, axis: int, *, ordered: bool) -> Array:
    """This device's part of the sum of all devices' `x`, in at least float32."""
    count = jax.lax.axis_size(DATA)
    axis = axis % x.ndim
    if not ordered:
        return jax.lax.psum_scatter(upcast(x), DATA, scatter_dimension=axis, tiled=True)
    parts = x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    addends = jax.lax.all_to_all(parts, DATA, split_axis=axis, concat_axis=0)
    return upcast(addends).sum(axis=0)


def sum_all(x: Array, *, ordered: bool) -> Array:
    """The sum of all devices' `x`, on every device, in at least float32."""
    if not ordered:
        return jax.lax.psum(upcast(x), DATA)
    count = jax.lax.axis_size(DATA)
    flat = jnp.pad(x.ravel(), (0, -x.size % count))
    return gather(sum_scatter(flat, -1, ordered=True))[: x.size].reshape(x.shape)


class Part(eqx.Module):
    """A device's part of a parameter, in place of the parameter.

    `whole()` is the parameter, in `dtype`. The gradient of a part is that of all devices' losses
    together, summed in the dtype of `array`, in the mesh's order if that is asked for.
    """

    array: Array
    axis: int = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)
    ordered: bool = eqx.field(static=True)

    def whole(self) -> Array:
        return _whole(self.axis, self.dtype, self.array.dtype, self.ordered, self.array)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _whole(axis: int, low: DTypeLike, own: DTypeLike, ordered: bool, array: Array) -> Array:
    return gather(array.astype(low), axis, to="varying")


def _forward(
    axis: int, low: DTypeLike, own: DTypeLike, ordered: bool, array: Array
) -> tuple[Array, None]:
    return _whole(axis, low, own, ordered, array), None


def _backward(
    axis: int, low: DTypeLike, own: DTypeLike, ordered: bool, _: None, grad: Array
) -> tuple[Array]:
    return (sum_scatter(grad, axis, ordered=ordered).astype(own),)


_whole.defvjp(_forward, _backward)


def scans(node: Any) -> bool:
    """Whether `node` is a module that calls `whole` itself, on one layer at a time in a scan.

    It says so by a class attribute, `scans_layers`: see [`equidit.train.whole`][].
    """
    return getattr(type(node), "scans_layers", False)


def whole(tree: Tree) -> Tree:
    """A network, or a layer of it, whose divided arrays are put together from all devices.

    With `sharding="fsdp"` the training step calls it on the network. Only where a module's class
    says `scans_layers = True`, as that of [`equidit.Stack`][] does, it leaves the arrays apart.
    Each of them has a first axis of layers, which is never divided, and the module calls this
    function on one layer at a time, inside of its scan and of the `jax.checkpoint` of the scan's
    body. So no device ever holds more than one layer.

    **Arguments:**

    - `tree`: any pytree.

    **Returns:**

    The same tree, where nothing is divided.
    """
    return jax.tree.map(
        lambda node: node.whole() if isinstance(node, Part) else node,
        tree,
        is_leaf=lambda node: isinstance(node, Part) or scans(node),
    )
