"""Gaussian diffusion as pure functions over tables, one example at a time.

`t` indexes a [`equidit.diffusion.Schedule`][] (0 is the least noisy step); what the network is told
is `schedule.time[t]`, so respacing is nothing but another schedule. References: DDPM is
[Ho et al. 2020](https://arxiv.org/abs/2006.11239), learned variances are
[Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672), DDIM is
[Song et al. 2021](https://arxiv.org/abs/2010.02502).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._common import upcast
from ._types import Network, Scalar

VARIANCES = ("learned", "small", "large")
Image = Float[Array, "channels height width"]
Index = Int[Array, ""] | int
State = TypeVar("State")


def linear_betas(steps: int = 1000) -> Float[np.ndarray, " steps"]:
    """The linear noise schedule: 1e-4 to 2e-2 at 1000 steps, scaled to the same total otherwise.

    **Arguments:**

    - `steps`: at least 21, where the last beta reaches 1 (`ValueError` below).

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

    **Returns:**

    Float64 betas.

    ??? cite

        Equation 17 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


def space_timesteps(steps: int, spec: str | int | Sequence[int]) -> tuple[int, ...]:
    """Which steps of a long schedule a short one keeps, as ADM chooses them.

    **Arguments:**

    - `steps`: length of the full schedule.
    - `spec`: a count (`250` or `"250"`): that many, spread evenly from the first step to the last;
        or counts for equal sections of the schedule (`"10,15,20"` or `[10, 15, 20]`), each spread
        likewise within its own; or `"ddim50"`: every k-th step for the whole k that gives 50.

    **Returns:**

    Increasing indices into the full schedule.

    **Raises:**

    `ValueError` if `spec` does not parse, asks for more steps than there are, or no whole stride
    gives the count.

    ??? cite

        Respacing is section 4 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        (count,) = _counts(spec.removeprefix("ddim"), spec)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return tuple(range(0, steps, stride))
        raise ValueError(f"spec={spec!r}: no whole stride through {steps} steps gives {count}")
    counts = _counts(spec, spec)
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"spec={spec!r} asks for {count} of a section of {size} steps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(stride * i) for i in range(count)]
        start += size
    return tuple(kept)


def _counts(text: str | int | Sequence[int], spec: Any) -> list[int]:
    try:
        if isinstance(text, str):
            return [int(part) for part in text.split(",")]
        return [text] if isinstance(text, int) else [int(count) for count in text]
    except (TypeError, ValueError):
        raise ValueError(f"spec={spec!r} is none of '250', '10,15,20' and 'ddim50'") from None


class Schedule(eqx.Module):
    """The tables of a diffusion process, float64 at birth and float32 here.

    Fields, one entry a step: `betas`; `alphas_cumprod`, its predecessor `alphas_cumprod_prev`, and
    the square roots that q_sample and its inverses need; `posterior_variance`, its clipped
    logarithm, and the two coefficients of the posterior mean; and `time`, what the network is told.

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
    sqrt_recip_alphas_cumprod: Float[Array, " steps"]
    sqrt_recipm1_alphas_cumprod: Float[Array, " steps"]
    posterior_variance: Float[Array, " steps"]
    posterior_log_variance_clipped: Float[Array, " steps"]
    posterior_mean_coef1: Float[Array, " steps"]
    posterior_mean_coef2: Float[Array, " steps"]

    def __init__(self, betas: Any, keep: Sequence[int] | None = None):
        """**Arguments:**

        - `betas`: float64 betas in (0, 1], e.g. [`equidit.diffusion.linear_betas`][].
        - `keep`: indices to respace to, e.g. from [`equidit.diffusion.space_timesteps`][]; the new
            betas give the kept steps the same `alphas_cumprod`. `None` keeps all.

        **Raises:**

        `ValueError` for betas outside (0, 1] and for `keep` that is not increasing or out of range.
        """
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not np.all((betas > 0) & (betas <= 1)):
            raise ValueError("betas must be one row of numbers in (0, 1]")
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

        self.time = table(kept)
        self.betas = table(betas)
        self.log_betas = table(np.log(betas))
        self.alphas_cumprod = table(signal)
        self.alphas_cumprod_prev = table(signal_prev)
        self.sqrt_alphas_cumprod = table(np.sqrt(signal))
        self.sqrt_alphas_cumprod_prev = table(np.sqrt(signal_prev))
        self.sqrt_one_minus_alphas_cumprod = table(np.sqrt(1 - signal))
        self.one_minus_alphas_cumprod_prev = table(1 - signal_prev)
        self.sqrt_recip_alphas_cumprod = table(np.sqrt(1 / signal))
        self.sqrt_recipm1_alphas_cumprod = table(np.sqrt(1 / signal - 1))
        self.posterior_variance = table(variance)
        self.posterior_log_variance_clipped = table(np.log(clipped))
        self.posterior_mean_coef1 = table(betas * np.sqrt(signal_prev) / (1 - signal))
        self.posterior_mean_coef2 = table((1 - signal_prev) * np.sqrt(1 - betas) / (1 - signal))

    @property
    def steps(self) -> int:
        """Length of the schedule."""
        return self.time.shape[0]


