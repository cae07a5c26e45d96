"""What devices can do at best: the measure of model FLOPs utilisation."""

import re
import time
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 matrix products a second, by a part of JAX's name of the device. TPUs: the "System
# architecture" pages of cloud.google.com/tpu/docs, a chip; v2, v3 and v7x have two devices a chip.
# GPUs: the data sheets of nvidia.com, without sparsity.
PEAK_FLOPS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device: Any = None) -> float | None:
    """FLOP/s of a device at best, in bfloat16; `None` for one that is not known.

    A multiply-add is two FLOPs. For a CPU it is measured: the best rate of float32 products of
    1024x1024 matrices, of all of this process's CPU devices together, divided among them.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return _matmul_flops() / jax.local_device_count()
    kind = device.device_kind
    names = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", kind, re.IGNORECASE)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


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
