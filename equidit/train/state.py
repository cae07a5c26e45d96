"""What a training run carries from step to step: how it begins, and on which devices."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike, Int, PyTree

from ..seams import Optimizer
from .handover import buffer, check_dtype, check_network, unshared
from .sharding import Sharding, is_shape, shardings

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
    sharding: Sharding,
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
    return eqx.combine(arrays, eqx.filter(shapes, is_shape, inverse=True))


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
