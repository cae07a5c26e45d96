"""Saving and restoring the arrays of a pytree, in one file that is whole or absent."""

import contextlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that belongs to something else."""


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes the arrays of `tree` to a `.npz` file, replacing an older one only once complete."""
    with replacing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for name, leaf in _named(tree).items():
            info = zipfile.ZipInfo(f"{name}.npy")
            # NumPy's format knows bfloat16 and its like only as nameless bytes.
            info.comment = leaf.dtype.name.encode()
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(leaf), allow_pickle=False)


def replace(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, replacing an older one only once complete."""
    with replacing(Path(path)) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces an older one at `path` only once complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def restore(path: str | os.PathLike[str], like: Tree) -> Tree:
    """Reads what [`equidit.checkpoint.save`][] wrote.

    **Arguments:**

    - `path`: the file. Nothing in it is executed.
    - `like`: a tree of the same structure, shapes and dtypes; `jax.ShapeDtypeStruct` leaves, e.g.
        from `eqx.filter_eval_shape`, do. Leaves that are no arrays are taken from it.

    **Raises:**

    `FileNotFoundError`; [`equidit.checkpoint.CheckpointError`][] if the file is damaged (every
    array's checksum is verified) or holds other names, shapes or dtypes than `like`.
    """
    wanted = _named(like)
    try:
        found = _read(Path(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint at {path}") from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        want, have = wanted[name], found[name]
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            problems.append(
                f"{name} is {have.dtype}{list(have.shape)}, not {want.dtype}{list(want.shape)}"
            )
    if problems:
        shown = "; ".join(problems[:4])
        raise CheckpointError(
            f"{path} belongs to another model or optimizer ({len(problems)} differences): {shown}"
        )
    leaves = iter(found[name] for name in wanted)
    return jax.tree.map(lambda leaf: jnp.asarray(next(leaves)) if _is_array(leaf) else leaf, like)


def fingerprint(tree: Any) -> str:
    """Eight hexadecimal digits that depend on every bit, name, shape and dtype of the arrays."""
    crc = 0
    for name, leaf in _named(tree).items():
        crc = zlib.crc32(f"{name} {leaf.dtype} {leaf.shape};".encode(), crc)
        crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
    return f"{crc:08x}"


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _is_array))
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays of the tree have the same path: rename a key with a '/' in it")
    return named


def _read(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            # Reading a whole member verifies its CRC-32 before any of it is believed.
            data = io.BytesIO(archive.read(member))
            array = np.load(data, allow_pickle=False)
            if array.dtype.kind == "V":
                array = array.view(jnp.dtype(member.comment.decode()))
            arrays[member.filename.removesuffix(".npy")] = array
    return arrays
