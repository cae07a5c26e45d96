import subprocess
import sys
from pathlib import Path

import hosts_worker
import jax
import numpy as np
import pytest
from helpers import free_port
from jax.sharding import AxisType

import equidit as edt

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def two_processes(folder, sharding):
    """What process 0 of two, with four devices each, ends with."""
    port = free_port()
    path = [str(Path(edt.__file__).parents[1]), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {path}; import hosts_worker; hosts_worker.main()"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(index), sharding, folder / "found.npz"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=480)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)[-4000:]
    return dict(np.load(folder / "found.npz"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding",
    ["fsdp", "replicated", "zero1"],
)
def test_two_processes_compute_the_same_bits_as_one(tmp_path, sharding):
    one, two = hosts_worker.train(sharding, MESH), two_processes(tmp_path, sharding)
    assert one.keys() == two.keys()
    assert [name for name in one if not np.array_equal(one[name], two[name])] == []
    assert one["losses"].shape == (16,)
    assert one["grad_norm"] > 0.5  # clipped


def test_one_process_is_the_main_one():
    assert edt.hosts.is_main()
    batch = edt.hosts.global_batch((np.arange(16), np.ones((16, 2))), MESH)
    assert batch[0].sharding.spec == jax.P("data")
    assert (np.asarray(batch[0]) == np.arange(16)).all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"12 examples.*8 devices.*multiple of 8 such as 8 or 16"):
        edt.hosts.global_batch(np.ones(12), MESH)
    with pytest.raises(ValueError, match=r"num_processes=2.*belong together"):
        edt.hosts.initialize("127.0.0.1:1", 2)
    with pytest.raises(ValueError, match="heartbeat"):
        edt.hosts.initialize(heartbeat=0)
