"""What accelerators can do by their makers' word: compute, memory, links; each with its source.

Rates are peaks, which no program reaches. Matrix rates are dense, of bfloat16 with sums in float32.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

_GIB = 2**30
_GB = 10**9
_CLOUD = "https://docs.cloud.google.com/tpu/docs"
_NORRIE = "Norrie et al., The Design Process for Google's Training Chips, IEEE Micro 41(2), 2021"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, of which JAX makes one device or several.

    **Fields:**

    - `name`: what its maker calls it.
    - `kinds`: JAX's `device_kind`, as it begins.
    - `devices`: JAX's devices a chip. All else is of the whole chip.
    - `flops`: bfloat16 FLOP/s. `memory`: bytes. `bandwidth`: of the memory, bytes/s.
    - `link`: bytes/s of one link in one direction; `links` is how many a chip has. For GPUs NVLink
        as one link to a switch, 0 where there is none.
    - `source`: where the figures are from.
    """

    name: str
    kinds: tuple[str, ...]
    devices: int
    flops: float
    memory: int
    bandwidth: float
    link: float
    links: int
    source: str


def _gpu(
    name: str, kinds: str, tera: int, memory: int, bandwidth: int, link: int, page: str
) -> Chip:
    source = f"https://www.nvidia.com/en-us/data-center/{page}"
    rates = bandwidth * 1e9, link * 1e9
    return Chip(name, tuple(kinds.split(", ")), 1, tera * 1e12, memory * _GB, *rates, 1, source)


def _tpu(
    name: str,
    kinds: str,
    devices: int,
    tera: int,
    memory: int,
    bandwidth: int,
    link: int,
    links: int,
    source: str,
) -> Chip:
    kind, rates = tuple(kinds.split(", ")), (bandwidth * 1e9, link * 1e9)
    return Chip(name, kind, devices, tera * 1e12, memory, *rates, links, source)


# In TFLOP/s and GB/s. A pod's "all-reduce bandwidth" in Google's tables is that of all links of all
# chips in one direction: links are that, over the chips and a chip's links.
CHIPS = (
    _tpu("TPU v2", "TPU v2", 2, 46, 16 * _GIB, 700, 62, 4, _NORRIE),
    _tpu("TPU v3", "TPU v3", 2, 123, 32 * _GIB, 900, 82, 4, f"{_CLOUD}/v3; {_NORRIE}"),
    _tpu("TPU v4", "TPU v4", 1, 275, 32 * _GIB, 1200, 45, 6, f"{_CLOUD}/v4"),
    _tpu("TPU v5e", "TPU v5 lite, TPU v5e", 1, 197, 16 * _GB, 819, 50, 4, f"{_CLOUD}/v5e"),
    _tpu("TPU v5p", "TPU v5p, TPU v5", 1, 459, 95 * _GB, 2765, 100, 6, f"{_CLOUD}/v5p"),
    _tpu("TPU v6e", "TPU v6 lite, TPU v6e", 1, 918, 32 * _GB, 1638, 100, 4, f"{_CLOUD}/v6e"),
    _tpu("TPU7x", "TPU7x, TPU v7x, TPU v7", 2, 2307, 192 * _GIB, 7380, 100, 6, f"{_CLOUD}/tpu7x"),
    _gpu("A100 40GB", "NVIDIA A100-SXM4-40GB, NVIDIA A100-PCIE-40GB", 312, 40, 1555, 300, "a100"),
    _gpu("A100 80GB", "NVIDIA A100", 312, 80, 2039, 300, "a100"),
    _gpu("H100 PCIe", "NVIDIA H100 PCIe", 756, 80, 2000, 0, "h100"),
    _gpu("H100 SXM", "NVIDIA H100", 989, 80, 3350, 450, "h100"),
    _gpu("H200", "NVIDIA H200", 989, 141, 4800, 450, "h200"),
    _gpu("B200", "NVIDIA B200", 2250, 180, 8000, 900, "dgx-b200"),
    _gpu("L4", "NVIDIA L4", 121, 24, 300, 0, "l4"),
    _gpu("L40S", "NVIDIA L40S", 362, 48, 864, 0, "l40s"),
)
"""The chips that are known: TPUs v2 to TPU7x, and NVIDIA's A100 to B200, L4 and L40S."""


def chip_of(kind: str) -> Chip | None:
    """The chip of a device of that `device_kind`, by its longest beginning.

    **Arguments:**

    - `kind`: e.g. `jax.devices()[0].device_kind`.

    **Returns:**

    A row of [`equidit.devices.CHIPS`][], or `None` if unknown.
    """
    found = [(len(k), chip) for chip in CHIPS for k in chip.kinds if _begins(kind, k)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _begins(kind: str, known: str) -> bool:
    """As words, so that an L4 is no L40S."""
    kind, known = kind.lower(), known.lower()
    return kind == known or (kind.startswith(known) and not kind[len(known)].isalnum())


def peak_flops(device: Any = None) -> float | None:
    """FLOP/s of a device at best, in bfloat16; `None` for one that is not known.

    A multiply-add is two FLOPs. For a CPU it is measured: the best rate of float32 products of
    1024x1024 matrices, of all of this process's CPU devices together, divided among them.

    **Arguments:**

    - `device`: one of JAX's; `None` is the first.

    **Returns:**

    FLOP/s.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return _matmul_flops() / jax.local_device_count()
    chip = chip_of(device.device_kind)
    return None if chip is None else chip.flops / chip.devices


def _matmul_flops(size: int = 1024, repeats: int = 5) -> float:
    product = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((size, size), jnp.float32)
    product(a, a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
