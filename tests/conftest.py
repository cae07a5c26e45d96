import gc
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path

# Most of the tests' time is compiling. Programs are kept for other tests and for the processes that
# they start, which inherit this (`pytest --cache-clear` empties the folder), and compiled quickly
# rather than to run fast. What is set already stays.
_ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}
if version("jaxlib").startswith("0.10."):
    # These emitters are the slowest to compile. Later versions end at a flag that they lack.
    _ENVIRONMENT["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
os.environ |= _ENVIRONMENT | os.environ

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_xdist_auto_num_workers() -> int:
    """Each has several devices and some gigabytes of programs."""
    return min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Files with the most slow tests come first: a worker has a whole file, and none ends last."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config):
    """Why a slow test that somebody named did not run."""
    if config.option.markexpr == "not slow":
        terminalreporter.write_line('Tests marked slow were left out: -m "" runs them too.')


@pytest.fixture
def optimised():
    """For tests whose programs run for longer than they compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Compiled programs hold memory maps, of which Linux grants a process 65,530 by default."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_text().count("\n") > 15_000:
        jax.clear_caches()
        gc.collect()
