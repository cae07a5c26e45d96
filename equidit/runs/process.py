"""What lies between data and noise: what a run minimises, and how samples of it are drawn."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import diffusion as dfn
from ..guidance import drop_label, guide
from ..seams import Loss, Network, PRNGKey

SCHEDULE_STEPS = 1000
Sampler = Literal["ddim", "ddpm"]
"""How a sample is drawn: deterministic, or ancestral with the learned variance."""
_STEPS: dict[Sampler, Callable[..., Any]] = {
    "ddim": dfn.ddim_step,
    "ddpm": partial(dfn.ddpm_step, variance="learned"),
}


@runtime_checkable
class Process(Protocol):
    """All that training, validation and sampling ask of a process, an example at a time.

    They see none of its schedule, its times, its losses and its solvers, so that another process
    is another class with these methods.
    """

    def loss(
        self,
        network: Network,
        clean: Float[Array, "channels height width"],
        label: Array,
        *,
        key: PRNGKey,
    ) -> Float[Array, ""]:
        """What training minimises, of one example, at a time drawn with `key`."""
        ...

    def losses_by_quartile(
        self,
        network: Network,
        clean: Float[Array, "channels height width"],
        label: Array,
        *,
        time_key: PRNGKey,
        noise_key: PRNGKey,
    ) -> Float[Array, " quartiles"]:
        """The same of one example at four times, one drawn from each quarter of them."""
        ...

    def spaced(self, steps: int) -> "Process":
        """The same process, to be sampled in so many steps: `ValueError` if it has not as many."""
        ...

    def guided(self, network: Network, scale: float, null: int, channels: int | None) -> Network:
        """A network that guides what is drawn towards the label, as [`equidit.guide`][] does."""
        ...

    def sample(
        self,
        network: Network,
        shape: tuple[int, int, int],
        label: Array,
        *,
        sampler: Sampler,
        clip: bool,
        key: PRNGKey,
    ) -> Float[Array, "channels height width"]:
        """One sample from noise; `clip` keeps every step's clean example within [-1, 1]."""
        ...


class Diffusion(eqx.Module):
    """The paper's process: noise under a linear schedule, the hybrid loss, DDIM and DDPM."""

    schedule: dfn.Schedule

    def __init__(self, steps: int | None = None):
        """**Arguments:**

        - `steps`: of the schedule's 1000, how many are taken; `None` for all, as in training.
        """
        betas = dfn.linear_betas(SCHEDULE_STEPS)
        keep = () if steps is None else (dfn.space_timesteps(SCHEDULE_STEPS, steps),)
        self.schedule = dfn.Schedule(betas, *keep)

    def loss(
        self,
        network: Network,
        clean: Float[Array, "channels height width"],
        label: Array,
        *,
        key: PRNGKey,
    ) -> Float[Array, ""]:
        return dfn.hybrid_loss(network, self.schedule, clean, label, key=key)

    def losses_by_quartile(
        self,
        network: Network,
        clean: Float[Array, "channels height width"],
        label: Array,
        *,
        time_key: PRNGKey,
        noise_key: PRNGKey,
    ) -> Float[Array, " quartiles"]:
        quarter = self.schedule.steps // 4
        t = jax.random.randint(time_key, (4,), 0, quarter) + quarter * jnp.arange(4)
        noise = jax.random.normal(noise_key, (4, *clean.shape))

        def term(t: Array, noise: Array) -> Float[Array, ""]:
            return dfn.hybrid_loss(
                network, self.schedule, clean, label, key=time_key, t=t, noise=noise
            )

        return jax.vmap(term)(t, noise)

    def spaced(self, steps: int) -> "Diffusion":
        return Diffusion(steps)

    def guided(self, network: Network, scale: float, null: int, channels: int | None) -> Network:
        return guide(network, scale, jnp.asarray(null, jnp.int32), channels=channels)

    def sample(
        self,
        network: Network,
        shape: tuple[int, int, int],
        label: Array,
        *,
        sampler: Sampler,
        clip: bool,
        key: PRNGKey,
    ) -> Float[Array, "channels height width"]:
        noise_key, steps_key = jax.random.split(key)
        step = partial(_STEPS[sampler], network, self.schedule, clip=clip)
        noise = jax.random.normal(noise_key, shape)
        return dfn.sample(step, self.schedule, noise, label, key=steps_key)


def training_loss(process: Process, num_classes: int, label_dropout: float) -> Loss:
    """The process's loss of an example, with its label dropped now and then, for guidance."""

    def loss(network: Network, example: Any, key: PRNGKey) -> Float[Array, ""]:
        clean_key, drop_key, process_key = jax.random.split(key, 3)
        label = drop_label(example.label, num_classes, label_dropout, key=drop_key)
        return process.loss(network, example.clean(clean_key), label, key=process_key)

    return loss
