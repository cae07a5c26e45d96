"""What does each config cost, and does the paper print the same?

Multiply-adds (MACs, which the paper prints as Gflops) and FLOPs (two a MAC, as vendors count) of
one forward pass of one example; of a training image, counted as three forward passes; and of a
sample of 250 steps, each of two evaluations for guidance. No weight is allocated.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equidit as edt

from .common import RESULTS, config_names, writable, write
from .report import Report, number, write_report

PAPER = json.loads((Path(__file__).parents[1] / "tests" / "references" / "paper.json").read_text())
BLOCKS = tuple(PAPER["blocks_xl2_256"])
LATENT = {256: 32, 512: 64}


def printed(name: str, block: str, resolution: int) -> dict[str, Any] | None:
    """The row of the paper's tables for it, if there is one."""
    rows = {}
    for config, row in PAPER["configs_256"].items():
        rows[config, "adaln-zero", 256] = row
    for design, row in PAPER["blocks_xl2_256"].items():
        if design != "adaln-zero":
            rows["DiT-XL/2", design, 256] = row
    rows["DiT-XL/2", "adaln-zero", 512] = PAPER["xl2_512"]
    return rows.get((name, block, resolution))


def agrees(gmacs: float, paper: float) -> bool:
    """Within 0.1 % or half a unit of the last printed digit, of which there are two."""
    return abs(gmacs - paper) <= max(0.001 * paper, 0.005)


def cost(name: str, block: str, resolution: int, steps: int = 250) -> dict[str, Any]:
    """Parameters and operations of that config, beside the paper's."""
    config = dataclasses.replace(edt.CONFIGS[name], block=block)
    side = LATENT[resolution]
    parts = edt.macs_by_part(config, side, side)
    macs, paper = sum(parts.values()), printed(name, block, resolution)
    row = {
        "config": name,
        "block": block,
        "resolution": resolution,
        "params": edt.num_params(config),
        "gmacs": macs / 1e9,
        "gflops": 2 * macs / 1e9,
        "shares": {part: count / macs for part, count in parts.items()},
        "training_gflops_per_image": 3 * 2 * macs / 1e9,
        "sample_tflops": steps * 2 * 2 * macs / 1e12,
        "paper_gmacs": None,
        "paper_params": None,
        "agrees": None,
    }
    if paper is not None:
        row["paper_gmacs"] = paper["gflops"]
        row["paper_params"] = paper["params_trainable"]
        row["agrees"] = (
            agrees(row["gmacs"], paper["gflops"]) and row["params"] == paper["params_trainable"]
        )
    return row


REPORT = Report(
    part="flops",
    columns={
        "config": lambda row: row["config"],
        "block": lambda row: row["block"],
        "pixels": lambda row: str(row["resolution"]),
        "parameters (M)": lambda row: number(row["params"] / 1e6),
        "Gflops (MACs)": lambda row: number(row["gmacs"]),
        "the paper's": lambda row: number(row["paper_gmacs"]),
        "GFLOPs": lambda row: number(row["gflops"], 1),
        "attention products": lambda row: f"{row['shares']['attention products']:.1%}",
        "modulation": lambda row: f"{row['shares']['modulation']:.2%}",
        "a training image (GFLOPs)": lambda row: number(row["training_gflops_per_image"], 1),
        "a guided sample (TFLOPs)": lambda row: number(row["sample_tflops"], 1),
    },
    bar=lambda row: row["gmacs"],
    label=lambda row: f"{row['config']} {row['block']} {row['resolution']}",
    unit="10^9 multiply-adds of a forward pass",
    mark=lambda row: row["paper_gmacs"],
    keep=lambda row: row["paper_gmacs"] is not None,
    log=True,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--configs", nargs="+", default=list(edt.CONFIGS), help="of CONFIGS")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=BLOCKS)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=LATENT, default=list(LATENT))
    parser.add_argument("--steps", type=int, default=250, help="of a sample")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    names, folder = config_names(options.configs), writable(options.results)

    from tqdm import tqdm

    rows = [
        cost(name, block, resolution, options.steps)
        for resolution in tqdm(options.resolutions, disable=None)
        for block in options.blocks
        for name in names
    ]
    path = write(
        "flops",
        {
            "conventions": {
                "gmacs": "multiply-adds of matrix products, what the paper prints as Gflops",
                "gflops": "2 a multiply-add",
                "training": "3 forward passes",
                "sample": f"{options.steps} steps of 2 evaluations (guidance)",
                "agrees": "0.1 % or half a unit of the last printed digit; parameters exactly",
            },
            "results": rows,
        },
        folder,
    )
    print(write_report(REPORT, folder))
    compared = [row for row in rows if row["agrees"] is not None]
    wrong = [row["config"] for row in compared if not row["agrees"]]
    print(f"{len(compared) - len(wrong)} of {len(compared)} figures of the paper reproduced")
    print(path)
    if wrong:
        raise SystemExit(f"not those of {', '.join(wrong)}")


if __name__ == "__main__":
    main()
