"""Steps of samplers, and the loop over them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .._base.common import upcast
from .._base.texts import brief
from ..seams import Network, Number, PRNGKey, Scalar
from .losses import log_variance_of, split_output
from .predictions import x0_and_eps
from .schedules import (
    Image,
    Index,
    Schedule,
    at,
    posterior,
    predict_eps,
    q_sample,
    times,
)


def _predicted(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    prediction: str,
    clip: bool,
) -> tuple[Image, Image, Image | None]:
    """The clean example and the noise that the network implies, and its variance channels."""
    value, values = split_output(network(x, at(schedule.time, t), cond), x.shape[0])
    x0, eps = x0_and_eps(schedule, x, t, value, prediction)
    if clip:
        x0 = jnp.clip(x0, -1.0, 1.0)
        eps = predict_eps(schedule, x, t, x0)
    return x0, eps, values


def ddpm_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    variance: str = "learned",
    prediction: str = "eps",
    clip: bool = False,
    with_x0: bool = False,
) -> Any:
    """One ancestral step from `t` to `t - 1` (DDPM, algorithm 2).

    **Arguments:**

    - `network`, `schedule`: what predicts; what `t` indexes.
    - `x`, `t`: the noisy example and its step. The step at 0 adds no noise.
    - `cond`: passed to the network.
    - `key`: of this example and this step.
    - `variance`: `"learned"` interpolates between the two bounds by the network's second half;
        `"small"` is the posterior's, `"large"` is beta.
    - `prediction`: what the network predicts: `"eps"` the noise, `"x0"` the clean example, `"v"`
        the velocity of [`equidit.diffusion.predict_v`][].
    - `clip`: whether the implied clean example is clipped to [-1, 1].
    - `with_x0`: whether to return the implied clean example too.

    **Returns:**

    The example at the step before, or with `with_x0` the pair of it and the clean example.

    **Raises:**

    `ValueError` for an unknown variance or prediction, and for `variance="learned"` of a network
    without variance channels.

    ??? cite

        Algorithm 2 of [Ho et al. 2020](https://arxiv.org/abs/2006.11239); the learned variance is
        equation 15 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    x0, _, values = _predicted(network, schedule, x, t, cond, prediction, clip)
    mean, _ = posterior(schedule, x0, x, t)
    deviation = jnp.exp(log_variance_of(schedule, t, values, variance) / 2).astype(mean.dtype)
    noise = jax.random.normal(key, x.shape, mean.dtype)
    out = jnp.where(jnp.asarray(t) == 0, mean, mean + deviation * noise).astype(x.dtype)
    return (out, x0.astype(x.dtype)) if with_x0 else out


def ddim_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey,
    eta: Scalar = 0.0,
    prediction: str = "eps",
    clip: bool = False,
    with_x0: bool = False,
) -> Any:
    """One DDIM step from `t` to `t - 1` (DDIM, equations 12 and 16).

    **Arguments:**

    - `network`, `schedule`, `x`, `t`, `cond`, `prediction`, `clip`, `with_x0`: as for
        [`equidit.diffusion.ddpm_step`][].
    - `key`: of this example and this step; not read at a plain `eta=0`, which draws no noise.
    - `eta`: 0 is deterministic, 1 has the posterior's variance at every step. Outside [0, 1] a
        `ValueError`.

    **Returns:**

    The example at the step before, or with `with_x0` the pair of it and the clean example.

    ??? cite

        Equations 12 and 16 of [Song et al. 2021](https://arxiv.org/abs/2010.02502).
    """
    if isinstance(eta, Number) and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]: 0 is deterministic, 1 is DDPM's noise")
    x0, eps, _ = _predicted(network, schedule, x, t, cond, prediction, clip)
    remaining = at(schedule.one_minus_alphas_cumprod_prev, t)
    deviation = None
    if not (isinstance(eta, Number) and eta == 0):
        deviation = eta * jnp.sqrt(at(schedule.posterior_variance, t))
        remaining -= jnp.square(deviation)
    # Not sqrt(max(remaining, 0)), whose gradient at 0 is NaN.
    positive = remaining > 0
    direction = jnp.where(positive, jnp.sqrt(jnp.where(positive, remaining, 1.0)), 0.0)
    mean = times(schedule.sqrt_alphas_cumprod_prev, t, x0) + direction.astype(eps.dtype) * eps
    if deviation is not None:
        mean += deviation.astype(mean.dtype) * jax.random.normal(key, x.shape, mean.dtype)
    out = mean.astype(x.dtype)
    return (out, x0.astype(x.dtype)) if with_x0 else out


