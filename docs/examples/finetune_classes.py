"""Published weights for classes of your own: a new table of labels, everything else kept.

The null label's row is kept too, for guidance, and the new classes start next to it: at first each
draws what the network draws without a label.
"""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import equidit as edt
from equidit import diffusion as dfn


def with_classes(network, num_classes, *, key):
    """`network` with `num_classes` labels in place of its own; the null label is the last again."""
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    null = network.conditioner.label.table[-1:]
    new = null + 0.02 * jax.random.normal(key, (num_classes, null.shape[1]), null.dtype)
    table = jnp.concatenate([new, null])
    return eqx.tree_at(lambda network: network.conditioner.label.table, network, table)


def loss(network, example, key):
    latent, label = example
    drop_key, key = jax.random.split(key)
    label = edt.drop_label(label, network.conditioner.null, 0.1, key=drop_key)
    return dfn.hybrid_loss(network, dfn.Schedule(dfn.linear_betas()), latent, label, key=key)


def published(folder):
    """Stands in for published weights, such as those of "facebook/DiT-XL-2-256"."""
    network = edt.DiT(4, 2, 64, 4, 4, num_classes=1000, key=jax.random.key(0))
    edt.pretrained.save_diffusers_dit(network, folder, allow_mismatch=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        published(folder)
        network = edt.pretrained.load_diffusers_dit(folder, arithmetic="official")
    print(f"loaded: {network.conditioner.null} classes")
    network = with_classes(network, 3, key=jax.random.key(1))
    latents = jax.random.normal(jax.random.key(2), (16, 4, 8, 8))
    labels = jnp.arange(16) % network.conditioner.null
    optimizer = optax.adamw(1e-4, weight_decay=0)
    step = edt.make_train_step(loss, optimizer)
    state = edt.init_state(network, optimizer)
    for _ in range(5):
        state, metrics = step(state, (latents, labels), jax.random.key(3))
        print(f"step {state.step}: loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
