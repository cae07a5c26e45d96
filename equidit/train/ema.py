"""Exponential moving averages of weights, and averages made from them afterwards."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._base.arguments import accepting
from .._base.common import check_share
from ..seams import Number, Scalar

Tree = TypeVar("Tree")
Decay = Number | Callable[[Int[Array, ""]], Float[Array, ""]]
"""An average's decay in [0, 1], or a function that gives it for the number of updates made."""


def ema_update(ema: Tree, network: Tree, decay: Scalar) -> Tree:
    """`decay * ema + (1 - decay) * network` for floating-point arrays; all else is `network`'s.

    **Arguments:**

    - `ema`: the average so far.
    - `network`: what is averaged, of the same structure; its dtypes may be others.
    - `decay`: in [0, 1]; 1 leaves the average as it is.

    **Returns:**

    The new average, in the dtypes of `ema`.
    """

    def update(old: Any, new: Any) -> Any:
        if not eqx.is_inexact_array(new):
            return new
        return old + jnp.asarray(1 - decay, old.dtype) * (new.astype(old.dtype) - old)

    return jax.tree.map(update, ema, network)


def ema_warmup(decay: Number = 0.9999) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """An `ema_decay` that grows as `min(decay, (1 + n) / (10 + n))` with the step `n`.

    A constant 0.9999 would be mostly initialisation for the first ten thousand steps.

    **Arguments:**

    - `decay`: the final one, in [0, 1].

    **Returns:**

    A function of the number of updates made, for [`equidit.make_train_step`][].
    """
    check_share(decay=decay)

    def at(step: Int[Array, ""]) -> Float[Array, ""]:
        n = step.astype(jnp.float32)
        return jnp.minimum(decay, (1 + n) / (10 + n))

    return accepting(at)


def std_to_gamma(std: Number) -> float:
    """The exponent of the power-function average whose profile has the relative width `std`.

    **Arguments:**

    - `std`: standard deviation of the profile as a share of the training so far, above 0 and below
        0.288 (that of a plain mean); EDM2 stores 0.05 and 0.10.

    **Returns:**

    The exponent gamma, at least 0.

    **Raises:**

    `ValueError` for a width that no exponent has.

    ??? cite

        Appendix C.1 of [Karras et al. 2023](https://arxiv.org/abs/2312.02696).
    """
    # The plain mean has gamma 0; wider profiles would weigh the start above the end.
    if not 0 < std <= 12**-0.5:
        raise ValueError(f"std={std} must lie in (0, {12**-0.5:.4f}]: 0.05 and 0.1 are usual")
    # std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    inverse = float(std) ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def power_ema_decay(std: Number) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """An `ema_decay` whose average keeps the relative width `std`, however long the training.

    After `t` steps the weights of step `s` count as `s^(gamma + 1) - (s - 1)^(gamma + 1)`, and the
    initial weights nothing. [`equidit.reconstruct_ema`][] makes other widths from a few of these.

    **Arguments:**

    - `std`: as in [`equidit.std_to_gamma`][].

    **Returns:**

    A function of the number of updates made, for [`equidit.make_train_step`][].

    ??? cite

        Section 3.1 of [Karras et al. 2023](https://arxiv.org/abs/2312.02696).
    """
    power = std_to_gamma(std) + 1

    def at(step: Int[Array, ""]) -> Float[Array, ""]:
        # (1 - 1/t)^power for the first update at t = 1, without rounding 1 - 1/t.
        return jnp.exp(power * jnp.log1p(-1 / (step + 1).astype(jnp.float32)))

    return accepting(at)


def reconstruct_ema(
    snapshots: Sequence[tuple[int, Number, Tree]], std: Number, *, step: int | None = None
) -> Tree:
    """The average of width `std`, as if it had been kept, from stored ones of other widths.

    The weighted sum of the stored averages whose profile over the training is nearest to the
    wanted one by least squares. Two widths stored every few thousand steps are enough.

    **Arguments:**

    - `snapshots`: of each stored average the number of updates made (`state.step`), its width and
        the weights. Of one width or several, at one step or several.
    - `std`: the width that is wanted, as in [`equidit.std_to_gamma`][].
    - `step`: the number of updates after which it is wanted; by default that of the last snapshot.

    **Returns:**

    The weights, computed in float64 on the host and in the dtypes of the first snapshot. What is no
    floating-point array is taken from the last.

    **Raises:**

    `ValueError` without snapshots, for one that is stored twice, or for a step that is not in
    `1 .. last snapshot`.

    ??? cite

        Section 3.2 and appendix C of [Karras et al. 2023](https://arxiv.org/abs/2312.02696).
    """
    if not snapshots:
        raise ValueError("snapshots is empty: store averages during training")
    snapshots = sorted(snapshots, key=lambda snapshot: snapshot[0])
    stored = np.array([(t, std_to_gamma(width)) for t, width, _ in snapshots], np.float64)
    if len(np.unique(stored, axis=0)) < len(stored):
        raise ValueError("two snapshots have the same step and width: leave one out")
    last = snapshots[-1][0]
    step = last if step is None else step
    if snapshots[0][0] < 1 or not 1 <= step <= last:
        raise ValueError(f"step={step} and those of the snapshots must lie in 1 .. {last}")
    wanted = np.array([(step, std_to_gamma(std))], np.float64)
    weights = np.linalg.lstsq(_overlap(stored, stored), _overlap(stored, wanted)[:, 0])[0]
    weights *= np.sqrt(stored[:, 0] / step)

    def combine(*leaves: Any) -> Any:
        if not eqx.is_inexact_array_like(leaves[-1]):
            return leaves[-1]
        total = sum(
            w * np.asarray(leaf, np.float64) for w, leaf in zip(weights, leaves, strict=True)
        )
        return jnp.asarray(total, leaves[0].dtype)

    return jax.tree.map(combine, *(tree for _, _, tree in snapshots))


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of the profiles of rows `(t, gamma)` of `a` with those of `b`.

    A profile is `(gamma + 1) tau^gamma / t^(gamma + 1)` for `tau` in [0, t], here times `sqrt(t)`:
    so its norm does not depend on `t`, and early snapshots do not spoil the equations.
    """
    (t, g), (u, h) = a.T[:, :, None], b.T[:, None, :]
    shorter = np.minimum(t, u)
    overlap = (shorter / t) ** (g + 0.5) * (shorter / u) ** (h + 0.5)
    return overlap * (g + 1) * (h + 1) / (g + h + 1)
