"""The paper's twelve configurations, and their size and cost without allocating a weight."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from ._blocks import AdaLNZeroBlock
from ._dit import DiT
from ._layers import FinalLayer
from ._ops import grid_of
from ._types import Number

_BLOCKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adaln-zero": (AdaLNZeroBlock, FinalLayer),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a DiT, as plain data.

    Fields are [`equidit.DiT`][]'s arguments; `block` names a block type together with the final
    layer that belongs to it.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    in_channels: int = 4
    num_classes: int | None = 1000
    mlp_ratio: Number = 4.0
    learn_sigma: bool = True
    block: str = "adaln-zero"
    remat: str | None = None

    def __post_init__(self):
        if self.block not in _BLOCKS:
            raise ValueError(f"block={self.block!r} is unknown: choose from {', '.join(_BLOCKS)}")


_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

CONFIGS: dict[str, Config] = {
    f"DiT-{size}/{patch_size}": Config(patch_size, hidden_size, depth, num_heads)
    for size, (hidden_size, depth, num_heads) in _SIZES.items()
    for patch_size in (8, 4, 2)
}
"""The paper's models, table 4 of appendix A: `"DiT-S/8"` to `"DiT-XL/2"`."""


def _resolve(config: str | Config) -> Config:
    if isinstance(config, Config):
        return config
    if config not in CONFIGS:
        raise ValueError(f"config {config!r} is unknown: choose from {', '.join(CONFIGS)}")
    return CONFIGS[config]


def build(name_or_config: str | Config, *, key: PRNGKeyArray, **overrides: Any) -> DiT:
    """A new [`equidit.DiT`][] with the paper's initialisation.

    **Arguments:**

    - `name_or_config`: a name in [`equidit.CONFIGS`][] such as `"DiT-S/2"`, or a
        [`equidit.Config`][].
    - `key`: initialises the weights.
    - `overrides`: fields of `Config` to change, e.g. `num_classes=10`.

    **Raises:**

    `ValueError` for an unknown name (it lists the known ones), `TypeError` for an unknown field.
    """
    config = _resolve(name_or_config)
    fields = [field.name for field in dataclasses.fields(Config)]
    if unknown := [name for name in overrides if name not in fields]:
        raise TypeError(f"Config has no field {unknown[0]!r}: its fields are {', '.join(fields)}")
    sizes = dataclasses.asdict(dataclasses.replace(config, **overrides))
    block, final = _BLOCKS[sizes.pop("block")]
    return DiT(**sizes, block=block, final=final, key=key)


def num_params(config: str | Config) -> int:
    """The number of trainable parameters. Nothing is allocated.

    **Arguments:**

    - `config`: a name in [`equidit.CONFIGS`][] or a [`equidit.Config`][].
    """
    network = eqx.filter_eval_shape(build, config, key=jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(eqx.filter(network, _is_shape)))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def num_macs(config: str | Config, height: int = 32, width: int = 32) -> int:
    """Multiply-adds of one forward pass of one example: what the paper prints as "Gflops".

    Counted are the matrix products: patch embedding, timestep MLP, attention's projections and its
    two products, MLPs, modulation and the final layer. Not counted are norms, softmax, activations,
    element-wise work and table look-ups. A FLOP count as hardware vendors state it is twice this.

    **Arguments:**

    - `config`: a name in [`equidit.CONFIGS`][] or a [`equidit.Config`][].
    - `height`, `width`: of the network's input; 32 for the paper's 256x256 images.

    ??? cite

        Tables 1 and 4 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """
    c = _resolve(config)
    rows, columns = grid_of(height, width, c.patch_size)
    n, d = rows * columns, c.hidden_size
    patch = c.patch_size**2 * c.in_channels
    attention = 4 * d * d * n + 2 * n * n * d
    mlp = 2 * d * int(d * c.mlp_ratio) * n
    block = attention + mlp + 6 * d * d
    final = 2 * d * d + d * patch * (2 if c.learn_sigma else 1) * n
    return patch * d * n + (256 * d + d * d) + c.depth * block + final
