"""Classifier-free guidance: dropping labels in training, guiding a network in sampling."""

import math
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._types import Network, Number, Scalar

Cond = TypeVar("Cond")


def drop_label(label: Cond, null: Any, probability: Scalar, *, key: PRNGKeyArray) -> Cond:
    """Replaces an example's conditioning by the null conditioning, now and then.

    **Arguments:**

    - `label`: the label, or any pytree of arrays.
    - `null`: what stands for "none", of the same structure; for a class label `num_classes`.
    - `probability`: of dropping, in [0, 1]; the paper's is 0.1.
    - `key`: of this example and this training step.

    **Returns:**

    `label` or `null`.

    ??? cite

        Algorithm 1 of [Ho & Salimans 2022](https://arxiv.org/abs/2207.12598).
    """
    if isinstance(probability, Number) and not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie in [0, 1]")
    dropped = jax.random.bernoulli(key, probability)
    return jax.tree.map(lambda a, b: jnp.where(dropped, jnp.asarray(b, a.dtype), a), label, null)


class Guided(eqx.Module):
    """A network under guidance, itself a network. Made by [`equidit.guide`][]."""

    network: Any
    scale: Float[Array, ""]
    null: PyTree
    channels: int | None = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "channels height width"],
        t: Float[Array, ""] | Int[Array, ""],
        cond: PyTree,
    ) -> Float[Array, "out height width"]:
        # Two calls rather than one doubled batch: the conditional one is then the same program as
        # without guidance, so that scale 1 is bit for bit the bare network.
        with_cond = self.network(x, t, cond)
        without = self.network(x, t, self.null)
        channels = x.shape[0] if self.channels is None else self.channels
        if channels > with_cond.shape[0]:
            raise ValueError(f"channels={channels}, but the output has only {with_cond.shape[0]}")
        scale = self.scale.astype(with_cond.dtype)
        guided = with_cond + (scale - 1) * (with_cond - without)
        return jnp.concatenate([guided[:channels], with_cond[channels:]])


def guide(
    network: Network,
    scale: Scalar,
    null: PyTree,
    *,
    channels: int | None = None,
) -> Any:
    """A network steered away from the unconditional: `cond + (scale - 1) (cond - null)`.

    **Arguments:**

    - `network`: a [`equidit.Network`][].
    - `scale`: 1 is no guidance, and as a Python number costs none: the network itself is returned.
        Anything else costs two evaluations a call, one compiled program for every scale.
    - `null`: the null conditioning, e.g. `num_classes`.
    - `channels`: how many of the first output channels are guided; the others are the conditional
        ones. `None` is all channels of `x`, so that a learned variance is never extrapolated. The
        paper's tables guide 3 of 4 (3-channel scale 1.5 is about 4-channel 1.375).

    **Returns:**

    A network, to be passed through `jit` as an argument like any other.

    ??? cite

        Equation 6 of [Ho & Salimans 2022](https://arxiv.org/abs/2207.12598), whose w is
        `scale - 1`; section 3.1 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """
    if channels is not None and channels < 1:
        raise ValueError(f"channels={channels} must be at least 1, or None for all")
    if isinstance(scale, Number) and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if isinstance(scale, Number) and scale == 1:
        return network
    return Guided(
        network, jnp.asarray(scale, jnp.float32), jax.tree.map(jnp.asarray, null), channels
    )