def _at(table: Float[Array, " steps"], t: Index) -> Float[Array, ""]:
    if isinstance(t, int) and not 0 <= t < table.shape[0]:
        raise ValueError(f"t={t} is no index of a schedule of {table.shape[0]} steps")
    # A traced index out of range gives NaN rather than, silently, the nearest step.
    return table.at[t].get(mode="fill", fill_value=float("nan"), wrap_negative_indices=False)


def q_sample(schedule: Schedule, x0: Image, t: Index, noise: Image) -> Image:
    """The forward process: `x0` with the noise of step `t` (DDPM, equation 4)."""
    return _at(schedule.sqrt_alphas_cumprod, t) * x0 + (
        _at(schedule.sqrt_one_minus_alphas_cumprod, t) * noise
    )


def posterior(schedule: Schedule, x0: Image, xt: Image, t: Index) -> tuple[Image, Float[Array, ""]]:
    """Mean and log-variance of q(x_{t-1} | x_t, x_0) (DDPM, equations 6 and 7).

    The log-variance at `t = 0`, minus infinity, is replaced by that of `t = 1`.
    """
    mean = _at(schedule.posterior_mean_coef1, t) * x0 + _at(schedule.posterior_mean_coef2, t) * xt
    return mean, _at(schedule.posterior_log_variance_clipped, t)


def predict_x0(schedule: Schedule, xt: Image, t: Index, eps: Image) -> Image:
    """The clean example that `eps` implies: the inverse of [`equidit.diffusion.q_sample`][]."""
    return _at(schedule.sqrt_recip_alphas_cumprod, t) * xt - (
        _at(schedule.sqrt_recipm1_alphas_cumprod, t) * eps
    )


def predict_eps(schedule: Schedule, xt: Image, t: Index, x0: Image) -> Image:
    """The noise that `x0` implies: the inverse of [`equidit.diffusion.predict_x0`][]."""
    return (_at(schedule.sqrt_recip_alphas_cumprod, t) * xt - x0) / (
        _at(schedule.sqrt_recipm1_alphas_cumprod, t)
    )


def _split(output: Float[Array, "out height width"], x: Image) -> tuple[Image, Image | None]:
    """The noise half of a network's output and, if it has one, the variance half."""
    output = upcast(output)
    channels = x.shape[0]
    if output.shape == x.shape:
        return output, None
    if output.shape == (2 * channels, *x.shape[1:]):
        return output[:channels], output[channels:]
    raise ValueError(
        f"the network's output has shape {output.shape}: for x of shape {x.shape} it should have "
        f"{channels} channels, or {2 * channels} with a learned variance"
    )


