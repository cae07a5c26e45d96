"""What becomes of a training run to which something happens?

Each incident befalls a small run of `equidit train` in mid-training. It must end as it is told to
(or go on), say so, and leave whole checkpoints. Afterwards it is resumed, and its weights,
averages, moments and metrics must be bit for bit those of a run to which nothing happened.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from equidit._base.disk import replace
from equidit.runs.folder import Folder

from . import kills
from .common import RESULTS, write

LOG_EVERY, SAVE_EVERY = 4, 20
SETTINGS = (
    "--model tiny --hidden-size 16 --depth 1 --num-heads 2 --batch-size 16 --held-out 8 "
    f"--log-every {LOG_EVERY} --sample-every {SAVE_EVERY} --sampling-steps 2"
)
HEARTBEAT = 10
# What a process may do instead of `equidit`'s main function: its clock jumps back by a day.
CLOCK = """
import itertools, sys, time
real, count = time.time, itertools.count()
time.time = lambda: real() - 86400 * (next(count) > 500)
time.time_ns = lambda: int(time.time() * 1e9)
from equidit.__main__ import main
sys.exit(main())
"""


class Trial:
    """One run in a folder of its own, and the like of it that nothing happens to."""

    def __init__(self, base: Path, data: str, *more: str, count: int = 1, steps: int = 400):
        self.out, self.whole, self.cache = base / "run", base / "whole", base / "cache"
        self.words = [data, *SETTINGS.split(), "--steps", str(steps), *more]
        self.count = count

    def start(self, out: Path, *words: str, code: str | None = None) -> list[subprocess.Popen[str]]:
        """Starts `equidit train` in as many processes as the trial has."""
        begin = ["-m", "equidit"] if code is None else ["-c", code]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{found.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1" if self.count == 1 else "2",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        several = ["--num-processes", str(self.count), "--coordinator", coordinator]
        several += ["--heartbeat", str(HEARTBEAT), "--process-id"]
        return [
            subprocess.Popen(
                [sys.executable, *begin, "train", *words, "--out", str(out)]
                + ([*several, str(i)] if self.count > 1 else []),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(self.count)
        ]

    @contextlib.contextmanager
    def under_way(self, code: str | None = None) -> Iterator[list[Any]]:
        """The run's processes, once it has a checkpoint and some steps more."""
        processes = self.start(self.out, *self.words, code=code)
        try:
            latest = time.monotonic() + 300
            while len(Folder(self.out).rows()) < SAVE_EVERY / LOG_EVERY + 3:
                time.sleep(0.02)
                if time.monotonic() > latest:
                    raise TimeoutError("it has not come so far in 300 s")
                if any(process.poll() is not None for process in processes):
                    raise RuntimeError(f"it ended by itself: {processes[0].communicate()[0]}")
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()

    def ends(self, *, all_rows: bool = True) -> str:
        """Resumes it, if it is not at its end: "" if that is the one of a run left alone.

        Without `all_rows` some of its metrics may be missing.
        """
        if not (self.out / "report.json").exists():
            processes = self.start(self.out, "--resume")
            printed = [process.communicate()[0] for process in processes]
            if any(process.returncode for process in processes):
                return f"WRONG: cannot go on: {printed[0][-500:]}"
        if not self.whole.exists():
            for process in self.start(self.whole, *self.words):
                process.communicate()
        leftovers = {path.name for path in (self.out / "checkpoints").iterdir()} - {"lock"}
        if not all(name.isdecimal() for name in leftovers):
            return f"WRONG: left over: {sorted(leftovers)}"
        found, expected = result(self.out), result(self.whole)
        rows = expected[1] if all_rows else [row for row in expected[1] if row in found[1]]
        same = all(map(np.array_equal, found[0], expected[0])) and found[1] == rows
        return "" if same else "WRONG: another end"


def result(out: Path) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """The last state, and the rows of a run's rhythm; one that was stopped has others beside."""
    state, rows = kills.result(out)
    rhythm = {"loss": LOG_EVERY, "validation_loss": SAVE_EVERY}
    return state, [
        row
        for row in rows
        if not any(name in row and row["step"] % every for name, every in rhythm.items())
    ]


