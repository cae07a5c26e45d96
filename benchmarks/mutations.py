"""Do the quick tests see wrong code?

Each mutation is one wrong line in a copy of the tree. The tests named beside it, without the slow
ones, must pass on the unchanged copy and fail on the changed one.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .common import RESULTS, writable, write

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in the one function of that name that has it, wherever that lies."""

    name: str
    function: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "exact GELU",
        "MLP.__call__",
        "approximate=True",
        "approximate=False",
        "test_golden.py::test_network",
    ),
    Mutation(
        "epsilon 1e-5 in layer norms",
        "layer_norm",
        "rsqrt(variance + eps)",
        "rsqrt(variance + 10 * eps)",
        "test_golden.py::test_network",
    ),
    Mutation(
        "heads and their features swapped",
        "Attention._heads",
        "reshape(x.shape[0], self.num_heads, -1)",
        "reshape(x.shape[0], -1, self.num_heads).swapaxes(1, 2)",
        "test_golden.py::test_network",
    ),
    Mutation(
        "sine before cosine",
        "timestep_features",
        "[jnp.cos(angle), jnp.sin(angle)]",
        "[jnp.sin(angle), jnp.cos(angle)]",
        "nn/test_ops.py",
    ),
    Mutation(
        "shift and scale swapped",
        "modulate",
        "x * (1 + scale[None]) + shift[None]",
        "x * (1 + shift[None]) + scale[None]",
        "nn/test_ops.py",
    ),
    Mutation(
        "schedule a step late",
        "at",
        "table.at[t]",
        "table.at[t - 1]",
        "test_golden.py::test_diffusion",
    ),
    Mutation(
        "posterior variance is beta",
        "Schedule.__init__",
        "self.posterior_variance = table(variance)",
        "self.posterior_variance = table(betas)",
        "diffusion/test_diffusion.py::test_tables_agree_with_each_other",
    ),
    Mutation(
        "guidance scale off by one",
        "Guided._guided",
        "kept + (scale - 1) * (kept - reference)",
        "kept + scale * (kept - reference)",
        "test_guidance.py::test_formula",
    ),
    Mutation(
        "EMA never moves",
        "ema_update",
        "jnp.asarray(1 - decay, old.dtype)",
        "jnp.asarray(0, old.dtype)",
        "train/test_train.py::test_ema_decays",
    ),
    Mutation(
        "gradient averaged twice",
        "over_devices",
        "total.astype(grad.dtype) / count",
        "total.astype(grad.dtype) / count**2",
        "train/test_train.py::test_gradients_are_not_scaled_by_the_device_count",
    ),
    Mutation(
        "one key for the whole batch",
        "_example_keys",
        "jax.random.fold_in(jax.random.fold_in(key, step), i)",
        "jax.random.fold_in(key, step)",
        "train/test_train.py::test_every_example_and_step_has_its_own_randomness",
    ),
    Mutation(
        "rows placed one too early",
        "Unfinished.write",
        "[rows.start : rows.stop] = value",
        "[max(rows.start - 1, 0) : max(rows.start - 1, 0) + len(value)] = value",
        "cli/test_resumable.py::test_every_row_is_written_once_by_the_group_that_owns_it",
    ),
    Mutation(
        "fingerprints not compared",
        "Record.check_fingerprints",
        "if digits != self.arrays[name][2]",
        "if False",
        "checkpoint/test_checkpoints.py::test_flipped_values_are_seen_by_their_fingerprints",
    ),
    Mutation(
        "another config not refused",
        "Record.check_config",
        "if saved.get(name) != now.get(name)",
        "if False",
        "checkpoint/test_checkpoints.py::test_refused_without_falling_back",
    ),
    Mutation(
        "validation keys shared by all examples",
        "validate",
        "jax.random.fold_in(key, index)",
        "key",
        "test_uneven.py::test_validation_is_the_mean_over_a_loop",
    ),
    Mutation(
        "labels not checked",
        "check_labels",
        "if len(wrong)",
        "if False",
        "data/test_data.py::test_labels_out_of_range",
    ),
    Mutation(
        "safetensors' float32 read as integers",
        "_safetensors",
        "data[begin:end].view(dtype)",
        "data[begin:end].view(f'i{dtype.itemsize}')",
        "pretrained/test_pretrained.py::test_golden_networks_from_files",
    ),
)


def place(mutation: Mutation, root: Path) -> Path:
    """The file that has the function; ends if not exactly one function has the text once."""
    found = []
    for path in sorted((root / "equidit").rglob("*.py")):
        for name, text in _functions(path.read_text()):
            if name == mutation.function and text.count(mutation.old) == 1:
                found.append(path)
    if len(found) != 1:
        raise SystemExit(
            f"mutation {mutation.name!r}: {len(found)} functions {mutation.function} have "
            f"{mutation.old!r} once, not 1: follow the library's change in benchmarks/mutations.py"
        )
    return found[0]


def mutated(mutation: Mutation, source: str) -> str:
    """A module's source with the mutation."""
    for name, text in _functions(source):
        if name == mutation.function and text.count(mutation.old) == 1:
            return source.replace(text, text.replace(mutation.old, mutation.new), 1)
    raise ValueError(f"{mutation.function} is not there")


def _functions(source: str) -> list[tuple[str, str]]:
    """Functions and methods by name, with their text."""
    tree = ast.parse(source)
    found = [("", node) for node in tree.body]
    found += [(f"{c.name}.", n) for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body]
    return [
        (prefix + node.name, ast.get_source_segment(source, node) or "")
        for prefix, node in found
        if isinstance(node, ast.FunctionDef)
    ]


def passes(root: Path, tests: str) -> tuple[bool, float]:
    """Whether quick tests pass in a copy of the tree, and after how many seconds."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/{tests}"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):  # neither passed nor failed
        raise SystemExit(f"tests/{tests} did not run:\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0, time.monotonic() - start


def markdown(rows: list[dict[str, object]]) -> str:
    """The table of results."""
    lines = ["| mutation | function | tests | caught |", "|---|---|---|---|"]
    for row in rows:
        caught = "yes" if row["caught"] else "**no**"
        lines.append(f"| {row['name']} | `{row['function']}` | `{row['tests']}` | {caught} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose names contain this")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(arguments)
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.name]
    for mutation in MUTATIONS:
        place(mutation, ROOT)
    folder, rows = writable(args.results), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for part in ("equidit", "tests", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "mkdocs.yml"):
            shutil.copy(ROOT / part, root / part)
        for tests in sorted({mutation.tests for mutation in chosen}):
            if not passes(root, tests)[0]:
                raise SystemExit(f"tests/{tests} fails without any mutation")
        for mutation in chosen:
            path = place(mutation, root)
            source = path.read_text()
            path.write_text(mutated(mutation, source))
            passed, seconds = passes(root, mutation.tests)
            path.write_text(source)
            rows.append(vars(mutation) | {"caught": not passed, "seconds": round(seconds, 1)})
            print(f"{mutation.name}: {'MISSED' if passed else 'caught'}, {seconds:.0f} s")
            sys.stdout.flush()
    write("mutations", {"mutations": rows}, folder)
    (folder / "mutations.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
