"""What does a checkpoint survive, and what does it cost?

Files of checkpoints are damaged in copies of a run's folder; savers are killed; the disk is full.
Each time, what is restored must be bit for bit what was saved, or refused with a
`CheckpointError`. Then: seconds, bytes and memory of saving and restoring.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import equidit as edt
from equidit.checkpoint import CheckpointError, Checkpoints
from equidit.checkpoint.hashing import array_hash

from .common import RESULTS, interleaved, median, write

CONFIG = {"model": {"depth": 2}, "seed": 0}
Case = tuple[str, Path, Callable[[Path], None]]


def small_state(step: int) -> dict[str, Any]:
    """A state of several dtypes, its arrays depending on the step."""
    keys = jax.random.split(jax.random.key(step), 3)
    return {
        "network": {"weight": jax.random.normal(keys[0], (64, 48)), "bias": jnp.ones(48)},
        "ema": jax.random.normal(keys[1], (64, 48)).astype(jnp.bfloat16),
        "count": jnp.asarray(step, jnp.int32),
        "name": "not an array",
    }


def make_run(folder: Path) -> None:
    """Checkpoints of steps 1 and 2."""
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small_state(step), data={"index": step}, config=CONFIG)


def damages(folder: Path, seed: int = 0) -> Iterator[Case]:
    """Every kind of damage to every file of the newest checkpoint: kind, file, what does it."""
    rng = random.Random(seed)

    def cut(size: int) -> Callable[[Path], None]:
        return lambda path: os.truncate(path, size)

    def flip(bit: int) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)

        return apply

    for path in sorted(p for p in (folder / "2").rglob("*") if p.is_file()):
        relative, size = path.relative_to(folder), path.stat().st_size
        yield "removed", relative, Path.unlink
        yield "emptied", relative, cut(0)
        for shorter in {size // 2, size - 1, rng.randrange(size)} - {0}:
            yield "truncated", relative, cut(shorter)
        for _ in range(9):
            yield "bit flipped", relative, flip(rng.randrange(8 * size))


def outcome(folder: Path, case: Case) -> str:
    """Damages a copy of the folder and restores from it: what became of it."""
    _, relative, damage = case
    with tempfile.TemporaryDirectory() as copied:
        copy = Path(copied) / "run"
        shutil.copytree(folder, copy)
        damage(copy / relative)
        checkpoints = Checkpoints(copy, read_only=True)
        like = eqx.filter_eval_shape(small_state, 0) | {"name": "not an array"}
        try:
            alone = checkpoints.restore(like, step=2)
        except CheckpointError:
            alone = None
        except Exception as error:
            return f"WRONG: {type(error).__name__} of that step"
        try:
            found = checkpoints.restore(like, config=CONFIG)
        except CheckpointError:
            return "WRONG: no fallback to the older checkpoint"
        except Exception as error:
            return f"WRONG: {type(error).__name__}"
        for restored in filter(None, (alone, found)):
            saved = small_state(restored.step), {"index": restored.step}, CONFIG
            if not same((restored.state, restored.data, restored.config), saved):
                return "WRONG: other values"
        if (alone is None, found.step, bool(found.fell_back)) == (True, 1, True):
            return "refused, fell back"
        if alone is not None and found.step == 2:
            return "all bits there nevertheless"
        return "WRONG: restored and refused at once"


def same(a: Any, b: Any) -> bool:
    """Whether two trees agree in every bit, dtype and leaf that is no array."""

    def bits(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return jax.tree.map(bits, a) == jax.tree.map(bits, b)


def damaged_files(every: int = 1) -> dict[str, dict[str, int]]:
    """Counts of outcomes by kind of damage, of every so-manieth case."""
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as base:
        make_run(Path(base))
        for case in list(damages(Path(base)))[::every]:
            counts.setdefault(case[0], Counter())[outcome(Path(base), case)] += 1
    return {kind: dict(count) for kind, count in counts.items()}


_SAVER = """
import sys
from pathlib import Path
import jax
from equidit.checkpoint import Checkpoints
from benchmarks.faults import CONFIG, big_state, limit_files
if len(sys.argv) > 3:
    limit_files(int(sys.argv[3]))
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    first = max(checkpoints.steps(), default=0) + 1
    for step in range(first, first + int(sys.argv[2])):
        print(step, flush=True)
        checkpoints.save(step, big_state(step), data={"index": step}, config=CONFIG)
