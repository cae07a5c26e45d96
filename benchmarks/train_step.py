"""How fast is a training step, as images/s and as a share of what the machine can multiply?

A training step is counted as three forward passes (one, and two more for the gradient) of
`2 * num_macs` floating-point operations an image; element-wise work, optimizer and EMA are not
counted. The machine's rate is that of a square float32 matrix product, measured in turns with the
steps.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import equidit as edt
from equidit import diffusion as dfn

from .common import interleaved, median, write


def train_step(name: str, batch_size: int, shape: tuple[int, int, int]) -> Callable[[], Any]:
    """A call that makes one more training step of that config on random latents."""
    network = edt.build(name, key=jax.random.key(0))
    optimizer = optax.adam(1e-4)
    schedule = dfn.Schedule(dfn.linear_betas())

    def loss(network: Any, example: Any, key: Any) -> Any:
        return dfn.hybrid_loss(network, schedule, *example, key=key)

    step = edt.make_train_step(loss, optimizer)
    state = edt.init_state(network, optimizer)
    batch = (
        jax.random.normal(jax.random.key(1), (batch_size, *shape)),
        jnp.arange(batch_size),
    )

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch, jax.random.key(2))
        return metrics

    return call


def matmul(size: int) -> Callable[[], Any]:
    """A call that multiplies two square matrices."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--configs", nargs="+", default=["DiT-S/4", "DiT-S/2"], help="of CONFIGS")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--matmul-size", type=int, default=2048)
    options = parser.parse_args(arguments)

    shape = (4, 32, 32)
    calls = {name: train_step(name, options.batch_size, shape) for name in options.configs}
    seconds = interleaved(
        calls | {"matmul": matmul(options.matmul_size)}, repetitions=options.repetitions
    )
    rate = 2 * options.matmul_size**3 / median(seconds["matmul"])
    rows = {}
    for name in options.configs:
        images = options.batch_size / median(seconds[name])
        flops = 3 * 2 * edt.num_macs(name, *shape[1:]) * images
        rows[name] = {
            "images_per_second": images,
            "flops_per_second": flops,
            "fraction_of_matmul": flops / rate,
        }
    path = write(
        "train_step",
        {
            "convention": "an image costs 3 forward passes of 2 * num_macs FLOPs",
            "dtype": "float32",
            "shape": shape,
            "batch_size": options.batch_size,
            "matmul": {"size": options.matmul_size, "flops_per_second": rate},
            "results": rows,
            "seconds": seconds,
        },
    )
    print(f"float32 {options.matmul_size}x{options.matmul_size} product: {rate / 1e9:.1f} GFLOP/s")
    print("| config | images/s | GFLOP/s | share of the matmul rate |\n|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['images_per_second']:.2f} | {row['flops_per_second'] / 1e9:.1f} "
            f"| {row['fraction_of_matmul']:.2f} |"
        )
    print(path)


if __name__ == "__main__":
    main()
