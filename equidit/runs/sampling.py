"""Guided samples, each belonging to its index, spread over all devices of this host."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Integer

from .. import diffusion as dfn
from ..guidance import guide
from ..seams import Network, PRNGKey
from ..train.sharding import replicated
from .settings import SCHEDULE_STEPS, Settings
from .task import About

Sampler = Literal["ddim", "ddpm"]
_STEPS = {"ddim": dfn.ddim_step, "ddpm": partial(dfn.ddpm_step, variance="learned")}


class Sampling(eqx.Module):
    """All that a sample depends on, but its label and its index."""

    network: Any
    schedule: dfn.Schedule
    key: PRNGKey
    decoder: Any
    sampler: str = eqx.field(static=True)
    shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        network: Network,
        schedule: dfn.Schedule,
        *,
        null: int,
        guidance_scale: float,
        guidance_channels: int | None = None,
        sampler: Sampler,
        shape: tuple[int, int, int],
        key: PRNGKey,
        decoder: Any = None,
    ):
        """**Arguments:**

        - `network`, `schedule`: what predicts; the steps that are taken.
        - `null`, `guidance_scale`, `guidance_channels`: see [`equidit.guide`][].
        - `sampler`: `"ddim"`, or `"ddpm"` with the learned variance.
        - `shape`: of what the network takes.
        - `key`: of all samples; each folds its index into it.
        - `decoder`: an autoencoder, where the network's space is one of latents. Without one the
            samples are images, and every step's clean example is clipped to [-1, 1].
        """
        null_label = jnp.asarray(null, jnp.int32)
        self.network = guide(network, guidance_scale, null_label, channels=guidance_channels)
        self.schedule, self.key, self.decoder = schedule, key, decoder
        self.sampler, self.shape = sampler, shape

    def one(self, label: Array, index: Array) -> Float[Array, "channels height width"]:
        """One sample, not decoded."""
        noise_key, steps_key = jax.random.split(jax.random.fold_in(self.key, index))
        clip = self.decoder is None
        step = partial(_STEPS[self.sampler], self.network, self.schedule, clip=clip)
        noise = jax.random.normal(noise_key, self.shape)
        return dfn.sample(step, self.schedule, noise, label, key=steps_key)

    def many(self, label: Array, index: Array) -> Float[Array, "batch channels height width"]:
        """Images of one device's share."""
        samples = jax.vmap(self.one)(label, index)
        # One at a time: a decoder's activations are a thousand times its latent.
        return samples if self.decoder is None else jax.lax.map(self.decoder.decode, samples)


@eqx.filter_jit
def _many(sampling: Sampling, mesh: Any, label: Array, index: Array) -> Array:
    shared = PartitionSpec("data")
    arrays, static = eqx.partition(sampling, eqx.is_array)

    def local(arrays: Any, label: Array, index: Array) -> Array:
        return eqx.combine(arrays, static).many(label, index)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), shared, shared), out_specs=shared
    )(arrays, label, index)


def batches(
    sampling: Sampling, groups: list[tuple[np.ndarray, np.ndarray]]
) -> Iterator[Float[np.ndarray, "batch channels height width"]]:
    """Images in about [-1, 1] of groups of (labels, indices), one group a device at a time.

    All groups must have the same size, for the same program to make them all. What a sample is
    depends on that size to rounding, and on nothing else but its label and index.
    """
    if not groups:
        return
    devices = jax.local_devices()[: len(groups)]
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    arrays, static = eqx.partition(sampling, eqx.is_array)
    # Once, rather than at every call.
    arrays = replicated(arrays, mesh)
    sampling = eqx.combine(arrays, static)
    for first in range(0, len(groups), len(devices)):
        part = groups[first : first + len(devices)]
        filled = part + part[:1] * (len(devices) - len(part))
        labels, indices = zip(*filled, strict=True)
        label, index = (jnp.asarray(np.concatenate(a), jnp.int32) for a in (labels, indices))
        images = np.asarray(_many(sampling, mesh, label, index))
        yield from np.split(images, len(devices))[: len(part)]


def draw(
    sampling: Sampling, labels: Integer[np.ndarray, " batch"], *, batch_size: int = 100
) -> Float[np.ndarray, "batch channels height width"]:
    """Images in about [-1, 1], one a label; its index is its place in `labels`.

    **Arguments:**

    - `batch_size`: at most so many at a time on a device.
    """
    devices = jax.local_device_count()
    size = min(batch_size, -(-len(labels) // devices))
    groups = [group_of(labels, i, size) for i in range(-(-len(labels) // size))]
    return np.concatenate(list(batches(sampling, groups)))[: len(labels)]


def group_of(labels: np.ndarray, group: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A group's labels and indices; beyond the last label they start over."""
    index = np.arange(group * size, (group + 1) * size)
    return labels[index % len(labels)], index


def sample(
    settings: Settings, about: About, network: Network, labels: np.ndarray, decoder: Any = None
) -> np.ndarray:
    """Draws from a run's network by the run's settings, one image a label."""
    keep = dfn.space_timesteps(SCHEDULE_STEPS, settings.sampling_steps)
    sampling = Sampling(
        network,
        dfn.Schedule(dfn.linear_betas(SCHEDULE_STEPS), keep),
        null=about.num_classes,
        guidance_scale=settings.guidance_scale,
        sampler="ddim",
        shape=about.shape,
        key=settings.key(3),
        decoder=decoder,
    )
    return draw(sampling, labels, batch_size=100 if decoder is None else 8)
