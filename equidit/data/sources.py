"""Data sets, and the order in which training sees them."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num, PyTree

from .._base.common import brief, check_positive, extra
from ..seams import PRNGKey, StrPath
from .images import (
    ImageError as ImageError,
    ImageFolder as ImageFolder,
    Small as Small,
    image_folder as image_folder,
    read_image as read_image,
)
from .latents import LatentCache as LatentCache, open_latents as open_latents

DIGITS_SHAPE = (1, 8, 8)
"""Channels, height and width of [`equidit.data.digits`][]."""
DIGITS_CLASSES = 10
"""The number of their classes."""


_EVER = 2**62


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


def _source(data: Source | PyTree) -> Source:
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
    source = _source(source)
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


class _Reader:
    """Reads one example, or says that it is damaged; the following one then takes its place."""

    def __init__(self, source: Source, skip_corrupt: bool):
        self.source, self.skip_corrupt = source, skip_corrupt

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Any, int]:
        size = len(self.source.label)
        for skipped in range(size):
            try:
                return self.source.read((int(index) + skipped) % size, rng), skipped
            except ImageError as error:
                if not (self.skip_corrupt and error.damaged):
                    raise
        raise ImageError("every example is damaged", damaged=True)


def _count_skipped(batch: tuple[Any, np.ndarray]) -> tuple[Any, int]:
    return batch[0], int(batch[1].sum())


class Batches(Iterator[tuple[Any, int]]):
    """What [`equidit.data.batches`][] returns: an iterator, to be used in a `with` statement.

    Without one, `close` ends its workers and threads.
    """

    def __init__(self, iterator: Any):
        """**Arguments:**

        - `iterator`: grain's.
        """
        self._iterator = iterator

    def __next__(self) -> tuple[Any, int]:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise ChildProcessError(
                f"a process that reads data has died ({str(error).splitlines()[0]}): if memory is "
                "short, go on with fewer workers, or with workers=0, which reads in threads"
            ) from error

    def close(self) -> None:
        """Ends the workers and threads that read."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def batches(
    source: Source | PyTree,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    workers: int = 0,
    skip_corrupt: bool = False,
    process: tuple[int, int] = (0, 1),
    num_classes: int | None = None,
) -> Batches:
    """Batches for ever, from the step `start` on: a new shuffle of the data every epoch.

    What is in a batch depends on the seed and the step alone, so that a run which goes on at any
    step, with any number of workers or processes, sees the same data. Use it in a `with`
    statement, which ends the workers, or call `next` and at the end `close`.

    **Arguments:**

    - `source`: a [`equidit.data.Source`][], or a pytree of arrays as for
        [`equidit.data.ArraySource`][].
    - `batch_size`: of all processes together. A batch may span epochs.
    - `seed`: of the run.
    - `start`: number of batches to leave out: the step to go on at.
    - `workers`: processes that read; 0 reads in threads, which suffices for most data. A script
        that asks for some must guard its main part by `if __name__ == "__main__":`.
    - `skip_corrupt`: whether a damaged example is replaced by the one after it, rather than an
        error.
    - `process`: this process's number, and how many there are. Each gets its share of the batch.
    - `num_classes`: of the network that is trained: labels must be below it, as
        [`equidit.data.check_labels`][] says. `None` does not look.

    **Returns:**

    An iterator over pairs: the batch, a pytree of arrays, and the number of damaged examples that
    were skipped.

    **Raises:**

    `ValueError` if the processes do not divide the batch, the source is empty, its arrays do not
    share their first axis, or a label is out of range; and from the iterator
    [`equidit.data.ImageError`][], which names the file and the index, and `ChildProcessError` if a
    worker died.
    """
    number, count = process
    if not 0 <= number < count:
        raise ValueError(
            f"process={process} must be a number and how many there are, such as (0, 2) and (1, 2)"
        )
    if start < 0:
        raise ValueError(f"start={start} must not be negative")
    source = _source(source)
    check_positive(batch_size=batch_size, examples=len(source.label))
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of {count}, the processes")
    if num_classes is not None:
        if not getattr(source, "labelled", True):
            raise ValueError(
                f"num_classes={num_classes} is to check labels, but none of the arrays is called "
                "'label': give a dictionary such as {'image': ..., 'label': ...}"
            )
        check_labels(source.label, num_classes)
    with extra("train"):
        import grain
        from absl import flags

    size = len(source.label)
    reader = _Reader(source, skip_corrupt)
    # Without a number of epochs the length is the largest there is, and that of batches overflows.
    dataset = grain.MapDataset.range(size).seed(seed).shuffle().repeat(_EVER // size)
    dataset = dataset.random_map(reader).batch(batch_size // count)[start * count + number :: count]
    # As the last transformation `batch` would answer in shared memory, and leave some behind.
    dataset = dataset.map(_count_skipped)
    ahead = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
    stream = dataset.to_iter_dataset(ahead)
    if workers:
        # Else the workers refuse to start.
        flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=4))
    return Batches(iter(stream))


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
