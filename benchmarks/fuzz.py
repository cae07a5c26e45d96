"""What do readers make of foreign bytes?

Damages small valid files of every kind that the library reads, a million times each, and runs the
reader on them: half by mutation of valid files, half guided by coverage (atheris, where it is
installed). A reader may read or refuse, with an error that it documents and that names the file. It
may not take more memory than `benchmarks/readers.py` states, hang, write, or start anything.
An interrupted campaign goes on where it was.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SECONDS = 5
"""Of processor time, that an input may take."""
MEMORY = 2**28
"""Bytes of address space, that a reader may take beyond what the process had."""
CHUNK = 50_000
_TRACED = 64
_ENGINES = ("mutated", "guided")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FORBIDDEN = re.compile(
    r"subprocess\.Popen|os\.(system|exec|posix_spawn|fork|remove|rename|rmdir|truncate|chmod)"
    r"|socket\.(connect|bind)|shutil\.|ctypes\.dlopen"
)


_watching: "list[Harness]" = []


class Hang(BaseException):
    """Raised in a reader that takes too long."""


class Harness:
    """Runs a reader on one input after the other, and finds out what it did.

    An input is a byte that names one of the reader's files, and what is put in that file's place.
    """

    def __init__(self, reader: Any, folder: Path, *, seconds: float = SECONDS):
        self.reader, self.folder, self.seconds = reader, folder, seconds
        self.files = reader.make()
        self.names = list(self.files)
        self.inputs, self.accepted, self.refused = 0, 0, 0
        self.findings: dict[str, dict[str, Any]] = {}
        self._events: list[str] | None = None
        self._lay_all()
        # Valid files are read, and what is imported on the way is no input's doing.
        self._place(self.seeds()[0])
        reader.read(folder)
        if not _watching:
            sys.addaudithook(lambda event, arguments: _watching[0]._audit(event, arguments))
        # A hook stays for as long as the process lives.
        _watching[:] = [self]

    def seeds(self) -> list[bytes]:
        """Valid inputs."""
        named = enumerate(self.files.values())
        return [bytes([i]) + content for i, contents in named for content in contents]

    def _lay_all(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name, contents in self.files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[0])
        self._damaged: str | None = None

    def _place(self, data: bytes) -> None:
        name, content = self.names[data[0] % len(self.names)], data[1:]
        if self.reader.lay is not None:
            (self.folder / name).write_bytes(content)
            self.reader.lay(self.folder, content)
            return
        if self._damaged not in (None, name):
            (self.folder / self._damaged).write_bytes(self.files[self._damaged][0])
        (self.folder / name).write_bytes(content)
        self._damaged = name

    def _listing(self) -> list[tuple[str, int, int]]:
        found, folders = [], [str(self.folder)]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        found.append((entry.path, 0, 0))
                    elif entry.name not in self.reader.leaves:
                        status = entry.stat(follow_symlinks=False)
                        found.append((entry.path, status.st_size, status.st_mtime_ns))
        return sorted(found)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._events is None:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITING
            if writes and Path(str(path)).name not in self.reader.leaves | self.reader.opens:
                self._events.append(f"opens {Path(str(path)).name} to write")
        elif _FORBIDDEN.match(event):
            self._events.append(event)

    def _hang(self, *_: Any) -> None:
        if self._events is not None:
            raise Hang

    def run(self, data: bytes) -> str | None:
        """Runs the reader on an input: what it did wrong, or `None`."""
        data = data or b"\0"
        self._place(data)
        before = self._listing()
        wrong, traced = None, self.inputs % _TRACED == 0
        self.inputs += 1
        if traced:
            tracemalloc.start()
        old = signal.signal(signal.SIGPROF, self._hang)
        # Where allocations are traced, Python takes several times as long.
        signal.setitimer(signal.ITIMER_PROF, self.seconds * (8 if traced else 1))
        self._events = events = []
        try:
            self.reader.read(self.folder)
            self.accepted += 1
        except self.reader.errors as error:
            self.refused += 1
            wrong = self._refusal(error)
        except Hang as error:
            wrong = f"hangs, {_where(error)}"
        except Exception as error:
            wrong = f"{type(error).__name__}, {_where(error)}"
        finally:
            self._events = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
            peak = tracemalloc.get_traced_memory()[1] if traced else 0
            if traced:
                tracemalloc.stop()
        limit = self.reader.memory + 16 * sum(size for _, size, _ in before)
        # Twice: what the interpreter itself allocates once, no input does.
        if peak > limit and self._peak() > limit:
            wrong = "takes too much memory"
        if events and not wrong:
            wrong = events[0]
        if self._listing() != before:
            wrong = wrong or "changes its files"
            self._lay_all()
        if wrong:
            self._note(wrong, data)
        return wrong

    def _peak(self) -> int:
        """Bytes that the input in place takes."""
        tracemalloc.start()
        try:
            with contextlib.suppress(Exception):
                self.reader.read(self.folder)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def _refusal(self, error: BaseException) -> str | None:
        """What is wrong with a documented error."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                return f"takes too much memory, {_where(cause)}"
            cause = cause.__cause__ or cause.__context__
        if str(self.folder) not in str(error):
            return f"{type(error).__name__} without the file's name, {_where(error)}"
        return None

    def _note(self, wrong: str, data: bytes) -> None:
        found = self.findings.setdefault(wrong, {"count": 0, "data": data})
        found["count"] += 1
        if len(data) < len(found["data"]):
            found["data"] = data

    def record(self) -> dict[str, Any]:
        """What became of the inputs, as JSON."""
        return {
            "inputs": self.inputs,
            "accepted": self.accepted,
            "refused": self.refused,
            "findings": [
                {"what": what, "count": found["count"]}
                | {"input": base64.b64encode(found["data"][:4096]).decode()}
                for what, found in self.findings.items()
            ],
        }


