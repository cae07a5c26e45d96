"""What must be on the documentation site: its pages, and the public names of the library."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = [
    "equidit",
    "equidit.checkpoint",
    "equidit.configs",
    "equidit.data",
    "equidit.devices",
    "equidit.diffusion",
    "equidit.guidance",
    "equidit.hosts",
    "equidit.metrics",
    "equidit.pretrained",
    "equidit.train",
    "equidit.vae",
]


def public_names() -> dict[str, Any]:
    """Every public thing by its dotted name."""
    return {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in MODULES
        for name in _names(module)
    }


def _names(module: str) -> list[str]:
    """Re-exports (`from ._x import X as X`) and what the module itself defines."""
    file = importlib.import_module(module).__file__
    assert file is not None
    names = []
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and "TypeVar" not in ast.unparse(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    modules = [name for name in names if f"{module}.{name}" in MODULES]
    return [name for name in names if not name.startswith("_") and name not in modules]


def documented() -> dict[str, list[str]]:
    """Every name that a page of the API renders, with the members that are shown of it."""
    found = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for block in re.findall(r"(?m)^::: \S+\n(?:    .*\n)*", page.read_text()):
            head, _, rest = block.partition("\n")
            options = (yaml.safe_load(rest) or {"options": {}})["options"]
            found[head.removeprefix("::: ")] = options.get("members", [])
    return found


def resolve(name: str) -> Any:
    """The thing that a dotted name stands for."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


def members(cls: type) -> set[str]:
    """Public methods and properties that a class itself defines."""
    return {
        name
        for name, member in vars(cls).items()
        if (name == "__call__" or not name.startswith("_"))
        and (inspect.isroutine(inspect.unwrap(member)) or isinstance(member, property))
        and getattr(member, "__doc__", None)
    }


def config() -> dict[str, Any]:
    """mkdocs.yml."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages() -> list[str]:
    """The pages of the navigation, as paths below docs/."""

    def walk(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        values = node if isinstance(node, list) else node.values()
        return [page for value in values for page in walk(value)]

    return walk(config()["nav"])


def address(page: str) -> str:
    """Where a page lies on the site."""
    path = re.sub(r"(^|/)(index|README)\.md$", r"\1", page)
    return re.sub(r"\.md$", "/", path)
