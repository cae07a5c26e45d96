"""The golden tests see what they should: each wrong implementation fails them."""

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

import equidit as edt
from equidit import diffusion as dfn
from equidit.diffusion import gaussian, likelihood, losses, schedules, steps


def _network_fails() -> bool:
    return any(network_failures(network_errors(name)) for name in NUM_HEADS)


def test_exact_gelu(monkeypatch):
    gelu = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=False))
    assert _network_fails()


def test_epsilon(monkeypatch):
    rsqrt = jax.lax.rsqrt
    monkeypatch.setattr(jax.lax, "rsqrt", lambda variance: rsqrt(variance + 9e-6))
    assert _network_fails()


def test_head_count():
    errors = network_errors("dit_tiny_unit", network("dit_tiny_unit", num_heads=2))
    assert errors["attention_out"] > NETWORK_TOLERANCE
    assert errors["out"] > 0.1


def test_sin_before_cos():
    swapped = lambda t, dim: jnp.roll(edt.timestep_features(t, dim), dim // 2)  # noqa: E731
    wrong = network("dit_tiny")
    object.__setattr__(wrong.conditioner.timestep, "features", swapped)
    assert network_failures(network_errors("dit_tiny", wrong))


@pytest.mark.parametrize("module", ["blocks", "layers"])
def test_shift_and_scale_swapped(monkeypatch, module):
    swapped = lambda x, shift, scale: edt.modulate(x, scale, shift)  # noqa: E731
    monkeypatch.setattr(f"equidit.nn.{module}.modulate", swapped)
    assert _network_fails()


def test_rows_before_columns(monkeypatch):
    right = edt.sincos_2d
    monkeypatch.setattr(
        edt, "sincos_2d", lambda dim, grid: jnp.roll(right(dim, grid), dim // 2, axis=1)
    )
    assert _network_fails()


@pytest.mark.parametrize("shift", [-1, 1])
def test_schedule_off_by_one(monkeypatch, shift):
    right = schedules.at
    for module in (schedules, gaussian, losses, likelihood, steps):
        wrong = lambda table, t: right(table, jnp.clip(t + shift, 0, 249))  # noqa: E731
        monkeypatch.setattr(module, "at", wrong)
    errors = diffusion_errors("250")
    seen = {name for name, error in errors.items() if error > DIFFUSION_TOLERANCE}
    assert {"x_t", "hybrid_vb", "p_pred_xstart", "ddim_step_eta0", "ddpm_step"} <= seen


def test_betas_off_by_one(monkeypatch):
    betas = np.append(dfn.linear_betas()[1:], 0.02)
    monkeypatch.setattr(dfn, "linear_betas", lambda: betas)
    assert max(diffusion_errors("1000").values()) > DIFFUSION_TOLERANCE


def test_nothing_mutated():
    assert not _network_fails()
