"""Builds the site with Zensical, Material's successor; what `zensical.txt` does not list fails.

Zensical's exit status says nothing of code blocks that fail, so its output is read. Pages that are
missing are complaints, too.
"""

import re
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent


def allowed() -> list[str]:
    """One regular expression a line; `#` begins a comment."""
    lines = (HERE / "zensical.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def complaints(output: str) -> list[str]:
    """Each begins with a line of its own, and ends where the next one begins."""
    found = re.split(r"(?mi)^(?=(?:warning|error|traceback|thread)\b)", output)
    return [text.strip() for text in found[1:]]


def missing(site: Path) -> list[str]:
    """Pages of the navigation that were not made."""

    def walk(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        values = node if isinstance(node, list) else node.values()
        return [page for value in values for page in walk(value)]

    pages = walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    address = [re.sub(r"(^|/)(index|README)\.md$|\.md$", r"\1", page) for page in pages]
    made = [site / page / "index.html" for page in address]
    return [f"no page {path.relative_to(site)}" for path in made if not path.is_file()]


def main() -> int:
    command = ["zensical", "build", "--clean"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=ROOT, text=True, **pipes)
    found = complaints(done.stdout) + missing(ROOT / "site")
    wrong = [text for text in found if not any(re.search(p, text) for p in allowed())]
    for text in wrong:
        print(f"zensical: {text}\n", file=sys.stderr)
    if not done.returncode and not wrong:
        print(f"zensical: built; {len(found)} known complaints")
        return 0
    print(
        f"zensical: exit status {done.returncode}, {len(wrong)} unknown complaints", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
