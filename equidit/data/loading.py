"""The order in which training sees a data set."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import PyTree

from .._base.common import check_positive, extra
from .images import ImageError
from .sources import Source, as_source, check_labels

_EVER = 2**62


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
    source = as_source(source)
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
