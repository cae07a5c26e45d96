"""How arguments come in, for every public function and module of the package alike.

What `jnp.asarray` takes becomes an array where an array is asked for, a concrete array of no axes a
Python number where a number is, and a key of `jax.random.PRNGKey` one of `jax.random.key`. For a
string that is none of a `Literal`'s a `ValueError` names the choices. A type error is told in a few
lines, and where an array has an axis too many it names `jax.vmap`.
"""

import functools
import importlib.abc
import inspect
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import AbstractArray, Key, TypeCheckError

from .texts import brief, check_choice

Converter = Callable[[Any], Any]
Function = TypeVar("Function", bound=Callable[..., Any])
_FORMER = "__former_names__"
_NUMBERS = (bool, int, float, complex, np.bool_, np.number)
_KINDS = {int: np.integer, float: np.floating, bool: np.bool_}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the package's modules as another finder does, and opens them up once they are run."""

    def __init__(self, package: str, inner: importlib.abc.MetaPathFinder):
        self.package, self.inner = package, inner

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(f"{self.package}."):
            return None
        spec = self.inner.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                open_up(module)

            spec.loader.exec_module = exec_module
        return spec


def open_up(module: types.ModuleType) -> None:
    """Wraps the public functions that a module defines, and the methods of its classes."""
    for name, thing in list(vars(module).items()):
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) and not name.startswith("_"):
            setattr(module, name, accepting(thing))
        elif inspect.isclass(thing) and not getattr(thing, "_is_protocol", False):
            for method, function in list(vars(thing).items()):
                public = method in ("__init__", "__call__") or not method.startswith("_")
                if public and inspect.isfunction(function):
                    setattr(thing, method, accepting(function))


