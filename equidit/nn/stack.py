"""Blocks of one kind as one block, scanned."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, SupportsIndex, TypeVar, overload

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._base.common import Module, check_module, check_positive
from .._base.parts import Part, whole
from ..seams import Block, Conditioning, PRNGKey

Remat = Literal["none", "dots", "full"]
BlockT = TypeVar("BlockT", bound=Block)

# Cheaper to do again than to remember; gathered parameters would be remembered through these.
_FREE = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose")


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    # A gather has a derivative of its own, and so appears as the call that brings it along.
    call = params.get("call_jaxpr")
    gathers = call is not None and any(e.primitive.name == "all_gather" for e in call.eqns)
    return not gathers and primitive.name not in _FREE


_REMAT_POLICIES: dict[Remat, Callable[..., Any]] = {
    "none": _all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(Module, Generic[BlockT]):
    """A stack of equal blocks, itself a block: one compiled body, scanned over the depth.

    Blocks may be any modules. `stacked` is one of them with the arrays of all, stacked along a new
    first axis; all else must be the same in every block. A block that changes the tokens' shape or
    dtype is an error that names its class. `len(stack)`, `stack[0]`, `stack[-1]`, `stack[2:5]` and
    `for block in stack` are as for a list of the blocks, whose arrays are copied out of the stack
    when they are asked for.
    """

    stacked: BlockT
    depth: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    # Parameters that the devices share are gathered here, a block at a time: see `_base/parts.py`.
    scans_layers: ClassVar[bool] = True

    def __init__(
        self,
        make_block: Callable[..., BlockT],
        depth: int,
        *,
        remat: Remat | None = "none",
        key: PRNGKey,
    ):
        """**Arguments:**

        - `make_block`: called as `make_block(key=key)`, once for every block.
        - `depth`: number of blocks, at least 1.
        - `remat`: what the backward pass computes again rather than remember: `"none"` nothing, as
            does `None`; `"dots"` all but the results of weight matrix products (half the memory at
            about the speed of `"none"`); `"full"` everything but each block's input.
        - `key`: split over the blocks.
        """
        check_positive(depth=depth)

        def make(key: PRNGKey) -> BlockT:
            block = make_block(key=key)
            check_module("what make_block returns", block)
            return block

        self.stacked = eqx.filter_vmap(make)(jax.random.split(key, depth))
        self.depth = depth
        self.remat = "none" if remat is None else remat

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `tokens`, `cond`: as for one [`equidit.Block`][]; every block gets the same `cond`.

        **Returns:**

        The tokens after the last block.
        """
        stacked, static = eqx.partition(self.stacked, eqx.is_array)
        for leaf in jax.tree.leaves(stacked):
            if leaf.shape[:1] != (self.depth,):
                raise ValueError(_misshapen(stacked, self.depth))

        def body(tokens: Array, arrays: Any) -> tuple[Array, None]:
            block = whole(eqx.combine(arrays, static))
            try:
                out = block(tokens, cond)
            except Exception as error:
                error.add_note(_where(block, tokens, error))
                raise
            return _checked(block, out, tokens), None

        # Parameters that are gathered for one block are let go after it, even without remat.
        if self.remat != "none" or _holds_parts(self.stacked):
            # The barriers against merging that prevent_cse adds are needless inside a scan.
            policy = _REMAT_POLICIES[self.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jax.lax.scan(body, tokens, stacked, length=self.depth)[0]

    @property
    def blocks(self) -> BlockT:
        """`stacked`, by its former name."""
        return self.stacked

    def unstack(self) -> list[BlockT]:
        """The blocks one by one, for a loop of your own.

        **Returns:**

        As many blocks as the stack is deep, with arrays of their own. So the hidden states after
        every block of a [`equidit.DiT`][], for probing or for losses on them, are:

        ```python
        tokens, conditioning = network.embed(x, t, cond)
        hidden = []
        for block in network.blocks:
            tokens = block(tokens, conditioning)
            hidden.append(tokens)
        ```
        """
        return self[:]

    def __len__(self) -> int:
        return self.depth

    def __iter__(self) -> Iterator[BlockT]:
        return iter(self.unstack())

    @overload
    def __getitem__(self, index: SupportsIndex) -> BlockT: ...

    @overload
    def __getitem__(self, index: slice) -> list[BlockT]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> BlockT | list[BlockT]:
        """One block, from the end if `index` is negative, or the list of those in a slice."""
        if isinstance(index, slice):
            return self._blocks(range(self.depth)[index])
        try:
            place = range(self.depth)[index]
        except IndexError:
            raise IndexError(
                f"block {index} of a stack of depth={self.depth}: choose from 0 to "
                f"{self.depth - 1}, or from -1 to {-self.depth}, counted from the end"
            ) from None
        return self._blocks([place])[0]

    def _blocks(self, places: Sequence[int]) -> list[BlockT]:
        stacked, static = eqx.partition(self.stacked, eqx.is_array)
        at = lambda place: jax.tree.map(lambda a: a[place], stacked)  # noqa: E731
        return [whole(eqx.combine(at(place), static)) for place in places]


def _holds_parts(tree: Any) -> bool:
    is_part = lambda node: isinstance(node, Part)  # noqa: E731
    return any(map(is_part, jax.tree.leaves(tree, is_leaf=is_part)))


def _where(block: Any, tokens: Array, error: Exception) -> str:
    """A note to the error of a block; all of a stack run as one program, so none has a number."""
    note = f"This was in a {type(block).__name__}, called with tokens of shape {tokens.shape}."
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(Path(file).parts[-3:-1] == ("equinox", "nn") for file in files):
        note += (
            " It calls a layer of equinox.nn, which takes one token: map it over all of them, "
            "jax.vmap(layer)(tokens)."
        )
    return note


def _misshapen(stacked: Any, depth: int) -> str:
    paths = jax.tree_util.tree_leaves_with_path(stacked)
    path, leaf = next(pair for pair in paths if pair[1].shape[:1] != (depth,))
    return (
        f"stacked{jax.tree_util.keystr(path)} has the shape {leaf.shape}, but a stack's arrays "
        f"have a first axis of depth={depth}: put one of the old one's shape in its place"
    )


def _checked(block: Any, out: Any, tokens: Array) -> Array:
    if not eqx.is_array(out) or (out.shape, out.dtype) != (tokens.shape, tokens.dtype):
        found = f"{out.dtype}{list(out.shape)}" if eqx.is_array(out) else f"a {type(out).__name__}"
        raise ValueError(
            f"a block must keep the tokens' shape and dtype, {tokens.dtype}{list(tokens.shape)}, "
            f"but {type(block).__name__} returned {found}"
        )
    return out
