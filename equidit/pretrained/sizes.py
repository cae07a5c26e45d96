"""How large the networks in files are: told by the arrays' shapes, with which a config must agree.

The arrays lie within their file, so what is built to these sizes is no larger than it deserves.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from .._base.texts import brief
from .files import Weights


def shapes_of(weights: Weights, kind: str, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The shapes of these arrays, of so many axes each: `ValueError` if one is no such array."""
    held = weights.tensors
    found = [held[name].shape if name in held else () for name in ranks]
    pairs = zip(ranks.items(), found, strict=True)
    if wrong := [name for (name, rank), shape in pairs if len(shape) != rank or 0 in shape]:
        names = brief(", ".join(sorted(held)[:20]) or "nothing", 1000)
        raise ValueError(
            f"{weights.source} is no state dict of {kind}: missing or of another shape are "
            f"{', '.join(wrong)}; it holds {names}"
        )
    return found


def count(weights: Weights, prefix: str) -> int:
    """How many numbers follow the prefix in names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in weights.tensors if (match := pattern.match(name))})


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a config.json says of a network; `source` is the file, for errors."""

    fields: dict[str, Any]
    source: str

    def filled(self, defaults: Mapping[str, Any]) -> "Declared":
        """With what it does not say."""
        return Declared({**defaults, **self.fields}, self.source)

    def check_agrees(self, found: Mapping[str, Any], weights: Weights) -> None:
        """`ValueError` unless it says what was found of the weights."""
        for name, value in found.items():
            said = self.fields[name]
            if type(said) is not type(value) or said != value:
                raise ValueError(
                    f"{self.source}: {name}={brief(repr(said))}, but the weights in "
                    f"{weights.source} have {value}"
                )

    def check_fixed(self, fixed: Mapping[str, Any]) -> None:
        """`ValueError` if it says anything else of what only one value is supported for."""
        for name, value in fixed.items():
            if (said := self.fields.get(name, value)) != value:
                raise ValueError(
                    f"{self.source}: {name}={brief(repr(said))} is not supported, only {value!r}"
                )

    def positive(self, name: str) -> int:
        """A field that must be a positive whole number."""
        value = self.fields[name]
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(
                f"{self.source}: {name}={brief(repr(value))} must be a positive whole number"
            )
        return value
