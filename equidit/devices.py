"""What accelerators can do by their makers' word: compute, memory, links; each with its source.

Rates are peaks, which no program reaches. Matrix rates are dense, of bfloat16 with sums in float32.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

_GIB = 2**30
_CLOUD = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
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


# A pod's "all-reduce bandwidth" in Google's tables is that of all links of all chips in one
# direction: links are that, over the chips and a chip's links.
CHIPS = (
    Chip("TPU v2", ("TPU v2",), 2, 46e12, 16 * _GIB, 700e9, 62e9, 4, _NORRIE),
    Chip("TPU v3", ("TPU v3",), 2, 123e12, 32 * _GIB, 900e9, 82e9, 4, f"{_CLOUD}/v3; {_NORRIE}"),
    Chip("TPU v4", ("TPU v4",), 1, 275e12, 32 * _GIB, 1200e9, 45e9, 6, f"{_CLOUD}/v4"),
    Chip(
        "TPU v5e",
        ("TPU v5 lite", "TPU v5e"),
        1,
        197e12,
        16 * 10**9,
        819e9,
        50e9,
        4,
        f"{_CLOUD}/v5e",
    ),
    Chip(
        "TPU v5p", ("TPU v5p", "TPU v5"), 1, 459e12, 95 * 10**9, 2765e9, 100e9, 6, f"{_CLOUD}/v5p"
    ),
    Chip(
        "TPU v6e",
        ("TPU v6 lite", "TPU v6e"),
        1,
        918e12,
        32 * 10**9,
        1638e9,
        100e9,
        4,
        f"{_CLOUD}/v6e",
    ),
    Chip(
        "TPU7x",
        ("TPU7x", "TPU v7x", "TPU v7"),
        2,
        2307e12,
        192 * _GIB,
        7380e9,
        100e9,
        6,
        f"{_CLOUD}/tpu7x",
    ),
    Chip(
        "A100 40GB",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        1,
        312e12,
        40 * 10**9,
        1555e9,
        300e9,
        1,
        f"{_NVIDIA}/a100",
    ),
    Chip("A100 80GB", ("NVIDIA A100",), 1, 312e12, 80 * 10**9, 2039e9, 300e9, 1, f"{_NVIDIA}/a100"),
    Chip(
        "H100 PCIe", ("NVIDIA H100 PCIe",), 1, 756e12, 80 * 10**9, 2000e9, 0.0, 1, f"{_NVIDIA}/h100"
    ),
    Chip("H100 SXM", ("NVIDIA H100",), 1, 989e12, 80 * 10**9, 3350e9, 450e9, 1, f"{_NVIDIA}/h100"),
    Chip("H200", ("NVIDIA H200",), 1, 989e12, 141 * 10**9, 4800e9, 450e9, 1, f"{_NVIDIA}/h200"),
    Chip(
        "B200", ("NVIDIA B200",), 1, 2250e12, 180 * 10**9, 8000e9, 900e9, 1, f"{_NVIDIA}/dgx-b200"
    ),
    Chip("L4", ("NVIDIA L4",), 1, 121e12, 24 * 10**9, 300e9, 0.0, 1, f"{_NVIDIA}/l4"),
    Chip("L40S", ("NVIDIA L40S",), 1, 362e12, 48 * 10**9, 864e9, 0.0, 1, f"{_NVIDIA}/l40s"),
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