"""


def big_state(step: int) -> dict[str, Any]:
    """32 MB, which take a moment to write."""
    return {f"a{i}": jax.random.normal(jax.random.key(step + i), (1024, 1024)) for i in range(8)}


def _saver(folder: Path, saves: int, *limit: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SAVER, str(folder), str(saves), *map(str, limit)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_savers(kills: int = 20, seed: int = 0) -> dict[str, dict[str, int]]:
    """`kill -9` at random moments of a process that saves without a pause."""
    rng, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "run"
        for _ in range(kills):
            before = Checkpoints(folder, read_only=True).steps()
            with _saver(folder, 10**6) as process:
                assert process.stdout is not None
                wanted = rng.randrange(1, 6)
                for _ in zip(range(wanted), process.stdout, strict=False):
                    pass
                time.sleep(rng.random() * 0.3)
                process.send_signal(signal.SIGKILL)
            counts[_after_kill(folder, before)] += 1
    return {"kill -9 while saving": dict(counts)}


def _after_kill(folder: Path, before: list[int]) -> str:
    with Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
        if {path.name for path in folder.iterdir()} != {"lock", *map(str, steps)}:
            return "WRONG: leftovers"
        for step in steps:
            found = checkpoints.restore(eqx.filter_eval_shape(big_state, 0), step=step)
            if not same(found.state, big_state(step)):
                return "WRONG: other values"
        if before and max(steps, default=0) < max(before):
            return "WRONG: lost a checkpoint"
    return "every checkpoint whole"


def full_disks(tries: int = 10) -> dict[str, dict[str, int]]:
    """No file may grow beyond ever more bytes, which is what a full disk looks like to a writer."""
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as base:
        for i in range(tries):
            folder = Path(base) / str(i)
            with _saver(folder, 1) as process:
                process.communicate()
            limit = int(1000 * 2 ** (i * 1.5))
            with _saver(folder, 1, limit) as process:
                _, errors = process.communicate()
            wrong = _after_kill(folder, [1])
            if wrong.startswith("WRONG"):
                counts[wrong] += 1
            elif process.returncode == 0:
                counts["there was room"] += 1
            elif "CheckpointError: the checkpoint of step 2 could not be saved" in errors:
                counts["CheckpointError, earlier checkpoint whole"] += 1
            else:
                counts[f"WRONG: {errors[-80:]}"] += 1
    return {"disk full while saving": dict(counts)}


def limit_files(size: int) -> None:
    """Lets this process write no file beyond `size` bytes: it gets an error instead."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# A campaign is a function without arguments that returns counts of outcomes by kind of fault; an
# outcome that must not be begins with "WRONG".
CAMPAIGNS: dict[str, Callable[[], dict[str, dict[str, int]]]] = {
    "files": damaged_files,
    "savers": killed_savers,
    "disks": full_disks,
}


def fingerprint_seconds(megabytes: int = 256) -> list[float]:
    """Of one float32 array of that size."""
    array = jax.random.normal(jax.random.key(0), (megabytes, 2**18))
    return interleaved({"fingerprint": lambda: array_hash(array)}, 7)["fingerprint"]


def training_state(config: str) -> Any:
    """Parameters, EMA and Adam's two moments."""
    return edt.init_state(edt.build(config, key=jax.random.key(0)), optax.adam(1e-4))


