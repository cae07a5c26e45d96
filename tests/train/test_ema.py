import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

import equidit as edt


def trajectory(steps):
    """Weights after each update: a slow curve with a ripple, for two arrays and a count."""
    t = np.arange(1, steps + 1)[:, None] / steps
    ripple = 0.05 * np.sin(40 * t + np.arange(3))
    return np.exp(-3 * t) + ripple + np.linspace(0, t, 3)[:, :, 0].T


def brute_force(weights, gamma):
    """The average by its definition: the weights of update `s` count as the profile's integral
    over [s - 1, s]."""
    s = np.arange(len(weights) + 1) / len(weights)
    return (np.diff(s ** (gamma + 1))[:, None] * weights).sum(axis=0)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_std_to_gamma(std):
    gamma = edt.std_to_gamma(std)
    variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
    assert np.sqrt(variance) == pytest.approx(std, rel=1e-9)
    tau = (np.arange(200_000) + 0.5) / 200_000
    profile = (gamma + 1) * tau**gamma
    mean = (profile * tau).mean()
    # A midpoint rule over 200,000 points.
    assert np.sqrt((profile * (tau - mean) ** 2).mean()) == pytest.approx(std, rel=1e-4)


def test_known_gammas():
    """Section 3.1 of the paper: widths 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert edt.std_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert edt.std_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_power_ema_is_the_average_by_its_profile(std):
    weights = trajectory(200)
    decay = edt.power_ema_decay(std)
    ema = {"w": jnp.full(3, 1e6)}  # the initial weights must not count
    for step, row in enumerate(weights):
        ema = edt.ema_update(ema, {"w": jnp.asarray(row, jnp.float32)}, decay(jnp.asarray(step)))
    expected = brute_force(weights, edt.std_to_gamma(std))
    # 200 float32 updates.
    assert tree_allclose(expected, ema["w"], 1e-5)


def test_late_decays_are_not_rounded_away():
    step = 1_000_000
    power = edt.std_to_gamma(0.1) + 1
    decay = float(edt.power_ema_decay(0.1)(jnp.asarray(step - 1)))
    # Float32 near 1 is 6e-8 apart, and 1 - decay is 8e-6.
    assert 1 - decay == pytest.approx(-np.expm1(power * np.log1p(-1 / step)), rel=1e-2)


@pytest.mark.parametrize("std", [0.04, 0.07, 0.1, 0.15, 0.2])
def test_reconstruction_is_near_the_average_that_was_not_kept(std):
    weights = trajectory(4096)

    def average(t, std):
        return {"w": jnp.asarray(brute_force(weights[:t], edt.std_to_gamma(std)), jnp.float32)}

    steps = range(256, 4097, 256)
    snapshots = [(t, kept, average(t, kept)) for t in steps for kept in (0.05, 0.1)]
    made = edt.reconstruct_ema(snapshots, std)
    expected = brute_force(weights, edt.std_to_gamma(std))
    stored = [np.abs(tree["w"] - expected).max() for _, _, tree in snapshots]
    assert made["w"].dtype == jnp.float32
    # Snapshots 1/16 of the training apart, and the widest profile is twice as wide as any stored.
    assert np.abs(made["w"] - expected).max() < max(0.2 * min(stored), 1e-5)


def test_reconstruction_of_what_was_stored_and_earlier():
    weights = trajectory(1024)

    def average(t, std):
        mean = brute_force(weights[:t], edt.std_to_gamma(std))
        return {"w": jnp.asarray(mean, jnp.float32), "count": t}

    snapshots = [(t, std, average(t, std)) for t in (512, 1024) for std in (0.05, 0.1)]
    for t, std, tree in snapshots:
        made = edt.reconstruct_ema(snapshots[::-1], std, step=t)
        assert tree_allclose(tree["w"], made["w"], 1e-6)
        assert made["count"] == 1024


def test_bad_input():
    for std in (0, -0.1, 0.3):
        with pytest.raises(ValueError, match=f"std={std} must lie in"):
            edt.std_to_gamma(std)
    tree = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="snapshots is empty"):
        edt.reconstruct_ema([], 0.1)
    with pytest.raises(ValueError, match="the same step and width"):
        edt.reconstruct_ema([(4, 0.1, tree), (4, 0.1, tree)], 0.1)
    with pytest.raises(ValueError, match=r"step=9 .* 1 \.\. 4"):
        edt.reconstruct_ema([(4, 0.1, tree)], 0.1, step=9)
