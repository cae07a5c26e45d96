"""How fast do latents and pictures reach the training step, and does reading them take memory?

Latents are random and lie in a cache of 4x32x32; pictures are random JPEGs of 500x375 that are cut
to 256x256, beside PIL decoding the same files and nothing else. Memory is what the process and its
workers hold of their own (Linux's RssAnon) along the way.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from equidit.data import FolderSource, LatentSource, batches, image_folder

from .common import median, write


def make_latents(path: Path, count: int) -> Path:
    """A cache of random latents."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for name in ("mean", "std"):
        np.save(path / f"{name}.npy", rng.standard_normal((count, 2, 4, 32, 32), np.float32))
    np.save(path / "label.npy", np.arange(count, dtype=np.int32) % 1000)
    classes = [str(i) for i in range(1000)]
    info = {"format": 1, "count": count, "classes": classes, "autoencoder": "random"}
    (path / "info.json").write_text(json.dumps(info))
    return path


def make_pictures(path: Path, count: int) -> Path:
    """A folder of random JPEGs, smooth as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = path / str(i % 2) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
    return path


def memory() -> int:
    """Bytes of anonymous memory of this process and of those that it started."""
    total = 0
    for process in [os.getpid(), *_children(os.getpid())]:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += 1024 * int(line.split()[1])
    return total


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed]


def read(source: Any, batch_size: int, workers: int, count: int) -> dict[str, Any]:
    """Examples a second over so many batches, and memory at eleven moments on the way."""
    with batches(source, batch_size, seed=0, workers=workers) as stream:
        next(stream)
        held, marks = [], {round(i * count / 10) for i in range(11)}
        start = time.perf_counter()
        for i in range(count + 1):
            if i in marks:
                held.append(memory())
            next(stream)
        seconds = time.perf_counter() - start
    return {
        "workers": workers,
        "batch_size": batch_size,
        "batches": count,
        "examples_per_second": batch_size * count / seconds,
        "memory": held,
    }


def decode(folder: Path) -> float:
    """Pictures a second that PIL alone decodes, in this thread."""
    files = sorted(folder.rglob("*.jpg"))
    start = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            image.convert("RGB").load()
    return len(files) / (time.perf_counter() - start)


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| what | examples/s | memory, first to last (MB) |", "|---|---|---|"]
    for name in ("latents", "pictures"):
        for row in results[name]:
            held = row["memory"]
            lines.append(
                f"| {name}, {row['workers'] or 'no'} workers, {row['batches']:,} batches of "
                f"{row['batch_size']} | {row['examples_per_second']:,.0f} | "
                f"{held[1] / 1e6:.0f} to {held[-1] / 1e6:.0f} |"
            )
    lines.append(f"| PIL decoding alone, one thread | {median(results['pil']):,.0f} | |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--batches", type=int, default=100_000, help="of latents, 8 each")
    parser.add_argument("--pictures", type=int, default=300, help="number of JPEGs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        latents = LatentSource(make_latents(Path(temporary) / "latents", 4096))
        folder = make_pictures(Path(temporary) / "pictures", options.pictures)
        pictures = FolderSource(image_folder(folder), 256)
        results: dict[str, Any] = {
            "latents": [
                read(latents, 64, 0, max(options.batches // 50, 10)),
                read(latents, 64, 2, max(options.batches // 50, 10)),
                read(latents, 8, 2, options.batches),
            ],
            "pictures": [],
            "pil": [],
        }
        for workers in (0, 2):
            results["pil"].append(decode(folder))
            results["pictures"].append(read(pictures, 32, workers, max(options.pictures // 16, 10)))
        results["pil"].append(decode(folder))
    path = write("data", {"results": results})
    print(table(results) + str(path))


if __name__ == "__main__":
    main()
