"""How timesteps are drawn in training."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._base.common import check_positive
from ..seams import PRNGKey


def stratified_timesteps(key: PRNGKey, steps: int, batch_size: int) -> Int[Array, " batch_size"]:
    """One step for each example of a batch, one from each of `batch_size` equal shares of the
    schedule, in random order: uniform each, and evenly spread together.

    Draw them beside the batch, and pass each example's to its loss as `t`.

    **Arguments:**

    - `key`: of this training step.
    - `steps`: of the schedule.
    - `batch_size`: number of examples; both at least 1, else `ValueError`.

    **Returns:**

    Indices of the schedule, 0 to `steps - 1`.

    ??? cite

        Of a continuous time: appendix I.1 of [Kingma et al. 2021](https://arxiv.org/abs/2107.00630).
    """
    check_positive(steps=steps, batch_size=batch_size)
    draw_key, order_key = jax.random.split(key)
    within = jax.random.uniform(draw_key, (batch_size,))
    place = jnp.arange(batch_size, dtype=within.dtype) + within
    t = jnp.minimum((place * (steps / batch_size)).astype(jnp.int32), steps - 1)
    return jax.random.permutation(order_key, t)


class LossSecondMoment(eqx.Module):
    """Importance sampling of steps, in proportion to the root mean square of their recent losses.

    ```python
    sampler = LossSecondMoment(schedule.steps)
    t, weight = sampler.sample(key, batch_size)  # the loss of an example: weight * loss at t
    sampler = sampler.update(t, metrics["losses"] / weight)
    ```

    Until every step has had `terms` losses, steps are drawn uniformly.

    ??? cite

        Equation 18 and section 3.3 of
        [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672).
    """

    losses: Float[Array, "steps terms"]
    counts: Int[Array, " steps"]

    def __init__(self, steps: int, terms: int = 10):
        """**Arguments:**

        - `steps`: of the schedule.
        - `terms`: how many of each step's latest losses are remembered.
        """
        check_positive(steps=steps, terms=terms)
        self.losses = jnp.zeros((steps, terms))
        self.counts = jnp.zeros(steps, jnp.int32)

    @property
    def probabilities(self) -> Float[Array, " steps"]:
        """Of each step; a thousandth of the whole is spread evenly, so that none is 0."""
        steps, terms = self.losses.shape
        uniform = jnp.full(steps, 1 / steps)
        root = jnp.sqrt(jnp.square(self.losses).mean(axis=1))
        total = root.sum()
        known = (self.counts >= terms).all() & (total > 0)
        mixed = 0.999 * root / jnp.where(known, total, 1.0) + 0.001 * uniform
        return jnp.where(known, mixed, uniform)

    def sample(
        self, key: PRNGKey, batch_size: int
    ) -> tuple[Int[Array, " batch_size"], Float[Array, " batch_size"]]:
        """Steps for a batch, and the weights that keep the mean loss what it is under uniform
        ones.

        **Arguments:**

        - `key`: of this training step.
        - `batch_size`: number of examples.

        **Returns:**

        Indices of the schedule, and `1 / (steps * probability)` of each.
        """
        probabilities = self.probabilities
        steps = probabilities.shape[0]
        t = jax.random.categorical(key, jnp.log(probabilities), shape=(batch_size,))
        return t.astype(jnp.int32), 1 / (steps * probabilities[t])

    def update(
        self, t: Int[Array, " batch_size"], losses: Float[Array, " batch_size"]
    ) -> "LossSecondMoment":
        """The sampler that has seen these losses too.

        **Arguments:**

        - `t`: the steps that `sample` gave.
        - `losses`: each example's, without its weight. Those that are not finite are left out.

        **Returns:**

        A new sampler; this one stays as it is.
        """

        def add(state: tuple[Array, Array], pair: tuple[Array, Array]) -> tuple:
            (history, counts), (t, loss) = state, pair
            finite = jnp.isfinite(loss)
            place = (t, counts[t] % history.shape[1])
            history = history.at[place].set(jnp.where(finite, loss, history[place]))
            return (history, counts.at[t].add(finite.astype(counts.dtype))), None

        state, _ = jax.lax.scan(add, (self.losses, self.counts), (t, losses))
        return eqx.tree_at(lambda s: (s.losses, s.counts), self, state)
