"""Which of the paper's four block types draws the best digits, at the same recipe and budget?"""

import argparse
from collections.abc import Sequence

from .common import median, write
from .digits import train

BLOCKS = ("adaln-zero", "adaln", "cross-attention", "in-context")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains each block type once a seed, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    options = parser.parse_args(arguments)

    rows = [
        {"block": block, "seed": seed}
        | train("--block", block, "--seed", seed, "--steps", options.steps)
        # Seeds outside, so that a slow spell of the machine falls on all blocks alike.
        for seed in options.seeds
        for block in BLOCKS
    ]
    path = write("blocks", {"steps": options.steps, "results": rows})
    print("| block | accuracy | Frechet / floor | validation loss | median wall time |")
    print("|---|---|---|---|---|")
    for block in BLOCKS:
        of_block = [row for row in rows if row["block"] == block]
        accuracy = " ".join(f"{row['accuracy']:.3f}" for row in of_block)
        frechet = " ".join(f"{row['frechet'] / row['frechet_floor']:.2f}" for row in of_block)
        loss = " ".join(f"{row['validation_loss']:.4f}" for row in of_block)
        seconds = median([row["seconds"] for row in of_block])
        print(f"| {block} | {accuracy} | {frechet} | {loss} | {seconds:.0f} s |")
    print(path)


if __name__ == "__main__":
    main()
