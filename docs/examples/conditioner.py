"""Conditioning of your own: attributes, each known or not, in place of the label."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import equidit as edt
from equidit import diffusion as dfn
from equidit.data import digits


class AttributeConditioner(eqx.Module):
    """`conditioner(t, attributes)`, where NaN is an attribute that is not known."""

    timestep: edt.TimestepEmbedder
    embed: edt.Linear
    mlp: edt.MLP

    def __init__(self, num_attributes, dim, *, key):
        timestep_key, embed_key, mlp_key = jax.random.split(key, 3)
        self.timestep = edt.TimestepEmbedder(dim, key=timestep_key)
        self.embed = edt.Linear(2 * num_attributes, dim, key=embed_key)
        self.mlp = edt.MLP(dim, dim, key=mlp_key)

    @property
    def null(self):
        return jnp.full(self.embed.weight.shape[1] // 2, jnp.nan)

    def __call__(self, t, attributes: Float[Array, " attributes"]) -> edt.Conditioning:
        known = ~jnp.isnan(attributes)
        x = jnp.concatenate([jnp.where(known, attributes, 0), known], dtype=self.embed.weight.dtype)
        timestep, embedding = self.timestep(t), self.mlp(self.embed(x)[None])[0]
        return edt.Conditioning(timestep + embedding, tokens=jnp.stack([timestep, embedding]))


def loss(network, example, key):
    image, attributes = example
    drop_key, key = jax.random.split(key)
    attributes = edt.drop_label(attributes, network.conditioner.null, 0.1, key=drop_key)
    return dfn.hybrid_loss(network, dfn.Schedule(dfn.linear_betas()), image, attributes, key=key)


def main():
    image = jnp.asarray(digits()[0].image[:64])
    ink = jnp.stack([image[..., :4].mean((1, 2, 3)), image[..., 4:].mean((1, 2, 3))], axis=1)
    conditioner = AttributeConditioner(2, 64, key=jax.random.key(0))
    network = edt.DiT(1, 2, 64, 4, 4, None, conditioner=conditioner, key=jax.random.key(1))
    optimizer = optax.adam(1e-3)
    state = edt.init_state(network, optimizer)
    state, metrics = edt.make_train_step(loss, optimizer)(state, (image, ink), jax.random.key(2))
    print(f"step {state.step}: loss {metrics['loss']:.3f}")
    guided = edt.guide(state.network, 2.0, state.network.conditioner.null)
    dark_left = jnp.asarray([0.5, jnp.nan])
    print(f"guided: {eqx.filter_jit(guided)(image[0], jnp.asarray(999), dark_left).shape}")


if __name__ == "__main__":
    main()
