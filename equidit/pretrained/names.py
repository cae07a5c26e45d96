"""What published weights are called, and how they become a network's: tables, used both ways."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._base.texts import brief
from .files import Tensor, Weights

Tree = TypeVar("Tree")
# From our module to theirs: `*` is the same number on both sides, `#` counts the stacked blocks. Of
# several modules the arrays are joined along their first axis.
Table = Mapping[str, str | tuple[str, ...]]

OFFICIAL: Table = {
    "patch_embed": "x_embedder.proj",
    "conditioner.timestep.up": "t_embedder.mlp.0",
    "conditioner.timestep.down": "t_embedder.mlp.2",
    "conditioner.label": "y_embedder.embedding_table",
    "blocks.blocks.attention.qkv": "blocks.#.attn.qkv",
    "blocks.blocks.attention.out": "blocks.#.attn.proj",
    "blocks.blocks.mlp.up": "blocks.#.mlp.fc1",
    "blocks.blocks.mlp.down": "blocks.#.mlp.fc2",
    "blocks.blocks.modulation": "blocks.#.adaLN_modulation.1",
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}

_BLOCK = "transformer_blocks.#"
_EMBEDDER = f"{_BLOCK}.norm1.emb"
DIFFUSERS: Table = {
    "patch_embed": "pos_embed.proj",
    "conditioner.timestep.up": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "conditioner.timestep.down": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "conditioner.label": f"{_EMBEDDER}.class_embedder.embedding_table",
    "blocks.blocks.attention.qkv": tuple(f"{_BLOCK}.attn1.to_{x}" for x in "qkv"),
    "blocks.blocks.attention.out": f"{_BLOCK}.attn1.to_out.0",
    "blocks.blocks.mlp.up": f"{_BLOCK}.ff.net.0.proj",
    "blocks.blocks.mlp.down": f"{_BLOCK}.ff.net.2",
    "blocks.blocks.modulation": f"{_BLOCK}.norm1.linear",
    "final.modulation": "proj_out_1",
    "final.linear": "proj_out_2",
}


def _coder(ours: str, theirs: str, resample: str) -> dict[str, str | tuple[str, ...]]:
    middle, attention = f"{theirs}.mid_block", f"{theirs}.mid_block.attentions.0"
    resnets = {
        f"{ours}.stages.*.resnets.*": f"{theirs}.{resample}_blocks.*.resnets.*",
        f"{ours}.middle.first": f"{middle}.resnets.0",
        f"{ours}.middle.second": f"{middle}.resnets.1",
    }
    layers = ("norm1", "conv1", "norm2", "conv2")
    return {
        f"{ours}.conv_in": f"{theirs}.conv_in",
        **{f"{a}.{layer}": f"{b}.{layer}" for a, b in resnets.items() for layer in layers},
        **{f"{a}.shortcut": f"{b}.conv_shortcut" for a, b in resnets.items()},
        f"{ours}.stages.*.resample": f"{theirs}.{resample}_blocks.*.{resample}samplers.0.conv",
        f"{ours}.middle.norm": f"{attention}.group_norm",
        f"{ours}.middle.attention.qkv": tuple(f"{attention}.to_{x}" for x in "qkv"),
        f"{ours}.middle.attention.out": f"{attention}.to_out.0",
        f"{ours}.norm_out": f"{theirs}.conv_norm_out",
        f"{ours}.conv_out": f"{theirs}.conv_out",
    }


AUTOENCODER: Table = {
    **_coder("encoder", "encoder", "down"),
    **_coder("decoder", "decoder", "up"),
    "quant": "quant_conv",
    "post_quant": "post_quant_conv",
}

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(_ATTENTION)})(?=\.)")

_LEAVES = {"table": "weight", "scale": "weight", "shift": "bias"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_KERNEL = "patch_embed.weight"
_STACK = "blocks."


def name_of(table: Table, leaf: str) -> str:
    """Their name of a leaf: in the first block, and the first of several that are joined."""
    return _keys(table, leaf, 1)[0][0]


def export(network: Any, table: Table) -> dict[str, Array]:
    """The network's arrays under the other names, in the other shapes."""
    found: dict[str, Array] = {}
    depth = _depth(network)
    for name, leaf in _named(network).items():
        if name == _KERNEL:
            p = network.patch_size
            leaf = einops.rearrange(leaf, "o (p q c) -> o c p q", p=p, q=p)
        for i, keys in enumerate(_keys(table, name, depth)):
            layer = leaf[i] if name.startswith(_STACK) else leaf
            found |= zip(keys, jnp.split(layer, len(keys)), strict=True)
    return found


