import ast
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import equidit as edt

PACKAGE = Path(edt.__file__).parent
BASE = {"_arguments", "_common", "_parts", "_storage", "_types"}
# Lower floors first; the three towers stand side by side on `BASE`.
NETWORK = [
    "_ops",
    "_layers",
    "_conditioning",
    "_blocks",
    "_stack",
    "_dit",
    "_parameters",
    "_counting",
    "configs",
    "vae",
    "_pickles",
    "_files",
    "_unwrap",
    "_names",
    "_sizes",
    "pretrained",
]
PROCESS = ["_schedule", "_objectives", "_steps", "_timesteps", "diffusion", "guidance"]
TRAINING = [
    "_ema",
    "_sharding",
    "_handover",
    "train",
    "hosts",
    "_fingerprint",
    "_record",
    "_orbax",
    "_together",
    "_checkpoints",
    "checkpoint",
    "_images",
    "_latents",
    "data",
    "metrics",
    "devices",
]
TOP = [
    "_resumable",
    "_sampling",
    "_report",
    "_settings",
    "_task",
    "_folder",
    "_log",
    "_losses",
    "_watch",
    "_run",
    "_source",
    "_npz",
    "_encode",
    "cli",
    "__main__",
]


def _imports(name: str) -> set[str]:
    """Modules of the package that a module imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_every_module_has_a_floor():
    named = {*BASE, *NETWORK, *PROCESS, *TRAINING, *TOP, "__init__"}
    assert named == {path.stem for path in PACKAGE.glob("*.py")}


@pytest.mark.parametrize("tower", [NETWORK, PROCESS, TRAINING])
def test_imports_go_down(tower):
    for i, name in enumerate(tower):
        assert _imports(name) <= BASE | set(tower[:i]), name


def test_top_floor_imports_go_down():
    below = BASE | {*NETWORK, *PROCESS, *TRAINING}
    for i, name in enumerate(TOP):
        assert _imports(name) <= below | set(TOP[:i]), name


@pytest.mark.parametrize("name", [*sorted(BASE), *NETWORK, *PROCESS, *TRAINING])
def test_library_neither_prints_nor_reads_the_environment(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in names
    assert not {"environ", "getenv"} & attributes
    assert name == "_storage" or "open" not in names


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
assert not [n for n in sys.modules if n.startswith("equidit.") and n.split(".")[1] in {TOP}]
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
        if not name.startswith("_") and callable(thing):
            # A dataclass without one is given its signature.
            assert thing.__doc__, name
            assert not thing.__doc__.startswith(f"{name}("), name
