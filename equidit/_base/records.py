"""Plain data: as JSON gives it back, what it sums up to, and where two of it differ."""

import json
import zlib
from collections.abc import Mapping
from typing import Any


def plain(value: Any, name: str) -> Any:
    """As JSON gives it back: tuples as lists, keys as strings. `ValueError` if that cannot be, by
    the `name` of what was given."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"{name} must be plain data, for JSON: {error}") from error


def crc32(content: bytes) -> str:
    """The checksum of some bytes, as eight digits."""
    return f"{zlib.crc32(content):08x}"


def checksum(value: Any) -> str:
    """The checksum of plain data, whatever the order of their keys."""
    return crc32(json.dumps(value, sort_keys=True).encode())


def differences(now: Mapping[str, Any], was: Mapping[str, Any]) -> str:
    """What differs, as `name=now (was before), ...` by name; empty if nothing."""
    names = [name for name in sorted(now.keys() | was.keys()) if now.get(name) != was.get(name)]
    return ", ".join(f"{name}={now.get(name)} (was {was.get(name)})" for name in names)
