"""Step by step against diffusers' schedulers: the same network, noise and timesteps.

Where diffusers differs by design, the test says how. Its tables are float32 throughout, which
limits the agreement to about 1e-5.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from equidit import diffusion as dfn

torch = pytest.importorskip("torch", reason="needs PyTorch and diffusers")
diffusers = pytest.importorskip("diffusers", reason="needs PyTorch and diffusers")


KEY = jax.random.key(3)
NOISE = jax.random.normal(jax.random.key(0), (3, 4, 4))
BETAS = dfn.linear_betas()
TOLERANCE = 1e-4
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def network(x, t, cond, *, xp=jnp):
    """Some smooth function; its second half lies in [-1, 1], as learned variances do."""
    value = 0.5 * x + 0.3 * xp.tanh(x) * xp.cos(t / 100)
    return xp.concatenate([value, xp.tanh(2 * x)])


def scheduler(name, **options):
    common = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    return getattr(diffusers, name)(**(common | options))


def noise_of(t):
    return np.asarray(jax.random.normal(jax.random.fold_in(KEY, t), NOISE.shape))


@functools.cache
def program(step, **options):
    """Compiled once for all schedules of a length, which are its argument."""

    def run(schedule):
        bound = functools.partial(step, network, schedule, **options)
        return dfn.sample(bound, schedule, NOISE, None, key=KEY, trajectory=True)[1]

    return jax.jit(run)


def ours(step, keep, **options):
    """The examples after every step."""
    return np.asarray(program(step, **options)(dfn.Schedule(BETAS, keep)))


def theirs(scheduler, steps, monkeypatch, *, learned=False, **options):
    """The examples after every step, and the timesteps, from the first to the last."""
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    x, states = torch.from_numpy(np.array(NOISE)), []
    for i, time in enumerate(times):
        noise = torch.from_numpy(noise_of(steps - 1 - i).copy())
        output = network(x.numpy(), np.float32(time), None, xp=np)
        value = torch.from_numpy(output if learned else output[:3])
        if hasattr(scheduler, "previous_timestep"):
            module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
            monkeypatch.setattr(module, lambda *_, noise=noise, **__: noise)
            x = scheduler.step(value[None], time, x[None]).prev_sample[0]
        else:
            if options.get("eta"):
                options["variance_noise"] = noise[None]
            x = scheduler.step(value[None], time, x[None], **options).prev_sample[0]
        states.append(x.numpy())
    return np.stack(states), tuple(reversed(times))


@pytest.mark.parametrize(
    ("variance", "name"),
    [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")],
)
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_variances(monkeypatch, variance, name, clip):
    reference = scheduler("DDPMScheduler", variance_type=name, clip_sample=clip)
    states, times = theirs(reference, 50, monkeypatch, learned=variance == "learned")
    keep = dfn.space_timesteps(1000, 50, "leading")
    assert keep == times
    made = ours(dfn.ddpm_step, keep, variance=variance, clip=clip, prediction="eps")
    assert tree_allclose(states, made, TOLERANCE)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_predictions_and_spacings(monkeypatch, prediction, spacing):
    options = {"prediction_type": PREDICTIONS[prediction], "timestep_spacing": spacing}
    states, times = theirs(scheduler("DDPMScheduler", **options), 50, monkeypatch)
    keep = dfn.space_timesteps(1000, 50, spacing)
    assert keep == times
    made = ours(dfn.ddpm_step, keep, variance="small", clip=False, prediction=prediction)
    assert tree_allclose(states, made, TOLERANCE)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim(monkeypatch, eta, prediction, spacing):
    options: dict[str, Any] = {"timestep_spacing": spacing}
    reference = scheduler("DDIMScheduler", prediction_type=PREDICTIONS[prediction], **options)
    states, times = theirs(reference, 50, monkeypatch, eta=eta)
    keep = dfn.space_timesteps(1000, 50, spacing)
    assert keep == times
    made = ours(dfn.ddim_step, keep, eta=eta, prediction=prediction)
    assert tree_allclose(states, made, TOLERANCE)


def test_ddim_clipping(monkeypatch):
    """Clipped, DDIM's direction is that of the clipped example here, and in diffusers by option."""
    keep = dfn.space_timesteps(1000, 50, "leading")
    made = ours(dfn.ddim_step, keep, clip=True)
    run = functools.partial(theirs, scheduler("DDIMScheduler", clip_sample=True), 50, monkeypatch)
    assert tree_allclose(run(use_clipped_model_output=True)[0], made, TOLERANCE)
    assert not tree_allclose(run()[0], made, 100 * TOLERANCE)


def test_ddim_of_uneven_steps(monkeypatch):
    """diffusers' DDIM goes down by 1000 // steps from wherever it is, though its timesteps, under
    "linspace", lie further apart; here a step always ends where the next one begins.
    """
    keep = dfn.space_timesteps(1000, 10, "linspace")
    reference = scheduler("DDIMScheduler", timestep_spacing="linspace")
    states, times = theirs(reference, 10, monkeypatch)
    assert keep == times
    assert not tree_allclose(states, ours(dfn.ddim_step, keep), 100 * TOLERANCE)
    # Its first step, from 999, is ours on the schedule that has 899 next.
    pair = dfn.Schedule(BETAS, (899, 999))
    first = dfn.ddim_step(network, pair, NOISE, 1, None, key=KEY)
    assert tree_allclose(states[0], first, TOLERANCE)


def test_full_schedule(monkeypatch):
    states, times = theirs(
        scheduler("DDPMScheduler", variance_type="fixed_small"), 1000, monkeypatch
    )
    assert times == tuple(range(1000))
    assert tree_allclose(states, ours(dfn.ddpm_step, None, variance="small"), TOLERANCE)
