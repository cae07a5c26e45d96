import gc
import tempfile

import jax
import pytest

# Every test that builds the same network would compile it again.
_cache = tempfile.TemporaryDirectory(prefix="equidit-tests-")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
