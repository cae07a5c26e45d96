"""The leaves of trees: which are arrays, and what they are called."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def former_name(name: str) -> str:
    """An array's name in checkpoints of before and in fingerprints: a stack's lay in `blocks`."""
    return "/".join("blocks" if part == "stacked" else part for part in name.split("/"))


def named(tree: PyTree, separator: str = "/") -> dict[str, Any]:
    """The arrays of a tree by their paths, e.g. `"ema/blocks/0/weight"`, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, is_array))
    found = {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves
    }
    if len(found) < len(leaves):
        raise ValueError(
            f"two arrays of the tree have the same path: rename a key with a {separator!r} in it"
        )
    return found
