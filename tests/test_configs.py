import dataclasses
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import PAPER, PAPER_BLOCKS, images

import equidit as edt
from equidit import diffusion as dfn

SCHEDULE, X = dfn.Schedule(dfn.linear_betas()), images(1)[0]


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


@pytest.mark.parametrize("size", ["S", "XL"])
def test_cross_attention_adds_roughly_15_percent(size):
    cross, zero, context = (
        edt.num_macs(with_block(f"DiT-{size}/2", block))
        for block in ("cross-attention", "adaln-zero", "in-context")
    )
    assert 0.150 <= round(cross / zero - 1, 3) <= 0.160
    assert 0.142 <= round(cross / context - 1, 3) <= 0.153


CONDITIONINGS: dict[str, dict[str, Any]] = {
    "label": {"num_classes": 5},
    "none": {"num_classes": None},
    "text": {"num_classes": None, "text_dim": 12, "text_length": 7},
}
every_block = pytest.mark.parametrize("block", get_args(edt.configs.BlockType))
every_conditioning = pytest.mark.parametrize("conditioning", CONDITIONINGS)


def formulas(c, height, width):
    """The paper's designs, by hand."""
    d, image = c.hidden_size, height * width // c.patch_size**2
    patch = c.patch_size**2 * c.in_channels
    modulation = {"adaln-zero": 6, "adaln": 4, "text-cross-attention": 6}.get(c.block, 0)
    conditioning = 256 * d + d * d
    if c.text_dim is None:
        context = 1 if c.num_classes is None else 2
    else:
        context = c.text_length + (not modulation)
        conditioning += c.text_length * (c.text_dim * d + d * d) + d * d
    n = image + context if c.block == "in-context" else image
    projections, products = 4 * d * d * n, 2 * n * n * d
    if "cross" in c.block:
        projections += 2 * d * d * (n + context)
        products += 2 * n * context * d
    final = d * patch * (2 if c.learn_sigma else 1) * image
    return {
        "patch embedding": patch * d * image,
        "conditioning": conditioning,
        "attention projections": c.depth * projections,
        "attention products": c.depth * products,
        "mlp": c.depth * 2 * d * int(d * c.mlp_ratio) * n,
        "modulation": c.depth * modulation * d * d,
        "final": final + (2 * d * d if modulation else 0),
    }


@every_block
@every_conditioning
def test_cost_by_part_is_the_formula(block, conditioning):
    options: dict[str, Any] = {"block": block} | CONDITIONINGS[conditioning]
    config = edt.Config(2, 64, 3, 4, 3, mlp_ratio=2.5, learn_sigma=False, **options)
    parts = edt.macs_by_part(config, 12, 20)
    assert list(parts.items()) == list(formulas(config, 12, 20).items())
    assert sum(parts.values()) == edt.num_macs(config, 12, 20)


@every_block
@every_conditioning
def test_size_and_cost_of_a_network_are_those_of_its_config(block, conditioning):
    config = edt.Config(2, 16, 3, 2, 3, block=block, **CONDITIONINGS[conditioning])
    network = eqx.filter_eval_shape(edt.build, config, key=jax.random.key(0))
    assert edt.num_params(network) == edt.num_params(config)
    low = eqx.filter_eval_shape(edt.cast, network, jnp.bfloat16)
    assert edt.num_macs(low, 6, 10) == sum(formulas(config, 6, 10).values())
    guided = edt.guide(network, 2.0, getattr(network.conditioner, "null", None))
    assert edt.num_macs(guided, 6, 10) == 2 * sum(formulas(config, 6, 10).values())


