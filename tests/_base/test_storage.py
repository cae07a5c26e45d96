"""Files that are whole or absent, locks, records, and fingerprints of trees."""

import resource

import jax.numpy as jnp
import numpy as np
import pytest

from equidit._base.disk import append, locked, replace, replacing
from equidit._base.records import checksum, differences, plain
from equidit.checkpoint import fingerprint


def test_a_write_that_fails_leaves_the_older_file(tmp_path):
    path = tmp_path / "a.txt"
    replace(path, "old")

    def fail():
        with replacing(path) as file:
            file.write(b"ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    replace(path, "new")
    assert path.read_text() == "new"


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    append(path, "first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append(path, "second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "first\n"
    append(path, "third\n")
    assert path.read_text() == "first\nthird\n"


def test_a_lock_is_held_by_one(tmp_path):
    with (
        locked(tmp_path / "lock"),
        pytest.raises(FileExistsError, match="another process"),
        locked(tmp_path / "lock"),
    ):
        pass
    with locked(tmp_path / "lock"):
        pass


def test_records_are_plain_and_their_differences_named():
    was = plain({"seed": 0, "shape": (1, 2), "gone": None, 3: "x"}, "settings")
    assert was == {"seed": 0, "shape": [1, 2], "gone": None, "3": "x"}
    assert checksum(was) == checksum(dict(reversed(was.items()))) == "bd397e10"
    assert differences(was, was) == differences({"a": 1}, {"a": 1, "gone": None}) == ""
    now = was | {"seed": 1, "new": 2}
    assert differences(now, was) == "new=2 (was None), seed=1 (was 0)"
    with pytest.raises(ValueError, match="settings must be plain data"):
        plain({"a": object()}, "settings")


def test_fingerprints_of_trees():
    tree = {"a": jnp.arange(6.0), "b": jnp.zeros(2, jnp.bfloat16), "name": "x"}
    found = fingerprint(tree)
    assert len(found) == 8
    assert fingerprint({**tree, "a": np.arange(6, dtype=np.float32)}) == found
    others = [
        {**tree, "a": jnp.arange(6.0).at[3].add(1e-6)},
        {**tree, "a": jnp.arange(6.0).reshape(2, 3)},
        {**tree, "b": jnp.zeros(2, jnp.float16)},
        {"c": tree["a"], "b": tree["b"]},
    ]
    assert len({found, *map(fingerprint, others)}) == 5
    assert fingerprint(None) == fingerprint({}) != found