def accepting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its arguments made what its annotations ask for."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    named = {p.name: _converter(p.name, p.annotation) for p in parameters}
    former = getattr(function, _FORMER, {})
    placed = [named[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]

    @functools.wraps(function)
    def accept(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            if former:
                _take_former(former, kwargs)
            pairs = itertools.zip_longest(args, placed[: len(args)])
            args = tuple(arg if convert is None else convert(arg) for arg, convert in pairs)
            for name in kwargs:
                if (convert := named.get(name)) is not None:
                    kwargs[name] = convert(kwargs[name])
            return function(*args, **kwargs)
        except TypeCheckError as error:
            raise _brief(error, function, args, kwargs) from None
        except TypeError as error:
            _name(error, signature, function, args, kwargs)
            raise

    return accept


def renamed(**names: str) -> Callable[[Function], Function]:
    """A function that takes keywords under their former names too: `@renamed(old="new")`."""

    def decorate(function: Function) -> Function:
        setattr(function, _FORMER, names)
        return function

    return decorate


def _take_former(names: dict[str, str], kwargs: dict[str, Any]) -> None:
    for old in names.keys() & kwargs.keys():
        if names[old] in kwargs:
            raise TypeError(f"{old} is the former name of {names[old]}: pass the latter alone")
        kwargs[names[old]] = kwargs.pop(old)


def _name(error: TypeError, signature: inspect.Signature, function: Any, *given: Any) -> None:
    """Python says whose arguments are wrong; the check of types only says which."""
    args, kwargs = given
    try:
        signature.bind(*args, **kwargs)
    except TypeError as unbound:
        if str(unbound) == str(error):
            error.args = (f"{function.__qualname__}: {error}",)


def _converter(name: str, annotation: Any) -> Converter | None:
    """What makes an argument of what was given; `None` where all is left as it is."""
    if get_origin(annotation) is tuple:
        inner = [_converter(name, item) for item in get_args(annotation) if item is not ...]
        if not any(inner) or len(inner) != len(get_args(annotation)):
            return None
        return functools.partial(_tuple, inner)
    members = list(union_members(annotation))
    choices = [c for m in members if get_origin(m) is Literal for c in get_args(m)]
    if choices and str not in members:
        return functools.partial(_choice, name, choices)
    arrays = [m for m in members if inspect.isclass(m) and issubclass(m, AbstractArray)]
    others = tuple(m for m in members if inspect.isclass(m) and m not in arrays)
    if any(a.dtype is Key for a in arrays):
        return _key
    if arrays:
        integral = any(jnp.issubdtype(name, jnp.integer) for a in arrays for name in _dtypes(a))
        to = np.asarray if all(a.array_type is np.ndarray for a in arrays) else jnp.asarray
        return functools.partial(_array, to, others, integral)
    numbers = [m for m in others if m in _KINDS]
    return functools.partial(_number, tuple(_KINDS[m] for m in numbers)) if numbers else None


def union_members(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation: itself, if it is no union."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from union_members(member)
    else:
        yield annotation


def _dtypes(annotation: Any) -> list[str]:
    names = annotation.dtypes
    return [n for n in names if isinstance(n, str)] if isinstance(names, list | tuple) else []


def _choice(name: str, choices: list[Any], value: Any) -> Any:
    if isinstance(value, str):
        check_choice(name, value, choices)
    return value


def _array(to: Callable[[Any], Any], others: tuple[type, ...], integral: bool, value: Any) -> Any:
    wanted = jax.Array if to is jnp.asarray else (np.ndarray, Tracer)
    if isinstance(value, (wanted, others)):
        return value
    if type(value) is int and not integral:
        value = float(value)
    known = isinstance(value, (*_NUMBERS, np.ndarray, list, tuple, jax.Array))
    if known or hasattr(value, "__jax_array__") or hasattr(value, "__array__"):
        try:
            return to(value)
        except (TypeError, ValueError, OverflowError):
            pass  # told by the check of types
    return value


def _key(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray) and (value.dtype, value.ndim) == (np.uint32, 1):
        try:
            return jax.random.wrap_key_data(jnp.asarray(value))
        except TypeError:
            pass  # of another length: told by the check of types
    return value


def _number(kinds: tuple[type, ...], value: Any) -> Any:
    concrete = isinstance(value, jax.Array | np.ndarray | np.generic)
    if not concrete or isinstance(value, Tracer) or np.ndim(value):
        return value
    return value.item() if any(np.issubdtype(value.dtype, kind) for kind in kinds) else value


def _tuple(inner: list[Converter | None], value: Any) -> Any:
    if not isinstance(value, tuple | list) or len(value) != len(inner):
        return value
    pairs = zip(value, inner, strict=True)
    return tuple(item if convert is None else convert(item) for item, convert in pairs)


def _brief(
    error: TypeCheckError, function: Callable[..., Any], args: Any, kwargs: Any
) -> TypeCheckError:
    """The same error in a few lines, however large what was given."""
    text = str(error)
    for name, following in (("Actual value", "Expected type"), ("Called with", "Parameter annot")):
        text = re.sub(
            rf"(?s)(?<=^{name}).*?(?=\n{following})", lambda m: brief(m[0], 300), text, flags=re.M
        )
    name = f"{function.__module__}.{function.__qualname__}."
    if text.startswith(f"Type-check error whilst checking the parameters of {name}"):
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
        text += "".join(_hints(function, bound.arguments))
    error.args = (text.replace("jaxlib._jax.Array", "Array"),)
    return error


def _hints(function: Callable[..., Any], given: dict[str, Any]) -> Iterator[str]:
    for name, parameter in inspect.signature(function).parameters.items():
        shape = getattr(given.get(name), "shape", None)
        if name in given and shape is None and _converter(name, parameter.annotation) is _key:
            seed = given[name] if type(given[name]) is int else 0
            yield f"\n{name} must be a key, such as jax.random.key({seed})"
        for member in union_members(parameter.annotation):
            axes = getattr(member, "dim_str", None)
            if shape is None or axes is None or "*" in axes or "..." in axes:
                continue
            if len(shape) == len(axes.split()) + 1:
                yield (
                    f"\n{name} has the shape {shape}, one axis more than ({axes.strip()}): this "
                    "takes one example, so map a batch by jax.vmap"
                )
                break
