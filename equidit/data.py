"""Data sets and the order in which training sees them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from ._common import check_positive, extra
from ._images import (
    ImageError as ImageError,
    ImageFolder as ImageFolder,
    image_folder as image_folder,
    read_image as read_image,
)
from ._latents import LatentCache as LatentCache, open_latents as open_latents

DIGITS_SHAPE = (1, 8, 8)
DIGITS_CLASSES = 10


class Images(NamedTuple):
    """Images in [-1, 1] and their labels, in host memory."""

    image: Float[np.ndarray, "batch channels height width"]
    label: Integer[np.ndarray, " batch"]


def digits() -> tuple[Images, Images]:
    """The 1,797 handwritten digits of 8x8 pixels that ship with scikit-learn.

    **Returns:**

    1,437 for training and 360 held out, with the same share of every class; always the same split.

    ??? cite

        E. Alpaydin and C. Kaynak,
        [Optical Recognition of Handwritten Digits](https://doi.org/10.24432/C50P49), UCI, 1998.
    """
    with extra("train"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    pixels, label = load_digits(return_X_y=True)
    image = (pixels / 8 - 1).astype(np.float32).reshape(-1, *DIGITS_SHAPE)
    images = Images(image, label.astype(np.int32))
    rows = np.arange(len(label))
    split = train_test_split(rows, test_size=360, random_state=0, stratify=label)
    train_set, held_out = (Images(*(field[part] for field in images)) for part in split)
    return train_set, held_out


def batch_indices(step: int, batch_size: int, size: int, *, seed: int) -> Integer[np.ndarray, "_"]:
    """Which examples make up a training step's batch: a new shuffle of the data every epoch.

    A function of the step alone, so a run that resumes at any step sees the same data.

    **Arguments:**

    - `step`: from 0.
    - `batch_size`, `size`: of a batch, and of the data set; a batch may span epochs.
    - `seed`: of the run.
    """
    check_positive(batch_size=batch_size, size=size)
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    shuffles = {
        epoch: np.random.default_rng((seed, epoch)).permutation(size)
        for epoch in np.unique(position // size)
    }
    return np.array([shuffles[p // size][p % size] for p in position])


def check_labels(label: Integer[np.ndarray, "*_"], num_classes: int) -> None:
    """`ValueError` naming the first label outside 0 to `num_classes - 1`.

    On the device an index out of range cannot raise, and `num_classes` itself is the null label.
    """
    wrong = np.flatnonzero((np.ravel(label) < 0) | (np.ravel(label) >= num_classes))
    if len(wrong):
        raise ValueError(
            f"label {np.ravel(label)[wrong[0]]} (number {wrong[0]}) is out of range: "
            f"labels are 0 to {num_classes - 1}"
        )
