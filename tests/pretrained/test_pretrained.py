"""Published weights in their own formats, written by PyTorch and diffusers, against their outputs.

All weights are random: zero gates would make agreement empty.
"""

import argparse
import dataclasses
import json
import logging
import os
import pickle
import re
import sys
import types
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from goldens import NUM_HEADS, network, network_errors, network_failures
from helpers import difference, golden, official, tree_allclose
from weights import (
    change_config,
    diffusers,
    our_output,
    small,
    state_dict,
    tensors,
    their_dit,
    their_output,
    torch,
)

import equidit as edt
from equidit import pretrained
from equidit.cli import sources
from equidit.pretrained import files, folders, official as official_files, transformer
from equidit.pretrained.official import OFFICIAL
from equidit.pretrained.tables import export

pytest.importorskip("safetensors", reason="needs safetensors")


WEIGHTS = "diffusion_pytorch_model"
# Rewrites of a float32 network in another framework.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()


def write_safetensors(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# Official files.


def bare(state, folder):
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def checkpoint(state, folder):
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    args = argparse.Namespace(model="DiT-XL/2", num_classes=1000)
    content = {"model": other, "ema": state, "opt": {"state": {}}, "args": args}
    return bare(content, folder)


def safetensors(state, folder):
    from safetensors.torch import save_file

    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("write", [bare, checkpoint, safetensors])
@pytest.mark.parametrize("name", NUM_HEADS)
def test_golden_networks_from_files(tmp_path, name, write):
    path = write(state_dict(name), tmp_path)
    loaded = edt.pretrained.load_dit(path, num_heads=NUM_HEADS[name])
    assert tree_allclose(loaded, network(name))
    # Networks of the same bits and structure compute the same: one is enough.
    if write is safetensors and name == "dit_tiny":
        errors = network_errors(name, loaded)
        assert not network_failures(errors), errors


def test_average_is_preferred_and_can_be_declined(tmp_path):
    state = state_dict()
    doubled = {k: v if k == "pos_embed" else 2 * v for k, v in state.items()}
    path = tmp_path / "0050000.pt"
    torch.save({"model": doubled, "ema": state, "opt": {}, "args": {"num_heads": 2}}, path)
    ema, model = pretrained.load_dit(path), pretrained.load_dit(path, ema=False)
    assert tree_allclose(jax.tree.map(lambda x: 2 * x, ema), model)
    torch.save({"model": doubled, "args": {"num_heads": 2}}, path)
    assert tree_allclose(pretrained.load_dit(path), model)


@pytest.mark.parametrize(
    "sizes",
    [
        {"learn_sigma": False, "patch_size": 4, "mlp_ratio": 0.5},
        {"in_channels": 3, "num_classes": 1, "depth": 3, "mlp_ratio": 3.7},
    ],
)
def test_sizes_are_inferred(sizes):
    expected = small(**sizes)
    loaded = pretrained.from_state_dict(export(expected, OFFICIAL), num_heads=4)
    # All sizes that are not an array's shape are in the tree's structure.
    assert tree_allclose(loaded, expected)


def test_head_count(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    state = state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"hidden_size=32 and depth=2: pass num_heads="):
        pretrained.load_dit(path)
    monkeypatch.setitem(edt.CONFIGS, "DiT-Z/2", edt.Config(2, 32, 2, 8))
    monkeypatch.setitem(edt.CONFIGS, "DiT-T/2", edt.Config(2, 32, 2, 2))

    def heads(**options):
        return pretrained.load_dit(path, **options).blocks.stacked.attention.num_heads

    assert heads() == 8
    assert heads(num_heads=4) == 4
    for model in ("DiT-T/2", "SiT-T/2"):
        torch.save({"model": state, "args": argparse.Namespace(model=model)}, path)
        assert heads() == 2
    # A name whose sizes are others says nothing about this file.
    torch.save({"model": state, "args": argparse.Namespace(model="DiT-XL/2")}, path)
    assert heads() == 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(tmp_path, dtype):
    from safetensors.torch import save_file

    state = {k: v.to(getattr(torch, dtype)) for k, v in state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    a = pretrained.load_dit(tmp_path / "weights.pt", num_heads=2)
    b = pretrained.load_dit(tmp_path / "weights.safetensors", num_heads=2)
    assert {leaf.dtype for leaf in jax.tree.leaves((a, b))} == {np.dtype("float32")}
    assert tree_allclose(a, b)
    assert 0 <= difference(a, network("dit_tiny")) < 1e-2


def test_weights_do_not_depend_on_the_file_once_loaded(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(state_dict(), path)
    loaded = pretrained.load_dit(path, num_heads=2)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert tree_allclose(loaded, network("dit_tiny"))


def test_keys_are_used_exactly_once():
    arrays = official(golden("dit_tiny"))
    bias = arrays.pop("blocks.1.attn.proj.bias")
    arrays["blocks.1.attn.project.bias"] = bias
    arrays["t_embedder.mlp.2.weight"] = arrays["t_embedder.mlp.2.weight"][:, :3]
    with pytest.raises(ValueError, match="another network") as error:
        pretrained.from_state_dict(arrays, num_heads=2)
    for line in (
        r"missing (1): blocks.1.attn.proj.bias",
        r"unexpected (1): blocks.1.attn.project.bias",
        r"of another shape (1): t_embedder.mlp.2.weight is (32, 3), not (32, 32)",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.clear(), "the state dict holds nothing, not a dict"),
        (lambda a: a.pop("x_embedder.proj.weight"), "missing.*x_embedder.proj.weight; it holds"),
        (lambda a: a.update({"final_layer.linear.bias": np.ones(5)}), "has 5 entries"),
        (lambda a: a.update(pos_embed=np.ones((1, 15, 32))), r"pos_embed is \(1, 15, 32\)"),
        (lambda a: a.update(pos_embed=np.ones((1, 16, 32))), "not the sine-cosine table"),
    ],
)
def test_other_networks_are_refused(change, message):
    arrays = official(golden("dit_tiny"))
    change(arrays)
    with pytest.raises(ValueError, match=message):
        pretrained.from_state_dict(arrays, num_heads=2)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="hoose from official, diffusers"):
        pretrained.from_state_dict({}, arithmetic="theirs")  # pyright: ignore[reportArgumentType]


