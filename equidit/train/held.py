"""Arrays that a loss holds, such as a teacher's: arguments of the training step's program."""

import inspect
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jaxtyping import PyTree

from ..seams import Loss
from .handover import check_alive


def held_by(loss: Loss) -> tuple[PyTree, PyTree]:
    """The arrays of a loss and, for `eqx.combine`, the rest of it.

    They are seen in a Module, in what a method is bound to and in what `functools.partial` binds.
    """
    return eqx.partition(_opened(loss), _is_held)


def check_held(held: PyTree, state: PyTree) -> None:
    """`ValueError` for arrays of the loss that are gone, or that go with `state`."""
    # At every step, as above; most losses hold nothing.
    arrays = [leaf for leaf in jax.tree.leaves(held) if not isinstance(leaf, Tracer)]
    if not arrays:
        return
    if any(leaf.is_deleted() for leaf in arrays):
        check_alive(held, "the loss")
    if not {*map(id, arrays)}.isdisjoint(map(id, jax.tree.leaves(state))):
        raise ValueError(
            "the loss and the state hold the same array, and a training step donates the state "
            "that it is given: give the loss a copy, jax.tree.map(jnp.copy, network)"
        )


class _Bound(eqx.Module):
    """A bound method or a `functools.partial` as a tree: JAX sees what is bound."""

    function: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*self.args, *args, **(self.keywords | keywords))


def _opened(tree: Any) -> Any:
    """`tree` with each bound method and `functools.partial` a tree itself."""
    is_bound = lambda node: inspect.ismethod(node) or isinstance(node, partial)  # noqa: E731

    def opened(node: Any) -> Any:
        if inspect.ismethod(node):
            return _Bound(node.__func__, (_opened(node.__self__),), {})
        if isinstance(node, partial):
            return _Bound(*map(_opened, (node.func, node.args, node.keywords)))
        return node

    return jax.tree.map(opened, tree, is_leaf=is_bound)


def _is_held(leaf: Any) -> bool:
    """Whether a leaf of the loss is worth an argument: one number is as good as a Python one."""
    return isinstance(leaf, jax.Array) and leaf.ndim > 0
