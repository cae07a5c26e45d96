import gc
import os
from collections import Counter
from pathlib import Path

# Every test that builds the same network would compile it again, and so would every process that a
# test starts: they inherit this. `pytest --cache-clear` empties it.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Compiling is most of the tests' time, and a third of that without these emitters.
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false"),
}

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


@pytest.fixture(scope="module")
def compile_quickly():
    """For modules whose programs hardly run twice, and that ask for no bits."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Compiled programs hold memory maps, of which Linux grants a process 65,530 by default."""
    yield
    jax.clear_caches()
    gc.collect()
