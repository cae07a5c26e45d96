"""The benchmarks page, made of benchmarks/README.md and benchmarks/results/: nothing is copied."""

import re
import runpy
from pathlib import Path

ROOT = Path("benchmarks")
REPOSITORY = "https://github.com/equidit/equidit/blob/main"
picture = runpy.run_path("docs/_picture.py")["picture"]

ALTS = {
    "aot": "Estimated steps a second and memory on TPU pods, by config and layout",
    "captions": "Coloured shapes, drawn for captions whose pairs never occurred in training",
    "compare": "Wall and CPU time of equidit beside PyTorch, by config and task",
    "flops": "Multiply-adds and parameters of the twelve configs in the four block types",
    "guidance": "Classifier accuracy and Frechet distance by guidance scale and by sampling steps",
    "scaling": "Images a second and efficiency by number of devices",
    "throughput": "Images a second and share of the machine's peak, by config and program",
}


def page() -> str:
    """Markdown: every section with its picture, and with the tables that it refers to."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\A# .*\n", "", text)
    text = re.sub(r"<!--.*?-->\n", "", text)
    text = re.sub(r"!\[(.*?)\]\((.*?)\)", lambda m: _image(ROOT / m[2], m[1]), text)
    head, *sections = re.split(r"(?m)^(?=## )", text)
    return "".join([head, *map(_section, sections)])


def _section(text: str) -> str:
    for name in re.findall(r"\]\(results/(\w+)\.md\)", text):
        table = (ROOT / "results" / f"{name}.md").read_text()
        rows = sum(line.startswith("|") for line in table.splitlines()) - 2
        drawn = ROOT / "results" / f"{name}.png"
        if drawn.exists():
            text += f"\n{_image(drawn)}\n"
        indented = "".join(f"    {line}\n" if line else "\n" for line in table.splitlines())
        text += f'\n??? abstract "All {rows} rows of {name}"\n\n{indented}\n'
    # What else is linked lies beside the README.
    text = re.sub(r"\[(.*?)\]\(results/\w+\.md\)", r"`\1`", text)
    return re.sub(r"\]\((?!\w+:|#)(.*?)\)", rf"]({REPOSITORY}/benchmarks/\1)", text)


def _image(path: Path, alt: str = "") -> str:
    return picture(path, alt or ALTS[path.stem])
