import numpy as np
import pytest

from equidit.data import DIGITS_SHAPE, batch_indices, check_labels, digits


def test_digits():
    train, held_out = digits()
    assert (len(train.label), len(held_out.label)) == (1437, 360)
    for images in (train, held_out):
        assert images.image.shape == (len(images.label), *DIGITS_SHAPE)
        assert images.image.dtype == np.float32
        assert (images.image.min(), images.image.max()) == (-1, 1)
    shares = [np.bincount(images.label) / len(images.label) for images in (train, held_out)]
    assert np.abs(shares[0] - shares[1]).max() < 0.002
    # No digit is on both sides, and the split is the same every time.
    flat = [images.image.reshape(-1, 64) for images in (train, held_out)]
    assert not {row.tobytes() for row in flat[0]} & {row.tobytes() for row in flat[1]}
    assert (digits()[1].image == held_out.image).all()


def test_batches_shuffle_anew_every_epoch_and_depend_on_the_step_alone():
    size, batch = 10, 4
    order = np.concatenate([batch_indices(step, batch, size, seed=3) for step in range(5)])
    first, second = order[:size], order[size:]
    assert sorted(first) == sorted(second) == list(range(size))
    assert (first != second).any()
    again = batch_indices(2, batch, size, seed=3)
    assert (again == order[2 * batch : 3 * batch]).all()
    assert (batch_indices(0, size, size, seed=4) != first).any()
    # A batch may be larger than the data.
    assert np.bincount(batch_indices(0, 25, size, seed=3)).tolist() in (
        [2 + (i in batch_indices(4, 5, size, seed=3)) for i in range(size)],
    )


@pytest.mark.parametrize(("label", "where"), [(-1, 0), (10, 0), (11, 2)])
def test_labels_out_of_range(label, where):
    labels = np.array([0, 9, 3])
    check_labels(labels, 10)
    labels[where] = label
    with pytest.raises(ValueError, match=rf"label {label} \(number {where}\).*0 to 9"):
        check_labels(labels, 10)