def test_licence_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(transformer, "_told", set())
    with caplog.at_level(logging.INFO):
        network("dit_tiny")
        assert not caplog.records
        sizes = {"hidden_size": 32, "depth": 2, "patch_size": 2, "num_classes": 4}
        monkeypatch.setattr(transformer, "_PUBLISHED", sizes)
        network("dit_tiny")
        network("dit_tiny")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CC-BY-NC 4.0" in caplog.text


def test_no_random_initialisation(monkeypatch):
    made = []
    skeleton = transformer.skeleton
    monkeypatch.setattr(
        transformer, "skeleton", lambda *a, **k: made.append(skeleton(*a, **k)) or made[-1]
    )
    network("dit_tiny")
    kinds = {type(leaf) for leaf in jax.tree.leaves(made)}
    assert kinds == {jax.ShapeDtypeStruct}


# What a file says it is.


def describe_of(path, state, args=None, **options):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"model": state, "args": args}, path)
    return pretrained.describe(path, **options)


CONFIG = edt.Config(2, 32, 2, 2, num_classes=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_describes_official_files(tmp_path, suffix):
    state = state_dict()
    found = describe_of(tmp_path / f"DiT{suffix}", state, num_heads=2)
    # 16 positions are a grid of 4x4 patches.
    assert found == pretrained.Published(CONFIG, 8, "steps", "official")
    loaded = pretrained.load_dit(tmp_path / f"DiT{suffix}", num_heads=2)
    built = jax.eval_shape(partial(edt.build, found.config), key=jax.random.key(0))
    assert jax.tree.structure(built) == jax.tree.structure(loaded)
    del state["pos_embed"]
    assert describe_of(tmp_path / f"DiT{suffix}", state, num_heads=2).sample_size is None


def test_describes_sits(tmp_path):
    state = state_dict()
    args = argparse.Namespace(model="SiT-XL/2", num_heads=2)
    found = describe_of(tmp_path / "0400000.pt", state, args)
    assert found == pretrained.Published(CONFIG, 8, "unit", "official")
    args = argparse.Namespace(model="DiT-XL/2", num_heads=2)
    assert describe_of(tmp_path / "0400000.pt", state, args).time == "steps"
    assert describe_of(tmp_path / "a-SiT.pt", state, num_heads=2).time == "steps"
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"SiT-XL-2-256x256{suffix}"
        assert describe_of(path, state, num_heads=2).time == "unit"


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_describes_folders(tmp_path, learn_sigma):
    their_dit(learn_sigma).save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    config = edt.Config(2, 32, 3, 2, num_classes=5, learn_sigma=learn_sigma)
    expected = pretrained.Published(config, 8, "steps", "diffusers")
    assert pretrained.describe(tmp_path) == expected
    assert pretrained.describe(tmp_path / "transformer", num_heads=2) == expected
    with pytest.raises(ValueError, match=r"num_heads=4, but .* has 2"):
        pretrained.describe(tmp_path, num_heads=4)
    path = tmp_path / "transformer" / "config.json"
    change_config(path, sample_size=None)
    assert pretrained.describe(tmp_path).sample_size is None
    change_config(path, sample_size=-8)
    with pytest.raises(ValueError, match=r"config.json: sample_size=-8 must be a positive"):
        pretrained.describe(tmp_path)


@pytest.mark.parametrize("kind", ["official", "diffusers"])
def test_what_is_described_loads_without_opening_the_file_again(tmp_path, kind):
    if kind == "official":
        path = bare(state_dict(), tmp_path)
        expected = pretrained.load_dit(path, num_heads=2)
        found = pretrained.describe(path, num_heads=2)
    else:
        path = tmp_path / "folder"
        their_dit().save_pretrained(path)
        expected = pretrained.load_diffusers_dit(path, arithmetic="diffusers")
        found = pretrained.describe(path)
    path.rename(tmp_path / "elsewhere")
    other = found.load(arithmetic="diffusers")
    assert jax.tree.all(
        jax.tree.map(np.array_equal, jax.tree.leaves(other), jax.tree.leaves(expected))
    )
    if kind == "official":
        assert tree_allclose(found.load(), expected)
        assert jax.tree.structure(other) != jax.tree.structure(expected)
    else:
        assert jax.tree.structure(other) == jax.tree.structure(expected)
        with pytest.raises(ValueError, match="arithmetic=None is unknown"):
            found.load()
    copy = dataclasses.replace(found)
    assert copy == found
    with pytest.raises(ValueError, match=r"only what describe returns can load itself"):
        copy.load(arithmetic="official")


def test_sampling_opens_a_file_once(tmp_path, monkeypatch):
    arrays = export(small(in_channels=3), OFFICIAL)
    path = safetensors(tensors(arrays), tmp_path)
    read, opened = official_files.read_file, []
    monkeypatch.setattr(official_files, "read_file", lambda p: opened.append(p) or read(p))
    drawable = sources.of_weights(str(path), None, size=8, num_heads=4, arithmetic="official")
    assert opened == [path]
    assert tree_allclose(drawable.network, pretrained.from_state_dict(arrays, num_heads=4))


def test_describing_reads_no_weights(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("weights were read")

    their_dit().save_pretrained(tmp_path / "folder")
    torch.save(state_dict(), tmp_path / "file.pt")
    for name in ("numpy", "float"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with monkeypatch.context() as patch:
        patch.setattr(np, "concatenate", refuse)
        assert pretrained.describe(tmp_path / "folder").kind == "diffusers"
        assert pretrained.describe(tmp_path / "file.pt", num_heads=2).kind == "official"
        with pytest.raises(AssertionError, match="weights were read"):
            pretrained.load_diffusers_dit(tmp_path / "folder", arithmetic="diffusers")
    with pytest.raises(AssertionError, match="weights were read"):
        pretrained.load_dit(tmp_path / "file.pt", num_heads=2)


def test_describing_what_is_no_dit(tmp_path):
    state = state_dict()
    with pytest.raises(ValueError, match=r"hidden_size=32 and depth=2: pass num_heads="):
        describe_of(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match=r"num_heads=5 does not divide hidden_size=32"):
        describe_of(tmp_path / "a.pt", state, num_heads=5)
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 15, 32\)"):
        describe_of(tmp_path / "a.pt", state | {"pos_embed": torch.ones(1, 15, 32)}, num_heads=2)
    (tmp_path / "a.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="truncated"):
        pretrained.describe(tmp_path / "a.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds config.json beside its weights"):
        pretrained.describe(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="is of a AutoencoderKL, not of diffusers' DiT"):
        pretrained.describe(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"there is no nothing\.pt"):
        pretrained.describe("nothing.pt")


# Bad files.


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_malicious_pickles_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x_embedder.proj.weight": _Evil()}, "evil.pt")
    Path("plain.pt").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(ValueError, match=rf"{name} is .*nothing in it was executed.*Download"):
            pretrained.load_dit(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(tmp_path, suffix, share):
    from safetensors.torch import save_file

    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"weights.* is truncated.*Download it again"):
        pretrained.load_dit(path, num_heads=2)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}}, "a claims"),
        ({"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 16]}}, "a claims"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, "a claims"),
        ({"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}, "dtype I64"),
        ({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}, "a claims"),
        ({"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, "a claims"),
        (
            {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"},
            "its arrays overlap",
        ),
        ({"a": 1}, "damaged"),
        ([], "damaged"),
    ],
)
def test_safetensors_that_claim_too_much(tmp_path, header, message):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, header, bytes(16))
    with pytest.raises(ValueError, match=message):
        pretrained.load_dit(path)


def test_safetensors_header_beyond_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="claims a header of 1099511627776 bytes, but has 10"):
        pretrained.load_dit(path)


def test_tensors_larger_than_their_storage(tmp_path):
    state = state_dict()
    state["y_embedder.embedding_table.weight"] = torch.zeros(1, 1).expand(10**9, 32)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"claims \(1000000000, 32\), more than the file holds"):
        pretrained.load_dit(tmp_path / "weights.pt", num_heads=2)


def test_what_is_no_state_dict(tmp_path):
    path = tmp_path / "weights.pt"
    for content, message in (
        ([1, 2], "a list, not a dictionary"),
        ({}, "not a dictionary of weights"),
        ({"a": 3}, "a is no dense floating-point tensor"),
        ({"a": torch.eye(3).to_sparse()}, "a is no dense floating-point tensor"),
        ({"a": torch.ones(3, device="meta")}, "a is no dense floating-point tensor"),
        ({"a": torch.ones(3, dtype=torch.int64)}, "a is no dense floating-point tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            pretrained.load_dit(path)
    path = tmp_path / "weights.npz"
    path.touch()
    with pytest.raises(ValueError, match=r"unknown kind: choose from .safetensors, .pt, .bin"):
        pretrained.load_dit(path)
    with pytest.raises(ValueError, match="is a folder"):
        pretrained.load_dit(tmp_path)


def test_without_pytorch(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    torch.save(state_dict(), path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch, or convert"):
        pretrained.load_dit(path)


# diffusers' DiT.


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_their_dit_here(tmp_path, learn_sigma, safe):
    model = their_dit(learn_sigma)
    model.save_pretrained(tmp_path / "transformer", safe_serialization=safe)
    (tmp_path / "model_index.json").write_text("{}")
    network = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    target = their_output(model)
    assert tree_allclose(target, our_output(network), TOLERANCE)
    # The same weights, as they were trained, are another network.
    other = pretrained.load_diffusers_dit(tmp_path / "transformer", arithmetic="official")
    assert jax.tree.all(
        jax.tree.map(np.array_equal, jax.tree.leaves(network), jax.tree.leaves(other))
    )
    assert not tree_allclose(target, our_output(other), 10 * TOLERANCE)


def test_the_older_class_name(tmp_path):
    """Of the folders that were published."""
    their_dit().save_pretrained(tmp_path)
    network = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    change_config(tmp_path / "config.json", _class_name="Transformer2DModel")
    assert tree_allclose(network, pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers"))
    change_config(tmp_path / "config.json", norm_type="ada_norm_single")
    with pytest.raises(ValueError, match="norm_type='ada_norm_single' is not supported"):
        pretrained.describe(tmp_path)


def test_our_dit_there(tmp_path):
    official_weights = official(golden("dit_tiny_unit"))
    network = pretrained.from_state_dict(official_weights, num_heads=4, arithmetic="diffusers")
    pretrained.save_diffusers_dit(network, tmp_path, sample_size=8)
    model = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert tree_allclose(their_output(model), our_output(network), TOLERANCE)
    again = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    assert tree_allclose(again, network)
    assert jax.tree.structure(again) == jax.tree.structure(network)


def test_the_mlps_norm_is_told_apart(tmp_path):
    """Its epsilon shows where the tokens' variance is small."""
    model = their_dit()
    with torch.no_grad():
        model.pos_embed.proj.weight *= 1e-3
        model.pos_embed.proj.bias *= 1e-3
        model.pos_embed.pos_embed *= 0
        for block in model.transformer_blocks:
            block.norm1.linear.weight *= 0.1
            block.norm1.linear.bias *= 0.1
    model.save_pretrained(tmp_path)
    network = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    block = jax.tree.map(lambda x: x[0], network.blocks.stacked)
    rng = np.random.default_rng(2)
    tokens = 3e-3 * rng.normal(size=(1, 16, 32)).astype(np.float32)
    with torch.no_grad():
        target = model.transformer_blocks[0](
            torch.tensor(tokens), timestep=torch.tensor([3]), class_labels=torch.tensor([1])
        ).numpy()[0]
    cond = jax.jit(lambda conditioner: conditioner(3, 1))(network.conditioner)
    run = jax.jit(lambda block: block(tokens[0], cond))
    assert tree_allclose(target, run(block), TOLERANCE)
    wrong = pretrained.load_diffusers_dit(tmp_path, arithmetic="official").blocks.stacked
    wrong = jax.tree.map(lambda x: x[0], wrong)
    assert not tree_allclose(target, run(wrong), 10 * TOLERANCE)


def test_writing_is_exact_or_refused(tmp_path):
    network = small()
    with pytest.raises(ValueError, match=r"arithmetic='diffusers', or pass allow_mismatch=True"):
        pretrained.save_diffusers_dit(network, tmp_path)
    assert not list(tmp_path.iterdir())
    pretrained.save_diffusers_dit(network, tmp_path, allow_mismatch=True)
    assert tree_allclose(network, pretrained.load_diffusers_dit(tmp_path, arithmetic="official"))
    for other in (
        small(num_classes=None),
        small(mlp_ratio=2.0),
        small(block=edt.AdaLNBlock),
        small(block=edt.CrossAttentionBlock),
        small(final=edt.PlainFinalLayer),
    ):
        with pytest.raises(ValueError, match="this network has something else"):
            pretrained.save_diffusers_dit(other, tmp_path, allow_mismatch=True)


def test_remat_and_attention_functions_are_no_mismatch(tmp_path):
    def attend(q, k, v, mask=None):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    block = eqx.Partial(edt.AdaLNZeroBlock, attention=eqx.Partial(edt.Attention, attend=attend))
    network = small(block=block, remat="dots")
    pretrained.save_diffusers_dit(network, tmp_path, allow_mismatch=True)


def test_embedders_that_differ_are_refused(tmp_path):
    model = their_dit()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blocks differ in transformer_blocks.2.*one embedder"):
        pretrained.load_diffusers_dit(tmp_path, arithmetic="official")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 is not supported"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"out_channels": 5}, r"out_channels=5, but the weights in .* have 8"),
        ({"num_layers": 2}, r"config.json: num_layers=2, but the weights in .* have 3"),
        ({"num_embeds_ada_norm": 6}, "num_embeds_ada_norm=6, but .* have 5"),
        ({"attention_head_dim": 8}, "attention_head_dim=8 make 16, but the tokens of .* have 32"),
        ({"_class_name": "SD3Transformer2DModel"}, "is of a SD3Transformer2DModel"),
    ],
)
def test_other_configs_are_refused(tmp_path, change, message):
    their_dit().save_pretrained(tmp_path)
    change_config(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        pretrained.load_diffusers_dit(tmp_path, arithmetic="official")


HOSTILE = [10**30, 10**9, 0, -1, 2.0, 1e400, True, None, "3", [3], {}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    their_dit().save_pretrained(tmp_path_factory.getbasetemp() / "hostile")
    return tmp_path_factory.getbasetemp() / "hostile"


@pytest.mark.parametrize(
    "name",
    [
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "patch_size",
        "num_embeds_ada_norm",
    ],
)
def test_hostile_sizes_in_a_config(folder, monkeypatch, name):
    """They are refused before a network of such a size is thought of."""
    text = (folder / "config.json").read_text()
    monkeypatch.setattr(transformer, "skeleton", None)
    try:
        for value in HOSTILE:
            (folder / "config.json").write_text(json.dumps(json.loads(text) | {name: value}))
            if name == "out_channels" and not value:
                value = 4  # What diffusers takes it for.
            message = rf"{name}={re.escape(repr(value)[:200])}"
            with pytest.raises(ValueError, match=message):
                pretrained.load_diffusers_dit(folder, arithmetic="official")
    finally:
        (folder / "config.json").write_text(text)


def test_configs_that_nest_or_run_on(folder):
    text = (folder / "config.json").read_text()
    try:
        for hostile in ("[" * 100_000, '{"a":' * 100_000, '{"a": ' + 5000 * "9" + "}", "\xff"):
            (folder / "config.json").write_text(hostile, "latin-1")
            with pytest.raises(ValueError, match=r"config.json is not JSON of diffusers"):
                pretrained.describe(folder)
        (folder / "config.json").write_text(json.dumps({"_class_name": "x" * 10**6}))
        with pytest.raises(ValueError, match="is of a x") as error:
            pretrained.describe(folder)
        assert len(str(error.value)) < 1000
    finally:
        (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_layer.linear.bias": (0,), "x_embedder.proj.weight": (32, 0, 2, 2)}, "are x_embed"),
        ({"y_embedder.embedding_table.weight": (10**9, 0)}, r"are y_embedder"),
        ({"blocks.0.mlp.fc1.weight": (0, 32)}, "are blocks.0.mlp.fc1.weight"),
        ({"y_embedder.embedding_table.weight": (1, 32)}, "num_classes=0"),
        ({"y_embedder.embedding_table.weight": (9, 31)}, "is .9, 31., but the patches' weights"),
        ({"blocks.0.mlp.fc1.weight": (9, 31)}, "is .9, 31., but the patches' weights"),
        ({"x_embedder.proj.weight": (32, 4, 2, 9**9)}, r"x_embedder.proj.weight is \(32, 4, 2"),
        ({"x_embedder.proj.weight": (4**20, 4, 2, 2)}, "make tokens of 1099511627776"),
        ({f"blocks.{i}.attn.qkv.bias": (96,) for i in range(10_000)}, r"missing \(89982\)"),
        ({"blocks.1000000000000.attn.qkv.bias": (96,)}, r"missing \(10\): blocks.2"),
        ({"blocks.0.attn.qkv.weight": (4**20, 4**20)}, "blocks.0.attn.qkv.weight is"),
        ({"a" * 10**6: (1,)}, r"unexpected \(1\)"),
    ],
)
def test_hostile_shapes_in_a_state_dict(change, message):
    """Nothing is read, nor built."""
    shapes = {name: array.shape for name, array in official(golden("dit_tiny")).items()} | change

    def read():
        raise AssertionError("weights were read")

    tensors = {name: files.Tensor(shape, read) for name, shape in shapes.items()}
    weights = files.weights_of(tensors, "hostile.pt")
    with pytest.raises(ValueError, match=message) as error:
        official_files.network_of(official_files.sized(weights, 2), "official")
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize("num_heads", [0, -1, 5, 10**30])
def test_hostile_head_counts(tmp_path, num_heads):
    path = tmp_path / "weights.pt"
    torch.save({"model": state_dict(), "args": {"num_heads": num_heads}}, path)
    with pytest.raises(ValueError, match=rf"num_heads={num_heads} does not divide hidden_size=32"):
        pretrained.load_dit(path)


def test_incomplete_folders(tmp_path):
    their_dit().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    for damaged in (text[:50], "[]"):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"config.json is not JSON of diffusers"):
            pretrained.load_diffusers_dit(tmp_path, arithmetic="official")
    config.write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ValueError, match=r"config.json lacks 'num_attention_heads'"):
        pretrained.load_diffusers_dit(tmp_path, arithmetic="official")
    config.write_text(text)
    (tmp_path / f"{WEIGHTS}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {WEIGHTS}.safetensors, .*{WEIGHTS}.bin or "):
        pretrained.load_diffusers_dit(tmp_path, arithmetic="official")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds config.json beside its weights"):
        pretrained.load_diffusers_dit(tmp_path, arithmetic="official")


# Folders in shards.


def sharded(folder):
    model = their_dit()
    model.save_pretrained(folder, max_shard_size="50KB")
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    assert len(set(places.values())) > 2
    return model, index, places


def test_shards(tmp_path):
    model, _, places = sharded(tmp_path / "shards")
    network = pretrained.load_diffusers_dit(tmp_path / "shards", arithmetic="diffusers")
    model.save_pretrained(tmp_path / "whole")
    whole = pretrained.load_diffusers_dit(tmp_path / "whole", arithmetic="diffusers")
    assert tree_allclose(whole, network)
    assert pretrained.describe(tmp_path / "shards") == pretrained.describe(tmp_path / "whole")
    (tmp_path / "shards" / places["proj_out_2.bias"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*-of-.*, which .*index.json names"):
        pretrained.describe(tmp_path / "shards")


def test_half_precision_files(tmp_path):
    their_dit().half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / f"{WEIGHTS}.fp16.safetensors").is_file()
    model = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16").eval()
    network = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    assert tree_allclose(their_output(model), our_output(network), TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: {**m, "proj_out_2.bias": m["pos_embed.proj.bias"]},
            r"proj_out_2.bias in .* lac",
        ),
        (lambda m: {**m, "more": m["proj_out_2.bias"]}, r"has more in .*, which lacks it"),
        (
            lambda m: {k: v for k, v in m.items() if k != "proj_out_2.bias"},
            r"holds proj_out_2.bias",
        ),
        (lambda m: {**m, "proj_out_2.bias": "../other.safetensors"}, r"names '\.\./other"),
        (lambda m: {**m, "proj_out_2.bias": "/tmp/other.safetensors"}, r"names '/tmp/other"),
        (lambda m: {**m, "proj_out_2.bias": "a\\b.safetensors"}, "no safetensors file beside it"),
        (lambda m: {**m, "proj_out_2.bias": "other.bin"}, "no safetensors file beside it"),
        (lambda m: {**m, "proj_out_2.bias": None}, "no safetensors file beside it"),
        (lambda m: {}, "holds nothing"),
        (lambda m: [1, 2], r"index.json is no index of shards"),
        (lambda m: None, r"index.json is no index of shards"),
    ],
)
def test_wrong_indices(tmp_path, change, message):
    _, index, places = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": change(places)}))
    with pytest.raises(ValueError, match=message):
        pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"weight_map"', "[" * 100_000])
def test_indices_that_are_none(tmp_path, text):
    _, index, _ = sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index.json is no index of shards.*Download it again"):
        pretrained.describe(tmp_path)


# Writing.


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, scale=1.0):
    network = jax.tree.map(lambda x: scale * x, small())
    pretrained.save_diffusers_dit(network, folder, allow_mismatch=True)


def test_writing_replaces_a_folder_of_its_kind(tmp_path):
    folder = tmp_path / "new" / "folder"
    write(folder)
    first = contents(folder)
    (folder / f"{WEIGHTS}.bin").touch()
    write(folder, 2.0)
    second = contents(folder)
    assert set(first) == set(second) == {"config.json", f"{WEIGHTS}.safetensors"}
    assert first["config.json"] == second["config.json"]
    assert first != second
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    link = tmp_path / "link"
    link.symlink_to(folder)
    write(link)
    assert link.is_symlink()
    assert contents(folder) == first


@pytest.mark.parametrize("name", ["rename", "mkdir", "write_text"])
def test_failed_writing_leaves_what_was_there(tmp_path, monkeypatch, name):
    folder = tmp_path / "folder"
    write(folder)
    before = contents(folder)
    call = getattr(Path, name)

    def fail(self, *args, **options):
        if name == "rename" and self.name == "folder":
            return call(self, *args, **options)
        if name == "rename" and self.name.endswith(".old"):
            return call(self, *args, **options)
        if name == "mkdir" and self == tmp_path:
            return call(self, *args, **options)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, name, fail)
        with pytest.raises(OSError, match="no space left"):
            write(folder, 2.0)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_writing_is_whole_at_every_step(tmp_path, monkeypatch):
    """What a process that is killed before any of its steps would leave."""
    folder = tmp_path / "folder"
    write(folder)
    before = contents(folder)
    left = []

    def watch(call):
        def watched(*args, **options):
            left.append([contents(f) for f in (folder, *tmp_path.glob("*.old")) if f.exists()])
            return call(*args, **options)

        return watched

    with monkeypatch.context() as patch:
        for name in ("mkdir", "write_text", "rename"):
            patch.setattr(Path, name, watch(getattr(Path, name)))
        patch.setattr(folders, "to_disk", watch(folders.to_disk))
        write(folder, 2.0)
    after = contents(folder)
    assert after != before
    # Two folders are made, a file and three fsyncs, two renames. Between these the old one has its
    # other name, after them the new one is there.
    assert left == [[before]] * 8 + [[after, before]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_text("mine"), "is a file"),
        (lambda p: (p.mkdir(), (p / "notes").touch()), "it holds notes"),
        (lambda p: (p.mkdir(), (p / "config.json").write_text("{}")), "is of a None"),
        (lambda p: (write(p), (p / "notes").touch()), "it holds notes"),
        (lambda p: (p.mkdir(), (p / f"{WEIGHTS}.bin").touch()), r"there is no .*config.json"),
        (
            lambda p: (
                p.mkdir(),
                (p / "config.json").write_text('{"_class_name": "AutoencoderKL"}'),
            ),
            "is of a AutoencoderKL",
        ),
    ],
)
def test_writing_replaces_nothing_else(tmp_path, make, message):
    path = tmp_path / "folder"
    make(path)
    before = path.read_text() if path.is_file() else contents(path)
    with pytest.raises(FileExistsError, match=message):
        write(path)
    assert before == (path.read_text() if path.is_file() else contents(path))