def ddim_inversion_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKey | None = None,
    prediction: str = "eps",
) -> Image:
    """One step of DDIM backwards, from `t - 1` to `t`: from an example to the noise that gives it.

    The network is asked at `t` for the noise in `x`, as if `x` did not change over the step, so
    the error falls as 1 / steps. Drive it with `sample(..., ascending=True)`, from a clean example;
    [`equidit.diffusion.ddim_step`][] leads back.

    **Arguments:** as for [`equidit.diffusion.ddim_step`][]. `key` is not read.

    **Returns:**

    The example at step `t`.

    ??? cite

        Section 4.3 of [Song et al. 2021](https://arxiv.org/abs/2010.02502).
    """
    value, _ = split_output(network(x, at(schedule.time, t), cond), x.shape[0])
    _, eps = x0_and_eps(schedule, x, t, value, prediction)
    signal = at(schedule.sqrt_alphas_cumprod_prev, t).astype(eps.dtype)
    noise = jnp.sqrt(at(schedule.one_minus_alphas_cumprod_prev, t)).astype(eps.dtype)
    x0 = (upcast(x) - noise * eps) / signal
    return q_sample(schedule, x0, t, eps).astype(x.dtype)


def sample(
    step: Callable[..., Any],
    schedule: Schedule,
    noise: Any,
    cond: PyTree,
    *,
    key: PRNGKey,
    ascending: bool = False,
    has_aux: bool = False,
    trajectory: bool = False,
    progress: Callable[[int], Any] | None = None,
    check_finite: bool = False,
) -> Any:
    """Runs `step` from the last step of a schedule down to 0, as one `lax.scan`.

    **Arguments:**

    - `step`: called as `step(x, t, cond, key=key)`, e.g.
        `partial(ddim_step, network, schedule)`; returns the next `x`. Make the `partial` inside the
        function that is jitted and pass the network to that as an argument: a closure would bake
        the weights into the program.
    - `schedule`: the step's own: gives the number of steps.
    - `noise`: where to start: standard normal, in the shape of one example. For a step that
        remembers, a tree of arrays such as the pair of the example and the last prediction: what
        the step takes as `x` and returns.
    - `cond`: passed to `step`.
    - `key`: of this example; every step gets its own.
    - `ascending`: from step 0 up instead, e.g. for [`equidit.diffusion.ddim_inversion_step`][].
    - `has_aux`: whether `step` returns the pair of the next `x` and something to be collected, e.g.
        the predicted clean example (`partial(ddim_step, ..., with_x0=True)`).
    - `trajectory`: whether the examples after each step are collected.
    - `progress`: called on the host as `progress(i)` after step number `i`, from 1, in any order.
    - `check_finite`: for debugging: raises if an example is not finite after a step, and names the
        first such step. Costs a read-back.

    **Returns:**

    The sample; with `has_aux` or `trajectory` the pair of it and what was collected, stacked along
    a new first axis in the order of the steps; with both, the pair `(examples, aux)` of these.

    **Raises:**

    `ValueError` if the step was made with a schedule of another length, and for a step that does
    not return what it was given, or with `has_aux` the pair of that and something else.
    """
    _check_schedule(step, schedule)
    order = jnp.arange(schedule.steps)

    def body(carry: tuple[Any, Array], i: Array) -> tuple[tuple[Any, Array], Any]:
        x, bad = carry
        t = i if ascending else schedule.steps - 1 - i
        out = step(x, t, cond, key=jax.random.fold_in(key, t))
        _check_returned(out, x, has_aux)
        x, aux = out if has_aux else (out, None)
        if progress is not None:
            jax.debug.callback(progress, i + 1)
        if check_finite:
            bad = jnp.where((bad < 0) & ~_finite(x), t, bad)
        return (x, bad), (x if trajectory else None, aux)

    (x, bad), (states, aux) = jax.lax.scan(body, (noise, jnp.asarray(-1)), order)
    if check_finite:
        x = _raise_at(x, bad, schedule.steps)
    if has_aux and trajectory:
        return x, (states, aux)
    return (x, aux if has_aux else states) if has_aux or trajectory else x


def _check_schedule(step: Any, schedule: Schedule) -> None:
    bound = [*step.args, *step.keywords.values()] if isinstance(step, partial) else []
    for other in bound:
        if isinstance(other, Schedule) and other.steps != schedule.steps:
            raise ValueError(
                f"the step was made with a schedule of {other.steps} steps, but schedule has "
                f"{schedule.steps}: pass the same one to both"
            )


def _check_returned(out: Any, x: Any, has_aux: bool) -> None:
    """By structure: a pair may as well be what the step remembers."""
    structure = jax.tree.structure(x)
    pair = isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[0]) == structure
    if pair if has_aux else jax.tree.structure(out) == structure:
        return
    if has_aux:
        remedy = "pass has_aux=False, or return the pair of the next x and what is to be collected"
    elif pair:
        remedy = "pass has_aux=True to collect the second, e.g. with with_x0=True"
    else:
        remedy = "a step returns the next x, in the structure of noise"
    found, wanted = (brief(eqx.tree_pformat(tree)) for tree in (out, x))
    raise ValueError(f"has_aux={has_aux}, but the step returned {found} for x {wanted}: {remedy}")


def _finite(tree: PyTree) -> Bool[Array, ""]:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.asarray([True, *(jnp.isfinite(leaf).all() for leaf in leaves)]).all()


def _raise_at(x: Any, bad: Int[Array, ""], steps: int) -> Any:
    texts = [
        f"the example is not finite after the step at t={t}: the network's output or the "
        "conditioning there is NaN or too large"
        for t in range(steps)
    ]
    return eqx.branched_error_if(x, bad >= 0, jnp.maximum(bad, 0), texts)
