import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import (
    DIFFUSION_TOLERANCE,
    NETWORK_TOLERANCE,
    NUM_HEADS,
    diffusion_errors,
    network,
    network_errors,
    network_failures,
)
from helpers import ROOT, golden

import equidit as edt
from equidit import diffusion as dfn


@pytest.mark.parametrize("name", NUM_HEADS)
def test_network(name):
    errors = network_errors(name)
    assert not network_failures(errors), errors


@pytest.mark.parametrize("name", NUM_HEADS)
def test_timestep_mlp_on_the_golden_features(name):
    arrays = golden(name)
    embedder = network(name).conditioner.timestep
    features = jnp.asarray(arrays["timestep_features"])
    embedding = embedder.down(jax.nn.silu(embedder.up(features)))
    target = arrays["timestep_embedding"]
    assert np.abs(np.asarray(embedding) - target).max() < NETWORK_TOLERANCE * np.abs(target).max()


@pytest.mark.parametrize("spec", ["1000", "250"])
def test_diffusion(spec):
    errors = diffusion_errors(spec)
    assert max(errors.values()) < DIFFUSION_TOLERANCE, errors


@pytest.mark.parametrize("spec", ["1000", "250"])
def test_tables_are_float64_rounded_once(spec):
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, spec))
    arrays = golden("diffusion")
    tables = [k for k in arrays if k.startswith(f"{spec}/") and arrays[k].dtype == np.float64]
    assert len(tables) == 6
    for key in tables:
        table = np.asarray(getattr(schedule, key.removeprefix(f"{spec}/")))
        # float64 itself is good to about 1e-13 here, which can tip the rounding of an entry.
        np.testing.assert_array_max_ulp(table, arrays[key].astype(np.float32), 1)


@pytest.mark.parametrize("spec", ["250", "50", "ddim50", "10,15,20"])
def test_spacing(spec):
    assert list(dfn.space_timesteps(1000, spec)) == golden("diffusion")[f"spaced/{spec}"].tolist()


@pytest.mark.parametrize(("name", "grid"), [("384x16", (16, 16)), ("64x4", (4, 4))])
def test_sincos(name, grid):
    table = golden("sincos")[name]
    np.testing.assert_allclose(edt.sincos_2d(table.shape[1], grid), table, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "named"),
    [
        ("test_golden.py", "test_"),
        ("test_hosts.py", "test_"),
        ("nn/test_blocks.py", "loop"),
        ("train/test_train.py", "devices or device_order or same_seed"),
        ("train/test_sharding.py", "does_not_matter or same_bits"),
    ],
)
def test_programs_that_are_optimised_hold_it_too(tests, named):
    """The other tests compile quickly; this is how users do."""
    as_users_do = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"tests/{tests}", "-k", named]
    run = subprocess.run(
        command, env=os.environ | as_users_do, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
