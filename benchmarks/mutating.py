"""Damage to files, blind and by their structure: JSON, JSON lines, safetensors, NumPy, zip, PNG."""

import ast
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

LONGEST = 2**16
"""Of an input, in bytes."""

# What json.dumps would not write, by the string that stands for it.
_RAW = {
    "@infinity": b"1e999",
    "@nan": b"NaN",
    "@digits": b"7" * 5000,
    "@many digits": b"7" * 4000,
    "@lists": b"[" * 20_000,
    "@objects": b'{"a":' * 9000,
    "@surrogate": b'"\\ud800"',
    "@twice": b'{"a": 1, "a": 2}',
    "@bytes": b'"\xff\xfe"',
}
_NASTY: tuple[Any, ...] = (
    *_RAW,
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**30),
    *(0.5, -0.0, 1e308, 5e-324, "", "0", "a", "../a", "/etc/passwd", "a\0b", "x" * 300, "\n", "é"),
    *([], {}, [[]], [None], [0], [1, 2], [-1, 0], {"a": 1}, [2**62, 0], [1] * 100),
)


def mutated(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """`data` with some damage; `others` are files of the same kind, to splice with."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if rng.random() < 0.6:
            data = structured(data, rng)
        else:
            data = rng.choice(_BLIND)(data, rng, others)
    return data[:LONGEST]


def structured(data: bytes, rng: random.Random) -> bytes:
    """One change that leaves the rest of a file as its format wants it, where that is known."""
    try:
        for begins, change in _FORMATS.items():
            if data.startswith(begins):
                return change(data, rng)
        if data[8:9] == b"{":
            return _safetensors(data, rng)
    except Exception:  # What is damaged already need not be of a format any more.
        pass
    return rng.choice(_BLIND)(data, rng, [data])


def _text(value: Any, **options: Any) -> bytes:
    found = json.dumps(value, **options).encode()
    for stands, raw in _RAW.items():
        found = found.replace(b'"%s"' % stands.encode(), raw)
    return found


def _node(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """Some container in plain data that is not empty, beside a key in it."""
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.25:
            return value, key
        value = inner


def altered(value: Any, rng: random.Random) -> Any:
    """Plain data with one node changed, removed, moved or added. Changes `value`."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.02:
        return rng.choice(_NASTY)
    parent, key = _node(value, rng)
    old, what = parent[key], rng.random()
    if what < 0.15:
        del parent[key]
    elif what < 0.25:
        other, there = _node(value, rng)
        parent[key] = json.loads(json.dumps(other[there]))
    elif what < 0.35 and isinstance(parent, dict):
        parent[rng.choice(("", "a", "format", "x" * 300, "é", "__metadata__"))] = parent.pop(key)
    elif what < 0.5 and isinstance(old, dict | list):
        if isinstance(old, dict):
            old["a"] = rng.choice(_NASTY)
        else:
            old.insert(0, rng.choice(_NASTY))
    elif what < 0.75 and type(old) in (int, float):
        parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 2**20, float(old), [old]))
    elif what < 0.75 and isinstance(old, str):
        parent[key] = rng.choice((old + "a", old[1:], old.upper(), old * 2, [old], {old: old}))
    else:
        parent[key] = rng.choice(_NASTY)
    return value


def _json(data: bytes, rng: random.Random) -> bytes:
    if b"\n{" in data:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at] = _text(altered(json.loads(lines[at]), rng))
        return b"\n".join(lines)
    return _text(altered(json.loads(data), rng))


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = _text(altered(json.loads(data[8 : 8 + length]), rng))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _npy(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10 : 10 + length].decode())
    what, shape = rng.random(), list(header["shape"])
    if what < 0.4:
        descriptions = ("<f4", "<f2", ">f4", "<f8", "|O", "|S4", "<U9", "<M8[s]", "|V4", "|b1")
        numbers = ("<i4", "<i8", "|u1", "<c8", "a", "", None, [["a", "<f4"]], [["a", "|O"]], 4)
        header["descr"] = rng.choice(descriptions + numbers)
    elif what < 0.8:
        shape = altered(shape, rng)
        header["shape"] = tuple(shape) if isinstance(shape, list) else shape
    else:
        header = altered(header, rng)
    text = (repr(header) + "\n").encode()
    return data[:8] + (len(text) % 2**16).to_bytes(2, "little") + text + data[10 + length :]


def _zip(data: bytes, rng: random.Random) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        members = [(name, old.read(name)) for name in old.namelist()]
        at = rng.randrange(len(members))
        name, content = members[at]
        what = rng.random()
        if what < 0.1:
            del members[at]
        elif what < 0.2:
            members[at] = rng.choice(("a", "../a", name + "a", "x" * 300)), content
        else:
            members[at] = name, mutated(content, rng, [content])
        for name, content in members:
            new.writestr(zipfile.ZipInfo(name), content)
        new.comment = old.comment
    return made.getvalue()


def _png(data: bytes, rng: random.Random) -> bytes:
    """One chunk of a PNG, with its checksum made right."""
    places, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        places.append((at, length))
        at += 12 + length
    at, length = rng.choice(places)
    kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
    if rng.random() < 0.2:
        kind = rng.choice((b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"IEND"))
    content = rng.choice(_BLIND)(content, rng, [content])
    chunk = struct.pack(">I", len(content)) + kind + content
    chunk += struct.pack(">I", zlib.crc32(kind + content))
    return data[:at] + chunk + data[at + 12 + length :]


_FORMATS: dict[bytes, Callable[[bytes, random.Random], bytes]] = {
    b"{": _json,
    b"[": _json,
    b"\x93NUMPY": _npy,
    b"PK": _zip,
    b"\x89PNG": _png,
}


def _flip(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _put(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A number that is the edge of something, in either order of bytes."""
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 2 ** (8 * width) - 1, 2 ** (8 * width - 1)))
    put = (number % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
    at = rng.randrange(len(data) + 1)
    return data[:at] + put + data[at + width :]


def _digit(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    places = [i for i, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not places:
        return _flip(data, rng, others)
    at = rng.choice(places)
    return data[:at] + rng.choice((b"", b"0", b"9", b"-1", b"99999999999", b"1e9")) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64)) :]


def _repeat(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 8, 64, 1024))
    return data[:at] + data[at : at + size] * rng.choice((2, 2, 9)) + data[at + size :]


def _splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _grow(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    return data + bytes(rng.choice((1, 8, 4096))) * rng.randrange(1, 5)


_BLIND = (_flip, _flip, _put, _put, _digit, _cut, _remove, _repeat, _splice, _grow)
