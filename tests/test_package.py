import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import jax.numpy as jnp
import pytest
from helpers import REFERENCES
from jaxtyping import TypeCheckError

import equidit as edt

PACKAGE = Path(edt.__file__).parent
# Lower rooms first. The towers in the middle do not see one another.
TOWERS = {
    "base": ["seams", "_base"],
    "network": ["nn", "configs", "vae", "pretrained"],
    "process": ["diffusion", "guidance"],
    "training": ["hosts", "train", "data", "metrics", "devices", "checkpoint"],
    "commands": ["runs", "cli", "__main__"],
}
TOWER = {room: tower for tower, rooms in TOWERS.items() for room in rooms}
BEFORE = REFERENCES / "public_names.txt"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
LIBRARY = [path for path in FILES if TOWER.get(path.with_suffix("").parts[0]) != "commands"]


def _named(path: Path) -> tuple[str, ...]:
    return path.parent.parts if path.stem == "__init__" else path.with_suffix("").parts


def _imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            here = path.parts[: len(path.parts) - node.level]
            for alias in node.names:
                name = (*here, *(node.module.split(".") if node.module else ()), alias.name)
                is_module = Path(*name).with_suffix(".py") in FILES
                found.add(name if is_module or Path(*name, "__init__.py") in FILES else name[:-1])
    return found


def test_imports_go_down():
    """No arrow up, no circle, and of the towers the commands alone see another."""
    graph = {_named(path): _imports(path) for path in FILES if path != Path("__init__.py")}
    assert {name[0] for name in graph} == set(TOWER)
    arrows = {(a[0], b[0]) for a in graph for b in graph[a] if a[0] != b[0]}
    for here, there in arrows:
        assert [*TOWER].index(there) < [*TOWER].index(here), (here, there)
        assert TOWER[there] in ("base", TOWER[here]) or TOWER[here] == "commands", (here, there)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=str)
def test_a_room_begins_with_its_contents(path):
    """And holds nothing else; the package's own also puts the checks of types in place."""
    body = ast.parse((PACKAGE / path).read_text()).body
    assert ast.get_docstring(ast.Module(body, []))
    if path != Path("__init__.py"):
        assert all(isinstance(node, ast.ImportFrom) for node in body[1:])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse((PACKAGE / path).read_text()))


def test_no_file_bears_the_name_of_a_public_function():
    """It would be hidden by it, or hide it."""
    for path in FILES:
        if path.stem in ("__init__", "__main__"):
            continue
        room = importlib.import_module(".".join(("equidit", *path.parent.parts)))
        thing = getattr(room, path.stem, None)
        assert thing is None or inspect.ismodule(thing), path


@pytest.mark.parametrize("name", BEFORE.read_text().split())
def test_what_was_public_before_there_were_rooms_is_where_it_was(name):
    module, _, thing = name.rpartition(".")
    assert hasattr(importlib.import_module(module), thing)


def test_rooms_are_attributes_of_the_package():
    public = [name for name in TOWER if TOWER[name] not in ("base", "commands")]
    code = f"""
import equidit
for name in {public}:
    assert name in dir(equidit) and getattr(equidit, name).__name__ == f"equidit.{{name}}"
assert not hasattr(equidit, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_library_neither_prints_nor_reads_the_environment(path):
    tree = ast.parse((PACKAGE / path).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in names
    assert not {"environ", "getenv"} & attributes
    assert path == Path("_base/disk.py") or "open" not in names


def test_import_needs_the_core_alone():
    extras = (
        "sklearn",
        "matplotlib",
        "tqdm",
        "tyro",
        "orbax",
        "grain",
        "torch",
        "diffusers",
        "safetensors",
        "huggingface_hub",
        "scipy",
    )
    code = f"""
import sys
for name in {extras}:
    if name != "scipy":  # JAX itself needs it
        sys.modules[name] = None
before = set(sys.modules)
import equidit
rooms = {{n.split(".")[1] for n in sys.modules if n.startswith("equidit.")}}
assert not rooms & {{*{TOWERS["commands"]}}}
import equidit.__main__
sys.argv = ["equidit", "train"]
assert equidit.__main__.main() == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'equidit[train]'" in done.stderr


def test_wrong_shape_shows_shapes_and_axes():
    with pytest.raises(TypeCheckError) as error:
        edt.modulate(jnp.ones((3, 4)), jnp.ones(5), jnp.ones(4))
    for part in ("shift", "f32[5]", "tokens=3", "dim=4", "tokens dim"):
        assert part in str(error.value)


def test_batch_axis_is_refused():
    with pytest.raises(TypeCheckError, match="channels height width"):
        edt.patchify(jnp.ones((2, 1, 8, 8)), 2)


def test_checks_can_be_turned_off(monkeypatch):
    code = """
import jax.numpy as jnp, equidit as edt
try:
    edt.modulate(jnp.ones((2, 3), int), jnp.ones(3), jnp.ones(3))
except Exception as error:
    print(type(error).__name__)
"""

    def printed():
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert printed() == "TypeCheckError"
    monkeypatch.setenv("JAXTYPING_DISABLE", "1")
    assert printed() == ""


@pytest.mark.parametrize("module", [edt, edt.diffusion, edt.hosts])
def test_public_names_have_docstrings(module):
    for name in dir(module):
        thing = getattr(module, name)
        if not name.startswith("_") and callable(thing) and not get_origin(thing):
            # A dataclass without one is given its signature.
            assert thing.__doc__, name
            assert not thing.__doc__.startswith(f"{name}("), name
