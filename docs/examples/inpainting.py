"""A sampling step of one's own: inpainting, by keeping the known part of the picture known.

After every step the known region is replaced by the clean picture noised to the same level (Lugmayr
et al. 2022, "RePaint", equation 8, arXiv 2201.09865), so that the network fills in the rest to fit.
"""

from functools import partial

import jax
import jax.numpy as jnp

import equidit as edt
from equidit import diffusion as dfn


def inpainting_step(step, schedule, known, mask):
    """`step`, any step of the library, with the pixels where `mask` is `True` kept from `known`.

    To be driven by `dfn.sample` like the step it is made of.
    """

    def inpaint(x, t, cond, *, key):
        step_key, noise_key = jax.random.split(key)
        x = step(x, t, cond, key=step_key)
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        # After step t the example is at the level of t - 1; after step 0 it is clean.
        noised = dfn.q_sample(schedule, known, jnp.maximum(t - 1, 0), noise)
        return jnp.where(mask, jnp.where(t == 0, known, noised), x)

    return inpaint


def main() -> jax.Array:
    """Fills in the right half of a picture, with a network that was never trained."""
    network = edt.DiT(1, 2, 32, 2, 4, num_classes=10, key=jax.random.key(0))
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 50))
    known = jnp.linspace(-1, 1, 64).reshape(1, 8, 8)
    mask = jnp.broadcast_to(jnp.arange(8) < 4, known.shape)

    @jax.jit
    def draw(network, key):
        noise_key, key = jax.random.split(key)
        step = partial(dfn.ddpm_step, edt.guide(network, 2.0, null=10), schedule, clip=True)
        step = inpainting_step(step, schedule, known, mask)
        noise = jax.random.normal(noise_key, known.shape)
        return dfn.sample(step, schedule, noise, jnp.asarray(3), key=key)

    picture = draw(network, jax.random.key(1))
    print(f"known half kept to {jnp.abs(jnp.where(mask, picture - known, 0)).max():.1e}")
    return picture


if __name__ == "__main__":
    main()
