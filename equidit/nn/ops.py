"""Functions of images, tokens and positions that have no parameters."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._base.common import check_positive, upcast
from ..seams import Number


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image; `ValueError` where they do not fit."""
    check_positive(patch_size=patch_size)
    for name, side in (("height", height), ("width", width)):
        if side < 1 or side % patch_size:
            near = max(patch_size, side // patch_size * patch_size)
            raise ValueError(
                f"{name}={side} is not divisible by patch_size={patch_size}: crop or resize to a "
                f"multiple such as {near} or {near + patch_size}, or choose another patch size"
            )
    return height // patch_size, width // patch_size


def patchify(
    x: Float[Array, "channels height width"], patch_size: int
) -> Float[Array, "tokens features"]:
    """Cuts an image into square patches, row by row.

    **Arguments:**

    - `x`: one image or latent.
    - `patch_size`: side of a patch; must divide height and width, else `ValueError`.

    **Returns:**

    `(height / p) * (width / p)` tokens of `p * p * channels` features, in the order (row, column,
    channel). [`equidit.unpatchify`][] is the inverse.

    ??? cite

        Section 3.2, "Patchify", of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """
    grid_of(x.shape[1], x.shape[2], patch_size)
    return einops.rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(
    tokens: Float[Array, "tokens features"], patch_size: int, grid: tuple[int, int]
) -> Float[Array, "channels height width"]:
    """Puts patches back together: the inverse of [`equidit.patchify`][].

    **Arguments:**

    - `tokens`: patches of `patch_size**2 * channels` features.
    - `patch_size`: side of a patch.
    - `grid`: rows and columns of patches; their product is the number of tokens, else
        `ValueError`.

    **Returns:**

    An image of `grid[0] * patch_size` rows and `grid[1] * patch_size` columns.
    """
    count, features = tokens.shape
    if grid[0] * grid[1] != count:
        raise ValueError(
            f"grid={grid} has {grid[0] * grid[1]} patches, but there are {count} tokens"
        )
    if patch_size < 1 or features % patch_size**2:
        raise ValueError(
            f"tokens of {features} features do not hold whole patches of patch_size={patch_size}: "
            f"features must be a multiple of {patch_size**2}"
        )
    return einops.rearrange(
        tokens, "(h w) (p q c) -> c (h p) (w q)", h=grid[0], p=patch_size, q=patch_size
    )


def sincos_2d(dim: int, grid: tuple[int, int]) -> Float[Array, "tokens dim"]:
    """The fixed sine-cosine position table of a grid of patches.

    **Arguments:**

    - `dim`: the hidden size; a multiple of 4, else `ValueError`.
    - `grid`: rows and columns of patches.

    **Returns:**

    For every patch, row by row: sines then cosines of its column index (the first half), then of
    its row index, at `dim / 4` frequencies from 1 down towards 1/10000. Float32, computed in
    float64.

    ??? cite

        Section 3.2 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748); the frequencies are
        those of [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762).
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim} must be a positive multiple of 4: sine and cosine of two axes")
    rows, columns = grid
    frequency = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))

    def axis(size: int) -> Float[np.ndarray, "size half"]:
        angle = np.arange(size)[:, None] * frequency[None]
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)

    column = jnp.broadcast_to(jnp.asarray(axis(columns))[None], (rows, columns, dim // 2))
    row = jnp.broadcast_to(jnp.asarray(axis(rows))[:, None], (rows, columns, dim // 2))
    return jnp.concatenate([column, row], axis=-1).reshape(rows * columns, dim)


def timestep_features(
    t: Float[Array, ""] | Int[Array, ""], dim: int = 256, *, endpoint: bool = False
) -> Float[Array, " {dim}"]:
    """Sinusoidal features of a timestep: cosines first, then sines.

    **Arguments:**

    - `t`: the time in diffusion steps (0 to 999 for the paper's models); need not be whole.
    - `dim`: number of features; even, else `ValueError`.
    - `endpoint`: whether the slowest frequency is exactly 1/10000, as in diffusers' DiT: `f` below
        with `dim / 2 - 1` in place of `dim / 2`. `dim` is then at least 4.

    **Returns:**

    `cos(t f), sin(t f)` with `f[i] = 10000 ** (-i / (dim / 2))`, in float32 whatever the network
    computes in: bfloat16 cannot tell 997 from 999.

    ??? cite

        Section 3.2 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748); the features are
        those of [Ho et al. 2020](https://arxiv.org/abs/2006.11239).
    """
    if dim < 2 + 2 * endpoint or dim % 2:
        raise ValueError(
            f"dim={dim} must be an even number of at least {2 + 2 * endpoint}: "
            "half cosines, half sines"
        )
    # Published weights were trained with exponents rounded to float32, which at t = 999 moves a
    # feature by up to 6e-5.
    intervals = dim // 2 - endpoint
    exponent = np.float32(-np.log(10000.0)) * np.arange(dim // 2, dtype=np.float32) / intervals
    t = upcast(t)
    angle = t * jnp.asarray(np.exp(exponent.astype(np.float64)), t.dtype)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])


def modulate(
    x: Float[Array, "tokens dim"], shift: Float[Array, " dim"], scale: Float[Array, " dim"]
) -> Float[Array, "tokens dim"]:
    """`x * (1 + scale) + shift`, the same for every token: the "adaptive" of adaptive norms.

    **Arguments:**

    - `x`: normalised tokens.
    - `shift`, `scale`: one entry a feature; both 0 leave `x` as it is.

    **Returns:**

    The tokens, in the dtype that `x`, `shift` and `scale` share.

    ??? cite

        Section 3.2, "Adaptive layer norm", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """
    return x * (1 + scale[None]) + shift[None]


def layer_norm(x: Float[Array, "*tokens dim"], eps: Number = 1e-6) -> Float[Array, "*tokens dim"]:
    """Every token to mean 0 and variance 1, without learned scale or shift.

    **Arguments:**

    - `x`: tokens, or one; normalised along the last axis.
    - `eps`: added to the variance, in its unit.

    **Returns:**

    The normalised tokens. Statistics are taken in at least float32; the result has `x`'s dtype.

    ??? cite

        [Ba et al. 2016](https://arxiv.org/abs/1607.06450).
    """
    y = upcast(x)
    y = y - y.mean(axis=-1, keepdims=True)
    variance = jnp.square(y).mean(axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def rms_norm(x: Float[Array, "*tokens dim"], eps: Number = 1e-6) -> Float[Array, "*tokens dim"]:
    """Every token to a mean square of 1, without learned scale: `layer_norm` less the centring.

    **Arguments:**

    - `x`, `eps`: as for [`equidit.layer_norm`][]; `eps` is added to the mean square.

    **Returns:**

    The normalised tokens, in `x`'s dtype; the mean square is taken in at least float32.

    ??? cite

        [Zhang & Sennrich 2019](https://arxiv.org/abs/1910.07467).
    """
    y = upcast(x)
    square = jnp.square(y).mean(axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(square + eps)).astype(x.dtype)


def rotary_2d(
    x: Float[Array, "tokens heads head_dim"],
    positions: Float[Array, "tokens 2"],
    theta: Number = 10000.0,
) -> Float[Array, "tokens heads head_dim"]:
    """Rotary position embedding of a grid: turns queries or keys by angles of their position.

    The product of a query and a key so turned depends on the difference of their positions alone.

    **Arguments:**

    - `x`: queries or keys; `head_dim` must be a multiple of 4, else `ValueError`.
    - `positions`: row and column of every token. A token at (0, 0) is not turned.
    - `theta`: the slowest frequency is about 1/theta radians a patch.

    **Returns:**

    `x` with the pairs of its first half turned by the column and those of its second half by the
    row, as in [`equidit.sincos_2d`][]. Angles are computed in at least float32.

    ??? cite

        [Su et al. 2021](https://arxiv.org/abs/2104.09864); by axes,
        [Heo et al. 2024](https://arxiv.org/abs/2403.13298).
    """
    head_dim = x.shape[-1]
    if head_dim % 4:
        raise ValueError(
            f"head_dim={head_dim} must be a multiple of 4 for a rotary embedding of two axes: "
            "choose another hidden size or number of heads"
        )
    quarter = head_dim // 4
    positions = upcast(positions)
    frequency = jnp.asarray(float(theta) ** (-np.arange(quarter) / quarter), positions.dtype)

    def turn(half: Array, position: Float[Array, " tokens"]) -> Array:
        angle = (position[:, None] * frequency[None])[:, None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(upcast(half), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    first, second = jnp.split(x, 2, axis=-1)
    turned = [turn(first, positions[:, 1]), turn(second, positions[:, 0])]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