def cost(config: str) -> dict[str, float]:
    """Saves and restores that config's training state, each in a process of its own."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as base:
        for part in MEASURED:
            command = [sys.executable, "-m", "benchmarks.faults", "--measure", part, config, base]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures |= json.loads(done.stdout)
    return figures


def _random(leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)


def measure_save(config: str, folder: Path) -> dict[str, float]:
    """The pause is what `save` takes to return; the first one compiles the fingerprints."""
    # Zero moments and gates, as at the start of training, would compress to nothing.
    state = jax.tree.map(_random, eqx.filter_eval_shape(training_state, config))
    jax.block_until_ready(state)
    pauses, totals = [], []
    with Checkpoints(folder, keep_last=1) as checkpoints:
        for step in range(3):
            start = time.perf_counter()
            checkpoints.save(step, state, data={}, config={})
            pauses.append(time.perf_counter() - start)
            checkpoints.wait()
            totals.append(time.perf_counter() - start)
    last = [path for path in (folder / "2").rglob("*") if path.is_file()]
    return {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "disk_bytes": sum(path.stat().st_size for path in last),
        "first_pause_seconds": pauses[0],
        "pause_seconds": median(pauses[1:]),
        "save_seconds": median(totals[1:]),
    }


def measure_restore(config: str, folder: Path) -> dict[str, float]:
    """In a process that has not yet compiled the fingerprints."""
    like = eqx.filter_eval_shape(training_state, config)
    with peak_memory() as peak:
        start = time.perf_counter()
        jax.block_until_ready(Checkpoints(folder, read_only=True).restore(like).state)
        seconds = time.perf_counter() - start
    return {"restore_seconds": seconds, "restore_peak_bytes": max(peak)}


def measure_part(config: str, folder: Path) -> dict[str, float]:
    """Of the EMA alone."""
    like = eqx.filter_eval_shape(training_state, config).ema
    before = bytes_read()
    start = time.perf_counter()
    jax.block_until_ready(Checkpoints(folder, read_only=True).restore_part(like, "ema").state)
    seconds = time.perf_counter() - start
    return {"ema_seconds": seconds, "ema_read_bytes": bytes_read() - before}


MEASURED: dict[str, Callable[[str, Path], dict[str, float]]] = {
    "save": measure_save,
    "restore": measure_restore,
    "part": measure_part,
}


def bytes_read() -> int:
    """By this process so far, from files or whatever else."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Samples of this process's anonymous memory, above what it had before."""
    before, samples, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            samples.append(_anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the campaigns and measures, prints tables and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--campaigns", nargs="*", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument(
        "--configs", nargs="*", default=["DiT-S/2", "DiT-B/2", "DiT-L/2"], help="of CONFIGS"
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        part, config, folder = options.measure
        print(json.dumps(MEASURED[part](config, Path(folder))))
        return

    path = RESULTS / "faults.json"
    before = json.loads(path.read_text()) if path.exists() else {"faults": {}, "costs": {}}
    faults: dict[str, dict[str, int]] = before["faults"]
    for name in options.campaigns:
        faults |= CAMPAIGNS[name]()
    print("| fault | tried | outcome |\n|---|---|---|")
    for kind, counts in faults.items():
        listed = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        print(f"| {kind} | {sum(counts.values())} | {listed} |")
    seconds = fingerprint_seconds()
    print(f"fingerprint of 256 MB: {median(seconds):.3f} s")
    costs = before["costs"] | {config: cost(config) for config in options.configs}
    print("| config | state | on disk | pause | save | restore | peak memory | EMA | EMA read |")
    print("|---|---|---|---|---|---|---|---|---|")
    for config, row in costs.items():
        print(
            f"| {config} | {row['state_bytes'] / 1e9:.2f} GB | {row['disk_bytes'] / 1e9:.2f} GB "
            f"| {row['pause_seconds']:.2f} s | {row['save_seconds']:.1f} s "
            f"| {row['restore_seconds']:.1f} s | {row['restore_peak_bytes'] / 1e9:.2f} GB "
            f"| {row['ema_seconds']:.1f} s | {row['ema_read_bytes'] / 1e9:.2f} GB |"
        )
    path = write(
        "faults",
        {"faults": faults, "fingerprint_256_mb_seconds": seconds, "costs": costs},
    )
    print(path)


if __name__ == "__main__":
    main()