def ended(process: subprocess.Popen[str], status: int | None, *said: str) -> str:
    """Waits for its end: "" if it is as expected; `None` is any status but 0."""
    printed, _ = process.communicate(timeout=120)
    if not (process.returncode == status or (status is None and process.returncode)):
        return f"WRONG: status {process.returncode}: {printed[-500:]}"
    missing = [words for words in said if words not in printed]
    return f"WRONG: nothing of {missing} in {printed[-500:]}" if missing else ""


def says(process: subprocess.Popen[str], words: str) -> bool:
    """Waits until a line has these words; a process that does not say them in 120 s is killed."""
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        return any(words in line for line in process.stdout or ())
    finally:
        timer.cancel()


def asked_to_stop(number: signal.Signals) -> Callable[[Path], str]:
    """A signal to the only process."""

    def befall(base: Path) -> str:
        trial = Trial(base, "digits")
        with trial.under_way() as (process,):
            process.send_signal(number)
            wrong = ended(process, 0, "Stopped", "--resume")
        return wrong or trial.ends() or "checkpoint, status 0, same end"

    return befall


def second_interrupt(base: Path) -> str:
    """Ctrl-C, and again before the run has stopped."""
    trial = Trial(base, "digits")
    with trial.under_way() as (process,):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)  # two at once would be one
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        if process.returncode == 0:
            return "WRONG: status 0"
    return trial.ends() or "ends at once, same end"


def one_of_two_asked(base: Path) -> str:
    """SIGTERM to the second of two hosts."""
    trial = Trial(base, "digits", count=2, steps=80)
    with trial.under_way() as processes:
        processes[1].send_signal(signal.SIGTERM)
        wrong = ended(processes[0], 0, "Stopped", "--resume") or ended(processes[1], 0)
    return wrong or trial.ends() or "both stop at one step, status 0, same end"


def one_of_two_killed(victim: int) -> Callable[[Path], str]:
    """`kill -9` of one of two hosts."""

    def befall(base: Path) -> str:
        trial = Trial(base, "digits", count=2, steps=80)
        with trial.under_way() as processes:
            processes[victim].kill()
            start = time.perf_counter()
            wrong = ended(processes[1 - victim], None, "another task died", "--resume")
            seconds = time.perf_counter() - start
        if seconds > 3 * HEARTBEAT:
            return f"WRONG: the other one ended after {seconds:.0f} s"
        return wrong or trial.ends() or "the other ends by the heartbeat and says why, same end"

    return befall


def pictures(folder: Path) -> str:
    """A folder of two classes of small random pictures."""
    rng = np.random.default_rng(0)
    for i in range(64):
        file = folder / str(i % 2) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    return f"folder:{folder}"


def worker_killed(base: Path) -> str:
    """`kill -9` of a process that reads data."""
    trial = Trial(base, pictures(base / "pictures"), "--size", "16", "--workers", "2")
    with trial.under_way() as (process,):
        listed = ["pgrep", "-P", str(process.pid), "-f", "spawn_main"]
        workers = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
        os.kill(int(workers[0]), signal.SIGKILL)
        wrong = ended(process, 1, "a process that reads data has died")
    newest = Folder(trial.out).rows()[-1]["step"]
    if not wrong and "validation_loss" not in Folder(trial.out).rows()[-1]:
        wrong = f"WRONG: step {newest} was not saved"
    return wrong or trial.ends() or "status 1, checkpoint of the last step, same end"


