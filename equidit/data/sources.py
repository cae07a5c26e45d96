"""Data sets: examples and their labels, in memory, in folders, or as latents."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num, PyTree

from .._base.common import extra
from .._base.texts import brief
from ..seams import PRNGKey, StrPath
from .images import ImageError, ImageFolder, Small, read_image
from .latents import open_latents

DIGITS_SHAPE = (1, 8, 8)
"""Channels, height and width of [`equidit.data.digits`][]."""
DIGITS_CLASSES = 10
"""The number of their classes."""


class Images(NamedTuple):
    """Images and their labels: one, a batch, or a whole data set in memory.

    **Fields:**

    - `image`: floats in [-1, 1], or bytes, which are a quarter to send to a device and are scaled
        there.
    - `label`: classes from 0.
    """

    image: Num[np.ndarray, "*batch channels height width"]
    label: Integer[np.ndarray, "*batch"]

    def clean(self, key: PRNGKey) -> Float[Array, "channels height width"]:
        """The clean example to be diffused, of one image.

        **Arguments:**

        - `key`: not read.

        **Returns:**

        The image in [-1, 1].
        """
        image = jnp.asarray(self.image)
        return image.astype(jnp.float32) / 127.5 - 1 if image.dtype == jnp.uint8 else image


class Latents(NamedTuple):
    """Moments of latents, in the units that a DiT sees, and their labels: one, or a batch.

    **Fields:**

    - `mean`, `std`: of the latent's normal distribution.
    - `label`: classes from 0.
    """

    mean: Float[np.ndarray, "*batch channels height width"]
    std: Float[np.ndarray, "*batch channels height width"]
    label: Integer[np.ndarray, "*batch"]

    def clean(self, key: PRNGKey) -> Float[Array, "channels height width"]:
        """The clean example to be diffused, of one picture.

        **Arguments:**

        - `key`: of this example and this training step.

        **Returns:**

        A latent drawn with it.
        """
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return mean + std * jax.random.normal(key, mean.shape, mean.dtype)


@runtime_checkable
class Source(Protocol):
    """A data set: what [`equidit.data.batches`][] reads. Worker processes get a pickled copy.

    `label` holds every example's; `read(index, rng)` gives one example, a pytree of NumPy arrays;
    chance (a flip) comes from `rng` alone. `equidit train` asks for examples with a method
    `clean(key)` and a field `label`.
    """

    label: Any

    def read(self, index: int, rng: np.random.Generator, /) -> Any:
        """One example.

        **Arguments:**

        - `index`: 0 to `len(label) - 1`.
        - `rng`: the only source of chance, so that a run can be repeated.

        **Returns:**

        A pytree of NumPy arrays, such as [`equidit.data.Images`][].
        """
        ...


class ArraySource:
    """Arrays in memory, or mapped into it."""

    def __init__(self, arrays: PyTree):
        """**Arguments:**

        - `arrays`: any pytree of arrays (a tuple, a dictionary, [`equidit.data.Images`][]), all
            with the same first axis, of examples. What it calls `label` is the labels; without
            that, all examples count as of class 0.

        **Raises:**

        `ValueError` if there are no arrays, or they do not share their first axis.
        """
        leaves = jax.tree_util.tree_leaves_with_path(arrays)
        named = [(f"arrays{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves]
        if single := [(name, leaf) for name, leaf in named if not np.ndim(leaf)]:
            raise ValueError(
                f"{single[0][0]} is {brief(repr(single[0][1]), 60)}, no array of examples: lists "
                "are trees, so make them arrays by np.asarray"
            )
        self.arrays = jax.tree.map(np.asanyarray, arrays)
        sizes = {np.shape(leaf)[:1] for _, leaf in named}
        if len(sizes) != 1:
            found = brief(", ".join(f"{name} {np.shape(leaf)}" for name, leaf in named))
            raise ValueError(
                "arrays must share their first axis, one entry an example, but have the shapes "
                f"{found or 'of none, since there are none'}: cut the longer ones"
            )
        mapping = isinstance(self.arrays, dict)
        label = self.arrays.get("label") if mapping else getattr(self.arrays, "label", None)
        self.labelled = isinstance(label, np.ndarray)
        self.label = label if isinstance(label, np.ndarray) else np.zeros(sizes.pop(), np.int32)

    @property
    def images(self) -> PyTree:
        """The arrays, which once had to be [`equidit.data.Images`][]."""
        return self.arrays

    def read(self, index: int, rng: np.random.Generator) -> Any:
        """**Arguments:**

        - `index`: of the example, from 0.
        - `rng`: not read.

        **Returns:**

        The same pytree, of one example's arrays.
        """
        return jax.tree.map(lambda array: array[index], self.arrays)


def as_source(data: Source | PyTree) -> Source:
    return data if isinstance(data, Source) else ArraySource(data)


class FolderSource:
    """Pictures of a folder, as squares of bytes, every other one mirrored."""

    def __init__(self, folder: ImageFolder, size: int, *, small: Small = "refuse"):
        """**Arguments:**

        - `folder`: what [`equidit.data.image_folder`][] lists.
        - `size`, `small`: of the square, and what to do with pictures that are smaller: see
            [`equidit.data.read_image`][].
        """
        self.folder, self.size = folder, size
        self.small: Small = small
        self.label = folder.label

    def read(self, index: int, rng: np.random.Generator) -> Images:
        """**Arguments:**

        - `index`: of the example, from 0.
        - `rng`: decides whether the picture is mirrored.

        **Returns:**

        One picture as bytes, and its label.

        **Raises:**

        [`equidit.data.ImageError`][], naming the example and the file.
        """
        mirrored = rng.random() < 0.5
        path = self.folder.root / self.folder.files[index]
        try:
            pixels = read_image(path, self.size, small=self.small)
        except ImageError as error:
            raise ImageError(f"example {index}: {error}", damaged=error.damaged) from error
        if mirrored:
            pixels = pixels[..., ::-1]
        return Images(np.ascontiguousarray(pixels), self.label[index])


class LatentSource:
    """A cache of latents, every other one of the mirrored picture. Skipped ones are left out."""

    def __init__(self, path: StrPath):
        """**Arguments:**

        - `path`: the folder, for [`equidit.data.open_latents`][].
        """
        self.path = path
        self.cache = open_latents(path)
        self.rows = np.flatnonzero(self.cache.label >= 0)
        self.label = np.asarray(self.cache.label[self.rows])

    def read(self, index: int, rng: np.random.Generator) -> Latents:
        """**Arguments:**

        - `index`: of the example, from 0.
        - `rng`: decides whether the picture is mirrored.

        **Returns:**

        One picture's moments in float32, and its label.
        """
        row, mirrored = self.rows[index], int(rng.random() < 0.5)
        mean, std = (
            np.asarray(moment[row, mirrored], np.float32)
            for moment in (self.cache.mean, self.cache.std)
        )
        return Latents(mean, std, self.label[index])

    # Mapped files are opened anew in a worker, rather than copied to it.
    def __getstate__(self) -> StrPath:
        return self.path

    def __setstate__(self, path: StrPath) -> None:
        self.__init__(path)


class Subset:
    """Some examples of a source."""

    def __init__(self, source: Source, rows: Integer[np.ndarray, " size"]):
        """**Arguments:**

        - `source`: of which some examples are taken.
        - `rows`: their indices in it.
        """
        self.source, self.rows = source, rows
        self.labelled = getattr(source, "labelled", True)
        self.label = np.asarray(source.label)[rows]

    def read(self, index: int, rng: np.random.Generator) -> Any:
        """**Arguments:**

        - `index`: of the example, from 0.
        - `rng`: handed on to the source.

        **Returns:**

        The source's example.
        """
        return self.source.read(int(self.rows[index]), rng)


def held_out(source: Source | PyTree, count: int, *, seed: int = 0) -> tuple[Subset, Subset]:
    """Splits a source in two: the larger part, and `count` examples. Always the same for a seed.

    **Arguments:**

    - `source`: what is split: a [`equidit.data.Source`][], or a pytree of arrays as for
        [`equidit.data.ArraySource`][].
    - `count`: how many examples are held out; from 0 and below their number, else `ValueError`.
    - `seed`: decides which.

    **Returns:**

    The examples for training, and those that are held out.
    """
    source = as_source(source)
    size = len(source.label)
    if not 0 <= count < size:
        raise ValueError(f"count={count} must be below {size}, the number of examples")
    order = np.random.default_rng(seed).permutation(size)
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


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


def check_labels(label: Integer[np.ndarray, "*_"], num_classes: int) -> None:
    """`ValueError` naming the first label outside 0 to `num_classes - 1`.

    On the device an index out of range cannot raise, and `num_classes` itself is the null label.

    **Arguments:**

    - `label`: labels on the host, of any shape.
    - `num_classes`: number of classes.
    """
    wrong = np.flatnonzero((np.ravel(label) < 0) | (np.ravel(label) >= num_classes))
    if len(wrong):
        raise ValueError(
            f"label {np.ravel(label)[wrong[0]]} (number {wrong[0]}) is out of range: "
            f"labels are 0 to {num_classes - 1}"
        )