def fill(skeleton: Tree, table: Table, weights: Weights, source: str) -> Tree:
    """A network like `skeleton`, of shapes, with the arrays of `weights`: each used exactly once.

    `ValueError` that lists what is missing, unexpected and of another shape.
    """
    _compare(expected(skeleton, table), weights, source)
    depth = _depth(skeleton)

    def leaf_of(name: str, shape: tuple[int, ...]) -> Array:
        stacked = name.startswith(_STACK)
        value = _empty(shape)
        for i, keys in enumerate(_keys(table, name, depth)):
            layer = np.concatenate([weights[key].read() for key in keys])
            if name == _KERNEL:
                layer = einops.rearrange(layer, "o c p q -> o (p q c)")
            if stacked:
                value[i] = layer
            elif i == 0:
                value[:] = layer
            elif not np.array_equal(value, layer):
                raise ValueError(
                    f"{source}: the blocks differ in {keys[0]} and its like. Here one embedder "
                    "serves all blocks, so this is another network; published DiT weights have "
                    "them all equal"
                )
        return jax.device_put(value)

    leaves = [leaf_of(name, leaf.shape) for name, leaf in _named(skeleton).items()]
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def expected(skeleton: Any, table: Table) -> dict[str, tuple[int, ...]]:
    """The shapes of what `export` gives, without tracing it: a file may claim many blocks."""
    found: dict[str, tuple[int, ...]] = {}
    depth = _depth(skeleton)
    for name, leaf in _named(skeleton).items():
        first, *rest = leaf.shape[1:] if name.startswith(_STACK) else leaf.shape
        if name == _KERNEL:
            rest = [skeleton.in_channels, skeleton.patch_size, skeleton.patch_size]
        for keys in _keys(table, name, depth):
            found |= dict.fromkeys(keys, (first // len(keys), *rest))
    return found


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array so aligned that JAX takes it on a CPU as it is: no copy, half the memory."""
    size = math.prod(shape)
    buffer = np.empty(size + 16, np.float32)
    start = -buffer.ctypes.data % 64 // buffer.itemsize
    return buffer[start : start + size].reshape(shape)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _depth(network: Any) -> int:
    return network.blocks.depth if hasattr(network, "blocks") else 1


def _keys(table: Table, name: str, depth: int) -> list[list[str]]:
    """Their names of what a leaf holds: by block, to be stacked or all equal, and joined."""
    module, _, leaf = name.rpartition(".")
    theirs = table[_NUMBER.sub("*", module)]
    names = [theirs] if isinstance(theirs, str) else theirs
    for number in _NUMBER.findall(module):
        names = [n.replace("*", number, 1) for n in names]
    layers = range(depth) if "#" in names[0] else range(1)
    return [[f"{n.replace('#', str(i))}.{_LEAVES.get(leaf, leaf)}" for n in names] for i in layers]


def _compare(expected: dict[str, tuple[int, ...]], weights: Weights, source: str) -> None:
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{name} is {shapes[name]}, not {expected[name]}"
            for name in sorted(expected.keys() & shapes.keys())
            if shapes[name] != expected[name]
        ],
    }
    if any(problems.values()):
        lines = [
            f"  {kind} ({len(names)}): {brief(', '.join(names[:20]), 1500)}"
            f"{', ...' if names[20:] else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise ValueError("\n".join([f"{source} holds another network:", *lines]))


def modern_attention(weights: Weights, source: Any) -> Weights:
    """The attention's layers under their newer names, as matrices rather than 1x1 convolutions."""
    modern: Weights = {}
    for name, tensor in weights.items():
        new = _OLD_ATTENTION.sub(lambda match: _ATTENTION[match[1]], name)
        if new in modern:
            raise ValueError(f"{source} holds {new} twice, under an older and a newer name")
        if ".attentions.0." in new and tensor.shape[2:] == (1, 1):
            shape, read = tensor.shape[:2], tensor.read
            tensor = Tensor(shape, lambda read=read, shape=shape: read().reshape(shape))
        modern[new] = tensor
    return modern
