"""Tables of a Gaussian process, and which of its steps a shorter one keeps."""

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .._base.common import upcast
from ..seams import Image, Index

Spacing = Literal["fractional", "leading", "trailing", "linspace"]
"""How the steps of a short schedule are spread: see [`equidit.diffusion.space_timesteps`][]."""


def linear_betas(steps: int = 1000) -> Float[np.ndarray, " steps"]:
    """The linear noise schedule: 1e-4 to 2e-2 at 1000 steps, scaled to the same total otherwise.

    **Arguments:**

    - `steps`: at least 21 (`ValueError` below, where the last beta would reach 1).

    **Returns:**

    Float64 betas.

    ??? cite

        Section 4 of [Ho et al. 2020](https://arxiv.org/abs/2006.11239).
    """
    if steps < 21:
        raise ValueError(
            f"steps={steps} would need betas above 1: the least is 21. To sample in few "
            "steps, respace: Schedule(linear_betas(), space_timesteps(1000, steps))"
        )
    return np.linspace(1e-4, 2e-2, steps) * (1000 / steps)


def cosine_betas(steps: int = 1000) -> Float[np.ndarray, " steps"]:
    """The cosine noise schedule, betas clipped at 0.999.

    **Arguments:**

    - `steps`: at least 1, else `ValueError`.

    **Returns:**

    Float64 betas.

    ??? cite

        Equation 17 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


def space_timesteps(
    steps: int, spec: str | int | np.integer | Sequence[int], spacing: Spacing = "fractional"
) -> tuple[int, ...]:
    """Which steps of a long schedule a short one keeps.

    **Arguments:**

    - `steps`: length of the full schedule.
    - `spec`: a count (`250` or `"250"`): that many, spread evenly from the first step to the last;
        or counts for equal sections of the schedule (`"10,15,20"` or `[10, 15, 20]`), each spread
        likewise within its own; or `"ddim50"`: every k-th step for the whole k that gives 50.
    - `spacing`: how one count is spread. `"fractional"`, ADM's, and `"linspace"`, diffusers', from
        the first step to the last, rounded (they differ in ties); `"leading"` at every k-th step
        from the first, k whole; `"trailing"` at even distances back from the last, which it always
        keeps. Of 1000 steps 10 are 0, 111, ..., 999; 0, 100, ..., 900; and 99, 199, ..., 999.

    **Returns:**

    Increasing indices into the full schedule.

    **Raises:**

    `ValueError` if `spec` does not parse, asks for more steps than there are, or no whole stride
    gives the count; for an unknown spacing (it lists the known ones), or one other than
    `"fractional"` for sections or `"ddimN"`.

    ??? cite

        Respacing is section 4 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672), the
        other spacings table 2 of [Lin et al. 2023](https://arxiv.org/abs/2305.08891).
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        if spacing != "fractional":
            raise ValueError(f"spec={spec!r} names a spacing of its own: leave out {spacing!r}")
        (count,) = _counts(spec.removeprefix("ddim"), spec, most=1)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return tuple(range(0, steps, stride))
        raise ValueError(f"spec={spec!r}: no whole stride through {steps} steps gives {count}")
    counts = _counts(spec, spec)
    if spacing != "fractional":
        return _spread(steps, counts, spec, spacing)
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"spec={spec!r} asks for {count} of a section of {size} steps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Added up, as ADM does: a product would round other ties.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return tuple(kept)


def _spread(steps: int, counts: list[int], spec: Any, spacing: Spacing) -> tuple[int, ...]:
    if len(counts) > 1:
        raise ValueError(f"spec={spec!r} has sections, for which spacing must be 'fractional'")
    (count,) = counts
    if not 1 <= count <= steps:
        raise ValueError(f"spec={spec!r} asks for {count} of {steps} steps")
    if spacing == "leading":
        kept = np.arange(count) * (steps // count)
    elif spacing == "trailing":
        kept = steps - 1 - np.round(np.arange(count)[::-1] * (steps / count))
    else:
        kept = np.round(np.linspace(0, steps - 1, count))
    return tuple(int(step) for step in kept)


def _counts(
    text: str | int | np.integer | Sequence[int], spec: Any, most: int | None = None
) -> list[int]:
    try:
        parts = text.split(",") if isinstance(text, str) else np.atleast_1d(text)
        counts = [int(part) for part in parts]
        if not counts or len(counts) > (most or len(counts)):
            raise ValueError
        return counts
    except (TypeError, ValueError):
        raise ValueError(f"spec={spec!r} is none of '250', '10,15,20' and 'ddim50'") from None


class Schedule(eqx.Module):
    """The tables of a diffusion process, float64 at birth and float32 here.

    **Fields**, one entry a step, all but `time` of the kept steps' own betas:

    - `time`: what the network is told: the index in the schedule before respacing.
    - `betas`, `log_betas`: the variance of one step of noise, and its logarithm.
    - `alphas_cumprod`, `alphas_cumprod_prev`: the share of `x0` in the variance at a step and at
        the step before, where the first has 1.
    - `sqrt_alphas_cumprod`, `sqrt_alphas_cumprod_prev`: the factor of `x0` there.
    - `sqrt_one_minus_alphas_cumprod`: the factor of the noise at a step.
    - `one_minus_alphas_cumprod_prev`: the variance of the noise at the step before.
    - `snr`: the signal-to-noise ratio, `alphas_cumprod / (1 - alphas_cumprod)`.
    - `sqrt_recip_alphas_cumprod`, `sqrt_recipm1_alphas_cumprod`: the factors of `xt` and of the
        noise, the latter taken away, that give `x0`.
    - `posterior_variance`, `posterior_log_variance_clipped`: of the step before, given `x0`; the
        logarithm of the first, which would be minus infinity, is that of the second.
    - `posterior_mean_coef1`, `posterior_mean_coef2`: factors of `x0` and `xt` in its mean.

    ??? cite

        Equations 4 and 7 of [Ho et al. 2020](https://arxiv.org/abs/2006.11239).
    """

    time: Float[Array, " steps"]
    betas: Float[Array, " steps"]
    log_betas: Float[Array, " steps"]
    alphas_cumprod: Float[Array, " steps"]
    alphas_cumprod_prev: Float[Array, " steps"]
    sqrt_alphas_cumprod: Float[Array, " steps"]
    sqrt_alphas_cumprod_prev: Float[Array, " steps"]
    sqrt_one_minus_alphas_cumprod: Float[Array, " steps"]
    one_minus_alphas_cumprod_prev: Float[Array, " steps"]
    snr: Float[Array, " steps"]
    sqrt_recip_alphas_cumprod: Float[Array, " steps"]
    sqrt_recipm1_alphas_cumprod: Float[Array, " steps"]
    posterior_variance: Float[Array, " steps"]
    posterior_log_variance_clipped: Float[Array, " steps"]
    posterior_mean_coef1: Float[Array, " steps"]
    posterior_mean_coef2: Float[Array, " steps"]

    def __init__(self, betas: Any, keep: Sequence[int] | None = None):
        """**Arguments:**

        - `betas`: float64 betas in (0, 1], e.g. [`equidit.diffusion.linear_betas`][]. Only the last
            may be 1; nothing is left of `x0` then, and the network must predict x0 or v.
        - `keep`: indices to respace to, e.g. from [`equidit.diffusion.space_timesteps`][]; the new
            betas give the kept steps the same `alphas_cumprod`. `None` keeps all.

        **Raises:**

        `ValueError` for betas outside (0, 1], a 1 before the last, and for `keep` that is not
        increasing or out of range.
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not np.all((betas > 0) & (betas <= 1)):
            raise ValueError("betas must be one row of numbers in (0, 1]")
        if np.any(betas[:-1] == 1):
            raise ValueError("betas must be below 1 before the last: a 1 leaves nothing of x0")
        kept = np.arange(len(betas)) if keep is None else np.asarray(keep)
        if (
            kept.ndim != 1
            or not len(kept)
            or kept.dtype.kind not in "iu"
            or np.any(np.diff(kept) <= 0)
            or kept[0] < 0
            or kept[-1] >= len(betas)
        ):
            raise ValueError(f"keep={keep} must be increasing indices of the {len(betas)} steps")
        signal = np.cumprod(1 - betas)[kept]
        signal_prev = np.append(1.0, signal[:-1])
        betas = 1 - signal / signal_prev
        variance = betas * (1 - signal_prev) / (1 - signal)
        # The first posterior has no variance; its logarithm takes the second step's.
        clipped = np.append(variance[1] if len(kept) > 1 else betas[0], variance[1:])

        def table(values: np.ndarray) -> Array:
            return jnp.asarray(values, jnp.float32)

        with np.errstate(divide="ignore"):
            recip, snr = 1 / signal, signal / (1 - signal)
        self.time = table(kept)
        self.betas = table(betas)
        self.log_betas = table(np.log(betas))
        self.alphas_cumprod = table(signal)
        self.alphas_cumprod_prev = table(signal_prev)
        self.sqrt_alphas_cumprod = table(np.sqrt(signal))
        self.sqrt_alphas_cumprod_prev = table(np.sqrt(signal_prev))
        self.sqrt_one_minus_alphas_cumprod = table(np.sqrt(1 - signal))
        self.one_minus_alphas_cumprod_prev = table(1 - signal_prev)
        self.snr = table(snr)
        self.sqrt_recip_alphas_cumprod = table(np.sqrt(recip))
        self.sqrt_recipm1_alphas_cumprod = table(np.sqrt(recip - 1))
        self.posterior_variance = table(variance)
        self.posterior_log_variance_clipped = table(np.log(clipped))
        self.posterior_mean_coef1 = table(betas * np.sqrt(signal_prev) / (1 - signal))
        self.posterior_mean_coef2 = table((1 - signal_prev) * np.sqrt(1 - betas) / (1 - signal))

    @property
    def steps(self) -> int:
        """Length of the schedule."""
        return self.time.shape[0]


def at(table: Float[Array, " steps"], t: Index) -> Float[Array, ""]:
    """A table's entry at step `t`; `ValueError` or, if `t` is traced, NaN where there is none."""
    if not isinstance(t, Tracer) and not 0 <= int(t) < table.shape[0]:
        raise ValueError(f"t={t} is no index of a schedule of {table.shape[0]} steps")
    # A traced index out of range gives NaN rather than, silently, the nearest step. NaN is what is
    # filled in by default: said here it would equal no other NaN, and every call compile anew.
    return table.at[t].get(mode="fill", wrap_negative_indices=False)


def times(table: Float[Array, " steps"], t: Index, x: Image) -> Image:
    """A table's entry at step `t` times `x`, in at least float32."""
    x = upcast(x)
    return at(table, t).astype(x.dtype) * x
