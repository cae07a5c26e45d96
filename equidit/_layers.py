from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._common import check_positive
from ._ops import layer_norm, modulate, timestep_features
from ._types import Conditioning

Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Array]


# "Linear layers are Xavier-uniform, tables normal 0.02, gates zero" (the paper's recipe).
# JAX's initialisers read a matrix as (in, out); Xavier's bound is the same either way.
xavier_uniform: Initializer = jax.nn.initializers.glorot_uniform()
normal_02: Initializer = jax.nn.initializers.normal(0.02)
zeros: Initializer = jax.nn.initializers.zeros


class Linear(eqx.Module):
    """`x @ weight.T + bias` on the last axis of whole arrays: no `vmap` over tokens is needed."""

    weight: Float[Array, "out features"]
    bias: Float[Array, " out"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_features`, `out_features`: sizes, at least 1.
        - `init`: `init(key, shape)` makes the weight; Xavier-uniform by default. The bias is 0.
        - `key`: for `init`.
        """
        check_positive(in_features=in_features, out_features=out_features)
        self.weight = init(key, (out_features, in_features))
        self.bias = jnp.zeros(out_features)

    def __call__(self, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens out"]:
        return _affine(x, self.weight, self.bias)


def _affine(x: Array, weight: Array, bias: Array) -> Array:
    y = x @ weight.T
    return y + jnp.broadcast_to(bias, y.shape)


class MLP(eqx.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden_size: int, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        self.up = Linear(dim, hidden_size, key=up_key)
        self.down = Linear(hidden_size, dim, key=down_key)

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Attention(eqx.Module):
    """Multi-head attention with one fused projection for queries, keys and values."""

    qkv: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    attend: Callable[..., Array] = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attend: Callable[..., Array] = jax.nn.dot_product_attention,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `dim`: the hidden size.
        - `num_heads`: must divide `dim`, else `ValueError`.
        - `attend`: `attend(query, key, value, mask=mask)` with arrays of shape
            `(tokens, heads, head_dim)` and a mask of shape `(1, 1, tokens)` or `None`. Any function
            with the signature of `jax.nn.dot_product_attention` will do.
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
        self.out = Linear(dim, dim, key=out_key)
        self.num_heads = num_heads
        self.attend = attend

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        context: Float[Array, "cond dim"] | None = None,
        mask: Bool[Array, " keys"] | None = None,
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: the tokens that ask.
        - `context`: the tokens that are attended to; `None` is `x` itself.
        - `mask`: which of those may be attended to (`True`); `None` is all.

        **Returns:**

        One output a token of `x`.
        """
        if context is None:
            q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        else:
            dim = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = _affine(x, weight[:dim], bias[:dim])
            k, v = jnp.split(_affine(context, weight[dim:], bias[dim:]), 2, axis=-1)
        if mask is not None:
            if mask.shape[0] != k.shape[0]:
                raise ValueError(
                    f"mask has {mask.shape[0]} entries, but there are {k.shape[0]} tokens "
                    "to attend to"
                )
            mask = mask[None, None]
        # JAX's own attention relies on implicit promotion to a float32 softmax.
        with jax.numpy_dtype_promotion("standard"):
            y = self.attend(*map(self._heads, (q, k, v)), mask=mask)
        return self.out(y.reshape(x.shape))

    def _heads(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens heads head_dim"]:
        return x.reshape(x.shape[0], self.num_heads, -1)


class TimestepEmbedder(eqx.Module):
    """Sinusoidal features of the timestep through a two-layer SiLU MLP."""

    up: Linear
    down: Linear

    def __init__(self, dim: int, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        self.up = Linear(256, dim, init=normal_02, key=up_key)
        self.down = Linear(dim, dim, init=normal_02, key=down_key)

    def __call__(self, t: Float[Array, ""] | Int[Array, ""]) -> Float[Array, " dim"]:
        features = timestep_features(t, 256).astype(self.up.weight.dtype)
        return self.down(jax.nn.silu(self.up(features)))


class LabelEmbedder(eqx.Module):
    """A table with a row a class and one more, the last, for the null label of guidance."""

    table: Float[Array, "classes dim"]

    def __init__(self, num_classes: int, dim: int, *, key: PRNGKeyArray):
        check_positive(num_classes=num_classes, dim=dim)
        self.table = normal_02(key, (num_classes + 1, dim))

    @property
    def null(self) -> int:
        """The null label: the number of classes."""
        return self.table.shape[0] - 1

    def __call__(self, label: Int[Array, ""]) -> Float[Array, " dim"]:
        """**Arguments:**

        - `label`: 0 to `num_classes - 1`, or `null`.

        **Returns:**

        Its row. A label outside the table gives NaN: never, as plain indexing would, another
        class. Check labels on the host, where they are known.
        """
        row = self.table.at[label].get(
            mode="fill", fill_value=float("nan"), wrap_negative_indices=False
        )
        return row


class LabelConditioner(eqx.Module):
    """The paper's conditioning: `conditioner(t, label)` from a timestep and a class label."""

    timestep: TimestepEmbedder
    label: LabelEmbedder

    def __init__(self, num_classes: int, dim: int, *, key: PRNGKeyArray):
        timestep_key, label_key = jax.random.split(key)
        self.timestep = TimestepEmbedder(dim, key=timestep_key)
        self.label = LabelEmbedder(num_classes, dim, key=label_key)

    def __call__(self, t: Float[Array, ""] | Int[Array, ""], label: Int[Array, ""]) -> Conditioning:
        t_embedding, label_embedding = self.timestep(t), self.label(label)
        return Conditioning(
            vector=t_embedding + label_embedding,
            tokens=jnp.stack([t_embedding, label_embedding]),
        )


class TimestepConditioner(eqx.Module):
    """Conditioning of an unconditional model: `conditioner(t, None)`."""

    timestep: TimestepEmbedder

    def __init__(self, dim: int, *, key: PRNGKeyArray):
        self.timestep = TimestepEmbedder(dim, key=key)

    def __call__(self, t: Float[Array, ""] | Int[Array, ""], cond: None = None) -> Conditioning:
        embedding = self.timestep(t)
        return Conditioning(vector=embedding, tokens=embedding[None])


class FinalLayer(eqx.Module):
    """The last layer: adaptive layer norm, then a linear map to patches. Zero at initialisation."""

    modulation: Linear
    linear: Linear

    def __init__(self, dim: int, patch_size: int, out_channels: int, *, key: PRNGKeyArray):
        modulation_key, linear_key = jax.random.split(key)
        self.modulation = Linear(dim, 2 * dim, init=zeros, key=modulation_key)
        self.linear = Linear(dim, patch_size**2 * out_channels, init=zeros, key=linear_key)

    def __call__(
        self, tokens: Float[Array, "tokens dim"], cond: Conditioning
    ) -> Float[Array, "tokens features"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(cond.vector)), 2)
        return self.linear(modulate(layer_norm(tokens), shift, scale))
