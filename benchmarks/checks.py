"""What do the checks of shapes, and arguments of any kind, cost? Only tracing and eager calls pay.

Times tracing DiT-XL/2, and eager calls of small functions, in fresh processes taken in turns: this
package with and without its checks, and another checkout's (`--package DIR`) beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEASURE = """
import json, time
begun = time.perf_counter()
import equidit as edt
imported = time.perf_counter() - begun
import equinox as eqx, jax, jax.numpy as jnp
network = eqx.filter_eval_shape(edt.build, "DiT-XL/2", key=jax.random.key(0))
x = jax.ShapeDtypeStruct((4, 32, 32), jnp.float32)
label = jax.ShapeDtypeStruct((), jnp.int32)

def best(call, count, turns=7):
    seconds = []
    for _ in range(turns):
        begun = time.perf_counter()
        for _ in range(count):
            call()
        seconds.append((time.perf_counter() - begun) / count)
    return min(seconds)

def trace():
    jax.clear_caches()
    eqx.filter_make_jaxpr(lambda f, *a: f(*a))(network, x, label, label)

trace()
image, tokens, vector = jnp.ones((4, 32, 32)), jnp.ones((256, 64)), jnp.ones(64)
linear = edt.Linear(64, 64, key=jax.random.key(0))
for call in (lambda: edt.modulate(tokens, vector, vector), lambda: linear(tokens)):
    jax.block_until_ready(call())
print(json.dumps({
    "import (s)": imported,
    "trace DiT-XL/2 (s)": best(trace, 1),
    "eager modulate (us)": 1e6 * best(lambda: edt.modulate(tokens, vector, vector), 200),
    "eager Linear (us)": 1e6 * best(lambda: linear(tokens), 200),
}))
"""


def measure(package: Path, *, checks: bool) -> dict[str, float]:
    """The figures of one fresh process."""
    environment = os.environ | {"PYTHONPATH": str(package)}
    if not checks:
        environment["JAXTYPING_DISABLE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=environment,
        cwd=package,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints medians, and writes the JSON."""
    from benchmarks.common import write

    parser = argparse.ArgumentParser(prog="python -m benchmarks checks", description=__doc__)
    parser.add_argument("--package", type=Path, help="another checkout, beside this one")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    sides = {"with checks": (ROOT, True), "without checks": (ROOT, False)}
    if options.package is not None:
        sides["the other checkout"] = (options.package.absolute(), True)
    found = {name: [] for name in sides}
    for _ in range(options.turns):
        for name, (package, checks) in sides.items():
            found[name].append(measure(package, checks=checks))
    medians = {
        name: {figure: statistics.median(row[figure] for row in rows) for figure in rows[0]}
        for name, rows in found.items()
    }
    path = write("checks", {"medians": medians, "turns": found})
    print(json.dumps(medians, indent=2), path, sep="\n")


if __name__ == "__main__":
    main()
