"""A block of your own: attention and MLP side by side, as in ViT-22B, with adaLN-Zero's gate.

Section 2 of Dehghani et al. 2023, https://arxiv.org/abs/2302.05442.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import equidit as edt
from equidit import diffusion as dfn
from equidit.data import digits


class ParallelBlock(eqx.Module):
    """`tokens + gate * (attention(x) + mlp(x))`, where `x` is one modulated norm of the tokens."""

    attention: edt.Attention
    mlp: edt.MLP
    modulation: edt.Linear

    def __init__(self, dim, num_heads, mlp_ratio=4.0, *, key):
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = edt.Attention(dim, num_heads, qk_norm=edt.LayerNorm, key=attention_key)
        self.mlp = edt.MLP(dim, int(dim * mlp_ratio), key=mlp_key)
        zeros = jax.nn.initializers.zeros
        self.modulation = edt.Linear(dim, 3 * dim, init=zeros, key=modulation_key)

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: edt.Conditioning
    ) -> Float[Array, "tokens dim"]:
        shift, scale, gate = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 3)
        x = edt.modulate(edt.layer_norm(tokens), shift, scale)
        return tokens + gate[None] * (self.attention(x) + self.mlp(x))


def loss(network, example, key):
    return dfn.hybrid_loss(network, dfn.Schedule(dfn.linear_betas()), *example, key=key)


def main():
    batch = jax.tree.map(lambda a: jnp.asarray(a[:64]), digits()[0])
    network = edt.DiT(1, 2, 64, 4, 4, num_classes=10, block=ParallelBlock, key=jax.random.key(0))
    output = eqx.filter_jit(network)(batch.image[0], jnp.asarray(999), batch.label[0])
    print(f"one image {batch.image[0].shape} -> its noise and variance {output.shape}")
    optimizer = optax.adam(1e-3)
    step = edt.make_train_step(loss, optimizer)
    state = edt.init_state(network, optimizer)
    for _ in range(20):
        state, metrics = step(state, batch, jax.random.key(1))
        if state.step in (1, 20):
            print(f"step {state.step}: loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