def _log_variance(schedule: Schedule, t: Index, values: Image | None, variance: str) -> Array:
    if variance == "learned":
        if values is None:
            raise ValueError(
                "variance='learned' needs a network with twice the input's channels "
                "(learn_sigma=True): choose variance='small' or 'large' for this one"
            )
        fraction = (values + 1) / 2
        upper, lower = (
            _at(table, t) for table in (schedule.log_betas, schedule.posterior_log_variance_clipped)
        )
        return fraction * upper + (1 - fraction) * lower
    lower = _at(schedule.posterior_log_variance_clipped, t)
    if variance == "small":
        return lower
    # At t = 0 beta is far below any useful decoder's variance: DDPM's code takes the posterior's.
    return jnp.where(jnp.asarray(t) == 0, lower, _at(schedule.log_betas, t))


def hybrid_terms(
    schedule: Schedule,
    output: Float[Array, "out height width"],
    x0: Image,
    xt: Image,
    t: Index,
    noise: Image,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two terms of the learned-variance objective.

    **Arguments:**

    - `output`: the network's output at `xt`: noise channels, then variance channels.
    - `x0`, `xt`, `t`, `noise`: as in [`equidit.diffusion.q_sample`][].

    **Returns:**

    `(mse, vb)`: the mean squared error of the noise; and the variational bound's term of step `t`
    in bits per dimension, a Kullback-Leibler divergence for `t > 0` and for `t = 0` the negative
    log-likelihood of `x0` in steps of 2/255. The bound teaches the variance only: no gradient
    reaches the noise channels through it.

    ??? cite

        Sections 3.1 and 3.3 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """
    eps, values = _split(output, x0)
    mse = jnp.square(eps - noise).mean()
    log_variance = _log_variance(schedule, t, values, "learned")
    x0_hat = predict_x0(schedule, xt, t, jax.lax.stop_gradient(eps))
    mean, _ = posterior(schedule, x0_hat, xt, t)
    true_mean, true_log_variance = posterior(schedule, x0, xt, t)
    kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -_discretized_log_likelihood(x0, mean, log_variance / 2)
    vb = jnp.where(jnp.asarray(t) == 0, nll, kl).mean() / math.log(2)
    return mse, vb


def _gaussian_kl(mean_p: Array, log_var_p: Array, mean_q: Array, log_var_q: Array) -> Array:
    """KL(p || q) of two diagonal Gaussians, element by element, in nats."""
    difference = log_var_p - log_var_q
    distance = jnp.square(mean_p - mean_q) * jnp.exp(-log_var_q)
    return 0.5 * (jnp.exp(difference) - 1 - difference + distance)


def _discretized_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """Log-probability of `x` in bins of width 2/255 over [-1, 1], the outer two open."""

    def cdf(z: Array) -> Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale = jnp.exp(-log_scale)
    below = cdf((x - mean - 1 / 255) * inverse_scale)
    above = cdf((x - mean + 1 / 255) * inverse_scale)
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _corrupt(
    network: Network, schedule: Schedule, x0: Image, cond: PyTree, key: PRNGKeyArray
) -> tuple[Array, Image, Int[Array, ""], Image]:
    t_key, noise_key = jax.random.split(key)
    t = jax.random.randint(t_key, (), 0, schedule.steps)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    xt = q_sample(schedule, x0, t, noise)
    return network(xt, _at(schedule.time, t), cond), xt, t, noise


def simple_loss(
    network: Network, schedule: Schedule, x0: Image, cond: PyTree, *, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Mean squared error of the predicted noise at a uniform random step (DDPM, equation 14).

    Variance channels, if the network has them, are ignored.
    """
    output, _, _, noise = _corrupt(network, schedule, x0, cond, key)
    return jnp.square(_split(output, x0)[0] - noise).mean()


def hybrid_loss(
    network: Network, schedule: Schedule, x0: Image, cond: PyTree, *, key: PRNGKeyArray
) -> Float[Array, ""]:
    """The paper's training loss: the sum of [`equidit.diffusion.hybrid_terms`][] at a uniform
    random step. The bound has weight 1, not steps/1000.

    ??? cite

        Section 3.1 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """
    output, xt, t, noise = _corrupt(network, schedule, x0, cond, key)
    mse, vb = hybrid_terms(schedule, output, x0, xt, t, noise)
    return mse + vb


def ddpm_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKeyArray,
    variance: str = "learned",
    clip: bool = False,
) -> Image:
    """One ancestral step from `t` to `t - 1` (DDPM, algorithm 2).

    **Arguments:**

    - `network`, `schedule`: what predicts the noise; what `t` indexes.
    - `x`, `t`: the noisy example and its step. The step at 0 adds no noise.
    - `cond`: passed to the network.
    - `key`: of this example and this step.
    - `variance`: `"learned"` interpolates between the two bounds by the network's second half;
        `"small"` is the posterior's, `"large"` is beta.
    - `clip`: whether the implied clean example is clipped to [-1, 1].

    **Returns:**

    The example at the step before.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance!r} is unknown: choose from {', '.join(VARIANCES)}")
    eps, values = _split(network(x, _at(schedule.time, t), cond), x)
    mean, _ = posterior(schedule, _clipped_x0(schedule, x, t, eps, clip), x, t)
    deviation = jnp.exp(_log_variance(schedule, t, values, variance) / 2)
    noise = jax.random.normal(key, x.shape, x.dtype)
    return jnp.where(jnp.asarray(t) == 0, mean, mean + deviation * noise)


def ddim_step(
    network: Network,
    schedule: Schedule,
    x: Image,
    t: Index,
    cond: PyTree,
    *,
    key: PRNGKeyArray,
    eta: Scalar = 0.0,
    clip: bool = False,
) -> Image:
    """One DDIM step from `t` to `t - 1` (DDIM, equations 12 and 16).

    **Arguments:**

    - `network`, `schedule`, `x`, `t`, `cond`, `clip`: as for [`equidit.diffusion.ddpm_step`][].
    - `key`: of this example and this step; without effect at `eta=0`.
    - `eta`: 0 is deterministic, 1 has the posterior's variance at every step.

    **Returns:**

    The example at the step before.
    """
    eps, _ = _split(network(x, _at(schedule.time, t), cond), x)
    x0 = _clipped_x0(schedule, x, t, eps, clip)
    if clip:
        eps = predict_eps(schedule, x, t, x0)
    variance = jnp.square(eta) * _at(schedule.posterior_variance, t)
    direction = jnp.sqrt(jnp.maximum(_at(schedule.one_minus_alphas_cumprod_prev, t) - variance, 0))
    mean = _at(schedule.sqrt_alphas_cumprod_prev, t) * x0 + direction * eps
    return mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape, x.dtype)


def _clipped_x0(schedule: Schedule, x: Image, t: Index, eps: Image, clip: bool) -> Image:
    x0 = predict_x0(schedule, x, t, eps)
    return jnp.clip(x0, -1.0, 1.0) if clip else x0


def sample(
    step: Callable[..., State],
    schedule: Schedule,
    noise: State,
    cond: PyTree,
    *,
    key: PRNGKeyArray,
) -> State:
    """Runs `step` from the last step of a schedule down to 0, as one `lax.scan`.

    **Arguments:**

    - `step`: called as `step(x, t, cond, key=key)`, e.g.
        `partial(ddim_step, network, schedule)`. Make the `partial` inside the function that is
        jitted and pass the network to that as an argument: a closure would bake the weights into
        the program.
    - `schedule`: gives the number of steps.
    - `noise`: where to start: standard normal, in the shape of one example.
    - `cond`: passed to `step`.
    - `key`: of this example; every step gets its own.

    **Returns:**

    The sample.
    """

    def body(x: State, t: Array) -> tuple[State, None]:
        return step(x, t, cond, key=jax.random.fold_in(key, t)), None

    return jax.lax.scan(body, noise, jnp.arange(schedule.steps), reverse=True)[0]