def _where(error: BaseException) -> str:
    """The last place in the package that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    named = [f for f in frames if f"{os.sep}equidit{os.sep}" in f.filename] or frames[-1:]
    return ", ".join(f"{Path(frame.filename).name}: {frame.name}" for frame in named[-1:])


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """This process may take `MEMORY` more address space than it has; more is a `MemoryError`."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def by_mutation(harness: Harness, inputs: int, seed: int) -> None:
    """So many mutations of valid files."""
    from .mutating import mutated

    rng = random.Random(f"{harness.reader.name} {seed}")
    contents = list(harness.files.values())
    seal = harness.reader.seal
    for first in range(0, inputs, 1000):
        with little_memory():
            for _ in range(min(1000, inputs - first)):
                at = rng.randrange(len(contents))
                data = mutated(rng.choice(contents[at]), rng, contents[at])
                if seal is not None and rng.random() < 0.8:
                    data = seal(data)
                harness.run(bytes([at]) + data)


def _quicken() -> None:
    """Leaves out what is no reader's: checks of types, tracing of networks, copies to devices.

    Before the package is imported. The short campaign of the tests leaves nothing out.
    """
    import jaxtyping

    def put(module: Any, name: str, value: Any) -> None:
        setattr(module, name, value)

    hook = SimpleNamespace(hook=SimpleNamespace(find_spec=lambda *_: None))
    put(jaxtyping, "install_import_hook", lambda *_, **__: hook)
    import equinox as eqx
    import jax

    from equidit.pretrained import autoencoder, tables, transformer

    found: dict[str, Any] = {}

    def once(function: Any, *arguments: Any, **options: Any) -> Any:
        name = repr((arguments, {**options, "key": None}))
        if name not in found:
            found[name] = function(*arguments, **options)
        return found[name]

    make, shape = transformer.skeleton, eqx.filter_eval_shape
    put(transformer, "skeleton", lambda *arguments: once(make, *arguments))

    def shapes(function: Any, *arguments: Any, **options: Any) -> Any:
        if arguments:
            return shape(function, *arguments, **options)
        return once(lambda **given: shape(function, **given), **options)

    put(autoencoder, "eqx", SimpleNamespace(filter_eval_shape=shapes))
    kept = {"tree": jax.tree, "eval_shape": jax.eval_shape}
    put(tables, "jax", SimpleNamespace(**kept, device_put=lambda array, *_, **__: array))


