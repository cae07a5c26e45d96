"""What each parameter of a network is, and Muon for those that are hidden matrices."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree
from optax import contrib

from .._base.common import is_parameter
from .._base.parts import scans
from ..seams import Scalar
from .conditioning import TextEmbedder, TimestepEmbedder
from .dit import DiT
from .layers import FinalLayer, PlainFinalLayer

Kind = Literal["hidden", "input", "output", "embedding", "bias", "scale", "other"]

_BIASES = ("bias", "shift")
_TABLES = ("embedding", "null", "pos_embed", "table")
_INPUTS = ("embed", "patch_embed")
_FUSED = ("qkv", "kv", "modulation")
_NORMS = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm)
# Layers whose name does not tell that one of their sides does not grow with the network's width.
_ENDS: dict[tuple[type, str], Kind] = {
    (TimestepEmbedder, "up"): "input",
    (TextEmbedder, "up"): "input",
    (FinalLayer, "linear"): "output",
    (PlainFinalLayer, "linear"): "output",
}


@dataclasses.dataclass(frozen=True)
class ParameterKind:
    """What a parameter is: a leaf of [`equidit.parameter_kinds`][].

    **Fields:**

    - `kind`: `"hidden"` for a matrix both of whose sides grow with the network's width, `"input"`
        and `"output"` for one with a side of fixed size, its columns or its rows; `"embedding"` for
        a table; `"bias"` for what is added; `"scale"` for other vectors and numbers; `"other"` for
        what has more axes, such as the kernel of a convolution.
    - `layers`: how many of the first axes count layers, as in a [`equidit.Stack`][].
    - `parts`: how many matrices of equal size the rows of a hidden matrix are made of: 3 for
        queries, keys and values.
    """

    kind: Kind
    layers: int = 0
    parts: int = 1


def parameter_kinds(network: PyTree) -> PyTree:
    """What each parameter of a network is: for weight decay, learning rates, freezing and Muon.

    It is told by the library's modules, by names and by shapes, in blocks of your own too:

    - Biases are called `bias` or `shift`; tables `table`, `embedding`, `pos_embed` or `null`, or
        belong to an `eqx.nn.Embedding`.
    - Input matrices are `patch_embed` and `embed`, and the first of a timestep's or a prompt's
        embedder; output matrices those of a [`equidit.DiT`][]'s last layer that make the patches.
        All others are hidden.
    - Made of several are `qkv` (3), `kv` (2) and `modulation` (as many as the columns go into the
        rows), be it the matrix or its layer that is called so.
    - Axes of layers are known of a [`equidit.Stack`][], and of a module with an attribute
        `scans_layers` that is true. What you stack by `jax.vmap` yourself has more axes than it
        seems to need: put right what that is taken for.

    **Arguments:**

    - `network`: any pytree of modules, e.g. a network, its gradient or its shapes.

    **Returns:**

    A [`equidit.ParameterKind`][] for each floating-point array, in the structure of
    `eqx.filter(network, eqx.is_inexact_array)`, which is what an optimizer sees. Where a module of
    your own is taken for something else, put what it is there by `eqx.tree_at`.

    Give optax's masks and labels as functions of the parameters, as in
    `optax.adamw(1e-4, mask=lambda params: ...)`: `optax.partition` calls labels that can be called,
    as a network of labels can.

    ??? cite

        Input, hidden and output weights: table 3 of
        [Yang et al. 2022](https://arxiv.org/abs/2203.03466).
    """
    return _kinds(network, _Place())


class _Place(NamedTuple):
    """What the modules around a parameter tell of it."""

    name: str = ""
    layers: int = 0
    matrix: Kind = "hidden"
    fused: str | None = None
    features: int | None = None


def _kinds(node: Any, place: _Place) -> Any:
    children, structure = jax.tree_util.tree_flatten_with_path(node, lambda part: part is not node)
    if structure == jax.tree.structure(0):
        return _kind(node.shape[place.layers :], place) if is_parameter(node) else None
    inner = [_kinds(child, _inside(node, path[0], place)) for path, child in children]
    return jax.tree.unflatten(structure, inner)


def _inside(node: Any, key: Any, place: _Place) -> _Place:
    name = str(getattr(key, "name", getattr(key, "key", place.name)))
    matrix: Kind = "input" if name in _INPUTS else place.matrix
    if isinstance(node, eqx.nn.Embedding):
        matrix = "embedding"
    if isinstance(node, _NORMS):
        matrix = "scale"
    features = place.features
    if isinstance(node, DiT):
        features = node.patch_size**2 * node.out_channels if name == "final" else None
    return _Place(
        name,
        place.layers + scans(node),
        _ENDS.get((type(node), name), matrix),
        name if name in _FUSED else place.fused,
        features,
    )


def _kind(shape: tuple[int, ...], place: _Place) -> ParameterKind:
    kind, parts = place.matrix, 1
    if place.name in _BIASES:
        kind = "bias"
    elif len(shape) < 2 or kind == "scale":
        kind = "scale"
    elif place.name in _TABLES:
        kind = "embedding"
    elif len(shape) > 2:
        kind = "other"
    elif kind == "hidden" and place.fused is not None:
        count = {"qkv": 3, "kv": 2}.get(place.fused, shape[0] // shape[1])
        parts = count if count and shape[0] % count == 0 else 1
    elif shape[0] == place.features:
        kind = "output"
    return ParameterKind(kind, place.layers, parts)


def muon(
    learning_rate: Scalar | Callable[[Any], Any],
    *,
    consistent_rms: Scalar | None = 0.2,
    kinds: PyTree = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the hidden matrices of a network, each layer and each part by itself; AdamW for all
    else.

    `optax.contrib.muon` alone takes what has two axes, which in stacked blocks are the biases.

    **Arguments:**

    - `learning_rate`: a number or an optax schedule.
    - `consistent_rms`: root mean square of Muon's updates before the learning rate. With 0.2 they
        are as large as Adam's usually are, so that Adam's learning rate serves both. `None` scales
        by the square root of rows over columns, where above 1.
    - `kinds`: what [`equidit.parameter_kinds`][] returned, or a function like it; `None` is that
        one.
    - `options`: other arguments of `optax.contrib.muon`. Its `weight_decay` is of the hidden
        matrices alone; all else is not decayed unless by `adam_weight_decay`.

    **Returns:**

    An optimizer, for [`equidit.make_train_step`][].

    ??? cite

        [Jordan et al. 2024](https://kellerjordan.github.io/posts/muon/); the scale from section 2.2
        of [Liu et al. 2025](https://arxiv.org/abs/2502.16982).
    """

    rate: Any = learning_rate
    contrib.muon(rate, consistent_rms=consistent_rms, **options)  # names a wrong option at once
    # A network of kinds can be called as well, and so cannot be told from a function by that.
    fixed = any(isinstance(leaf, ParameterKind) for leaf in jax.tree.leaves(kinds))

    def labels_of(tree: PyTree) -> PyTree:
        return kinds if fixed else (kinds or parameter_kinds)(tree)

    def inner(labels: PyTree) -> optax.GradientTransformationExtraArgs:
        # Weights have the shape (out, in); all axes before these are batched over.
        axes = contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
        numbers = jax.tree.map(lambda label: axes if label.kind == "hidden" else None, labels)
        one = contrib.muon(
            rate,
            consistent_rms=consistent_rms,
            muon_weight_dimension_numbers=lambda _: numbers,
            **options,
        )
        return optax.with_extra_args_support(one)

    def init(params: PyTree) -> PyTree:
        labels = labels_of(params)
        return inner(labels).init(_split(labels, params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        labels = labels_of(updates)
        parts = None if params is None else _split(labels, params)
        found, state = inner(labels).update(_split(labels, updates), state, parts, **extra)
        return jax.tree.map(lambda a, b: a.reshape(b.shape), found, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _split(labels: PyTree, tree: PyTree) -> PyTree:
    """`tree` with one more axis, before the last two, for the parts of fused matrices."""

    def split(label: ParameterKind, x: Any) -> Any:
        if label.parts == 1:
            return x
        *layers, rows, columns = x.shape
        return x.reshape(*layers, label.parts, rows // label.parts, columns)

    return jax.tree.map(split, labels, tree)
