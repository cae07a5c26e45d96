from collections.abc import Iterator
from contextlib import contextmanager

import jax.numpy as jnp
from jaxtyping import Array


def upcast(x: Array) -> Array:
    """`x` in float32, or float64 if it is that already: what statistics are computed in."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def check_positive(**sizes: int) -> None:
    """`ValueError` naming the first of `sizes` that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of an optional extra: if one is missing, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'equidit[{name}]'", name=error.name
        ) from error
