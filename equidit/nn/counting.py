"""The multiply-adds of any function, counted in its program."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx

# Kernels whose work cannot be read off their operands.
_OPAQUE = {
    "custom_call",
    "custom_linear_solve",
    "ffi_call",
    "pallas_call",
    "ragged_dot",
    "ragged_dot_general",
    "tpu_custom_call",
}


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds of the matrix products and convolutions in `function(*args)`.

    Nothing is computed. The body of a `lax.scan` counts as often as it runs, and of a `lax.cond`
    the dearest branch; what `jax.checkpoint` computes again counts again; what every device of a
    `jax.shard_map` computes counts for each.

    **Arguments:**

    - `function`: any function that JAX can trace, e.g. a network.
    - `args`: its arguments, as arrays or as `jax.ShapeDtypeStruct`.

    **Returns:**

    The number of multiply-adds; FLOPs are twice that.

    **Raises:**

    `ValueError` for a product inside a `lax.while_loop`, whose trip count is not known, and for
    kernels that cannot be looked into.

    ```python
    network = eqx.filter_eval_shape(edt.build, "DiT-XL/2", key=jax.random.key(0))
    x = jax.ShapeDtypeStruct((4, 32, 32), jnp.float32)
    t = label = jax.ShapeDtypeStruct((), jnp.int32)
    edt.count_macs(network, x, t, label)  # 118621421568
    ```
    """
    return macs_by_scope(function, *args).total()


def macs_by_scope(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """As `count_macs`, but for each path of `jax.named_scope`s, such as `"DiT/final/Linear"`."""
    # As an argument, so that a network may have shapes for leaves.
    traced, _, _ = eqx.filter_make_jaxpr(lambda f, *args: f(*args))(function, *args)
    return _count(traced.jaxpr, "")


def _count(jaxpr: Any, outer: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        scope = f"{outer}/{equation.source_info.name_stack}".strip("/")
        counts.update(_count_equation(equation, scope))
    return counts


def _count_equation(equation: Any, scope: str) -> Counter[str]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left, (contracted, _) = equation.invars[0].aval.shape, params["dimension_numbers"][0]
        count = _size(equation.outvars[0]) * math.prod(left[i] for i in contracted)
        return Counter({scope: count})
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
        count = _size(equation.outvars[0]) * math.prod(kernel) // out_channels
        return Counter({scope: count})
    if name in _OPAQUE:
        raise ValueError(f"the multiply-adds inside a {name} cannot be counted")
    inner = [_count(jaxpr, scope) for jaxpr in _jaxprs(params)]
    if name == "while" and any(map(Counter.total, inner)):
        raise ValueError(
            "matrix products in a lax.while_loop cannot be counted, since it runs an unknown "
            "number of times: use lax.scan or a fori_loop with constant bounds"
        )
    if name == "cond":
        return max(inner, key=Counter.total)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size
    return Counter({path: times * n for path, n in sum(inner, Counter[str]()).items()})


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
