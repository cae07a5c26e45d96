"""Training parts of published weights, the others frozen: here the modulation and the labels.

A mask over the network's leaves, by their names, for optax. `optax.masked` alone would not do: it
hands the gradients of what it leaves out on as they are, and they would be added to the weights.
Frozen leaves have no moments, so that little memory is needed beside the weights.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax

import equidit as edt
from equidit import diffusion as dfn

PARTS = ("modulation", "conditioner.label")


def train_only(optimizer, parts):
    """`optimizer` for the leaves whose names have one of `parts`, and no change for the others."""

    def label(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return "trained" if any(part in name for part in parts) else "frozen"

    def labels(network):
        found = jax.tree_util.tree_map_with_path(label, network)
        if "trained" not in jax.tree.leaves(found):
            raise ValueError(f"parts={parts}: no leaf of the network has such a name")
        return found

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def loss(network, example, key):
    return dfn.hybrid_loss(network, dfn.Schedule(dfn.linear_betas()), *example, key=key)


def main():
    with tempfile.TemporaryDirectory() as folder:  # Stands in for "facebook/DiT-XL-2-256".
        new = edt.DiT(4, 2, 64, 4, 4, num_classes=10, key=jax.random.key(0))
        new = jax.tree.map(lambda leaf: leaf + 0.02, new)  # A new one's gates are all zero.
        edt.pretrained.save_diffusers_dit(new, folder, allow_mismatch=True)
        network = edt.pretrained.load_diffusers_dit(folder, arithmetic="official")
    before = jax.tree.map(jnp.copy, network)
    optimizer = train_only(optax.adam(1e-3), PARTS)
    step = edt.make_train_step(loss, optimizer)
    state = edt.init_state(network, optimizer)
    batch = (jax.random.normal(jax.random.key(2), (16, 4, 8, 8)), jnp.arange(16) % 10)
    for _ in range(5):
        state, metrics = step(state, batch, jax.random.key(3))
        print(f"step {state.step}: loss {metrics['loss']:.3f}")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, state.network)
    for path, equal in jax.tree_util.tree_leaves_with_path(same):
        print("frozen " if equal else "trained", jax.tree_util.keystr(path))


if __name__ == "__main__":
    main()
