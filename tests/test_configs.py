import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import PAPER, PAPER_BLOCKS, images

import equidit as edt

T = jax.ShapeDtypeStruct((), jnp.int32)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def with_block(name, block):
    return dataclasses.replace(edt.CONFIGS[name], block=block)


def test_the_twelve():
    assert list(edt.CONFIGS) == list(PAPER["configs_256"])


@pytest.mark.parametrize("name", edt.CONFIGS)
def test_size_and_cost(name):
    row, config = PAPER["configs_256"][name], edt.CONFIGS[name]
    sizes = PAPER["sizes"][name.removeprefix("DiT-").split("/")[0]]
    assert {field: getattr(config, field) for field in sizes} == sizes
    assert edt.num_params(name) == row["params_trainable"]
    # 0.1 %, or half a unit of the last printed digit.
    assert edt.num_macs(name) / 1e9 == pytest.approx(row["gflops"], rel=0.001, abs=0.005)


@pytest.mark.parametrize("block", PAPER_BLOCKS)
def test_the_four_designs(block):
    row, config = PAPER["blocks_xl2_256"][block], with_block("DiT-XL/2", block)
    assert edt.num_params(config) == row["params_trainable"]
    assert edt.num_macs(config) / 1e9 == pytest.approx(row["gflops"], rel=0.001)


def test_cost_at_512():
    assert PAPER["xl2_512"]["gflops"] == 524.6
    assert edt.num_macs("DiT-XL/2", 64, 64) / 1e9 == pytest.approx(524.60, rel=0.001)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_cross_attention_adds_roughly_15_percent(size):
    cross, zero, context = (
        edt.num_macs(with_block(f"DiT-{size}/2", block))
        for block in ("cross-attention", "adaln-zero", "in-context")
    )
    assert 0.150 <= round(cross / zero - 1, 3) <= 0.160
    assert 0.142 <= round(cross / context - 1, 3) <= 0.153


@pytest.mark.parametrize("block", PAPER_BLOCKS)
@pytest.mark.parametrize("name", edt.CONFIGS)
def test_the_program_has_the_stated_cost(name, block):
    config = with_block(name, block)
    network = eqx.filter_eval_shape(edt.build, config, key=jax.random.key(0))
    assert edt.count_macs(network, shape(4, 32, 32), T, T) == edt.num_macs(config)


@pytest.mark.parametrize("block", [*PAPER_BLOCKS, "text-cross-attention"])
@pytest.mark.parametrize("length", [8, 77])
def test_the_program_has_the_stated_cost_with_prompts(block, length):
    sizes: dict[str, Any] = {"text_dim": 24, "text_length": length, "num_classes": None}
    config = edt.Config(2, 64, 3, 4, 3, mlp_ratio=2.5, learn_sigma=False, block=block, **sizes)
    network = eqx.filter_eval_shape(edt.build, config, key=jax.random.key(0))
    prompt = shape(length, 24), jax.ShapeDtypeStruct((length,), bool)
    counted = edt.count_macs(network, shape(3, 12, 20), T, prompt)
    assert counted == edt.num_macs(config, 12, 20)
    real = edt.build(config, key=jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(real)) == edt.num_params(config)


@pytest.mark.parametrize("block", PAPER_BLOCKS)
def test_unconditional_cost(block):
    config = edt.Config(2, 32, 2, 4, num_classes=None, block=block)
    network = eqx.filter_eval_shape(edt.build, config, key=jax.random.key(0))
    assert edt.count_macs(network, shape(4, 8, 8), T, None) == edt.num_macs(config, 8, 8)


def test_parts():
    parts = edt.macs_by_part("DiT-XL/2")
    assert sum(parts.values()) == edt.num_macs("DiT-XL/2")
    d, n = 1152, 256
    assert parts["attention projections"] == 28 * 4 * d * d * n
    assert parts["attention products"] == 28 * 2 * n * n * d
    assert parts["mlp"] == 28 * 8 * d * d * n
    assert parts["modulation"] == 28 * 6 * d * d
    assert parts["patch embedding"] == 16 * d * n
    assert parts["conditioning"] == 256 * d + d * d
    assert parts["final"] == 2 * d * d + 32 * d * n


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
        (
            lambda k: edt.build("DiT-S/2", key=k, block="mine"),
            ValueError,
            ["'mine'", "adaln-zero", "in-context"],
        ),
        (lambda k: edt.build("DiT-S/2", key=k, text_dim=768), ValueError, ["num_classes=1000"]),
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
