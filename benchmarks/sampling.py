"""What does `sample` cost beside the network's own evaluations, and how long does it compile?"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import equidit as edt
from equidit import diffusion as dfn

from .common import interleaved, median, write


def sampler(steps: int, batch_size: int) -> Any:
    """`draw(network, noise, label)`: a compiled DDIM sampler of so many steps."""
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, steps))

    @jax.jit
    def draw(network: Any, noise: Any, label: Any) -> Any:
        step = partial(dfn.ddim_step, network, schedule)
        run = partial(dfn.sample, step, schedule)
        keys = jax.random.split(jax.random.key(0), batch_size)
        return jax.vmap(lambda x, c, key: run(x, c, key=key))(noise, label, keys)

    return draw


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--config", default="DiT-S/4", help="of CONFIGS")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler that is timed")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args(arguments)

    network = edt.build(options.config, key=jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), (options.batch_size, 4, 32, 32))
    label = jnp.arange(options.batch_size)
    evaluate = jax.jit(lambda n, x, t, c: jax.vmap(n, (0, None, 0))(x, t, c))
    draw = sampler(options.steps, options.batch_size)

    def evaluations() -> Any:
        x = noise
        for t in range(options.steps):
            x = evaluate(network, noise, jnp.asarray(float(t)), label)
        return x

    calls = {"sample": lambda: draw(network, noise, label), "evaluations": evaluations}
    seconds = interleaved(calls, options.repetitions)
    ratios = [a / b for a, b in zip(seconds["sample"], seconds["evaluations"], strict=True)]

    compile_seconds = {}
    for steps in (10, 100, 1000):
        start = time.perf_counter()
        sampler(steps, options.batch_size).lower(network, noise, label).compile()
        compile_seconds[steps] = time.perf_counter() - start
    path = write(
        "sampling",
        {
            "config": options.config,
            "batch_size": options.batch_size,
            "steps": options.steps,
            "ratio": median(ratios),
            "ratios": ratios,
            "compile_seconds": compile_seconds,
            "seconds": seconds,
        },
    )
    print(f"sample / its {options.steps} evaluations: {median(ratios):.3f} (median)")
    print("compile: " + ", ".join(f"{n} steps {s:.1f} s" for n, s in compile_seconds.items()))
    print(path)


if __name__ == "__main__":
    main()
