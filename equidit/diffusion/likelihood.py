"""The whole bound on the likelihood of an example."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._base.common import upcast
from ..seams import Image, Network, PRNGKey
from .gaussian import Variance
from .losses import noise_and_evaluate
from .predictions import PredictionLike, split_output
from .schedules import Schedule, at
from .terms import Likelihood, gaussian_kl, squared_error, vb_term


class BitsPerDim(eqx.Module):
    """Bits per dimension of one example, by [`equidit.diffusion.bits_per_dim`][].

    **Fields:** `total`, which is `prior` + the sum of `terms`; `terms`, the bound's, one a step;
    and `mse`, the squared error of the prediction at each step.
    """

    total: Float[Array, ""]
    prior: Float[Array, ""]
    terms: Float[Array, " steps"]
    mse: Float[Array, " steps"]


def bits_per_dim(
    network: Network,
    schedule: Schedule,
    x0: Image,
    cond: PyTree,
    *,
    key: PRNGKey,
    variance: Variance = "learned",
    prediction: PredictionLike = "eps",
    likelihood: Likelihood = "pixels",
    clip: bool = False,
) -> BitsPerDim:
    """The whole variational bound on the negative log-likelihood of one example, by one draw of
    noise a step. Costs one evaluation of the network a step.

    **Arguments:**

    - `network`, `schedule`, `x0`, `cond`: as for [`equidit.diffusion.simple_loss`][].
    - `key`: of this example.
    - `variance`, `prediction`, `likelihood`, `clip`: as for [`equidit.diffusion.vb_term`][].

    **Returns:**

    The bound, its terms, and the squared error at every step.

    ??? cite

        Equation 4 of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """

    def step(carry: None, t: Array) -> tuple[None, tuple[Array, Array]]:
        output, xt, _, noise = noise_and_evaluate(
            network, schedule, x0, cond, jax.random.fold_in(key, t), t, None
        )
        term = vb_term(
            schedule,
            output,
            x0,
            xt,
            t,
            variance=variance,
            prediction=prediction,
            likelihood=likelihood,
            clip=clip,
        )
        mse = squared_error(
            schedule, split_output(output, x0.shape[0])[0], x0, t, noise, prediction
        )
        return carry, (term, mse)

    terms, mse = jax.lax.scan(step, None, jnp.arange(schedule.steps))[1]
    last = schedule.steps - 1
    mean = at(schedule.sqrt_alphas_cumprod, last) * upcast(x0)
    log_variance = 2 * jnp.log(at(schedule.sqrt_one_minus_alphas_cumprod, last))
    prior = gaussian_kl(mean, log_variance, jnp.zeros_like(mean), jnp.zeros_like(log_variance))
    prior = prior.mean() / math.log(2)
    return BitsPerDim(prior + terms.sum(), prior, terms, mse)
