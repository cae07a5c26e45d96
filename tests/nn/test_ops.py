import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import images

import equidit as edt


@pytest.mark.parametrize(("shape", "patch_size"), [((4, 8, 8), 2), ((3, 6, 12), 3), ((1, 5, 7), 1)])
def test_patchify_round_trip(shape, patch_size):
    x = images(1, shape)[0]
    grid = (shape[1] // patch_size, shape[2] // patch_size)
    tokens = edt.patchify(x, patch_size)
    assert tokens.shape == (grid[0] * grid[1], patch_size**2 * shape[0])
    np.testing.assert_array_equal(edt.unpatchify(tokens, patch_size, grid), x)


def test_patchify_order():
    x = jnp.arange(2 * 4 * 6).reshape(2, 4, 6).astype(jnp.float32)
    tokens = edt.patchify(x, 2)
    # The second token is the patch right of the first; in it channels vary fastest.
    np.testing.assert_array_equal(
        tokens[1], [x[c, i, j] for i in (0, 1) for j in (2, 3) for c in (0, 1)]
    )


def test_patchify_then_linear_is_a_strided_convolution():
    x = images(1, (3, 8, 12))[0]
    kernel = images(5, (3, 4, 4), seed=2)
    convolved = jax.lax.conv(x[None], kernel, (4, 4), "VALID")[0]
    weight = einops.rearrange(kernel, "d c p q -> d (p q c)")
    tokens = edt.patchify(x, 4) @ weight.T
    np.testing.assert_allclose(tokens.T.reshape(convolved.shape), convolved, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: edt.patchify(jnp.ones((1, 9, 8)), 2), ["height=9", "patch_size=2", "8 or 10"]),
        (lambda: edt.patchify(jnp.ones((1, 8, 7)), 2), ["width=7", "patch_size=2"]),
        (lambda: edt.patchify(jnp.ones((1, 8, 8)), 0), ["patch_size=0"]),
        (lambda: edt.unpatchify(jnp.ones((4, 4)), 2, (2, 3)), ["(2, 3)", "4 tokens"]),
        (lambda: edt.unpatchify(jnp.ones((4, 5)), 2, (2, 2)), ["5 features", "multiple of 4"]),
        (lambda: edt.sincos_2d(6, (2, 2)), ["dim=6", "multiple of 4"]),
        (lambda: edt.timestep_features(jnp.ones(()), 7), ["dim=7", "even"]),
        (lambda: edt.timestep_features(jnp.ones(()), 2, endpoint=True), ["dim=2", "least 4"]),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_sincos_of_a_wide_grid():
    table = np.asarray(edt.sincos_2d(16, (2, 3))).reshape(2, 3, 16)
    # The first half depends on the column alone, the second on the row alone.
    assert (table[0, :, :8] == table[1, :, :8]).all()
    assert (table[:, 0, 8:] == table[:, 2, 8:]).all()
    np.testing.assert_allclose(table[1, 2, :2], np.sin([2, 2 * 10000**-0.25]), rtol=1e-6)
    np.testing.assert_allclose(table[1, 2, 12:14], np.cos([1, 10000**-0.25]), rtol=1e-6)


def test_timestep_features_are_float32_and_continuous():
    features = edt.timestep_features(jnp.asarray(999, jnp.int32))
    assert features.dtype == jnp.float32
    assert features.shape == (256,)
    np.testing.assert_array_equal(features, edt.timestep_features(jnp.asarray(999.0)))
    assert np.abs(features - edt.timestep_features(jnp.asarray(998.5))).max() > 0.1
    # bfloat16 cannot hold 999; what it holds is not rounded further.
    rounded = jnp.asarray(999, jnp.bfloat16)
    np.testing.assert_array_equal(
        edt.timestep_features(rounded), edt.timestep_features(rounded.astype(jnp.float32))
    )


@pytest.mark.parametrize("endpoint", [False, True])
def test_slowest_frequency(endpoint):
    slowest = edt.timestep_features(jnp.asarray(1e4), 8, endpoint=endpoint)[3]
    assert abs(slowest - np.cos(1.0 if endpoint else 10.0)) < 1e-5


def test_layer_norm_statistics_are_float32():
    x = 100 + jax.random.normal(jax.random.key(0), (3, 512))
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(edt.layer_norm(x), exact, rtol=0, atol=1e-4)
    low = edt.layer_norm(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    same = edt.layer_norm(x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(low, same.astype(jnp.bfloat16))


def test_modulate():
    x, shift, scale = jnp.full((2, 3), 5.0), jnp.asarray([1.0, 2, 3]), jnp.asarray([0.0, 1, -1])
    np.testing.assert_array_equal(edt.modulate(x, shift, scale), [[6, 12, 3]] * 2)
