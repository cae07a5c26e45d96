"""Checks of arguments, and what the errors say."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .texts import brief


def upcast(x: Array) -> Array:
    """`x` in float32, or float64 if it is that already: what statistics are computed in."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array, or the shape of one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def check_positive(**sizes: int) -> None:
    """`ValueError` naming the first of `sizes` that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def check_share(**shares: Any) -> None:
    """`ValueError` naming the first of `shares` that is a known number outside [0, 1]."""
    for name, share in shares.items():
        if isinstance(share, float | int | np.number) and not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must lie in [0, 1]")


def check_channels(name: str, x: Array, channels: int, wanted: str) -> None:
    """`ValueError` unless the image has so many channels, first: `wanted` says who wants them."""
    if x.shape[0] != channels:
        last = x.shape[2] == channels
        raise ValueError(
            f"{name} has {x.shape[0]} channels, but {wanted}"
            + (
                f": channels come first, so if they are last in its shape {x.shape}, pass "
                f"jnp.transpose({name}, (2, 0, 1))"
                if last
                else ""
            )
        )


def check_statistics(mean: Any, std: Any, shift: float, channels: int) -> None:
    """`ValueError` unless these can be the statistics of an autoencoder's latents, or are none."""
    given = {"latents_mean": mean, "latents_std": std}
    if not (given := {name: values for name, values in given.items() if values is not None}):
        return
    for name, values in given.items():
        least = 1e-30 if name == "latents_std" else -1e30
        if not _numbers(values, channels) or min(values) <= least:
            raise ValueError(
                f"{name}={brief(repr(values))} must be {channels} finite numbers, one a channel"
                f"{', all positive' if name == 'latents_std' else ''}"
            )
    if len(given) == 1:
        raise ValueError(f"{min(given)} is given alone: latents_mean and latents_std go together")
    if shift:
        raise ValueError(f"shift_factor={shift} must be 0 beside latents_mean, which stands for it")


def _numbers(values: Any, count: int) -> bool:
    if not isinstance(values, list | tuple | np.ndarray | Array) or len(values) != count:
        return False
    values = np.asarray(values) if isinstance(values, Array) else values
    kinds = int | float | np.integer | np.floating
    return all(isinstance(v, kinds) and type(v) is not bool and abs(v) < 1e30 for v in values)


def check_module(name: str, thing: Any) -> None:
    """`ValueError` for an object that hides arrays from JAX: they would not be trained or saved."""
    hidden = vars(thing) if hasattr(thing, "__dict__") and not inspect.isroutine(thing) else {}
    if jax.tree_util.all_leaves([thing]) and any(map(eqx.is_array, jax.tree.leaves(hidden))):
        raise ValueError(
            f"{name} is a {type(thing).__name__}, which is no pytree, so that its arrays would be "
            "neither trained nor saved: derive it from equinox.Module, with its arrays as fields"
        )


class Module(eqx.Module):
    """An Equinox module of the library's. Profiles and compiled programs name its class where it is
    called, and an error says how it goes through `jax.jit`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.__call__ = jax.named_scope(cls.__name__.lstrip("_"))(vars(cls)["__call__"])

    def __hash__(self) -> int:
        try:
            return super().__hash__()
        except TypeError:
            raise TypeError(
                f"{type(self).__name__} holds arrays and so has no hash, which jax.jit and "
                "jax.checkpoint ask of what they wrap: write eqx.filter_jit(module) for "
                "jax.jit(module), or pass the module as an argument: "
                "jax.jit(lambda module, *args: module(*args))"
            ) from None


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of an optional extra: if one is missing, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'equidit[{name}]'", name=error.name
        ) from error
