"""What the training step takes from its caller and gives back: checks and the metrics."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, PyTree

from .._base.common import is_parameter, upcast
from .._base.texts import brief
from ..seams import Optimizer

# What the step itself reports.
OWN = ("loss", "losses", "grad_norm", "param_norm", "skipped")


class Metrics(dict[str, Any]):
    """A dictionary that prints its single numbers, and of other arrays dtype and shape alone."""

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: {_shown(value)}' for name, value in self.items())}}}"


def _flatten(metrics: Metrics) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(sorted(metrics))  # as JAX flattens a dictionary
    return [(jax.tree_util.DictKey(name), metrics[name]) for name in names], names


jax.tree_util.register_pytree_with_keys(
    Metrics, _flatten, lambda names, values: Metrics(zip(names, values, strict=True))
)


def _shown(value: Any) -> str:
    single = isinstance(value, jax.Array | np.ndarray) and not isinstance(value, Tracer)
    return str(np.asarray(value)[()]) if single and not value.ndim else eqx.tree_pformat(value)


def reported(returned: Any) -> tuple[Array, dict[str, Array]]:
    """What a loss returned for one example: its number, and by name those that it reports."""
    number, extra = returned, {}
    if isinstance(returned, tuple) and len(returned) == 2:
        number, extra = returned
    named = isinstance(extra, Mapping)
    if not (named and all(map(_is_number, (number, *extra.values())))):
        raise ValueError(
            "the loss must return one number an example, or the pair (number, {name: number}), but "
            f"returned {eqx.tree_pformat(returned)}"
        )
    if not jnp.issubdtype(jnp.result_type(number), jnp.floating):
        raise ValueError(
            f"the loss returned {eqx.tree_pformat(returned)}: what is minimised must be a "
            "floating-point number, or it has no gradient"
        )
    for name in extra:
        if not isinstance(name, str) or name in OWN:
            raise ValueError(
                f"the loss reports a number named {name!r}: choose a string other than the step's "
                f"own metrics {', '.join(OWN)}"
            )
    return upcast(jnp.asarray(number)), {name: _float(value) for name, value in extra.items()}


def _is_number(value: Any) -> bool:
    if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float) or np.ndim(value):
        return False
    dtype = jnp.result_type(value) if isinstance(value, jax.Array) else np.asarray(value).dtype
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _float(value: Any) -> Array:
    # A number of Python's or NumPy's may be beyond JAX's integers.
    return upcast(jnp.asarray(value if isinstance(value, jax.Array) else float(value)))


def updates_of(
    optimizer: Optimizer, grads: PyTree, state: PyTree, params: PyTree, loss: Array
) -> tuple[PyTree, PyTree]:
    """The optimizer's updates and next state; it is told the loss if it asks for more by name."""
    parameters = inspect.signature(optimizer.update).parameters
    more = isinstance(optimizer, optax.GradientTransformationExtraArgs) or "value" in parameters
    more = more or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        try:
            return optimizer.update(grads, state, params, **({"value": loss} if more else {}))
        except TypeError as error:
            if "required keyword-only argument" in str(error):
                error.add_note(
                    "The training step gives an optimizer the gradient, the parameters and value=, "
                    "the loss. One that evaluates the loss again, such as a line search, needs a "
                    "loop of your own."
                )
            raise


