"""Data whose order shows."""

import json

import numpy as np

from equidit.data import ImageError, batches


class Numbers:
    """Example i is the number i, and what chance gave it."""

    def __init__(self, size, damaged=()):
        self.label, self.damaged = np.arange(size), damaged

    def read(self, index, rng):
        if index in self.damaged:
            raise ImageError(f"example {index} is damaged", damaged=True)
        return {"label": np.int64(index), "chance": rng.random()}


def taken(count, source, batch_size, **options):
    with batches(source, batch_size, seed=options.pop("seed", 3), **options) as stream:
        return [next(stream) for _ in range(count)]


def cache(path, mean, std, label):
    path.mkdir()
    for name, array in (("mean", mean), ("std", std), ("label", label)):
        np.save(path / f"{name}.npy", array)
    info = {"format": 2, "count": len(label), "classes": ["a", "b"], "autoencoder": "0"}
    (path / "info.json").write_text(json.dumps(info))
    return path