def guided(harness: Harness, inputs: int, seed: int, corpus: Path, result: Path) -> None:
    """So many inputs by atheris, which does not return: the process ends."""
    import importlib
    import inspect

    import atheris

    from .mutating import mutated

    engine: Any = atheris
    for name in harness.reader.modules:
        module = importlib.import_module(name)
        things = [t for t in vars(module).values() if getattr(t, "__module__", None) == name]
        methods = [m for t in things if inspect.isclass(t) for m in vars(t).values()]
        for function in things + methods:
            function = inspect.unwrap(function) if callable(function) else function
            if inspect.isfunction(function):
                engine.instrument_func(function)
    corpus.mkdir(exist_ok=True)
    for i, content in enumerate(harness.seeds()):
        (corpus / f"seed-{i}").write_bytes(content)
    contents, seal = list(harness.files.values()), harness.reader.seal

    def change(data: bytes, size: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.3 or not data:
            return engine.Mutate(data, size)
        at = data[0] % len(contents)
        body = mutated(data[1:], rng, contents[at])
        if seal is not None and rng.random() < 0.8:
            body = seal(body)
        return (bytes([at]) + body)[:size]

    last = 0.0
    limits = contextlib.ExitStack()

    def one(data: bytes) -> None:
        nonlocal last
        harness.run(data)
        if harness.inputs % 1000 == 0:
            limits.close()
            limits.enter_context(little_memory())
        if harness.inputs >= inputs or time.monotonic() - last > 2:
            last = time.monotonic()
            _write(result, harness.record())

    words = [f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=65536", "-rss_limit_mb=0"]
    words += ["-timeout=120", "-detect_leaks=0", "-verbosity=1", str(corpus)]
    limits.enter_context(little_memory())
    engine.Setup(["fuzz", *words], one, custom_mutator=change)
    engine.Fuzz()


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(path)


def _work(name: str, engine: str, inputs: int, seed: int, folder: Path) -> None:
    """One chunk, in a process of its own."""
    _quicken()
    from .readers import READERS

    harness = Harness(READERS[name], folder / "files")
    result = folder / "result.json"
    if engine == "guided":
        guided(harness, inputs, seed, folder / "corpus", result)
    try:
        by_mutation(harness, inputs, seed)
    finally:
        _write(result, harness.record())


def chunk(name: str, engine: str, inputs: int, seed: int, folder: Path) -> dict[str, Any]:
    """What became of so many inputs, in a process of its own. That it dies is a finding."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    words = ["--worker", name, engine, str(inputs), str(seed), str(folder)]
    # A thread's arena is 64 MiB of addresses, whatever it asks for.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    with (folder / "said").open("w+", errors="replace") as said:
        status = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz", *words],
            env=environment,
            stdout=said,
            stderr=said,
            cwd=Path(__file__).parents[1],
        ).returncode
        said.seek(0)
        text = said.read()
    if not result.exists():
        raise RuntimeError(f"nothing came of {words}: {text[-2000:]}")
    row = json.loads(result.read_text())
    row["seconds"] = time.monotonic() - begun
    if status:
        files = sorted((folder / "files").rglob("*"), key=lambda path: path.stat().st_mtime_ns)
        last = next(path for path in reversed(files) if path.is_file()).read_bytes()
        input_ = base64.b64encode(last[:4096]).decode()
        row["findings"].append({"what": f"ends with {status}", "count": 1, "input": input_})
        row["said"] = text[-500:]
    for moment in ("INITED", "DONE"):
        if match := re.search(rf"{moment}\s+cov: (\d+) ft: (\d+)", text):
            row.setdefault("coverage", {})[moment] = [int(number) for number in match.groups()]
    return row


def merged(row: dict[str, Any], more: dict[str, Any], engine: str) -> dict[str, Any]:
    """A reader's row with another chunk."""
    inputs = dict.fromkeys(_ENGINES, 0) | row.get("inputs", {})
    inputs[engine] += more["inputs"]
    found = {f["what"]: f for f in row.get("findings", [])}
    for new in more["findings"]:
        old = found.get(new["what"], {"count": 0, "input": new["input"]})
        smaller = min(old["input"], new["input"], key=len)
        found[new["what"]] = new | {"count": old["count"] + new["count"], "input": smaller}
    coverage = row.get("coverage") or {}
    for moment, numbers in more.get("coverage", {}).items():
        pick = min if moment == "INITED" else max
        coverage[moment] = pick(coverage.get(moment, numbers), numbers)
    return {
        "inputs": inputs,
        **{n: row.get(n, 0) + more[n] for n in ("accepted", "refused", "seconds")},
        "coverage": coverage,
        "findings": list(found.values()),
    }


def campaign(names: Sequence[str], wanted: int, engines: Sequence[str], name: str) -> None:
    """Goes on until every reader has had so many inputs, half of them by each engine."""
    from .common import RESULTS, origin, write

    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["readers"] if path.exists() else {}
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as temporary:
        # A part for every reader first: what is found is found early.
        rounds = [
            (part, reader, engine) for part in (50, 10, 1) for reader in names for engine in engines
        ]
        for part, reader, engine in rounds:
            folder = Path(temporary) / str(names.index(reader))
            folder.mkdir(exist_ok=True)
            while True:
                done = rows.get(reader, {}).get("inputs", {}).get(engine, 0)
                rest = -(-wanted // (len(engines) * part)) - done
                if rest <= 0:
                    break
                more = chunk(reader, engine, min(CHUNK, rest), done, folder)
                rows[reader] = merged(rows.get(reader, {}), more, engine) | origin()
                write(name, {"wanted": wanted, "readers": rows})
                path.with_suffix(".md").write_text(table(rows) + "\n")
                print(reader, rows[reader]["inputs"], len(rows[reader]["findings"]), flush=True)
    print(table(rows), path, sep="\n")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| reader | inputs | read | refused | edges seen | found |",
        "|---" * 6 + "|",
    ]
    for name, row in sorted(rows.items()):
        edges = " to ".join(str(numbers[0]) for numbers in row["coverage"].values())
        found = "; ".join(f["what"] for f in row["findings"]) or "nothing"
        inputs = sum(row["inputs"].values())
        lines.append(
            f"| {name} | {inputs:,} | {row['accepted'] / inputs:.0%} "
            f"| {row['refused'] / inputs:.0%} | {edges} | {found} |"
        )
    return "\n".join(lines)


def _memory_disk() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the campaign, prints a table and writes the JSON after every chunk."""
    from .readers import READERS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--readers", nargs="*", choices=READERS, default=list(READERS))
    parser.add_argument("--inputs", type=int, default=10**6, help="of each reader")
    parser.add_argument("--engines", nargs="*", choices=_ENGINES, default=None)
    parser.add_argument("--name", default="fuzz", help="of the JSON")
    options = parser.parse_args(arguments)
    engines = options.engines
    if engines is None:
        try:
            import atheris as atheris

            engines = list(_ENGINES)
        except ModuleNotFoundError:
            print("atheris is not installed: all inputs are mutations of valid files")
            engines = ["mutated"]
    campaign(options.readers, options.inputs, engines, options.name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
    else:
        main()
