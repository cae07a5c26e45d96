"""Multi-head attention."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._base.common import Module, check_positive
from ..seams import Attend, PRNGKey, Rotary, TokenMap
from .layers import Initializer, Linear, affine, weight_and_bias, xavier_uniform


class Attention(Module):
    """Multi-head attention with one fused projection for queries, keys and values.

    ??? cite

        Section 3.2 of [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762).
    """

    qkv: Linear
    out: Linear
    q_norm: TokenMap | None
    k_norm: TokenMap | None
    num_heads: int = eqx.field(static=True)
    attend: Attend = eqx.field(static=True)
    rotary: Rotary | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attend: Attend = jax.nn.dot_product_attention,
        qk_norm: Callable[[int], TokenMap] | None = None,
        rotary: Rotary | None = None,
        out_init: Initializer = xavier_uniform,
        key: PRNGKey,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `num_heads`: must divide `dim`, else `ValueError`.
        - `attend`: `attend(query, key, value, mask=mask)` with arrays of shape
            `(tokens, heads, head_dim)` and a mask of shape `(1, 1, tokens)` or `None`. Any function
            with the signature of `jax.nn.dot_product_attention` will do.
        - `qk_norm`: called as `qk_norm(head_dim)`, e.g. [`equidit.RMSNorm`][]: makes a norm of
            every head's queries and another of its keys, which keeps the logits from growing
            ([Dehghani et al. 2023](https://arxiv.org/abs/2302.05442), section 2). `None` is none.
        - `rotary`: called as `rotary(x, positions)` on queries and keys of self-attention, e.g.
            [`equidit.rotary_2d`][]. `None` is none.
        - `out_init`: initialiser of the output projection.
        - `key`: initialises the weights.
        """
        check_positive(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            divisors = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
            raise ValueError(
                f"dim={dim} is not divisible by num_heads={num_heads}: "
                f"choose one of {divisors} heads, or another size"
            )
        qkv_key, out_key = jax.random.split(key)
        self.qkv = Linear(dim, 3 * dim, key=qkv_key)
        self.out = Linear(dim, dim, init=out_init, key=out_key)
        self.q_norm, self.k_norm = (
            None if qk_norm is None else qk_norm(dim // num_heads) for _ in range(2)
        )
        self.num_heads = num_heads
        self.attend = attend
        self.rotary = rotary

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        context: Float[Array, "cond dim"] | None = None,
        mask: Bool[Array, " keys"] | None = None,
        *,
        positions: Float[Array, "tokens 2"] | None = None,
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: the tokens that ask.
        - `context`: the tokens that are attended to; `None` is `x` itself.
        - `mask`: which of those may be attended to (`True`); `None` is all.
        - `positions`: row and column of every token of `x`; read if there is a `rotary`, and then
            needed for self-attention (`ValueError`).

        **Returns:**

        One output a token of `x`.
        """
        if context is None:
            q, k, v = map(self._heads, jnp.split(self.qkv(x), 3, axis=-1))
        else:
            dim = x.shape[-1]
            weight, bias = weight_and_bias(self.qkv)
            q = self._heads(affine(x, weight[:dim], bias[:dim]))
            keys_values = affine(context, weight[dim:], bias[dim:])
            k, v = map(self._heads, jnp.split(keys_values, 2, axis=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None and context is None:
            if positions is None:
                raise ValueError("attention with a rotary embedding needs positions, but got None")
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if mask is not None:
            if mask.shape[0] != k.shape[0]:
                raise ValueError(
                    f"mask has {mask.shape[0]} entries, but there are {k.shape[0]} tokens "
                    "to attend to"
                )
            mask = mask[None, None]
        # JAX's own attention relies on implicit promotion to a float32 softmax.
        with jax.named_scope("attend"), jax.numpy_dtype_promotion("standard"):
            y = self.attend(q, k, v, mask=mask)
        return self.out(y.reshape(x.shape))

    def _heads(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens heads head_dim"]:
        return x.reshape(x.shape[0], self.num_heads, -1)
