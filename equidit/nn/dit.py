"""The Diffusion Transformer."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._base.common import Module, check_channels, check_module, check_positive
from ..seams import Block, Conditioner, Conditioning, LastLayer, Number, PRNGKey
from .blocks import AdaLNZeroBlock, tokens_of
from .conditioning import LabelConditioner, TimestepConditioner
from .layers import FinalLayer, Linear, parameter
from .ops import grid_of, patchify, sincos_2d, unpatchify
from .stack import Remat, Stack


class DiT(Module):
    """A Diffusion Transformer: a [`equidit.Network`][] over patches of an image or latent.

    In profiles and compiled programs its parts are named by `jax.named_scope`: `patch_embed`,
    `conditioner` and `final`, and inside every part the classes of its layers.

    ??? cite

        [Scalable Diffusion Models with Transformers](https://arxiv.org/abs/2212.09748)

        ```bibtex
        @inproceedings{peebles2023dit,
          title={Scalable Diffusion Models with Transformers},
          author={Peebles, William and Xie, Saining},
          booktitle={ICCV},
          year={2023},
        }
        ```
    """

    patch_embed: Linear
    conditioner: Any  # a Conditioner; what else it has, such as `null`, its class says
    blocks: Stack[Any]
    final: LastLayer
    in_channels: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)
    append_cond: bool = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int | None,
        *,
        mlp_ratio: Number = 4.0,
        learn_sigma: bool = True,
        block: Callable[..., Block] = AdaLNZeroBlock,
        final: Callable[..., LastLayer] = FinalLayer,
        append_cond: bool = False,
        conditioner: Conditioner | None = None,
        remat: Remat | None = "none",
        key: PRNGKey,
    ):
        """**Arguments:**

        - `in_channels`: channels of the input; 4 for Stable Diffusion's latents.
        - `patch_size`: side of a patch, the paper's p.
        - `hidden_size`: size of a token, a multiple of 4 and of `num_heads`.
        - `depth`: number of blocks.
        - `num_heads`: attention heads of a block.
        - `num_classes`: number of labels; label `num_classes` is the null label. `None` makes an
            unconditional network, called as `network(x, t, None)`.
        - `mlp_ratio`: the MLPs' hidden size as a multiple of `hidden_size`.
        - `learn_sigma`: whether the output has a second half, for the variance.
        - `block`: a class or function called as `block(hidden_size, num_heads, mlp_ratio, key=key)`
            that makes a [`equidit.Block`][].
        - `final`: likewise `final(hidden_size, patch_size, out_channels, key=key)`.
        - `append_cond`: whether the conditioning's tokens are appended to the image's for the
            blocks. `block`, `final` and `append_cond` belong together: see [`equidit.Config`][].
        - `conditioner`: an [`equidit.seams.Conditioner`][] of vectors of `hidden_size`, by default
            timestep + label. With it `num_classes` must be `None`.
        - `remat`: see [`equidit.Stack`][].
        - `key`: initialises the weights.

        **Raises:**

        `ValueError` for sizes below 1 or that do not divide one another, for an unknown `remat`,
        and for a conditioner beside `num_classes`.
        """
        check_positive(in_channels=in_channels, patch_size=patch_size, hidden_size=hidden_size)
        if hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of 4")
        if conditioner is not None and num_classes is not None:
            raise ValueError(
                f"num_classes={num_classes} has no meaning beside a conditioner: "
                "pass num_classes=None"
            )
        patch_key, cond_key, blocks_key, final_key = jax.random.split(key, 4)
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.patch_size = patch_size
        self.append_cond = append_cond
        self.patch_embed = Linear(patch_size**2 * in_channels, hidden_size, key=patch_key)
        if conditioner is not None:
            check_module("conditioner", conditioner)
            self.conditioner = conditioner
        elif num_classes is None:
            self.conditioner = TimestepConditioner(hidden_size, key=cond_key)
        else:
            self.conditioner = LabelConditioner(num_classes, hidden_size, key=cond_key)
        make_block = partial(block, hidden_size, num_heads, mlp_ratio)
        self.blocks = Stack(make_block, depth, remat=remat, key=blocks_key)
        self.final = final(hidden_size, patch_size, self.out_channels, key=final_key)

    @property
    def num_classes(self) -> int | None:
        """The number of classes, which is the null label as well; `None` without labels."""
        return getattr(self.conditioner, "num_classes", None)

    def __call__(
        self,
        x: Float[Array, "channels height width"],
        t: Float[Array, ""] | Int[Array, ""],
        cond: PyTree,
    ) -> Float[Array, "out height width"]:
        """**Arguments:**

        - `x`: one noisy image or latent. Any height and width that the patch size divides, square
            or not.
        - `t`: its time, in units of diffusion steps (0 to 999).
        - `cond`: what the conditioner takes: by default an integer label as an array, where
            `num_classes` is the null label.

        **Returns:**

        The predicted noise and, with `learn_sigma`, `channels` more for the variance. The dtype is
        `x`'s; inside, the network computes in its parameters' dtype.

        **Raises:**

        `ValueError` for other channels than the network's, for a height or width that the patch
        size does not divide, and for a label outside the table whose value is known (under
        `jax.jit` it gives NaN instead).
        """
        tokens, conditioning = self.embed(x, t, cond)
        grid = grid_of(x.shape[1], x.shape[2], self.patch_size)
        tokens = self.blocks(tokens, conditioning)[: grid[0] * grid[1]]
        with jax.named_scope("final"):
            patches = self.final(tokens, conditioning)
        return unpatchify(patches, self.patch_size, grid).astype(x.dtype)

    def embed(
        self,
        x: Float[Array, "channels height width"],
        t: Float[Array, ""] | Int[Array, ""],
        cond: PyTree,
    ) -> tuple[Float[Array, "tokens dim"], Conditioning]:
        """What goes into the first block: the tokens, the image's first, and the conditioning.

        **Arguments:** those of the network.

        **Returns:**

        The tokens and the [`equidit.Conditioning`][] for the blocks.
        """
        wanted = f"the network has in_channels={self.in_channels}"
        check_channels("x", x, self.in_channels, wanted)
        grid = grid_of(x.shape[1], x.shape[2], self.patch_size)
        dtype = parameter(self.patch_embed, "weight", "out features").dtype
        with jax.named_scope("patch_embed"):
            tokens = self.patch_embed(patchify(x, self.patch_size).astype(dtype))
            tokens = tokens + sincos_2d(tokens.shape[1], grid).astype(dtype)
        with jax.named_scope("conditioner"):
            conditioning = self.conditioner(t, cond)
        if conditioning.vector.shape[0] != tokens.shape[1]:
            raise ValueError(
                f"the conditioner's vector has {conditioning.vector.shape[0]} entries, but "
                f"hidden_size={tokens.shape[1]}"
            )
        rows, columns = jnp.meshgrid(*map(jnp.arange, grid), indexing="ij")
        positions = jnp.stack([rows.ravel(), columns.ravel()], axis=1).astype(jnp.float32)
        if self.append_cond:
            appended = tokens_of(conditioning, reader="DiT with append_cond=True").astype(dtype)
            tokens = jnp.concatenate([tokens, appended])
            positions = jnp.pad(positions, ((0, appended.shape[0]), (0, 0)))
            mask = conditioning.mask
            if mask is not None:
                mask = jnp.pad(mask, (grid[0] * grid[1], 0), constant_values=True)
            conditioning = dataclasses.replace(conditioning, tokens=None, mask=mask)
        if conditioning.positions is None:
            conditioning = dataclasses.replace(conditioning, positions=positions)
        return tokens, conditioning
