"""The paper's configurations and block types; size and cost without allocating a weight."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._base.common import check_positive, is_parameter
from ._base.texts import check_choice, choose_from
from .nn import (
    AdaLNBlock,
    AdaLNZeroBlock,
    CrossAttentionBlock,
    DiT,
    FinalLayer,
    InContextBlock,
    PlainFinalLayer,
    TextConditioner,
    TextCrossAttentionBlock,
)
from .nn.counting import macs_by_scope
from .nn.stack import Remat
from .seams import Block, LastLayer, Network, Number, PRNGKey

BlockType = Literal["adaln-zero", "adaln", "cross-attention", "in-context", "text-cross-attention"]
"""The paper's four kinds of block, and one for prompts."""


class _Design(NamedTuple):
    """A block type, and what belongs to it."""

    block: Callable[..., Block]
    final: Callable[..., LastLayer] = FinalLayer
    append_cond: bool = False


_DESIGNS: dict[BlockType, _Design] = {
    "adaln-zero": _Design(AdaLNZeroBlock),
    "adaln": _Design(AdaLNBlock),
    "cross-attention": _Design(CrossAttentionBlock, PlainFinalLayer),
    "in-context": _Design(InContextBlock, PlainFinalLayer, append_cond=True),
    "text-cross-attention": _Design(TextCrossAttentionBlock),
}
# By the scope of a product: its part is the last of these that it is inside of.
_PARTS = {
    "patch_embed": "patch embedding",
    "conditioner": "conditioning",
    "Attention": "attention projections",
    "attend": "attention products",
    "MLP": "mlp",
    "modulation": "modulation",
    "final": "final",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a DiT, as plain data.

    **Fields:** [`equidit.DiT`][]'s arguments, and

    - `block`: `"adaln-zero"`, `"adaln"`, `"cross-attention"`, `"in-context"` (the paper's four) or
        `"text-cross-attention"`: a block type together with the final layer, and the place of the
        conditioning, that belong to it.
    - `text_dim`: size of a text encoder's states; makes the network take prompts
        ([`equidit.TextConditioner`][]) in place of labels, and needs `num_classes=None`.
    - `text_length`: of the longest prompt, in tokens.

    **Raises:**

    `ValueError` for an unknown block (it lists the known ones), and for text beside labels.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    in_channels: int = 4
    num_classes: int | None = 1000
    mlp_ratio: Number = 4.0
    learn_sigma: bool = True
    block: BlockType = "adaln-zero"
    text_dim: int | None = None
    text_length: int = 77
    remat: Remat | None = None

    def __post_init__(self):
        check_positive(
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            in_channels=self.in_channels,
            text_length=self.text_length,
        )
        if self.text_dim is not None and self.num_classes is not None:
            raise ValueError(
                f"text_dim={self.text_dim} and num_classes={self.num_classes} exclude each other: "
                "pass num_classes=None for prompts"
            )


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
    check_choice("config", config, CONFIGS)
    return CONFIGS[config]


def _shapes(config: str | Config) -> DiT:
    return eqx.filter_eval_shape(build, config, key=jax.random.key(0))


def build(name_or_config: str | Config, *, key: PRNGKey, **overrides: Any) -> DiT:
    """A new [`equidit.DiT`][] with the paper's initialisation.

    **Arguments:**

    - `name_or_config`: a name in [`equidit.CONFIGS`][] such as `"DiT-S/2"`, or a
        [`equidit.Config`][].
    - `key`: initialises the weights.
    - `overrides`: fields of `Config` to change, e.g. `num_classes=10`.

    **Returns:**

    The network, with float32 weights.

    **Raises:**

    `ValueError` for an unknown name (it lists the known ones), `TypeError` for an unknown field.
    """
    config = _resolve(name_or_config)
    fields = [field.name for field in dataclasses.fields(Config)]
    if unknown := [name for name in overrides if name not in fields]:
        raise TypeError(f"Config has no field {unknown[0]!r}: {choose_from(fields, unknown[0])}")
    sizes = dataclasses.asdict(dataclasses.replace(config, **overrides))
    design = _DESIGNS[sizes.pop("block")]
    text_dim, text_length = sizes.pop("text_dim"), sizes.pop("text_length")
    conditioner = None
    if text_dim is not None:
        key, text_key = jax.random.split(key)
        conditioner = TextConditioner(
            text_dim,
            sizes["hidden_size"],
            max_length=text_length,
            # Without modulation the timestep is seen among the tokens or not at all.
            timestep_token=design.final is PlainFinalLayer,
            key=text_key,
        )
    return DiT(
        **sizes,
        block=design.block,
        final=design.final,
        append_cond=design.append_cond,
        conditioner=conditioner,
        key=key,
    )


def num_params(config: str | Config | PyTree) -> int:
    """The number of trainable parameters. Nothing is allocated.

    **Arguments:**

    - `config`: a name in [`equidit.CONFIGS`][], a [`equidit.Config`][], or a network: any pytree,
        of arrays or of their shapes.

    **Returns:**

    The sum of the sizes of all floating-point arrays; of a guided network, its scale among them.

    **Raises:**

    `ValueError` for an unknown name, and for what has no floating-point arrays.
    """
    if isinstance(config, str | Config):
        config = _shapes(config)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(config) if is_parameter(leaf)]
    if not sizes:
        raise ValueError(
            f"config of type {type(config).__name__} has no floating-point arrays: pass a name, a "
            "Config or a network"
        )
    return sum(sizes)


def num_macs(
    config: str | Config | Network, height: int = 32, width: int = 32, cond: PyTree = None
) -> int:
    """Multiply-adds of one forward pass of one example: what the paper prints as "Gflops".

    What [`equidit.count_macs`][] finds in the network's program. A FLOP count as hardware vendors
    state it is twice this.

    **Arguments:**

    - `config`: a name in [`equidit.CONFIGS`][], a [`equidit.Config`][] or a [`equidit.DiT`][], of
        arrays or of their shapes, also under [`equidit.guide`][].
    - `height`, `width`: of the network's input; 32 for the paper's 256x256 images.
    - `cond`: what a network's own conditioner takes, as arrays or shapes; by default its `null`.

    **Returns:**

    The number of multiply-adds; of DiT-XL/2 on 32x32 latents 118.6 * 10**9.

    **Raises:**

    `ValueError` for an unknown name, for a height or width that the patch size does not divide, and
    for a network that does not say its `in_channels`.

    ??? cite

        Tables 1 and 4 of [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """
    return _macs(config, height, width, cond).total()


def _macs(
    config: str | Config | Network, height: int, width: int, cond: PyTree = None
) -> Counter[str]:
    """By the paths of scopes."""
    network = _shapes(config) if isinstance(config, str | Config) else config
    inner: Any = network
    while hasattr(inner, "network"):
        inner = inner.network
    if not hasattr(inner, "in_channels"):
        raise ValueError(
            f"{type(inner).__name__} has no in_channels: count its program by "
            "count_macs(network, x, t, cond)"
        )
    if cond is None:
        cond = getattr(getattr(inner, "conditioner", None), "null", None)
    x = jax.ShapeDtypeStruct((inner.in_channels, height, width), jnp.float32)
    return macs_by_scope(network, x, jax.ShapeDtypeStruct((), jnp.float32), cond)


def macs_by_part(config: str | Config, height: int = 32, width: int = 32) -> dict[str, int]:
    """Multiply-adds of one forward pass of one example, part by part.

    Counted are the matrix products. Not counted are norms, softmax, activations, element-wise work
    and table look-ups. [`equidit.count_macs`][] counts any function, from its program.

    **Arguments:**

    - `config`: a name in [`equidit.CONFIGS`][] or a [`equidit.Config`][].
    - `height`, `width`: of the network's input; 32 for the paper's 256x256 images.

    **Returns:**

    The counts of `"patch embedding"`, `"conditioning"` (timestep MLP and, with prompts, the text's
    maps), `"attention projections"`, `"attention products"` (queries with keys, weights with
    values), `"mlp"`, `"modulation"` (of the blocks) and `"final"`.

    **Raises:**

    `ValueError` for an unknown name, and for a height or width that the patch size does not divide.
    """
    parts = dict.fromkeys(_PARTS.values(), 0)
    for path, count in _macs(config, height, width).items():
        scopes = re.findall(r"\w+", path)
        *_, part = (part for scope, part in _PARTS.items() if scope in scopes)
        parts[part] += count
    return parts
