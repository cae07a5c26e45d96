"""The loop over the steps of a sampler."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .._base.texts import brief
from ..seams import PRNGKey
from .schedules import Schedule

State = TypeVar("State")
Aux = TypeVar("Aux")


@overload
def sample(
    step: Callable[..., State],
    schedule: Schedule,
    noise: State,
    cond: PyTree,
    *,
    key: PRNGKey,
    ascending: bool = ...,
    has_aux: Literal[False] = ...,
    trajectory: Literal[False] = ...,
    progress: Callable[[int], Any] | None = ...,
    check_finite: bool = ...,
) -> State: ...


@overload
def sample(
    step: Callable[..., tuple[State, Aux]],
    schedule: Schedule,
    noise: State,
    cond: PyTree,
    *,
    key: PRNGKey,
    ascending: bool = ...,
    has_aux: Literal[True],
    trajectory: Literal[False] = ...,
    progress: Callable[[int], Any] | None = ...,
    check_finite: bool = ...,
) -> tuple[State, Aux]: ...


@overload
def sample(
    step: Callable[..., State],
    schedule: Schedule,
    noise: State,
    cond: PyTree,
    *,
    key: PRNGKey,
    ascending: bool = ...,
    has_aux: Literal[False] = ...,
    trajectory: Literal[True],
    progress: Callable[[int], Any] | None = ...,
    check_finite: bool = ...,
) -> tuple[State, State]: ...


@overload
def sample(
    step: Callable[..., tuple[State, Aux]],
    schedule: Schedule,
    noise: State,
    cond: PyTree,
    *,
    key: PRNGKey,
    ascending: bool = ...,
    has_aux: Literal[True],
    trajectory: Literal[True],
    progress: Callable[[int], Any] | None = ...,
    check_finite: bool = ...,
) -> tuple[State, tuple[State, Aux]]: ...


@overload
def sample(
    step: Callable[..., Any],
    schedule: Schedule,
    noise: Any,
    cond: PyTree,
    *,
    key: PRNGKey,
    ascending: bool = ...,
    has_aux: bool = ...,
    trajectory: bool = ...,
    progress: Callable[[int], Any] | None = ...,
    check_finite: bool = ...,
) -> Any: ...


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
