import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import NUM_HEADS, diffusion_errors, network, network_errors
from helpers import golden

import equidit as edt
from equidit import diffusion as dfn

ROOT = Path(__file__).parents[1]
# A right float32 implementation is within 1e-6; the mildest wrong one, exact GELU, 3.5e-6 off.
NETWORK_TOLERANCE = 2e-6
# PyTorch's float32 exp is one unit in the last place off at 2 of the 128 frequencies, ours at none.
# Times t = 999 that is 2.9e-5 in the features and shows in what is made of them alone.
FROM_FREQUENCIES = {"timestep_features": 3e-5, "timestep_embedding": 3e-6, "conditioning": 3e-6}
# Rounding to float32 is 6e-8; the DDIM step's direction is a difference that loses a digit.
DIFFUSION_TOLERANCE = 1e-6


def network_failures(errors):
    return {k: e for k, e in errors.items() if e > FROM_FREQUENCIES.get(k, NETWORK_TOLERANCE)}


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
@pytest.mark.parametrize("module", ["golden", "blocks", "train", "objectives"])
def test_programs_that_are_optimised_hold_it_too(module):
    """The other tests compile quickly; this is how users do."""
    as_users_do = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"tests/test_{module}.py"]
    run = subprocess.run(
        command, env=os.environ | as_users_do, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
