"""The table and the picture of a part, made from its JSON files: those of all machines together."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from equidit._base.common import extra

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """How the results of a part are shown.

    **Fields:**

    - `part`: its name; read are `part.json` and `part-MACHINE.json`.
    - `columns`: by heading, the cell of a row; `None` is shown as a dash.
    - `bar`: a row's value in the picture, and `mark` one to compare it with, if any.
    - `label`: of the row in the picture. `unit`: of the axis.
    - `keep`: which rows are in the picture.
    """

    part: str
    columns: Mapping[str, Callable[[Row], str | None]]
    bar: Callable[[Row], float | None]
    label: Callable[[Row], str]
    unit: str
    mark: Callable[[Row], float | None] = lambda row: None
    mark_label: str = "the paper"
    keep: Callable[[Row], bool] = lambda row: True
    log: bool = False


def rows_of(part: str, folder: Path) -> list[Row]:
    """The rows of all machines, each with its `machine`."""
    rows = []
    for path in sorted(folder.glob(f"{part}.json")) + sorted(folder.glob(f"{part}-*.json")):
        name = path.stem.removeprefix(part).strip("-")
        rows += [{"machine": name} | row for row in json.loads(path.read_text())["results"]]
    return rows


def table(report: Report, rows: list[Row]) -> str:
    """Markdown, with a column for the machine if there are several."""
    columns = dict(report.columns)
    if len({row["machine"] for row in rows}) > 1:
        columns = {"machine": lambda row: row["machine"]} | columns
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) or "-" for cell in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(report: Report, rows: list[Row], path: Path) -> None:
    """A bar a row, and a mark where there is something to compare with."""
    with extra("train"):
        from matplotlib.figure import Figure
    rows = [row for row in rows if report.keep(row) and report.bar(row) is not None]
    if not rows:
        return
    several = len({row["machine"] for row in rows}) > 1
    labels = [report.label(row) + (f" ({row['machine']})" if several else "") for row in rows]
    places = range(len(rows))
    figure = Figure(figsize=(8, 1 + 0.24 * len(rows)), dpi=100, layout="constrained")
    panel = figure.subplots()
    panel.barh(places, [report.bar(row) or 0.0 for row in rows], color="tab:blue", alpha=0.7)
    marks = [(i, value) for i, row in enumerate(rows) if (value := report.mark(row)) is not None]
    if marks:
        y, x = zip(*marks, strict=True)
        panel.plot(x, y, "k|", markersize=12, label=report.mark_label)
        panel.legend()
    panel.set_yticks(places, labels, fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlabel(report.unit)
    if report.log:
        panel.set_xscale("log")
    panel.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def write_report(report: Report, folder: Path) -> str:
    """Reads the JSON, writes `part.md` and `part.png` beside it, and returns the table."""
    rows = rows_of(report.part, folder)
    text = table(report, rows)
    (folder / f"{report.part}.md").write_text(text)
    plot(report, rows, folder / f"{report.part}.png")
    return text


def gib(value: float | None) -> str | None:
    """Bytes in GiB."""
    return None if value is None else f"{value / 2**30:.2f}"


def number(value: float | None, digits: int = 2) -> str | None:
    """A number of so many digits after the point."""
    return None if value is None else f"{value:,.{digits}f}"
