"""Checkpoints between two processes with four devices each, and one."""

import os
import sys

import jax
from helpers import ROOT, free_port, run_together

from benchmarks import faults
from equidit.checkpoint import Checkpoints

WORKER = """
import sys
import warnings
from pathlib import Path
warnings.simplefilter("error")
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from benchmarks.faults import CONFIG, small_state
from equidit.checkpoint import CheckpointError, Checkpoints
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

def place(leaf):
    spec = PartitionSpec("data") if leaf.ndim and leaf.shape[0] % 8 == 0 else PartitionSpec()
    return NamedSharding(mesh, spec)

def spread(leaf):
    if isinstance(leaf, str):
        return leaf
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, place(leaf), lambda i: value[i])

def like(leaf):
    if isinstance(leaf, str):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf))

def check(found, step):
    assert found.step == step, found
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(small_state(step))):
        if not isinstance(b, str):
            whole = np.asarray(b)
            assert all((np.asarray(s.data) == whole[s.index]).all() for s in a.addressable_shards)

wanted = jax.tree.map(like, small_state(0))
with Checkpoints(folder, keep_last=2) as checkpoints:
    found = checkpoints.restore(wanted)
    check(found, 1)
    for step in (2, 3):
        state = jax.tree.map(spread, small_state(step))
        checkpoints.save(step, state, data={"index": step}, config=CONFIG)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    check(checkpoints.restore(wanted, config=CONFIG), 3)
    # One host alone cannot read the newest: both must take the one before.
    from equidit.checkpoint import backend
    read = backend.read_arrays
    def fail(path, arrays):
        if path.name == "3" and index == 1:
            raise OSError("no such luck")
        return read(path, arrays)
    backend.read_arrays = fail
    found = checkpoints.restore(wanted)
    check(found, 2)
    assert ("no such luck" if index else "another host") in found.fell_back[0], found.fell_back
    try:
        checkpoints.restore(wanted, config={"model": index})
    except CheckpointError as error:
        assert "another config" in str(error)
    # By default on all devices of both.
    bare = jax.ShapeDtypeStruct(wanted["ema"].shape, wanted["ema"].dtype)
    found = checkpoints.restore(wanted | {"ema": bare})
    assert found.state["ema"].is_fully_replicated and not found.state["ema"].is_fully_addressable
print("done", index)
"""


def test_two_processes_and_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, faults.small_state(1), data={"index": 1}, config=faults.CONFIG)
    port = free_port()
    workers = [[sys.executable, "-c", WORKER, str(i), str(port), str(tmp_path)] for i in range(2)]
    run_together(workers, 120, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    like = jax.eval_shape(lambda: {k: v for k, v in faults.small_state(0).items() if k != "name"})
    found = Checkpoints(tmp_path, read_only=True).restore(like | {"name": "not an array"})
    assert (found.step, found.data, found.fell_back) == (3, {"index": 3}, [])
    assert faults.same(found.state, faults.small_state(3))
