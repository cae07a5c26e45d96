"""What a checkpoint says of itself, beside its arrays."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .._base.records import checksum, plain
from .._base.trees import former_name

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that belongs to something else."""


class Damaged(CheckpointError):
    """Not what was saved: an older one may be."""


@dataclass(frozen=True)
class Record:
    """A checkpoint's record, as plain data.

    **Fields:**

    - `step`: the training step.
    - `data`: the position in the data.
    - `config`: the run's configuration.
    - `arrays`: for every array by name, its dtype, shape and fingerprint.
    """

    step: int
    data: dict[str, Any]
    config: dict[str, Any]
    arrays: dict[str, list[Any]]

    def to_json(self) -> dict[str, Any]:
        """With the format's version and a checksum of all the rest."""
        content = plain({"format": FORMAT, **vars(self)}, "data and config")
        return content | {"checksum": checksum(content)}

    @classmethod
    def from_json(cls, record: Any) -> "Record":
        """Raises `Damaged` for what is not as it was written, `CheckpointError` for a newer one."""
        if not isinstance(record, dict):
            raise Damaged("its record is damaged: it is no JSON object")
        content = {name: value for name, value in record.items() if name != "checksum"}
        try:
            found = checksum(content)
            list(_fields(content))
        except RecursionError as error:
            raise Damaged("its record is damaged: it is nested too deep") from error
        # Every format keeps this checksum, so that a newer one is told from a damaged one.
        if record.get("checksum") != found:
            raise Damaged("its record is damaged: the checksum differs")
        version = content.pop("format", None)
        if not isinstance(version, int):
            raise Damaged("its record is of no checkpoint: it has no format")
        if version > FORMAT:
            raise CheckpointError(
                f"it has format {version}, made by a newer equidit; this one reads up to {FORMAT}: "
                "pip install --upgrade equidit"
            )
        kinds = {"step": int, "data": dict, "config": dict, "arrays": dict}
        if {name: type(value) for name, value in content.items()} != kinds or not all(
            _describes_array(array) for array in content["arrays"].values()
        ):
            raise Damaged("its record is damaged: a field is missing, unknown or of another type")
        return cls(**content)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises `CheckpointError` naming the fields that differ."""
        saved, now = dict(_fields(self.config)), dict(_fields(plain(config, "config")))
        differ = [
            f"{name}={now.get(name, 'missing')} (saved: {saved.get(name, 'missing')})"
            for name in sorted(saved.keys() | now.keys())
            if saved.get(name) != now.get(name)
        ]
        if differ:
            raise CheckpointError(f"it is of a run with another config: {_some(differ)}")

    def saved_names(self, wanted: Iterable[str]) -> dict[str, str]:
        """What arrays are called in this checkpoint, which may have a stack's by a former name."""
        wanted = list(wanted)
        rest = self.arrays.keys() - set(wanted)
        former = {former_name(name): name for name in rest}
        # What two arrays would be called is the name of neither.
        unclear = [name for name, n in Counter(map(former_name, rest)).items() if n > 1]
        return {
            name: name
            if name in self.arrays or former_name(name) in unclear
            else former.get(former_name(name), name)
            for name in wanted
        }

    def check_arrays(self, wanted: Mapping[str, Any], part: str | None) -> None:
        """Raises `CheckpointError` naming arrays that differ in name, shape or dtype."""
        saved = {
            name: array
            for name, array in self.arrays.items()
            if part is None or name == part or name.startswith(f"{part}/")
        }
        if part is not None and not saved:
            parts = sorted({name.partition("/")[0] for name in self.arrays})
            raise CheckpointError(f"it has no part {part!r}, but {', '.join(parts)}")
        differ = [f"{name} is missing" for name in sorted(wanted.keys() - saved.keys())]
        differ += [f"{name} is unknown" for name in sorted(saved.keys() - wanted.keys())]
        for name in sorted(wanted.keys() & saved.keys()):
            dtype, shape, _ = saved[name]
            want = f"{wanted[name].dtype}{list(wanted[name].shape)}"
            if f"{dtype}{shape}" != want:
                differ.append(f"{name} is {dtype}{shape}, not {want}")
        if differ:
            raise CheckpointError(
                f"it belongs to another model or optimizer ({len(differ)} differences): "
                f"{_some(differ)}"
            )

    def check_fingerprints(self, found: Mapping[str, str]) -> None:
        """Raises `Damaged` naming arrays that are not what was saved."""
        wrong = [name for name, digits in found.items() if digits != self.arrays[name][2]]
        if wrong:
            raise Damaged(
                f"{len(wrong)} of {len(found)} arrays are damaged: {_some(sorted(wrong))}"
            )


def _describes_array(array: Any) -> bool:
    """Whether it is a dtype, a shape and a fingerprint."""
    kinds = [str, list, str]
    return isinstance(array, list) and [type(part) for part in array] == kinds


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, sort_keys=True)


def _some(items: list[str]) -> str:
    more = f"; and {len(items) - 4} more" if len(items) > 4 else ""
    return "; ".join(items[:4]) + more
