"""Reads a compiled program's text: collectives and bytes, a loop's body as often as it runs.

XLA's own analysis counts the body of a loop once.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Neither read nor write memory, or are counted where they are called.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "add-dependency",
    "opt-barrier",
    "optimization-barrier",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` or `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return None if found is None else found[1]


@dataclasses.dataclass(frozen=True)
class Collective:
    """**Fields:** its kind, the bytes of the whole array on a device (the larger of what goes in
    and what comes out), the number of devices that take part, and how often it runs.
    """

    kind: str
    bytes: int
    group: int
    times: int


def num_bytes(shape: str) -> int:
    """Bytes of the entries of an array or tuple."""
    return sum(
        math.prod(int(d) for d in dims.split(",") if d) * _itemsize(dtype)
        for dtype, dims, _ in _ARRAY.findall(shape)
    )


def stored_bytes(shape: str, *, everywhere: bool = False) -> int:
    """Bytes of an array or tuple in a device's memory, filled up to whole tiles as its layout says;
    unless `everywhere`, without what is in on-chip memory: `S(1)` and above in the layout.
    """
    return sum(
        math.prod(_padded(dims, layout)) * _itemsize(dtype)
        for dtype, dims, layout in _ARRAY.findall(shape)
        if everywhere or "S(" not in layout
    )


def _padded(dims: str, layout: str) -> list[int]:
    sizes = [int(d) for d in dims.split(",") if d]
    found = re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout)
    if found:
        order, tile = ([int(n) for n in part.split(",")] for part in found.groups())
        for axis, unit in zip(order, reversed(tile), strict=False):
            sizes[axis] = -(-sizes[axis] // unit) * unit
    return sizes


def _itemsize(dtype: str) -> int:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    if bits is None:
        raise ValueError(f"the size of the type {dtype!r} is unknown")
    return max(1, int(bits[0]) // 8)


class Program:
    """The computations of a compiled program, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif instruction := _instruction(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text has no ENTRY: it is not a compiled program")

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs, which counts from 0 to a constant as `lax.scan` does."""
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        constants = [
            int(found[1])
            for i in condition.values()
            if i.opcode == "constant"
            and (found := re.match(r"(\d+)$", i.operands[0] if i.operands else ""))
        ]
        if len(constants) != 1:
            raise ValueError(f"how often the loop {loop.name} runs is not in its condition")
        return constants[0]

    def walk(self, name: str = "", times: int = 1, *, once: bool = False) -> Iterator[Any]:
        """`(computation, instruction, times)` of all that runs outside of fusions."""
        name = name or self.entry
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                trips = 1 if once else self.trips(instruction)
                body = instruction.called("body") or ""
                yield from self.walk(body, times * trips, once=once)
            elif instruction.opcode in ("call", "async-start") and (
                called := instruction.called("to_apply") or instruction.called("calls")
            ):
                yield from self.walk(called, times, once=once)
            elif instruction.opcode == "conditional":
                for called in self._branches(instruction):
                    yield from self.walk(called, times, once=once)
            else:
                yield name, instruction, times

    def _branches(self, instruction: Instruction) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if listed:
            return [branch.strip(" %") for branch in listed[1].split(",")]
        both = (instruction.called(f"{way}_computation") for way in ("true", "false"))
        return [name for name in both if name]

    def collectives(self) -> list[Collective]:
        """All exchanges between devices."""
        return [
            self._collective(inside, i, times)
            for name, instruction, times in self.walk()
            for inside, i in self._fused(name, instruction)
            if i.opcode.removesuffix("-start") in _COLLECTIVES
        ]

    def _fused(self, name: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        called = instruction.called("calls") if instruction.opcode == "fusion" else None
        if called is None:
            yield name, instruction
        else:
            for inner in self.computations[called].values():
                yield from self._fused(called, inner)

    def _collective(self, name: str, i: Instruction, times: int) -> Collective:
        table = self.computations[name]
        taken = sum(num_bytes(table[o].shape) for o in i.operands if o in table)
        given = num_bytes(i.shape)
        if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
            given -= taken  # such a start's result holds its operands too
        listed = re.search(r"replica_groups=\{\{([\d,]*)\}", i.attributes)
        counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", i.attributes)
        # As newer compilers write it: the mesh's axes with their sizes, and those of the group.
        named = re.search(r"replica_groups=mesh\[([^]]*)\]\s*\{([^}]*)\}", i.attributes)
        group = 0
        if listed:
            group = len(listed[1].split(","))
        elif counted:
            group = int(counted[2])
        elif named:
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
            group = math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
        return Collective(i.opcode.removesuffix("-start"), max(taken, given), group, times)

    def traffic(self, *, once: bool = False) -> int:
        """Bytes read and written in a device's memory. Of slices, what is taken or replaced.

        **Arguments:**

        - `once`: count the body of a loop once, as XLA's own analysis does.
        """
        return sum(t * self._moved(name, i) for name, i, t in self.walk(once=once))

    def _moved(self, name: str, i: Instruction) -> int:
        if i.opcode in _FREE or i.opcode.endswith("-done") or "AllocateBuffer" in i.attributes:
            return 0
        table = self.computations[name]
        shapes = [table[o].shape for o in i.operands if o in table]
        if i.opcode == "fusion":
            called = i.called("calls") or ""
            parts = [min(stored_bytes(s), self._read(called, n, s)) for n, s in enumerate(shapes)]
            return sum(parts) + min(stored_bytes(i.shape), self._written(called, None))
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * stored_bytes(i.shape)
        if i.opcode == "dynamic-update-slice":
            return 2 * stored_bytes(shapes[1])
        if i.opcode.endswith("-start"):
            return stored_bytes(i.shape)  # holds its operands
        return sum(map(stored_bytes, shapes)) + stored_bytes(i.shape)

    def _read(self, name: str, index: int, shape: str) -> int:
        """What a fused computation reads of its parameter: all, unless it only takes slices."""
        table = self.computations[name]
        parameter = next(
            i for i in table.values() if i.opcode == "parameter" and i.operands[0] == str(index)
        )
        whole = stored_bytes(shape, everywhere=True)

        def users(source: str) -> int:
            total = 0
            for i in table.values():
                if source not in i.operands:
                    continue
                if i.opcode == "bitcast":
                    total += users(i.name)
                elif i.opcode in ("dynamic-slice", "slice", "gather"):
                    total += stored_bytes(i.shape, everywhere=True)
                elif i.opcode == "fusion":
                    total += self._read(i.called("calls") or "", i.operands.index(source), shape)
                elif i.opcode != "dynamic-update-slice" or i.operands[0] != source:
                    total += whole
            return total

        return users(parameter.name)

    def _written(self, name: str, of: str | None) -> int:
        """What a fused computation writes: all, or the part of an array that it replaces."""
        table = self.computations[name]
        i = next(i for i in table.values() if i.root) if of is None else table[of]
        if i.opcode == "tuple":
            return sum(self._written(name, o) for o in i.operands)
        if i.opcode == "bitcast":
            return self._written(name, i.operands[0])
        if i.opcode == "dynamic-update-slice":
            return stored_bytes(table[i.operands[1]].shape, everywhere=True)
        if i.opcode == "fusion":
            return self._written(i.called("calls") or "", None)
        return stored_bytes(i.shape)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)
    if found is None:
        return None
    rest = found[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    names = tuple(re.findall(r"%([\w.\-]+)", inside)) or ((inside,) if inside else ())
    return Instruction(
        found[2], shape, rest[:opening], names, rest[closing + 1 :], found[1] is not None
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def total(collectives: list[Collective], weight: Callable[[Collective], float]) -> dict[str, float]:
    """Sums by kind, of those between several devices."""
    sums: dict[str, float] = {}
    for c in collectives:
        if c.group != 1:
            sums[c.kind] = sums.get(c.kind, 0) + c.times * weight(c)
    return sums
