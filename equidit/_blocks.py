from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._common import check_positive
from ._layers import MLP, Attention, Linear, zeros
from ._ops import layer_norm, modulate
from ._types import Conditioning, Number


class AdaLNZeroBlock(eqx.Module):
    """Self-attention and MLP, each shifted, scaled and gated by the conditioning vector.

    The gates are zero at initialisation, so a new block is the identity.

    ??? cite

        Section 3.2, "adaLN-Zero block", of
        [Peebles & Xie 2022](https://arxiv.org/abs/2212.09748).
    """

    attention: Attention
    mlp: MLP
    modulation: Linear

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: Number = 4.0,
        *,
        attend: Callable[..., Array] = jax.nn.dot_product_attention,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `num_heads`: attention heads; must divide `dim`.
        - `mlp_ratio`: the MLP's hidden size as a multiple of `dim`.
        - `attend`: see [`equidit.Attention`][].
        - `key`: initialises the weights.
        """
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = Attention(dim, num_heads, attend=attend, key=attention_key)
        self.mlp = MLP(dim, int(dim * mlp_ratio), key=mlp_key)
        self.modulation = Linear(dim, 6 * dim, init=zeros, key=modulation_key)

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        modulation = self.modulation(jax.nn.silu(cond.vector))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6)
        attended = self.attention(modulate(layer_norm(tokens), shift_a, scale_a))
        tokens = tokens + gate_a[None] * attended
        return tokens + gate_m[None] * self.mlp(modulate(layer_norm(tokens), shift_m, scale_m))


_REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class Stack(eqx.Module):
    """A stack of equal blocks, itself a block: one compiled body, scanned over the depth.

    Blocks may be any modules. Their arrays are stacked along a new first axis; all else must be
    the same in every block.
    """

    blocks: Any
    depth: int = eqx.field(static=True)
    remat: str | None = eqx.field(static=True)

    def __init__(
        self,
        make_block: Callable[..., Any],
        depth: int,
        *,
        remat: str | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `make_block`: called as `make_block(key=key)`, once for every block.
        - `depth`: number of blocks, at least 1.
        - `remat`: what the backward pass computes again rather than remember: `None` nothing;
            `"dots"` all but the results of weight matrix products (half the memory at about the
            speed of `None`); `"full"` everything but each block's input.
        - `key`: split over the blocks.
        """
        check_positive(depth=depth)
        if remat is not None and remat not in _REMAT_POLICIES:
            raise ValueError(f"remat={remat!r} is unknown: choose None, {_names(_REMAT_POLICIES)}")
        self.blocks = eqx.filter_vmap(lambda k: make_block(key=k))(jax.random.split(key, depth))
        self.depth = depth
        self.remat = remat

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens dim"]:
        stacked, static = eqx.partition(self.blocks, eqx.is_array)

        def body(tokens: Array, arrays: Any) -> tuple[Array, None]:
            return eqx.combine(arrays, static)(tokens, cond), None

        if self.remat is not None:
            # The barriers against merging that prevent_cse adds are needless inside a scan.
            policy = _REMAT_POLICIES[self.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jax.lax.scan(body, tokens, stacked)[0]

    def unstack(self) -> list[Any]:
        """The blocks one by one, for a loop of your own:

        ```python
        hidden = []
        for block in stack.unstack():
            tokens = block(tokens, cond)
            hidden.append(tokens)
        ```
        """
        stacked, static = eqx.partition(self.blocks, eqx.is_array)
        take = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(self.depth)]
        return [eqx.combine(arrays, static) for arrays in take]


def _names(table: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in table)
