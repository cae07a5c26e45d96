"""What a run shows for itself: pictures, and figures of quality."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from .._base.common import extra
from ..data import Images
from ..metrics import frechet_distance, nearest_distance
from ..seams import StrPath


def quality(samples: Images, train_set: Images, held_out: Images) -> dict[str, float | int]:
    """Figures of quality of labelled samples, beside those of real images.

    Accuracy: how often a support vector classifier fitted on the training set finds the label that
    was asked for. Frechet distance: in pixel space to the held-out images, at their number. Nearest
    distance: Euclidean, to the nearest training image; far below the held-out images' own it would
    mean memorisation.
    """

    with extra("train"):
        from sklearn.svm import SVC

    def flat(images: Images, count: int | None = None) -> Float[np.ndarray, "batch features"]:
        return images.image[:count].reshape(len(images.image[:count]), -1).astype(np.float64)

    classifier = SVC().fit(flat(train_set), train_set.label)
    count = min(len(held_out.image), len(samples.image))
    held = flat(held_out, count)
    return {
        "samples": len(samples.image),
        "accuracy": float(classifier.score(flat(samples), samples.label)),
        "accuracy_held_out": float(classifier.score(flat(held_out), held_out.label)),
        "frechet_at": count,
        "frechet": frechet_distance(flat(samples, count), held),
        "frechet_floor": frechet_distance(flat(train_set, count), held),
        "nearest": nearest_distance(flat(samples), flat(train_set)),
        "nearest_held_out": nearest_distance(flat(held_out), flat(train_set)),
    }


def grid(
    path: StrPath,
    images: Float[np.ndarray, "rows columns channels height width"],
    names: Iterable[Any],
) -> None:
    """Writes a picture of images in [-1, 1], one row a name; small ones are enlarged smoothly."""
    rows, columns, channels, height, width = images.shape
    zoom = max(1, 64 // max(height, width))
    height, width = height * zoom, width * zoom
    shape = (rows, columns, channels, height, width)
    pixels = np.asarray(jax.image.resize(images * 0.5 + 0.5, shape, "cubic")).clip(0, 1)
    gap = 4
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (gap, 0), (gap, 0)), constant_values=1)
    sheet = pixels.transpose(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, channels)
    # A margin for the names; one unit of the axes is one pixel of the file.
    margin, dpi = 64, 100
    size = ((margin + sheet.shape[1]) / dpi, sheet.shape[0] / dpi)
    with extra("train"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=size, dpi=dpi)
    left = margin / (margin + sheet.shape[1])
    axes = figure.add_axes((left, 0, 1 - left, 1))
    axes.imshow(sheet[..., 0] if channels == 1 else sheet, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks(np.arange(rows) * (height + gap) + gap + height / 2, [str(n) for n in names])
    axes.tick_params(length=0, labelsize=18)
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def loss_curve(path: StrPath, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a picture of the rows of metrics.jsonl: training loss, and validation by quartile."""
    with extra("train"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    if training:
        axes.plot(*zip(*training, strict=True), color="0.75", linewidth=1, label="training batch")
    steps = [row["step"] for row in validation]
    series = {"held out": [row["validation_loss"] for row in validation]}
    for quartile in range(4):
        name = f"held out, timesteps {quartile * 25} to {quartile * 25 + 25} %"
        series[name] = [row["validation_loss_by_quartile"][quartile] for row in validation]
    for name, values in series.items():
        axes.plot(steps, values, marker=".", linewidth=2 if name == "held out" else 1, label=name)
    axes.set(xlabel="training step", ylabel="hybrid loss", yscale="log")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path)