def unshared(tree: PyTree, *, key: Callable[[Any], Any] = id) -> PyTree:
    """`tree` with a copy of every array that it holds already, since each is donated once."""
    seen: set[Any] = set()

    def own(leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        known = key(leaf) in seen
        seen.add(key(leaf))
        return jnp.copy(leaf) if known else leaf

    return jax.tree.map(own, tree)


def buffer(array: Any) -> Any:
    """What two arrays of the same memory have in common."""
    plain = isinstance(array, jax.Array) and not isinstance(array, Tracer)
    plain = plain and jnp.issubdtype(array.dtype, jnp.number)
    shards = array.addressable_shards if plain and array.size else None
    return shards[0].data.unsafe_buffer_pointer() if shards else id(array)


def check_network(network: PyTree) -> None:
    """`ValueError` for a network that was donated, or that holds a parameter in two places."""
    check_alive(network, "the network")
    if not any(map(is_parameter, jax.tree.leaves(network))):
        raise ValueError(
            f"network is a {type(network).__name__} without floating-point arrays: there is "
            "nothing to train. A class of your own is an equinox.Module, with arrays as fields"
        )
    places: dict[Any, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        if not eqx.is_inexact_array(leaf):
            continue
        name = jax.tree_util.keystr(path)
        if (other := places.setdefault(buffer(leaf), name)) != name:
            raise ValueError(
                f"network{other} and network{name} are the same array: the optimizer would update "
                "each by itself. To tie them, use eqx.nn.Shared; for two parameters that begin "
                "alike, copy one by jnp.copy"
            )


def check_alive(tree: PyTree, what: str) -> None:
    """`ValueError` for arrays that an earlier step was given."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _is_gone(leaf):
            raise ValueError(
                f"{what} has arrays that are gone, e.g. {jax.tree_util.keystr(path)}: a training "
                "step donates the state that it is given, and with it the network that the state "
                "was made of, so that the next state takes their memory. Go on with the state that "
                "the step returned; to keep one, copy it before: jax.tree.map(jnp.copy, state)"
            )


def usable(state: Any) -> Any:
    """The state, with arrays that it holds twice copied; `ValueError` if it was used before."""
    # At every step: no function is called for each leaf, since calls are checked.
    arrays = [
        leaf
        for leaf in jax.tree.leaves(state)
        if not isinstance(leaf, Tracer) and hasattr(leaf, "is_deleted")
    ]
    if any(leaf.is_deleted() for leaf in arrays):
        check_alive(state, "the state")
    return state if len(set(map(id, arrays))) == len(arrays) else unshared(state)


def _is_gone(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()


def check_dtype(dtype: DTypeLike) -> None:
    """`ValueError` for what is no floating-point dtype."""
    try:
        good = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        good = False
    if not good:
        raise ValueError(
            f"dtype={dtype!r} is no floating-point dtype: choose jnp.bfloat16, jnp.float16 or "
            "jnp.float32, or their names 'bfloat16', 'float16', 'float32'"
        )


def check_averages(ema: PyTree, names: Iterable[str]) -> None:
    """`ValueError` for a state whose averages are not these."""
    found = set(ema) if isinstance(ema, dict) else None
    if found != set(names):
        raise ValueError(
            f"ema_decay names the averages {sorted(names)}, but the state holds "
            f"{'one without a name' if found is None else sorted(found)}: "
            "pass ema_names=ema_decay to init_state"
        )


def check_batch(batch: PyTree, devices: int, accumulate: int) -> None:
    """`ValueError` for a batch that the step cannot divide into examples, devices and parts."""
    leaves = jax.tree.leaves(batch)
    if not all(map(_is_array, leaves)):
        name, leaf = next((name, leaf) for name, leaf in _named(batch) if not _is_array(leaf))
        raise ValueError(
            f"{name} is a {type(leaf).__name__}, {brief(repr(leaf), 60)}: the leaves of a batch "
            "are arrays of numbers, one entry of the first axis an example. Lists are trees: make "
            "them arrays by np.asarray"
        )
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        found = ", ".join(f"{name} {leaf.shape}" for name, leaf in _named(batch))
        raise ValueError(
            "the leaves of a batch must share their first axis, one entry an example, but have the "
            f"shapes: {found or 'none, since there are no leaves'}"
        )
    ((size,),) = sizes
    unit = devices * accumulate
    if size < 1 or size % unit:
        fit = max(unit, size // unit * unit)
        raise ValueError(
            f"a batch of {size} does not divide over {devices} devices x {accumulate} "
            f"micro-batches: take a multiple of {unit} such as {fit} or {fit + unit}"
        )


def _is_array(leaf: Any) -> bool:
    # Numbers, by the letters that NumPy has for their kinds; V is bfloat16 and its like.
    numpy = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufcV"
    return numpy or isinstance(leaf, jax.Array)


def _named(batch: PyTree) -> Iterable[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        yield f"batch{jax.tree_util.keystr(path)}", leaf
