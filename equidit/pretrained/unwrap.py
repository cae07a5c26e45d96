"""The one network in what a file holds: out of its containers, without its wrappers' prefixes."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._base.texts import brief
from .files import Weights, weights_of

# Of DistributedDataParallel, torch.compile and Lightning. Any prefix of all names is left out; that
# one of these is only on some is an error.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# Of a block that is compiled, checkpointed or sharded by itself: these stand within names.
_INNER = re.compile(r"(?<=\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# What torch.optim.swa_utils counts beside the weights that it averages.
_COUNTER = "n_averaged"
_ARGUMENTS = ("args", "hyper_parameters")
_DEEPEST = 4
# A network's arrays under its own names, and all names that are beside them, these included.
_Group = tuple[dict[str, Any], list[str]]


class _Place(NamedTuple):
    arrays: dict[str, Any]
    args: Any
    beside: Mapping[Any, Any]
    prefix: str
    names: list[str]

    @property
    def whole(self) -> bool:
        return len(self.arrays) == len(self.names)


def network_in(
    content: Any, anchor: str, source: str, *, ema: bool = True, select: str | None = None
) -> Weights:
    """The one network in what a file holds, under its own names.

    **Arguments:**

    - `anchor`: the name of an array of four axes that every such network has.
    - `ema`: of a network and its average, whether the average is meant.
    - `select`: of several, which one: the keys that lead to it, with a slash between them, and a
        prefix if it has one.

    **Raises:**

    `ValueError` if there is none, or several without `select`: it names them.
    """
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{source} holds {what}, not a dictionary of weights")
    places = _places(content, anchor)
    if not places and select is None:
        if any(isinstance(value, Mapping) for value in content.values()):
            raise ValueError(
                f"{source} holds no network of this kind: no name in it is, or ends in, {anchor}, "
                f"of an array of four axes. It holds {_brief_names(content)}"
            )
        return weights_of({str(key): value for key, value in content.items()}, source)
    name = _choose(places, source, ema) if select is None else select
    if name not in places:
        raise ValueError(
            f"select={select!r} is no network in {source}, which holds "
            f"{', '.join(map(repr, places)) or 'none'}"
        )
    place = places[name]
    for wrapper in _WRAPPERS:
        count = sum(name.startswith(wrapper) for name in place.arrays)
        if count:
            raise ValueError(
                f"{source}: the prefix {wrapper!r} is on {count} of {len(place.arrays)} names "
                "alone, so that it is no wrapper's. Are two networks mixed?"
            )
    # The official training keeps an argparse.Namespace, Lightning a dictionary.
    args = place.args if isinstance(place.args, dict) else getattr(place.args, "__dict__", {})
    where = f"{source} ({name})" if name != "." else source
    return weights_of(place.arrays, where, {str(key): value for key, value in args.items()})


def _choose(places: dict[str, _Place], source: str, ema: bool) -> str:
    names = [name for name, place in places.items() if place.whole]
    if not names:
        some = ", ".join(
            f"{name!r} ({len(place.arrays)} of {len(place.names)} names begin with "
            f"{place.prefix!r}, but not {brief(_other(place))!r})"
            for name, place in list(places.items())[:8]
        )
        raise ValueError(
            f"{source} holds a network beside other names, so that its prefix is left to you: "
            f"pick one by select= (in the shell --select): {some}"
        )
    start = names[0].rpartition("/")[0]
    trained, average = (f"{start}/{key}".lstrip("/") for key in ("model", "ema"))
    if set(names) == {trained, average}:
        return average if ema else trained
    if len(names) > 1:
        raise ValueError(
            f"{source} holds {len(names)} networks that fit: pick one by select= (in the shell "
            f"--select): {brief(', '.join(map(repr, names)), 1000)}"
        )
    if names == [trained] and ema and _full(places[trained].beside.get("ema")):
        raise ValueError(
            f"{source} has an average, 'ema', that is not this network's names and arrays. "
            f"select={trained!r} (in the shell --select) takes the weights that it is beside"
        )
    return names[0]


def _full(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and len(value) > 0


def _other(place: _Place) -> str:
    return next(name for name in place.names if not name.startswith(place.prefix))


def _places(content: Mapping[Any, Any], anchor: str) -> dict[str, _Place]:
    """All networks in the mappings within mappings, by the keys that lead to them.

    A mapping is looked through once, however often it is in the file.
    """
    found: dict[str, _Place] = {}
    groups: dict[int, dict[str, _Group]] = {}
    queue: list[tuple[tuple[str, ...], Mapping[Any, Any], Any, Mapping[Any, Any]]]
    queue = [((), content, None, {})]
    for path, mapping, args, beside in queue:
        new = id(mapping) not in groups
        if new:
            groups[id(mapping)] = _groups(mapping, anchor)
        args = next((mapping[key] for key in _ARGUMENTS if key in mapping), args)
        for prefix, (arrays, names) in groups[id(mapping)].items():
            place = _Place(arrays, args, beside, prefix, names)
            found["/".join(path if place.whole else (*path, prefix)) or "."] = place
        if new and len(path) < _DEEPEST:
            queue += [
                ((*path, str(key)), value, args, mapping)
                for key, value in mapping.items()
                if isinstance(value, Mapping)
            ]
    return found


def _groups(mapping: Mapping[Any, Any], anchor: str) -> dict[str, _Group]:
    """The networks in one mapping by their prefixes, and all its names."""
    keys = {key: _INNER.sub("", str(key)) for key in mapping}
    if len(set(keys.values())) < len(keys):
        keys = {key: str(key) for key in mapping}
    prefixes = [
        name.removesuffix(anchor)
        for key, name in keys.items()
        if name.endswith(anchor) and len(getattr(mapping[key], "shape", ())) == 4
    ]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    if not prefixes:
        return {}
    arrays = {
        name: mapping[key]
        for key, name in keys.items()
        if name != _COUNTER and not isinstance(mapping[key], Mapping)
    }
    names = list(arrays)
    own = {p: [name for name in names if name.startswith(p)] for p in prefixes[:100]}
    return {p: ({n.removeprefix(p): arrays[n] for n in own[p]}, names) for p in own}


def _brief_names(content: Mapping[Any, Any]) -> str:
    lines = [
        f"{key}: {', '.join(map(str, list(value)[:5]))}{', ...' if len(value) > 5 else ''}"
        if isinstance(value, Mapping)
        else f"{key}"
        for key, value in list(content.items())[:20]
    ]
    return brief("; ".join(lines), 1000)
