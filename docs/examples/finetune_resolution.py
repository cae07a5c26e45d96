"""Published weights at another resolution: only the input changes, positions are computed for it.

Patches beyond the grid of training are at positions that the network never saw. Training gets over
that; or `Resized` spreads the old range over the new grid, as PixArt-alpha does (arXiv 2310.00426).
"""

import tempfile

import equinox as eqx
import jax
import numpy as np
import optax

import equidit as edt
from equidit import diffusion as dfn


def positions(dim, grid, side):
    """`edt.sincos_2d(dim, grid)` at the positions of a grid of `side`x`side` patches."""
    frequency = np.logspace(0, -4, dim // 4, endpoint=False)
    angles = [np.outer(np.arange(count) * side / count, frequency) for count in grid]
    row, column = (np.hstack([np.sin(a), np.cos(a)]).astype(np.float32) for a in angles)
    return np.hstack([np.tile(column, (grid[0], 1)), np.repeat(row, grid[1], axis=0)])


class Resized(eqx.Module):
    """A DiT with its positions spread over larger inputs; `side`: patches that it was made for."""

    network: edt.DiT
    side: int = eqx.field(static=True)

    def __call__(self, x, t, cond):
        p = self.network.patch_size
        grid = (x.shape[1] // p, x.shape[2] // p)
        tokens, conditioning = self.network.embed(x, t, cond)
        shift = positions(tokens.shape[1], grid, self.side) - edt.sincos_2d(tokens.shape[1], grid)
        tokens = self.network.blocks(tokens + shift.astype(tokens.dtype), conditioning)
        return edt.unpatchify(self.network.final(tokens, conditioning), p, grid).astype(x.dtype)


def loss(network, example, key):
    return dfn.hybrid_loss(network, dfn.Schedule(dfn.linear_betas()), *example, key=key)


def main():
    with tempfile.TemporaryDirectory() as folder:  # Stands in for "facebook/DiT-XL-2-256".
        new = edt.DiT(4, 2, 64, 4, 4, num_classes=10, key=jax.random.key(0))
        edt.pretrained.save_diffusers_dit(new, folder, sample_size=8, allow_mismatch=True)
        size = edt.pretrained.describe(folder).sample_size or 32  # That of 256x256 images.
        network = edt.pretrained.load_diffusers_dit(folder, arithmetic="official")
    batch = (jax.random.normal(jax.random.key(2), (8, 4, 16, 12)), np.arange(8))
    step = edt.make_train_step(loss, optax.adam(1e-4))
    state = edt.init_state(Resized(network, size // 2), optax.adam(1e-4))  # Or `network` itself.
    for _ in range(5):
        state, metrics = step(state, batch, jax.random.key(3))
        print(f"step {state.step}: loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
