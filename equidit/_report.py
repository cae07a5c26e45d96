"""What a run shows for itself: samples, pictures, and figures of quality."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from . import diffusion as dfn
from ._common import extra
from ._types import Network
from .data import Images
from .guidance import guide
from .metrics import frechet_distance, nearest_distance

Sampler = Literal["ddim", "ddpm"]
_STEPS = {
    "ddim": partial(dfn.ddim_step, clip=True),
    "ddpm": partial(dfn.ddpm_step, variance="learned", clip=True),
}
_CHUNK = 100


@partial(jax.jit, static_argnames=("sampler", "shape"))
def _draw(
    network: Network,
    schedule: dfn.Schedule,
    label: Array,
    index: Array,
    key: PRNGKeyArray,
    *,
    sampler: Sampler,
    shape: tuple[int, int, int],
) -> Array:
    def one(label: Array, index: Array) -> Array:
        noise_key, steps_key = jax.random.split(jax.random.fold_in(key, index))
        step = partial(_STEPS[sampler], network, schedule)
        noise = jax.random.normal(noise_key, shape)
        return dfn.sample(step, schedule, noise, label, key=steps_key)

    return jax.vmap(one)(label, index)


def draw(
    network: Network,
    labels: Integer[np.ndarray, " batch"],
    *,
    null: int,
    guidance_scale: float,
    schedule: dfn.Schedule,
    sampler: Sampler,
    shape: tuple[int, int, int],
    key: PRNGKeyArray,
) -> Float[np.ndarray, "batch channels height width"]:
    """Guided samples in [-1, 1], one a label. Noise belongs to a sample's place in `labels`."""
    network = guide(network, guidance_scale, jnp.asarray(null, jnp.int32))
    count = len(labels)
    # Chunks of one size, the last one filled up, so that one program serves any number.
    index = np.arange(-(-count // _CHUNK) * _CHUNK, dtype=np.int32).reshape(-1, _CHUNK)
    label = np.resize(labels.astype(np.int32), index.shape)
    chunks = [
        _draw(network, schedule, *pair, key, sampler=sampler, shape=shape)
        for pair in zip(label, index, strict=True)
    ]
    return np.concatenate([np.asarray(chunk) for chunk in chunks])[:count]


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
    path: Path,
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


def loss_curve(path: Path, rows: Sequence[dict[str, Any]]) -> None:
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
