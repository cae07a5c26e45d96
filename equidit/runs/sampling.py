"""Guided samples, each belonging to its index, spread over all devices of this host."""

from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer

from ..hosts import data_mesh, over_mesh
from ..seams import Network, PRNGKey
from ..train.sharding import replicated
from ..vae import Autoencoder
from .kinds import About
from .process import Process, Sampler
from .settings import Settings


class Sampling(eqx.Module):
    """All that a sample depends on, but its label and its index."""

    network: Network
    process: Process
    key: PRNGKey
    decoder: Autoencoder | None
    sampler: Sampler = eqx.field(static=True)
    shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        network: Network,
        process: Process,
        *,
        null: int,
        guidance_scale: float,
        guidance_channels: int | None = None,
        sampler: Sampler,
        shape: tuple[int, int, int],
        key: PRNGKey,
        decoder: Autoencoder | None = None,
    ):
        """**Arguments:**

        - `network`, `process`: what predicts; in which steps.
        - `null`, `guidance_scale`, `guidance_channels`: see [`equidit.guide`][].
        - `sampler`: `"ddim"`, or `"ddpm"` with the learned variance.
        - `shape`: of what the network takes.
        - `key`: of all samples; each folds its index into it.
        - `decoder`: an autoencoder, where the network's space is one of latents. Without one the
            samples are images, and every step's clean example is clipped to [-1, 1].
        """
        self.network = process.guided(network, guidance_scale, null, guidance_channels)
        self.process, self.key, self.decoder = process, key, decoder
        self.sampler, self.shape = sampler, shape

    def one(self, label: Array, index: Array) -> Float[Array, "channels height width"]:
        """One sample, not decoded."""
        key, clip = jax.random.fold_in(self.key, index), self.decoder is None
        return self.process.sample(
            self.network, self.shape, label, sampler=self.sampler, clip=clip, key=key
        )

    def many(self, label: Array, index: Array) -> Float[Array, "batch channels height width"]:
        """Images of one device's share."""
        samples = jax.vmap(self.one)(label, index)
        # One at a time: a decoder's activations are a thousand times its latent.
        return samples if self.decoder is None else jax.lax.map(self.decoder.decode, samples)


@eqx.filter_jit
def _many(sampling: Sampling, mesh: Mesh | None, label: Array, index: Array) -> Array:
    return over_mesh(Sampling.many, mesh)(sampling, label, index)


def batches(
    sampling: Sampling,
    labels: Integer[np.ndarray, " count"],
    groups: Sequence[range],
    size: int,
) -> Iterator[Float[np.ndarray, "batch channels height width"]]:
    """Images in about [-1, 1] of groups of indices, one group a device at a time.

    What a sample is depends on `size` to rounding, and on nothing else but its label and index.

    **Arguments:**

    - `labels`: of all indices.
    - `groups`: indices of at most `size` samples each.
    """
    devices = jax.local_devices()
    mesh = data_mesh(devices)
    arrays, static = eqx.partition(sampling, eqx.is_array)
    # Once, rather than at every call.
    sampling = eqx.combine(replicated(arrays, mesh), static)
    for first in range(0, len(groups), len(devices)):
        part = groups[first : first + len(devices)]
        # Every device draws `size`, whatever is asked of it: one program serves all.
        index = np.zeros((len(devices), size), np.int32)
        for row, group in zip(index, part, strict=False):
            row[: len(group)] = group
        label = np.asarray(labels[index], np.int32)
        images = np.asarray(_many(sampling, mesh, jnp.ravel(label), jnp.ravel(index)))
        images = images.reshape(*index.shape, *images.shape[1:])
        for drawn, group in zip(images, part, strict=False):
            yield drawn[: len(group)]


def draw(
    sampling: Sampling, labels: Integer[np.ndarray, " batch"], *, batch_size: int = 100
) -> Float[np.ndarray, "batch channels height width"]:
    """Images in about [-1, 1], one a label; its index is its place in `labels`.

    **Arguments:**

    - `batch_size`: at most so many at a time on a device.
    """
    count = len(labels)
    size = min(batch_size, -(-count // jax.local_device_count()))
    groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return np.concatenate(list(batches(sampling, labels, groups, size)))


def sample(
    settings: Settings,
    about: About,
    network: Network,
    labels: np.ndarray,
    decoder: Autoencoder | None = None,
) -> np.ndarray:
    """Draws from a run's network by the run's settings, one image a label."""
    sampling = Sampling(
        network,
        settings.process.spaced(settings.sampling_steps),
        null=about.num_classes,
        guidance_scale=settings.guidance_scale,
        sampler="ddim",
        shape=about.shape,
        key=settings.key("sample"),
        decoder=decoder,
    )
    return draw(sampling, labels, batch_size=8 if about.latents else 100)
