import ast
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import re
from types import SimpleNamespace

import pytest
from site_names import DOCS, ROOT, address, documented, members, pages, public_names, resolve

import equidit as edt

SHOWN = documented()
THINGS = {name: resolve(name) for name in SHOWN}
CLASSES = sorted(name for name, thing in THINGS.items() if inspect.isclass(thing))


def _described():
    """Every function and method on the API pages, and the docstring that describes it."""
    for name, thing in THINGS.items():
        if inspect.isroutine(thing):
            yield name, thing, f"{thing.__doc__}"
        elif inspect.isclass(thing):
            own = "__init__" in vars(thing) and not dataclasses.is_dataclass(thing)
            if own and not getattr(thing, "_is_protocol", False):
                yield name, thing.__init__, f"{thing.__doc__} {thing.__init__.__doc__}"
            for member in set(SHOWN[name]) & members(thing):
                if not isinstance(vars(thing)[member], property):
                    method = getattr(thing, member)
                    yield f"{name}.{member}", method, f"{thing.__doc__} {method.__doc__}"


DESCRIBED = {name: (thing, text) for name, thing, text in _described()}


def _text(page):
    """A page's Markdown, with what it includes, without code."""
    text = (DOCS / page).read_text()
    text = re.sub(r'--8<-- "(.*?)"', lambda m: (ROOT / m[1]).read_text(), text)
    return re.sub(r"(?ms)^ *(```+|~~~+).*?^ *\1", "", text)


def test_every_public_name_is_on_an_api_page():
    shown = {(name.rpartition(".")[2], id(thing)) for name, thing in THINGS.items()}
    missing = [
        name
        for name, thing in public_names().items()
        if (name.rpartition(".")[2], id(thing)) not in shown
    ]
    assert not missing


@pytest.mark.parametrize("name", CLASSES)
def test_members_of_classes_are_shown(name):
    inherited = ("fget", "_asdict", "count", "index")
    assert members(THINGS[name]) - set(SHOWN[name]) - set(inherited) == set()


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_docstrings_tell_arguments_and_results(name):
    thing, text = DESCRIBED[name]
    if re.search(r"(?i)\b(as|those) (for|of)\b", text):
        return
    signature = inspect.signature(inspect.unwrap(thing))
    for parameter in list(signature.parameters):
        assert parameter == "self" or f"`{parameter}`" in text, parameter
    result = signature.return_annotation
    if result is not None and thing.__name__ != "__init__":
        assert re.search(r"(?i)\*\*Returns|result|returns", text), "what it returns"


def _rooms(page):
    """The rooms of what a page of the API documents: a page's own, but for aliases of types."""
    names = re.findall(r"(?m)^::: (\S+)", (DOCS / page).read_text())
    modules = [f"{getattr(resolve(name), '__module__', '')}".split(".") for name in names]
    return {module[1] for module in modules if module[0] == "equidit"} - {"_base"}


def test_pages_of_the_api_follow_the_rooms():
    drawing = re.search(r"(?s)```text\nequidit/\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text())
    assert drawing is not None
    order = re.findall(r"(?m)^  (\w+)(?:\.py|/) ", drawing[1])
    found = [_rooms(page) for page in pages() if page.startswith("api/")]
    assert all(len(rooms) <= 1 for rooms in found)
    places = [order.index(room) for rooms in found for room in rooms]
    assert places == sorted(places)


def test_navigation_holds_every_page_and_no_other():
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(pages()) == sorted(there)


@pytest.mark.parametrize("page", pages())
def test_headings_are_in_order(page):
    levels = [len(marks) for marks in re.findall(r"(?m)^(#+) ", _text(page))]
    assert levels[:1] == [1]
    assert levels.count(1) == 1
    for before, after in itertools.pairwise(levels):
        assert after <= before + 1


@pytest.mark.parametrize("page", pages())
def test_images_have_alternative_texts(page):
    text = _text(page)
    for alt in re.findall(r"!\[(.*?)\]\(", text, re.S):
        assert len(alt) > 10
    for tag in re.findall(r"<(?:img|object)\b.*?>", text, re.S):
        assert re.search(r'(alt|aria-label)="[^"]{10,}"', tag), tag


def _plain_blocks():
    """Python on the pages that is not executed when the site is built."""
    for page in filter(lambda page: (DOCS / page).exists(), pages()):
        found = re.findall(r"(?ms)^( *)```python *\n(.*?)^\1```", (DOCS / page).read_text())
        for number, (indent, code) in enumerate(found):
            code = re.sub(f"(?m)^{indent}", "", code)
            yield pytest.param(code, id=f"{page}-{number}")


@pytest.mark.parametrize("code", [*_plain_blocks()])
def test_code_that_is_only_shown_is_python_and_names_what_there_is(code):
    roots = {"edt": edt, "dfn": edt.diffusion, "pretrained": edt.pretrained}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in roots:
            root, *path = ast.unparse(node).split(".")
            if all(map(str.isidentifier, path)):
                functools.reduce(getattr, path, roots[root])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("equidit"):
            for alias in node.names:
                resolve(f"{node.module}.{alias.name}")


def test_llms_txt_lists_every_page():
    listed = re.findall(r"\]\((.*?)\)", (DOCS / "llms.txt").read_text())
    assert sorted(listed) == sorted(address(page) or "index.html" for page in pages())


@pytest.mark.parametrize(
    ("output", "status", "missing", "code"),
    [
        ("Build started", 0, [], 0),
        (
            "WARNING:x: Execution of python code block exited with errors\n session start; n1",
            0,
            [],
            0,
        ),
        (
            "WARNING:x: Execution of python code block exited with errors\n session faq; n1",
            0,
            [],
            1,
        ),
        ("Error: no such page", 0, [], 1),
        ("Build started", 1, [], 1),
        ("Build started", 0, ["no page faq/index.html"], 1),
    ],
)
def test_what_zensical_complains_of_is_listed_or_an_error(
    monkeypatch, output, status, missing, code
):
    spec = importlib.util.spec_from_file_location("zensical_step", ROOT / ".ci" / "zensical.py")
    assert spec is not None
    assert spec.loader is not None
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    done = SimpleNamespace(stdout=output, returncode=status)
    monkeypatch.setattr(step.subprocess, "run", lambda *args, **kwargs: done)
    monkeypatch.setattr(step, "missing", lambda site: missing)
    monkeypatch.setattr(step, "allowed", lambda: [r"code block[\s\S]*session start; n1\b"])
    assert step.main() == code
