"""Classifier-free guidance: dropping labels in training, guiding a network in sampling."""

import math
from typing import Any, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from ._base.common import Module, check_share, upcast
from .seams import Network, Number, PRNGKey, Scalar

Cond = TypeVar("Cond")


@overload
def drop_label(
    label: Number, null: Any, probability: Scalar, *, key: PRNGKey
) -> Int[Array, ""] | Float[Array, ""]: ...


@overload
def drop_label(label: Cond, null: Any, probability: Scalar, *, key: PRNGKey) -> Cond: ...


def drop_label(label: Any, null: Any, probability: Scalar, *, key: PRNGKey) -> Any:
    """Replaces an example's conditioning by the null conditioning, now and then.

    **Arguments:**

    - `label`: one example's label, or any pytree of arrays; it is dropped as a whole.
    - `null`: what stands for "none", of the same structure, else `ValueError`; for a class label
        `num_classes`.
    - `probability`: of dropping, in [0, 1]; the paper's is 0.1.
    - `key`: of this example and this training step.

    **Returns:**

    `label` or `null`; arrays, where they were numbers.

    ??? cite

        Algorithm 1 of [Ho & Salimans 2022](https://arxiv.org/abs/2207.12598).
    """
    check_share(probability=probability)
    _check_structure(null, label)
    dropped = jax.random.bernoulli(key, jnp.asarray(probability, jnp.float32))

    def drop(kept: Any, none: Any) -> Array:
        kept = jnp.asarray(kept)
        if not isinstance(none, Tracer) and jnp.issubdtype(kept.dtype, jnp.integer):
            exact = np.asarray(none)
            if np.any(exact.astype(kept.dtype) != exact):
                raise ValueError(f"null={none} does not fit the label's dtype {kept.dtype}")
        return jnp.where(dropped, jnp.asarray(none).astype(kept.dtype), kept)

    return jax.tree.map(drop, label, null)


class Guided(Module):
    """A network under guidance, itself a network. Made by [`equidit.guide`][], whose arguments its
    fields are.
    """

    network: Network
    scale: Float[Array, ""]
    null: PyTree
    other: Network | None
    interval: tuple[Float[Array, ""], Float[Array, ""]] | None
    rescale: Float[Array, ""] | None
    channels: int | None = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "channels height width"],
        t: Float[Array, ""] | Int[Array, ""],
        cond: PyTree,
    ) -> Float[Array, "out height width"]:
        """**Arguments:** those of the [`equidit.Network`][].

        **Returns:**

        The guided prediction in the guided channels, the conditional one in the others.
        """
        # Two calls rather than one doubled batch: the conditional one is then the same program as
        # without guidance, so that scale 1 is bit for bit the bare network.
        with_cond = self.network(x, t, cond)
        if self.interval is None:
            return self._guided(with_cond, x, t, cond)
        low, high = self.interval
        time = upcast(jnp.asarray(t))
        inside = (low <= time) & (time <= high)
        return jax.lax.cond(inside, lambda: self._guided(with_cond, x, t, cond), lambda: with_cond)

    def _guided(self, with_cond: Array, x: Array, t: Array, cond: PyTree) -> Array:
        if self.other is None:
            _check_structure(self.null, cond)
            reference = self.network(x, t, self.null)
        else:
            reference = self.other(x, t, cond)
        channels = x.shape[0] if self.channels is None else self.channels
        if channels > with_cond.shape[0]:
            raise ValueError(f"channels={channels}, but the output has only {with_cond.shape[0]}")
        scale = jnp.asarray(self.scale, with_cond.dtype)
        if reference.shape != with_cond.shape:
            raise ValueError(
                f"the reference's output has shape {reference.shape}, the network's "
                f"{with_cond.shape}: they must predict the same"
            )
        kept, reference = with_cond[:channels], reference[:channels]
        guided = kept + (scale - 1) * (kept - reference)
        if self.rescale is not None:
            deviation = upcast(guided).std()
            # A new network predicts 0, which has no deviation to bring back.
            ratio = jnp.where(deviation > 0, upcast(kept).std() / deviation, 1.0)
            guided = guided * (1 + self.rescale * (ratio - 1)).astype(guided.dtype)
        return jnp.concatenate([guided, with_cond[channels:]])


def guide(
    network: Network,
    scale: Scalar,
    null: PyTree,
    *,
    channels: int | None = None,
    other: Network | None = None,
    interval: tuple[Scalar, Scalar] | None = None,
    rescale: Scalar | None = None,
) -> Network:
    """A network steered away from another prediction: `cond + (scale - 1) (cond - reference)`.

    The reference is the network's own under the null conditioning (classifier-free guidance), or
    a weaker network's (autoguidance).

    **Arguments:**

    - `network`: a [`equidit.Network`][].
    - `scale`: 1 is no guidance, and as a finite Python number costs none: the network itself is
        returned. Anything else costs two evaluations a call, one compiled program for every scale.
        For a scale a sample, call `guide` inside the function that is mapped.
    - `null`: the null conditioning, e.g. `num_classes`; or a negative one, to be steered away from.
        Of the structure of the conditioning, else `ValueError`.
    - `channels`: how many of the first output channels are guided; the others are the conditional
        ones. `None` is all channels of `x`, so that a learned variance is never extrapolated. The
        paper's tables guide 3 of 4 (3-channel scale 1.5 is about 4-channel 1.375).
    - `other`: a smaller or less trained network that predicts the same. The reference is then
        `other(x, t, cond)`, and `null` is not read.
    - `interval`: the lowest and the highest time, in the network's units, at which to guide.
        Outside only the conditional network is evaluated (where the time is not batched).
    - `rescale`: from 0, none, to 1: how far the guided channels' standard deviation is brought
        back to that of the conditional ones. About 0.7 is usual.

    **Returns:**

    A network, to be passed through `jit` as an argument like any other.

    **Raises:**

    `ValueError` for a scale that is not finite, for `channels` below 1 or beyond the output's, an
    interval upside down, and `rescale` outside [0, 1].

    ??? cite

        Equation 6 of [Ho & Salimans 2022](https://arxiv.org/abs/2207.12598), whose w is
        `scale - 1`; section 3.1 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
        Autoguidance: [Karras et al. 2024](https://arxiv.org/abs/2406.02507). Interval:
        [Kynkaanniemi et al. 2024](https://arxiv.org/abs/2404.07724). Rescaling: section 3.4 of
        [Lin et al. 2023](https://arxiv.org/abs/2305.08891).
    """
    if channels is not None and channels < 1:
        raise ValueError(f"channels={channels} must be at least 1, or None for all")
    if isinstance(scale, Number) and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if isinstance(rescale, Number) and not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale} must lie in [0, 1]")
    if interval is not None:
        low, high = interval
        if isinstance(low, Number) and isinstance(high, Number) and not low <= high:
            raise ValueError(f"interval={interval} must be the lowest time, then the highest")
        interval = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    if isinstance(scale, Number) and scale == 1:
        return network
    return Guided(
        network,
        jnp.asarray(scale, jnp.float32),
        None if other is not None else jax.tree.map(jnp.asarray, null),
        other,
        interval,
        None if rescale is None else jnp.asarray(rescale, jnp.float32),
        channels,
    )


def _check_structure(null: PyTree, cond: PyTree) -> None:
    expected, found = jax.tree.structure(cond), jax.tree.structure(null)
    if expected != found:
        raise ValueError(
            f"null has the structure {found}, but the conditioning {expected}: they must be alike"
        )
