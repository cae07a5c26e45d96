"""What published weights are called, and how they become a network's: tables, used both ways."""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, TypeVar

import einops
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._base.texts import brief
from .._base.trees import named
from .files import Weights

Tree = TypeVar("Tree", bound=eqx.Module)


class Row(NamedTuple):
    """What one of our modules is called there, and the axes of its weight.

    **Fields:**

    - `names`: `*` is the same number on both sides, `#` counts the stacked blocks. Of several
        modules the arrays are joined along their first axis.
    - `weight`: an einops pattern from their weight's axes to ours, where these are others.
    - `sizes`: of the pattern's axes that ours are made of, the network's fields that tell them.
    """

    names: tuple[str, ...]
    weight: str | None = None
    sizes: Mapping[str, str] = {}

    def ours(self, theirs: np.ndarray, leaf: str) -> np.ndarray:
        """Their array with our axes."""
        pattern = self._pattern(leaf)
        return theirs if pattern is None else einops.rearrange(theirs, pattern)

    def theirs(
        self, ours: Array | np.ndarray, leaf: str, network: eqx.Module
    ) -> Array | np.ndarray:
        """Our array with their axes."""
        if (pattern := self._pattern(leaf)) is None:
            return ours
        sizes = {axis: getattr(network, field) for axis, field in self.sizes.items()}
        return einops.rearrange(ours, " -> ".join(reversed(pattern.split(" -> "))), **sizes)

    def _pattern(self, leaf: str) -> str | None:
        return self.weight if leaf.endswith(".weight") else None


# By our module, its name there: a row may be given as its names, or its name.
Table = Mapping[str, Row | tuple[str, ...] | str]

_LEAVES = {"table": "weight", "scale": "weight", "shift": "bias"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_STACK = "blocks."


def name_of(table: Table, leaf: str) -> str:
    """Their name of a leaf: in the first block, and the first of several that are joined."""
    return _keys(table, leaf, 1)[0][0]


def export(network: eqx.Module, table: Table) -> dict[str, Array]:
    """The network's arrays under the other names, in the other shapes."""
    found: dict[str, Array] = {}
    depth = _depth(network)
    for name, leaf in named(network, ".").items():
        leaf = _row(table, name).theirs(leaf, name, network)
        for i, keys in enumerate(_keys(table, name, depth)):
            layer = leaf[i] if name.startswith(_STACK) else leaf
            found |= zip(keys, jnp.split(layer, len(keys)), strict=True)
    return found


def fill(skeleton: Tree, table: Table, weights: Weights) -> Tree:
    """A network like `skeleton`, of shapes, with the arrays of `weights`: each used exactly once.

    `ValueError` that lists what is missing, unexpected and of another shape.
    """
    _compare(expected(skeleton, table), weights)
    depth = _depth(skeleton)

    def leaf_of(name: str, shape: tuple[int, ...]) -> Array:
        stacked, row = name.startswith(_STACK), _row(table, name)
        value = _empty(shape)
        for i, keys in enumerate(_keys(table, name, depth)):
            layer = np.concatenate([weights.tensors[key].read() for key in keys])
            layer = row.ours(layer, name)
            if stacked:
                value[i] = layer
            elif i == 0:
                value[:] = layer
            elif not np.array_equal(value, layer):
                raise ValueError(
                    f"{weights.source}: the blocks differ in {keys[0]} and its like. Here one "
                    "embedder serves all blocks, so this is another network; published DiT weights "
                    "have them all equal"
                )
        return jax.device_put(value)

    leaves = [leaf_of(name, leaf.shape) for name, leaf in named(skeleton, ".").items()]
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def expected(skeleton: eqx.Module, table: Table) -> dict[str, tuple[int, ...]]:
    """The shapes of what `export` gives, without making it: a file may claim many blocks."""
    found: dict[str, tuple[int, ...]] = {}
    depth = _depth(skeleton)
    for name, leaf in named(skeleton, ".").items():
        row, shape = _row(table, name), leaf.shape
        if row.weight is not None:
            reshape = partial(row.theirs, leaf=name, network=skeleton)
            shape = jax.eval_shape(reshape, leaf).shape
        first, *rest = shape[1:] if name.startswith(_STACK) else shape
        for keys in _keys(table, name, depth):
            found |= dict.fromkeys(keys, (first // len(keys), *rest))
    return found


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array so aligned that JAX takes it on a CPU as it is: no copy, half the memory."""
    size = math.prod(shape)
    buffer = np.empty(size + 16, np.float32)
    start = -buffer.ctypes.data % 64 // buffer.itemsize
    return buffer[start : start + size].reshape(shape)


def _depth(network: eqx.Module) -> int:
    return getattr(getattr(network, "blocks", None), "depth", 1)


def _row(table: Table, leaf: str) -> Row:
    row = table[_NUMBER.sub("*", leaf.rpartition(".")[0])]
    if isinstance(row, Row):
        return row
    return Row((row,) if isinstance(row, str) else row)


def _keys(table: Table, leaf: str, depth: int) -> list[list[str]]:
    """Their names of what a leaf holds: by block, to be stacked or all equal, and joined."""
    module, _, kind = leaf.rpartition(".")
    names = _row(table, leaf).names
    for number in _NUMBER.findall(module):
        names = [name.replace("*", number, 1) for name in names]
    layers = range(depth) if "#" in names[0] else range(1)
    kind = _LEAVES.get(kind, kind)
    return [[f"{name.replace('#', str(i))}.{kind}" for name in names] for i in layers]


def _compare(expected: dict[str, tuple[int, ...]], weights: Weights) -> None:
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
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
        raise ValueError("\n".join([f"{weights.source} holds another network:", *lines]))
