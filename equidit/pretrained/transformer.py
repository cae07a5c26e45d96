"""The DiT that several layouts of files hold: its sizes, its shapes, its two arithmetics."""

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import equinox as eqx
import jax

from .._base.texts import choose_from
from ..configs import Config
from ..nn.attention import Attention
from ..nn.blocks import AdaLNZeroBlock
from ..nn.conditioning import LabelConditioner
from ..nn.dit import DiT
from ..nn.ops import layer_norm, timestep_features
from ..nn.stack import Stack
from ..seams import PRNGKey
from .files import Weights
from .sizes import count, shapes_of
from .tables import Row, Table, fill, name_of

Arithmetic = Literal["official", "diffusers"]
Time = Literal["steps", "unit"]

# Each made once: networks are compared, and compiled, by the identity of their functions.
_FEATURES = partial(timestep_features, endpoint=True)
_NORM_MLP = partial(layer_norm, eps=1e-5)
_PUBLISHED = {"hidden_size": 1152, "depth": 28, "patch_size": 2, "num_classes": 1000}
_log = logging.getLogger(__name__)
_told: set[str] = set()


class Opened(NamedTuple):
    """A DiT in a file: its sizes are known, its weights not yet read.

    **Fields:**

    - `config`: the sizes that the weights have.
    - `sample_size`: height and width of the latents that it was made for, if that is known.
    - `time`: in what the network is told it: diffusion steps, or [0, 1].
    """

    weights: Weights
    config: Config
    sample_size: int | None
    time: Time = "steps"


def patches(name: str) -> Row:
    """The embedding of patches, which is a convolution there: its weight is a kernel."""
    return Row((name,), "o c p q -> o (p q c)", {"p": "patch_size", "q": "patch_size"})


def sizes_of(weights: Weights, table: Table, kind: str) -> Config:
    """What the arrays tell: all but the number of heads, which is left at 1."""
    label_name = name_of(table, "conditioner.label.table")
    mlp_name = name_of(table, "blocks.stacked.mlp.up.weight")
    final_name = name_of(table, "final.linear.bias")
    ranks = {name_of(table, "patch_embed.weight"): 4, label_name: 2, mlp_name: 2, final_name: 1}
    patch, labels, mlp, final = shapes_of(weights, kind, ranks)
    hidden_size, in_channels, patch_size, _ = patch
    for name, shape in ((label_name, labels), (mlp_name, mlp)):
        if shape[1] != hidden_size:
            raise ValueError(
                f"{weights.source}: {name} is {shape}, but the patches' weights {patch} make "
                f"tokens of {hidden_size}"
            )
    features = in_channels * patch_size**2
    if final[0] not in (features, 2 * features):
        raise ValueError(
            f"{weights.source}: {final_name} has {final[0]} entries, which is neither "
            f"{features}, the patches' size, nor twice that, with a learned variance"
        )
    ratio = mlp[0] / hidden_size
    if int(hidden_size * ratio) != mlp[0]:
        ratio = math.nextafter(ratio, math.inf)
    return Config(
        patch_size,
        hidden_size,
        depth=count(weights, mlp_name.partition("0")[0]),
        num_heads=1,
        in_channels=in_channels,
        num_classes=labels[0] - 1,
        mlp_ratio=ratio,
        learn_sigma=final[0] == 2 * features,
    )


def filled(weights: Weights, table: Table, config: Config, arithmetic: Arithmetic) -> DiT:
    """The network of these sizes with these weights, of which nothing may be left over."""
    try:
        like = skeleton(arithmetic, config)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from error
    network = fill(like, table, weights)
    if _PUBLISHED.items() <= dataclasses.asdict(config).items() and not _told:
        _told.add("licence")
        _log.warning(
            "the published DiT-XL/2 weights are under CC-BY-NC 4.0, for non-commercial use: "
            "https://github.com/facebookresearch/DiT/blob/main/LICENSE.txt"
        )
    return network


def skeleton(
    arithmetic: Arithmetic, config: Config, attention: Callable[..., Attention] = Attention
) -> DiT:
    """The network, with shapes in place of arrays."""
    theirs = arithmetic == "diffusers"

    def make(key: PRNGKey) -> DiT:
        assert config.num_classes is not None
        return DiT(
            config.in_channels,
            config.patch_size,
            config.hidden_size,
            config.depth,
            config.num_heads,
            None,
            mlp_ratio=config.mlp_ratio,
            learn_sigma=config.learn_sigma,
            block=partial(
                AdaLNZeroBlock, make_attention=attention, norm_mlp=_NORM_MLP if theirs else None
            ),
            conditioner=LabelConditioner(
                config.num_classes,
                config.hidden_size,
                features=_FEATURES if theirs else timestep_features,
                key=key,
            ),
            remat=config.remat,
            key=key,
        )

    return eqx.filter_eval_shape(make, jax.random.key(0))


def kind_of(network: DiT) -> tuple[Arithmetic, Config] | None:
    """A network's arithmetic and sizes, or `None` if it is no network that `skeleton` makes."""
    conditioner, stack = network.conditioner, network.blocks
    if not isinstance(conditioner, LabelConditioner) or not isinstance(stack, Stack):
        return None
    block = stack.stacked
    if not isinstance(block, AdaLNZeroBlock) or not isinstance(block.attention, Attention):
        return None
    functions = (conditioner.timestep.features, block.norm_mlp)
    arithmetic = "diffusers" if functions == (_FEATURES, _NORM_MLP) else "official"
    config = Config(
        network.patch_size,
        network.patch_embed.weight.shape[0],
        stack.depth,
        block.attention.num_heads,
        network.in_channels,
        conditioner.num_classes,
        learn_sigma=network.out_channels != network.in_channels,
        remat=stack.remat,
    )
    like = skeleton(arithmetic, config, partial(Attention, attend=block.attention.attend))
    # All that is not an array's shape is in the structure.
    if jax.tree.structure(network) != jax.tree.structure(like):
        return None
    pairs = zip(jax.tree.leaves(network), jax.tree.leaves(like), strict=True)
    return (arithmetic, config) if all(a.shape == b.shape for a, b in pairs) else None


def said(arithmetic: Arithmetic | None) -> Arithmetic:
    """`ValueError` unless it is said which arithmetic is meant."""
    if arithmetic is None:
        raise ValueError(
            f"arithmetic=None is unknown: {choose_from(('official', 'diffusers'), 'None')}. "
            "'official' is what the published weights were trained in: timestep frequencies "
            "10000 ** (-i / 128), norms' epsilon 1e-6. 'diffusers' is what its DiTPipeline "
            "computes of any weights: 10000 ** (-i / 127), and 1e-5 before the MLPs; it is for "
            "models trained in diffusers"
        )
    return arithmetic
