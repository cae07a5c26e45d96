import numpy as np
import pytest
from scipy.linalg import sqrtm

from equidit.metrics import frechet_distance, nearest_distance

RNG = np.random.default_rng(0)
A = RNG.normal(size=(200, 5)) @ RNG.normal(size=(5, 5))
B = RNG.normal(size=(150, 5)) @ RNG.normal(size=(5, 5)) + 1


def test_frechet_is_the_formula():
    cov_a, cov_b = np.cov(A, rowvar=False), np.cov(B, rowvar=False)
    expected = (
        np.square(A.mean(0) - B.mean(0)).sum()
        + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b)).real
    )
    assert frechet_distance(A, B) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(B, A) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_known_gaussians():
    assert frechet_distance(A, A) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(A, A + 2) == pytest.approx(4 * 5)
    # One dimension: (mean difference)^2 + (deviation difference)^2.
    a = A[:, :1]
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * a.mean() ** 2 + 4 * a.var(ddof=1))
    # Fewer samples than features: the covariances are singular.
    assert np.isfinite(frechet_distance(A[:3], B[:3]))


def test_nearest():
    expected = np.linalg.norm(A[:, None] - B[None], axis=-1).min(axis=1).mean()
    assert nearest_distance(A, B) == pytest.approx(expected)
    assert nearest_distance(A, A) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [A[:1], np.full((3, 5), np.nan)])
def test_bad_input(bad):
    with pytest.raises(ValueError, match="b must be at least 2 samples of finite features"):
        frechet_distance(A, bad)