def disk_full(errors: str, steps: int, hosts: int = 1) -> Callable[[Path], str]:
    """No byte left on the file system for a while."""

    def befall(base: Path) -> str:
        words = ["--save-errors", errors]
        if hosts > 1:
            words += ["--sharding", "fsdp"]  # so that they must gather what they draw from
        trial = Trial(base, "digits", *words, count=hosts, steps=steps)
        trial.out.mkdir()
        size = ["-o", "size=4m"]
        subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", str(trial.out)], check=True)
        ballast = trial.out / "ballast"
        try:
            wrong = ""
            with trial.under_way() as processes:
                fill(ballast)
                if errors == "stop":
                    wrong = ended(processes[0], 1, "o space left")
                elif not says(processes[0], "could not be saved"):
                    wrong = "WRONG: ended, or says nothing for 120 s"
                ballast.unlink()
                if errors == "warn":
                    wrong = wrong or ended(processes[0], 0)
            whole = wrong or trial.ends(all_rows=errors == "stop")
        finally:
            subprocess.run(["umount", "--lazy", str(trial.out)], check=True)
        told = "stops, says so" if errors == "stop" else "says so, goes on"
        return whole or f"{told}, same end"

    return befall


def fill(file: Path) -> None:
    """Lets a file grow until its file system is full."""
    with contextlib.suppress(OSError), open(file, "ab", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def clock_set_back(base: Path) -> str:
    """The clock jumps back by a day in mid-run; and the run goes on at the right time."""
    trial = Trial(base, "digits")
    with trial.under_way(code=CLOCK) as (process,):
        process.send_signal(signal.SIGTERM)
        wrong = ended(process, 0, "Stopped")
    return wrong or trial.ends() or "not noticed, same end"


def two_in_one_folder(base: Path) -> str:
    """A second run begins, resumes and overwrites where one is under way."""
    trial = Trial(base, "digits", steps=2000)
    with trial.under_way() as (process,):
        for how in ([], ["--resume"], ["--overwrite"]):
            words = ["--resume"] if how == ["--resume"] else [*trial.words, *how]
            (second,) = trial.start(trial.out, *words)
            said = "holds a run" if not how else "another process"
            if wrong := ended(second, 1, said):
                return wrong
        wrong = ended(process, 0)
    return wrong or trial.ends() or "the second is refused, the first goes on, same end"


def left_over(base: Path) -> str:
    """Killed while saving, as the folders say that unfinished saves and deletions leave."""
    trial = Trial(base, "digits")
    with trial.under_way() as (process,):
        process.kill()
    checkpoints = trial.out / "checkpoints"
    newest = max(
        (path for path in checkpoints.iterdir() if path.name.isdecimal()), key=os.path.getmtime
    )
    shutil.copytree(newest, checkpoints / "9999.orbax-checkpoint-tmp")
    replace(trial.out / "config.json.partial", "{")
    return trial.ends() or "removed, same end"


INCIDENTS: dict[str, Callable[[Path], str]] = {
    "SIGTERM": asked_to_stop(signal.SIGTERM),
    "Ctrl-C": asked_to_stop(signal.SIGINT),
    "Ctrl-C twice": second_interrupt,
    "SIGTERM to one of two hosts": one_of_two_asked,
    "kill -9 of the first of two hosts": one_of_two_killed(0),
    "kill -9 of the second of two hosts": one_of_two_killed(1),
    "kill -9 of a data worker": worker_killed,
    "disk full, save_errors=stop": disk_full("stop", 400),
    "disk full, save_errors=warn": disk_full("warn", 400),
    "disk full on two hosts, save_errors=warn": disk_full("warn", 120, hosts=2),
    "the clock set back by a day": clock_set_back,
    "two runs in one folder": two_in_one_folder,
    "leftover temporary folders": left_over,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Lets the incidents happen, prints a table, and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.incidents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--incidents", nargs="*", choices=INCIDENTS, default=list(INCIDENTS))
    options = parser.parse_args(arguments)
    path = RESULTS / "incidents.json"
    outcomes = json.loads(path.read_text())["outcomes"] if path.exists() else {}
    for name in (bar := tqdm(options.incidents)):
        bar.set_postfix_str(name)
        with tempfile.TemporaryDirectory() as base:
            outcomes[name] = INCIDENTS[name](Path(base))
    print("| incident | what became of the run |\n|---|---|")
    for name, outcome in outcomes.items():
        print(f"| {name} | {outcome} |")
    print(write("incidents", {"outcomes": outcomes}))
    if any(outcome.startswith("WRONG") for outcome in outcomes.values()):
        sys.exit(json.dumps(outcomes, indent=2))


if __name__ == "__main__":
    main()
