"""Training on many hosts: each runs the same program and holds its share of every batch."""

import collections.abc
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._base.common import check_positive
from ._base.parts import DATA as DATA

_EVERYWHERE, _SHARED = PartitionSpec(), PartitionSpec(DATA)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat: int = 100,
) -> None:
    """Connects this process with the others, before anything else is done with JAX.

    Without arguments JAX finds out by itself, from the environment, on TPU pods and under SLURM,
    Open MPI and Kubernetes. Under SLURM and Open MPI each process then takes one GPU, that of its
    number on its host: start as many on a host as it has GPUs. A program for one process does not
    call this.

    **Arguments:**

    - `coordinator`: `"host:port"` of process 0.
    - `num_processes`: number of processes.
    - `process_id`: this one's, from 0.
    - `heartbeat`: after so many seconds without a sign of life a process counts as dead, and JAX
        ends all others, saying that another task died.

    **Raises:**

    `ValueError` if only some are given; `RuntimeError` if JAX is in use already.
    """
    check_positive(heartbeat=heartbeat)
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError(
            f"coordinator={coordinator!r}, num_processes={num_processes} and "
            f"process_id={process_id} belong together: give all three, or none on a pod or cluster"
        )
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat
    )


def is_main() -> bool:
    """Whether this is process 0: the one to print and to write what is not written by all.

    **Returns:**

    `True` in one process of all, and where there is one alone.
    """
    return jax.process_index() == 0


def global_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """The batch of all processes, for the training step, from this process's share.

    **Arguments:**

    - `batch`: a pytree of arrays, this process's examples along their first axis; as many in every
        process.
    - `mesh`: of the training step. Its axis `"data"` must have the processes one after the other,
        as `jax.make_mesh` and `jax.devices()` do: the examples of process 0 come first.

    **Returns:**

    The same pytree of global arrays, divided along `"data"`. An example's place in it decides its
    key, so that one process with all examples computes the same.

    **Raises:**

    `ValueError` for a batch that this process's devices do not divide.
    """
    mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    unit = mine * mesh.shape[DATA] // mesh.devices.size
    for size in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
        if size < 1 or size % unit:
            fit = max(unit, size // unit * unit)
            raise ValueError(
                f"a share of {size} examples does not divide over this process's {mine} devices: "
                f"take a multiple of {unit} such as {fit} or {fit + unit}"
            )
    sharding = NamedSharding(mesh, _SHARED)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def data_mesh(devices: collections.abc.Sequence[Any] | None = None) -> Mesh | None:
    """Devices in a row, for the axis `"data"`.

    **Arguments:**

    - `devices`: e.g. `jax.local_devices()`; `None` is all of all hosts, in JAX's best order.

    **Returns:**

    A mesh of one axis, with automatic sharding; `None` for one device.
    """
    count = jax.device_count() if devices is None else len(devices)
    if count == 1:
        return None
    return jax.make_mesh((count,), (DATA,), (jax.sharding.AxisType.Auto,), devices=devices)


def over_mesh(
    function: collections.abc.Callable[..., Any],
    mesh: Mesh | None,
    in_specs: tuple[PyTree, ...] | None = None,
    out_specs: PyTree = _SHARED,
) -> collections.abc.Callable[..., Any]:
    """`function` on every device of a mesh, with its share of a batch: for use in a `jax.jit`.

    **Arguments:**

    - `function`: called by position, with arrays and anything else; returns arrays.
    - `mesh`: devices with an axis called `"data"`; `None` is one device, and `function` as it is.
    - `in_specs`: for each argument a `PartitionSpec`, or a tree of them for its arrays. By default
        every device has all of the first argument, e.g. a network, and of arrays without axes, and
        its share of the others along their first axes.
    - `out_specs`: the same for the result; by default its first axis is the batch's.

    **Returns:**

    A function of the whole arrays, which returns whole arrays.
    """
    if mesh is None:
        return function

    def run(*args: Any) -> Any:
        arrays, rest = eqx.partition(args, eqx.is_array)
        divided = lambda leaf: _SHARED if leaf.ndim else _EVERYWHERE  # noqa: E731
        usual = (_EVERYWHERE, *jax.tree.map(divided, arrays[1:]))
        return jax.shard_map(
            lambda *arrays: function(*eqx.combine(arrays, rest)),
            mesh=mesh,
            in_specs=usual if in_specs is None else in_specs,
            out_specs=out_specs,
        )(*arrays)

    return run


def gathered(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """All of every array on every host, such as to write or to draw from what devices share.

    **Arguments:**

    - `tree`: any pytree; what is no array stays as it is.
    - `mesh`: over which its arrays are divided, or `None` for one device.

    **Returns:**

    The tree with whole arrays of one device of this host. All hosts must call it together.
    """
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, _EVERYWHERE)
    tree = eqx.filter_jit(lambda t: eqx.filter_shard(t, everywhere))(tree)
    return jax.tree.map(lambda a: a.addressable_data(0) if eqx.is_array(a) else a, tree)
