"""What a run says of itself while it trains: rows, curves, and a bar in the terminal."""

import json
import math
import sys
import time
from typing import Any

import jax

from .. import hosts
from .._base.common import extra
from .._base.disk import append
from ..configs import Config, num_macs
from ..devices import peak_flops
from .folder import Folder

with extra("train"):
    from tensorboardX import SummaryWriter
    from tqdm import tqdm


class Log:
    """Writes metrics.jsonl, TensorBoard's events and the progress bar; of many hosts, one does.

    Rates are those of the time in between, less what went into validation, pictures and
    checkpoints (`aside`).
    """

    def __init__(self, folder: Folder, *, start: int, steps: int, batch_size: int, main: bool):
        self.folder, self.batch_size, self.main = folder, batch_size, main
        self.events = SummaryWriter(str(folder.events)) if main else None
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not main)
        self.restart()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        if self.events is not None:
            self.events.close()

    def restart(self) -> None:
        """Begins to measure the rates anew."""
        self.count, self.waited, self.since = 0, 0.0, time.perf_counter()

    def step(self, waited: float) -> None:
        """Counts a step, whose data were waited for so many seconds."""
        self.count += 1
        self.waited += waited
        self.bar.update()

    def rates(self, ideal_seconds: float | None) -> dict[str, float | None]:
        """Images a second, the share of time spent waiting for data, and the use of the devices.

        **Arguments:**

        - `ideal_seconds`: that an image takes at best; `None` if not known.
        """
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rate = self.count * self.batch_size / seconds
        rates = {
            "images_per_second": rate,
            "data_wait": self.waited / seconds,
            "mfu": None if ideal_seconds is None else rate * ideal_seconds,
        }
        self.restart()
        return rates

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl, and its numbers to TensorBoard."""
        if self.events is None:
            return
        append(self.folder.metrics, json.dumps({"step": step} | row) + "\n")
        for name, value in row.items():
            numbers = {name: value}
            if isinstance(value, list):
                numbers = {f"{name}/{i}": number for i, number in enumerate(value)}
            for label, number in numbers.items():
                if number is not None and math.isfinite(number):
                    self.events.add_scalar(label, number, step)
        self.events.flush()

    def show(self, row: dict[str, Any]) -> None:
        """Shows a row in the terminal, beside the time that is left."""
        parts = [
            f"loss {row['loss']:.3f}",
            f"gradient norm {row['grad_norm']:.3f}",
            f"{row['images_per_second']:.0f} images/s",
        ]
        if row["mfu"] is not None:
            parts.append(f"MFU {row['mfu']:.0%}")
        if row["skipped"]:
            parts.append(f"{row['skipped']} steps skipped")
        self.bar.set_postfix_str(", ".join(parts))


def tell(message: str) -> None:
    """Says something beside the progress bar."""
    if hosts.is_main():
        tqdm.write(f"equidit: {message}", file=sys.stderr)


def ideal_seconds(config: Config, height: int, width: int) -> float | None:
    """Seconds that an image takes in training if all devices do what they can do at best.

    `None`, which is told, if that is not known of them.
    """
    peak = peak_flops()
    if peak is None:
        tell(f"the peak of {jax.devices()[0].device_kind} is not known: MFU is left out")
        return None
    # Forward, and backward at twice that; two FLOPs a multiply-add.
    return 6 * num_macs(config, height, width) / (peak * jax.device_count())
