"""Attention of your own: exact, but for a chunk of queries at a time, to save memory.

Rabe & Staats 2021, https://arxiv.org/abs/2112.05682, without their chunks of keys.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import equidit as edt
from equidit import diffusion as dfn
from equidit.data import digits


def chunked_attention(query, key, value, *, mask=None, chunk=128):
    """`jax.nn.dot_product_attention` of arrays of shape `(tokens, heads, head_dim)`, with
    `(heads, chunk, tokens)` weights in memory, forward and backward, rather than all of them.

    `mask` says which keys may be attended to, the same for every query: `(1, 1, tokens)`.
    """
    if mask is not None and mask.shape[-2] != 1:
        raise ValueError(f"mask has shape {mask.shape}: it must be the same for every query")

    @jax.checkpoint
    def attend(query):
        logits = jnp.einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
        logits = logits * query.shape[-1] ** -0.5
        if mask is not None:
            logits = jnp.where(mask, logits, -1e30)
        weights = jax.nn.softmax(logits).astype(value.dtype)
        return jnp.einsum("hqk,khd->qhd", weights, value)

    padded = jnp.pad(query, ((0, -len(query) % chunk), (0, 0), (0, 0)))
    chunks = padded.reshape(-1, chunk, *query.shape[1:])
    return jax.lax.map(attend, chunks).reshape(padded.shape)[: len(query)]


def loss(network, example, key):
    return dfn.hybrid_loss(network, dfn.Schedule(dfn.linear_betas()), *example, key=key)


def main():
    attention = partial(edt.Attention, attend=partial(chunked_attention, chunk=16))
    block = partial(edt.AdaLNZeroBlock, make_attention=attention)
    network = edt.DiT(1, 1, 64, 4, 4, num_classes=10, block=block, key=jax.random.key(0))
    batch = jax.tree.map(lambda a: jnp.asarray(a[:64]), digits()[0])
    output = eqx.filter_jit(network)(batch.image[0], jnp.asarray(999), batch.label[0])
    print(f"64 tokens, 16 at a time: {batch.image[0].shape} -> {output.shape}")
    optimizer = optax.adam(1e-3)
    state = edt.init_state(network, optimizer)
    state, metrics = edt.make_train_step(loss, optimizer)(state, batch, jax.random.key(1))
    print(f"step {state.step}: loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
