import sys
from pathlib import Path

import equinox as eqx
import hosts_worker
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import free_port, images, run_together, tree_allclose
from jax.sharding import AxisType

import equidit as edt

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def two_processes(folder, sharding):
    """What process 0 of two, with four devices each, ends with."""
    port = free_port()
    path = [str(Path(edt.__file__).parents[1]), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {path}; import hosts_worker; hosts_worker.main()"
    start = [sys.executable, "-c", code, str(port)]
    run_together([[*start, str(i), sharding, folder / "found.npz"] for i in range(2)], 480)
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


def test_a_function_over_a_mesh_is_the_function():
    """Its first argument may hold anything, and is on all devices; the others are divided."""
    tree = {"linear": edt.Linear(4, 3, key=jax.random.key(0)), "name": "linear"}
    many = jax.vmap(lambda tree, x, scale: scale * tree["linear"](x), (None, 0, 0))
    x, scale = images(8, (2, 4)), jnp.arange(8.0)
    found = eqx.filter_jit(edt.hosts.over_mesh(many, MESH))(tree, x, scale)
    assert found.sharding.spec == jax.P(edt.hosts.DATA)
    assert tree_allclose(many(tree, x, scale), found, 1e-6)
    assert edt.hosts.over_mesh(many, None) is many
    # A number and a key are whole.
    noisy = lambda a, x, b, key: a * x + b * jax.random.normal(key)  # noqa: E731
    args = (jnp.float32(2), jnp.arange(8.0), jnp.float32(3), jax.random.key(0))
    assert tree_allclose(noisy(*args), jax.jit(edt.hosts.over_mesh(noisy, MESH))(*args), 1e-6)


def test_specs_say_what_is_divided():
    def weighed(scale, x):
        return scale * x, jax.lax.psum(x.sum(), edt.hosts.DATA)

    shared, everywhere = jax.P(edt.hosts.DATA), jax.P()
    over = edt.hosts.over_mesh(weighed, MESH, (shared, shared), (shared, everywhere))
    x = jnp.arange(8.0)
    found, total = jax.jit(over)(x + 1, x)
    assert (found == x * (x + 1)).all()
    assert total == x.sum()


def test_a_mesh_of_some_devices():
    devices = jax.devices()[2:4]
    mesh = edt.hosts.data_mesh(devices)
    assert mesh is not None
    assert list(mesh.devices) == devices
    assert mesh.shape == {edt.hosts.DATA: 2}
    assert edt.hosts.data_mesh(devices[:1]) is None
    assert edt.hosts.data_mesh() == MESH


def test_bad_input():
    with pytest.raises(ValueError, match=r"12 examples.*8 devices.*multiple of 8 such as 8 or 16"):
        edt.hosts.global_batch(np.ones(12), MESH)
    with pytest.raises(ValueError, match=r"num_processes=2.*belong together"):
        edt.hosts.initialize("127.0.0.1:1", 2)
    with pytest.raises(ValueError, match="heartbeat"):
        edt.hosts.initialize(heartbeat=0)
