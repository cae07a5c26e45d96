import dataclasses

import jax
import pytest
from helpers import PAPER, images

import equidit as edt


def test_the_twelve():
    assert list(edt.CONFIGS) == list(PAPER["configs_256"])


@pytest.mark.parametrize("name", edt.CONFIGS)
def test_size_and_cost(name):
    row, config = PAPER["configs_256"][name], edt.CONFIGS[name]
    sizes = PAPER["sizes"][name.removeprefix("DiT-").split("/")[0]]
    assert {field: getattr(config, field) for field in sizes} == sizes
    assert edt.num_params(name) == row["params_trainable"]
    # The paper prints S/8 with two digits.
    tolerance = 0.006 if name == "DiT-S/8" else 0.005
    assert edt.num_macs(name) / 1e9 == pytest.approx(row["gflops"], rel=tolerance)


def test_cost_at_512():
    gflops = PAPER["xl2_512"]["gflops"]
    assert edt.num_macs("DiT-XL/2", 64, 64) / 1e9 == pytest.approx(gflops, rel=0.001)


def test_counts_of_another_config():
    config = edt.Config(
        2, 32, 2, 4, in_channels=1, num_classes=10, mlp_ratio=2.5, learn_sigma=False
    )
    network = edt.build(config, key=jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == edt.num_params(config)
    # Counted by hand, for a 4x6 image: 6 tokens of 4 features.
    n, d = 6, 32
    attention = n * d * 3 * d + n * d * d + 2 * n * n * d
    block = attention + 2 * n * d * 80 + 6 * d * d
    assert (
        edt.num_macs(config, 4, 6)
        == n * 4 * d + 256 * d + d * d + 2 * block + 2 * d * d + n * d * 4
    )


def test_build_overrides():
    network = edt.build(
        "DiT-S/8",
        key=jax.random.key(0),
        depth=1,
        in_channels=3,
        num_classes=None,
        learn_sigma=False,
    )
    assert network(images(1, (3, 16, 8))[0], jax.numpy.asarray(3), None).shape == (3, 16, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda k: edt.build("DiT-M/2", key=k), ValueError, ["DiT-M/2", "DiT-S/8", "DiT-XL/2"]),
        (lambda k: edt.num_params("XL"), ValueError, ["XL", "DiT-B/4"]),
        (lambda k: edt.num_macs("DiT-S/2", 33, 32), ValueError, ["height=33", "patch_size=2"]),
        (lambda k: edt.build("DiT-S/2", key=k, width=3), TypeError, ["'width'", "hidden_size"]),
        (lambda k: edt.build("DiT-S/2", key=k, block="mine"), ValueError, ["'mine'", "adaln-zero"]),
        (lambda k: edt.build("DiT-S/2", key=k, num_heads=5), ValueError, ["num_heads=5"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call(jax.random.key(0))
    assert all(word in str(caught.value) for word in words), caught.value


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        edt.CONFIGS["DiT-S/2"].depth = 3  # pyright: ignore[reportAttributeAccessIssue]
