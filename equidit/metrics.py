"""Figures of quality: distances between sets of samples, over whatever features they are given."""

import numpy as np
from jaxtyping import Float


def frechet_distance(
    a: Float[np.ndarray, "batch_a features"], b: Float[np.ndarray, "batch_b features"]
) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features.

    `|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`, in the squared unit of the
    features. It is biased upwards for few samples: compare at equal numbers only.

    **Arguments:**

    - `a`, `b`: the features of one set and of the other, a row a sample. The number of samples may
        differ; at least 2 each.

    **Returns:**

    The squared distance, at least 0, computed in float64.

    **Raises:**

    `ValueError` for fewer than 2 samples and for features that are not finite.

    ??? cite

        Equation 6 of [Heusel et al. 2017](https://arxiv.org/abs/1706.08500).
    """
    for name, features in (("a", a), ("b", b)):
        if len(features) < 2 or not np.isfinite(features).all():
            raise ValueError(f"{name} must be at least 2 samples of finite features")
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    # tr (A B)^(1/2) by the symmetric A^(1/2) B A^(1/2), which has the same eigenvalues.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = (
        np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    )
    return float(max(distance, 0.0))


def nearest_distance(
    a: Float[np.ndarray, "batch_a features"], b: Float[np.ndarray, "batch_b features"]
) -> float:
    """Mean Euclidean distance from each row of `a` to its nearest row of `b`.

    From samples to the training set it betrays memorisation where it is far below what held-out
    data have.

    **Arguments:**

    - `a`, `b`: features, a row a sample.

    **Returns:**

    The mean distance, in the unit of the features, computed in float64.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return float(np.sqrt(np.maximum(squares.min(axis=1), 0)).mean())