# Where files are.


def test_missing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("nothing.pt", "/no/such/file.pt", "weights/file.pt", "some/file.pt"):
        with pytest.raises(FileNotFoundError, match=rf"there is no {name}.*owner/name/file"):
            pretrained.load_dit(name)
    for name in ("nothing", "weights/folder", "/no/such", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=rf"there is no {name}.*owner/name"):
            pretrained.load_vae(name)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'equidit\[pretrained\]'"):
        pretrained.load_vae("owner/name")


def test_the_hub(tmp_path, monkeypatch):
    their_dit().save_pretrained(tmp_path / "folder")
    torch.save(state_dict(), tmp_path / "file.pt")
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, "transformer/config.json" in allow_patterns))
        return str(tmp_path / "folder")

    def hf_hub_download(name, file):
        asked.append((name, file))
        return str(tmp_path / "file.pt")

    hub = types.SimpleNamespace(
        snapshot_download=snapshot_download, hf_hub_download=hf_hub_download
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    pretrained.load_diffusers_dit("facebook/DiT-XL-2-256", arithmetic="official")
    pretrained.load_dit("owner/name.x/some/file.pt", num_heads=2)
    assert asked == [("facebook/DiT-XL-2-256", True), ("owner/name.x", "some/file.pt")]
    assert pretrained.describe("facebook/DiT-XL-2-256").kind == "diffusers"
    assert pretrained.describe("owner/name.x/SiT-B.pt", num_heads=2).time == "unit"
    assert asked[2:] == [("facebook/DiT-XL-2-256", True), ("owner/name.x", "SiT-B.pt")]