def test_size_and_cost_of_networks_of_your_own():
    class Half(eqx.Module):
        weight: jax.Array
        calls: jax.Array
        name: str

        def __call__(self, t, cond):
            return edt.Conditioning(self.weight @ cond * t)

    half = Half(jnp.ones((16, 6)), jnp.arange(3), "half")
    network = edt.DiT(3, 2, 16, 1, 2, None, conditioner=half, key=jax.random.key(0))
    plain = edt.Config(2, 16, 1, 2, 3, num_classes=None)
    timestep = 256 * 16 + 16 * 16
    assert edt.num_params(half) == 16 * 6
    assert edt.num_params(network) == edt.num_params(plain) - timestep - 2 * 16 + 16 * 6
    macs = edt.num_macs(network, 4, 6, cond=shape(6))
    assert macs == edt.num_macs(plain, 4, 6) - timestep + 16 * 6
    assert edt.num_macs(edt.guide(network, 2.0, jnp.zeros(6)), 4, 6, jnp.ones(6)) == 2 * macs


def test_parts_of_the_largest():
    config = edt.CONFIGS["DiT-XL/2"]
    assert edt.macs_by_part("DiT-XL/2", 64, 64) == formulas(config, 64, 64)


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
        (lambda k: edt.num_params(3), ValueError, ["int", "no floating-point arrays"]),
        (lambda k: edt.num_macs(lambda x, t, cond: x), ValueError, ["in_channels", "count_macs"]),
        (
            lambda k: edt.num_macs(edt.build("DiT-S/2", key=k, depth=1), 33, 32),
            ValueError,
            ["height=33", "patch_size=2"],
        ),
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


SAME = {"adaln_zero": "adaln-zero", "AdaLN": "adaln", "Cross Attention": "cross-attention"}
NEAR: dict[str, tuple[Any, dict[str, str]]] = {
    "config": (
        lambda name: edt.build(name, key=jax.random.key(0)),
        {name.removeprefix("DiT-"): name for name in edt.CONFIGS}
        | {name.lower(): name for name in edt.CONFIGS}
        | {name.replace("/", "-"): name for name in edt.CONFIGS},
    ),
    "cost": (edt.num_macs, {"XL/2": "DiT-XL/2", "DiT_B_4": "DiT-B/4"}),
    "block": (lambda name: edt.Config(2, 16, 1, 2, block=name), SAME | {"context": "in-context"}),
    "remat": (
        lambda name: edt.build("DiT-S/8", key=jax.random.key(0), remat=name),
        {"Full": "full", "dot": "dots", "None": "none"},
    ),
    "spacing": (
        lambda name: dfn.space_timesteps(1000, 10, name),
        {"trail": "trailing", "lin_space": "linspace", "Leading": "leading"},
    ),
    "prediction": (
        lambda name: dfn.x0_and_eps(SCHEDULE, X, 3, X, name),
        {"epsilon": "eps", "V": "v", "x_0": "x0"},
    ),
    "variance": (
        lambda name: dfn.ddpm_step(
            lambda x, t, cond: x, SCHEDULE, X, 3, None, key=jax.random.key(0), variance=name
        ),
        {"learn": "learned", "Small": "small", "larger": "large"},
    ),
    "arithmetic": (
        lambda name: edt.pretrained.from_state_dict({}, arithmetic=name),
        {"diffuser": "diffusers"},
    ),
}


@pytest.mark.parametrize("table", NEAR)
def test_a_name_that_is_nearly_right_is_told_the_right_one(table):
    call, names = NEAR[table]
    for name, right in names.items():
        with pytest.raises(ValueError, match=r"unknown: did you mean .*\? Choose from") as caught:
            call(name)
        assert f"did you mean {right!r}? Choose" in str(caught.value)


def test_several_names_that_are_near_and_none():
    for name, words in {
        "XL": "did you mean 'DiT-XL/8' or 'DiT-XL/4' or 'DiT-XL/2'? Choose from DiT-S/8",
        "DiT": "unknown: choose from DiT-S/8",
        "resnet": "unknown: choose from DiT-S/8",
        "": "unknown: choose from DiT-S/8",
    }.items():
        with pytest.raises(ValueError, match="is unknown") as caught:
            edt.num_params(name)
        assert words in str(caught.value)
    with pytest.raises(TypeError, match=r"'hidden_dim': did you mean 'hidden_size'\? Choose"):
        edt.build("DiT-S/8", key=jax.random.key(0), hidden_dim=3)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        edt.CONFIGS["DiT-S/2"].depth = 3  # pyright: ignore[reportAttributeAccessIssue]
