"""What a reader of a signature should see, for mkdocstrings: shapes, and the fields of a Module."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import griffe

# Aliases of shapes, which the code uses to stay readable.
ALIASES = ("Image",)


class Signatures(griffe.Extension):
    """Writes aliases of shapes out, and gives dataclass-like classes their `__init__`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """After all modules are read."""
        shapes: dict[str, Any] = {name: pkg[f"seams.{name}"].value for name in ALIASES}
        for thing in _walk(pkg):
            if isinstance(thing, griffe.Function):
                for parameter in thing.parameters:
                    parameter.annotation = _written_out(parameter.annotation, shapes)
                thing.returns = _written_out(thing.returns, shapes)
            elif isinstance(thing, griffe.Attribute):
                thing.value = _written_out(thing.value, shapes)
            elif isinstance(thing, griffe.Class) and "__init__" not in thing.members:
                _add_init(thing)


def _walk(parent: Any) -> Iterator[Any]:
    for member in list(parent.members.values()):
        if not member.is_alias:
            yield member
            if member.is_module or member.is_class:
                yield from _walk(member)


def _written_out(node: Any, shapes: dict[str, Any]) -> Any:
    if isinstance(node, griffe.ExprName):
        return shapes.get(node.name, node)
    if isinstance(node, str):
        return re.sub(r"^'(.*)'$", r'"\1"', node)
    if isinstance(node, list | tuple):
        return type(node)(_written_out(item, shapes) for item in node)
    if isinstance(node, griffe.Expr):
        fields = [field.name for field in dataclasses.fields(node) if field.init]
        return dataclasses.replace(
            node, **{name: _written_out(getattr(node, name), shapes) for name in fields}
        )
    return node


def _add_init(cls: griffe.Class) -> None:
    if not {str(base).rpartition(".")[2] for base in cls.bases} & {"Module", "NamedTuple"}:
        return
    fields = [
        griffe.Parameter(
            field.name,
            annotation=field.annotation,
            kind=griffe.ParameterKind.positional_or_keyword,
            default=field.value if isinstance(field.value, griffe.ExprConstant | str) else None,
        )
        for field in cls.members.values()
        if isinstance(field, griffe.Attribute) and field.annotation
        if "ClassVar" not in str(field.annotation)
    ]
    this = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    cls.set_member(
        "__init__", griffe.Function("__init__", parameters=griffe.Parameters(this, *fields))
    )
