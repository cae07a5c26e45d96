"""Weights as people save them: whatever lies around a network, it loads to the same arrays."""

import argparse
import collections
import os
import pathlib
from typing import Any

import numpy as np
import pytest
from goldens import network
from helpers import tree_allclose
from hypothesis import given, settings, strategies as st
from weights import our_output, small, state_dict, their_dit, their_output, torch

import equidit as edt
from equidit import pretrained
from equidit.pretrained.official import OFFICIAL
from equidit.pretrained.tables import export

STATE = state_dict()
OTHER = {name: value if name == "pos_embed" else value + 1 for name, value in STATE.items()}
JUNK = torch.ones(3, 2)


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def module(state=STATE):
    """A module with these parameters, for PyTorch's own wrappers."""
    root = torch.nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        inner = root
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, torch.nn.Module())
            inner = getattr(inner, part)
        inner.register_parameter(leaf, torch.nn.Parameter(value.clone()))
    return root


def compiled(model):
    """Its names as `torch.compile` makes them."""
    wrapper = torch.nn.Module()
    wrapper._orig_mod = model
    return wrapper


def optimizer():
    model = module()
    made = torch.optim.AdamW(model.parameters())
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    made.step()
    return made.state_dict()


def average():
    return torch.optim.swa_utils.AveragedModel(compiled(module())).state_dict()


def lightning(state_dict):
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state_dict,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [],
        "hyper_parameters": {"num_heads": 2, "learning_rate": 1e-4},
    }


def scalars():
    numbers = {"num_heads": np.int64(2), "lr": np.float64(1e-4), "half": np.float16(2)}
    others = {"flag": np.bool_(True), "name": np.str_("a"), "table": np.arange(6).reshape(2, 3)}
    paths = {"data": pathlib.Path("a/b"), "windows": pathlib.PureWindowsPath("c")}
    return argparse.Namespace(**numbers, **others, **paths)


def inside(wrapper):
    """One block is wrapped by itself."""
    return {n.replace("blocks.0.", f"blocks.0.{wrapper}."): value for n, value in STATE.items()}


# Every one is STATE's network, of two heads.
LOADS = {
    "bare": lambda: STATE,
    "DataParallel": lambda: torch.nn.DataParallel(module()).state_dict(),
    "compiled": lambda: compiled(module()).state_dict(),
    "compiled in DataParallel": lambda: torch.nn.DataParallel(compiled(module())).state_dict(),
    "DataParallel compiled": lambda: compiled(torch.nn.DataParallel(module())).state_dict(),
    "another prefix": lambda: prefixed("network.dit."),
    "a compiled block": lambda: inside("_orig_mod"),
    "a checkpointed block": lambda: prefixed("module.", inside("_checkpoint_wrapped_module")),
    "FSDP": lambda: prefixed("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module")),
    "an averaged model": average,
    "model": lambda: {"model": STATE},
    "EMA": lambda: {"ema": STATE},
    "model and EMA": lambda: {"model": OTHER, "ema": STATE},
    "one object twice": lambda: {"model": STATE, "ema": STATE},
    "a compiled EMA": lambda: {"model": prefixed("module.", OTHER), "ema": average()},
    "EMA deeper": lambda: {"a": {"b": {"model": OTHER, "ema": prefixed("module.")}}},
    "no EMA yet": lambda: {"model": STATE, "ema": None, "step": 0},
    "official training": lambda: {
        "model": OTHER,
        "ema": STATE,
        "opt": optimizer(),
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4),
    },
    "of an optimizer by name": lambda: {
        "model": STATE,
        "optimizer": {"state": {n: {"exp_avg": v, "step": 3} for n, v in STATE.items()}},
        "scaler": {"scale": 65536.0},
        "rng": (torch.get_rng_state(), np.random.default_rng(0).bytes(3)),
    },
    "NumPy's numbers and paths": lambda: {"model": STATE, "args": scalars(), "step": np.int64(7)},
    "a default dictionary": lambda: {
        "model": STATE,
        "opt": {"state": collections.defaultdict(dict, {0: {"step": JUNK}})},
    },
    "state_dict": lambda: {"state_dict": STATE},
    "Lightning": lambda: lightning(prefixed("model.")),
    "Lightning, compiled": lambda: lightning(prefixed("model._orig_mod.")),
    "beside an autoencoder": lambda: {"dit": STATE, "vae": {"encoder.conv_in.weight": JUNK}},
    "half": lambda: {n: v.half() for n, v in STATE.items()},
    "bfloat16": lambda: {"ema": {n: v.bfloat16() for n, v in STATE.items()}},
    "without pos_embed": lambda: {n: v for n, v in STATE.items() if n != "pos_embed"},
}


@pytest.mark.parametrize("name", LOADS)
def test_loads_to_the_same_arrays(tmp_path, name):
    content = LOADS[name]()
    suffix = (".pt", ".pth", ".ckpt", ".bin")[len(name) % 4]
    torch.save(content, tmp_path / f"a{suffix}")
    loaded = pretrained.load_dit(tmp_path / f"a{suffix}", num_heads=2)
    # bfloat16 keeps 8 bits.
    tolerance = 2**-8 if name in ("half", "bfloat16") else 0
    assert tree_allclose(network("dit_tiny"), loaded, tolerance)
    assert pretrained.describe(tmp_path / f"a{suffix}", num_heads=2).config.num_classes == 4
    assert tree_allclose(loaded, pretrained.from_state_dict(content, num_heads=2))


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("metadata", [None, {"format": "pt", "step": "5"}])
def test_safetensors(tmp_path, prefix, metadata):
    from safetensors.torch import save_file

    save_file(prefixed(prefix), tmp_path / "a.safetensors", metadata=metadata)
    loaded = pretrained.load_dit(tmp_path / "a.safetensors", num_heads=2)
    assert tree_allclose(network("dit_tiny"), loaded)


WRAPPERS = st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "_fsdp_wrapped_module."])
KEYS = st.sampled_from(["state_dict", "model", "ema", "x/y", "weights", 0])


@given(st.lists(WRAPPERS, max_size=4), st.lists(KEYS, max_size=4), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_any_nesting(wrappers, keys, beside):
    content = prefixed("".join(wrappers))
    for key in keys:
        junk = {"epoch": 3, "opt": {"state": {0: {"step": JUNK}}}} if beside else {}
        content = {**junk, key: content}
    assert tree_allclose(network("dit_tiny"), pretrained.from_state_dict(content, num_heads=2))


@pytest.mark.parametrize("name", ["NumPy's numbers and paths", "Lightning"])
def test_heads_of_the_file_s_own_arguments(tmp_path, name):
    torch.save(LOADS[name](), tmp_path / "a.pt")
    assert tree_allclose(network("dit_tiny"), pretrained.load_dit(tmp_path / "a.pt"))


def test_arrays_of_a_model_in_memory():
    parameters = dict(torch.nn.DataParallel(module()).named_parameters())
    low = {name: value.detach().bfloat16() for name, value in parameters.items()}
    assert tree_allclose(network("dit_tiny"), pretrained.from_state_dict(parameters, num_heads=2))
    loaded = pretrained.from_state_dict(low, num_heads=2)
    assert tree_allclose(network("dit_tiny"), loaded, 2**-8)


@pytest.mark.parametrize("wrappers", ["", "module."])
@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ({"learn_sigma": False}, 8),
        ({"num_classes": 1}, 16),
        ({"num_classes": 37, "depth": 1}, 2),
        ({"in_channels": 4}, 64),  # of 512 pixels
    ],
)
def test_sizes_of_saved_networks(tmp_path, sizes, side, wrappers):
    expected = small(**sizes)
    state = {n: torch.tensor(np.asarray(a)) for n, a in export(expected, OFFICIAL).items()}
    grid = side // expected.patch_size
    dim = expected.patch_embed.weight.shape[0]
    state["pos_embed"] = torch.tensor(np.asarray(edt.sincos_2d(dim, (grid, grid))))[None]
    torch.save({"ema": prefixed(wrappers, state)}, tmp_path / "a.pt")
    assert tree_allclose(expected, pretrained.load_dit(tmp_path / "a.pt", num_heads=4))
    found = pretrained.describe(tmp_path / "a.pt", num_heads=4)
    assert found.sample_size == side
    assert found.config.learn_sigma == sizes.get("learn_sigma", True)
    assert found.config.num_classes == sizes.get("num_classes", 10)


# Several networks in a file.

SEVERAL = {
    "teacher and student": (lambda: {"teacher": OTHER, "student": STATE}, "student", "teacher"),
    "three": (lambda: {"model": OTHER, "ema": STATE, "best": OTHER}, "ema", "best"),
    "an EMA by Lightning": (
        lambda: lightning({**prefixed("model.", OTHER), **prefixed("ema.")}),
        "state_dict/ema.",
        "state_dict/model.",
    ),
    "a network and its loss": (
        lambda: lightning({**prefixed("model."), "vae.conv.weight": JUNK}),
        "state_dict/model.",
        None,
    ),
    "two prefixes": (
        lambda: {**prefixed("online_model.", OTHER), **prefixed("ema_model."), "initted": JUNK},
        "ema_model.",
        "online_model.",
    ),
    "momenta by name": (
        lambda: {"model": prefixed("module."), "opt": {"exp_avg": OTHER}},
        "model",
        "opt/exp_avg",
    ),
    "another EMA": (lambda: {"model": STATE, "ema": {"shadow": [JUNK]}}, "model", None),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_one_is_selected(tmp_path, name):
    make, ours, other = SEVERAL[name]
    path = tmp_path / "a.pt"
    torch.save(make(), path)
    with pytest.raises(ValueError, match=r"select=.*--select") as error:
        pretrained.load_dit(path, num_heads=2)
    for selected, state in ((ours, STATE), (other, OTHER)):
        if selected is not None:
            assert repr(selected) in str(error.value)
            loaded = pretrained.load_dit(path, num_heads=2, select=selected)
            assert tree_allclose(loaded, pretrained.from_state_dict(state, num_heads=2))
            found = pretrained.describe(path, num_heads=2, select=selected)
            assert found.sample_size == 8
    with pytest.raises(ValueError, match=r"select='x' is no network in .*a.pt, which holds '"):
        pretrained.load_dit(path, num_heads=2, select="x")


def test_the_average_is_a_matter_of_ema_alone():
    content = {"model": prefixed("module.", OTHER), "ema": prefixed("module._orig_mod.")}
    for ema, state in ((True, STATE), (False, OTHER)):
        loaded = pretrained.from_state_dict(content, num_heads=2, ema=ema)
        assert tree_allclose(loaded, pretrained.from_state_dict(state, num_heads=2))
    broken = {"model": STATE, "ema": {"shadow": [JUNK]}}
    loaded = pretrained.from_state_dict(broken, num_heads=2, ema=False)
    assert tree_allclose(network("dit_tiny"), loaded)


# What is refused.


class Config:
    pass


def cycle():
    content: dict[str, Any] = {"step": 3}
    content["self"] = {"again": content, "other": [content]}
    return content


def without(*names):
    return {name: value for name, value in STATE.items() if name not in names}


HALF = {(f"module.{n}" if n.startswith("blocks") else n): value for n, value in STATE.items()}
LOST = {(n if n.startswith("blocks") else f"module.{n}"): value for n, value in STATE.items()}
REFUSED = {
    "nothing": (dict, "holds nothing, not a dictionary of weights"),
    "a list": (lambda: [STATE], "holds a list, not a dictionary"),
    "no tensors": (lambda: {"a": 3, "b": "x"}, "a is no dense floating-point tensor"),
    "no tensors deeper": (lambda: {"model": {"a": 3}}, "no network of this kind.*holds model: a"),
    "a step among the weights": (lambda: {**STATE, "step": 3}, "step is no dense floating-point"),
    "whole numbers": (
        lambda: {"ema": {n: v.long() for n, v in STATE.items()}},
        r"a.pt \(ema\): .* is no dense floating-point",
    ),
    "an autoencoder": (
        lambda: {"state_dict": {"encoder.conv_in.weight": JUNK}},
        "no network of this kind.*x_embedder.proj.weight.*holds state_dict: encoder.conv_in.weight",
    ),
    "a list of averages": (lambda: {"shadow_params": [*STATE.values()]}, "shadow_params is no"),
    "a prefix of some": (lambda: HALF, r"the prefix 'module.' is on 20 of 32 names"),
    "a prefix of others": (
        lambda: LOST,
        r"beside other names.*'module.' \(.* begin with 'module.', but not 'blocks.0",
    ),
    "a lost array": (
        lambda: {"ema": prefixed("module.", without("blocks.1.attn.proj.bias"))},
        r"a.pt \(ema\) holds another network:\n  missing \(1\): blocks.1.attn.proj.bias",
    ),
    "pos_embed interpolated": (
        lambda: {**STATE, "pos_embed": STATE["pos_embed"] * 0.9},
        "not the sine-cosine table .* trained or interpolated. Without it",
    ),
    "a class of one's own": (
        lambda: {"model": STATE, "args": Config()},
        r"more than weights: it holds \S*Config, and nothing in it was executed",
    ),
    "in itself": (cycle, "no network of this kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    make, message = REFUSED[name]
    torch.save(make(), tmp_path / "a.pt")
    for read in (pretrained.load_dit, pretrained.describe):
        # It reads names and shapes, and compares no more than it needs.
        if read is pretrained.load_dit or name not in ("a lost array", "pos_embed interpolated"):
            with pytest.raises(ValueError, match=message) as error:
                read(tmp_path / "a.pt", num_heads=2)
            assert "a.pt" in str(error.value)
            assert len(str(error.value)) < 3000


def test_the_older_format_of_pytorch(tmp_path):
    """It cannot be mapped into memory."""
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a.pt is .*older than PyTorch 1.6"):
        pretrained.load_dit(tmp_path / "a.pt", num_heads=2)


def test_what_stands_for_other_things_does_nothing(tmp_path):
    """NumPy is given nothing of a file but bytes of one number."""

    class Hostile:
        def __init__(self, *call):
            self.call = call

        def __reduce__(self):
            return self.call

    scalar = np.float64(1).__reduce__()[0]
    reconstruct = np.ones(1).__reduce__()[0]
    huge = Hostile(reconstruct, (np.ndarray, (10**15,), b"b"))
    args = {
        "num_heads": 2,
        "huge": huge,
        "array": Hostile(np.ndarray, ((10**15,), "f8")),
        "wide": Hostile(scalar, (np.dtype("V1000000000"), b"1")),
        "short": Hostile(scalar, (np.dtype("f8"), b"1")),
        "object": Hostile(scalar, (np.dtype("O"), "x")),
        "none": Hostile(scalar, (None, None)),
    }
    torch.save({"model": STATE, "args": args}, tmp_path / "a.pt")
    assert tree_allclose(network("dit_tiny"), pretrained.load_dit(tmp_path / "a.pt"))
    args = Hostile(os.mkdir, (str(tmp_path / "made"),))
    torch.save({"model": STATE, "args": args}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"more than weights: it holds \S*mkdir"):
        pretrained.load_dit(tmp_path / "a.pt", num_heads=2)
    assert not (tmp_path / "made").exists()


def test_hostile_dictionaries_end():
    wide = {str(i): {"a": JUNK} for i in range(300)}
    content = {str(i): wide for i in range(300)}
    content |= {f"{i}.x_embedder.proj.weight": torch.ones(1, 1, 1, 1) for i in range(300)}
    with pytest.raises(ValueError, match="beside other names") as error:
        pretrained.from_state_dict(content, num_heads=2)
    assert len(str(error.value)) < 3000


# Folders of diffusers.


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_folders_with_wrapped_names(tmp_path, prefix):
    from safetensors.torch import save_file

    model = their_dit()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(prefixed(prefix, model.state_dict()), path)
    loaded = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    assert tree_allclose(their_output(model), our_output(loaded), 1e-4)
    with pytest.raises(ValueError, match=r"select='ema' is for a file"):
        pretrained.describe(tmp_path, select="ema")


def test_an_arithmetic_is_to_be_said(tmp_path):
    with pytest.raises(ValueError, match="arithmetic=None is unknown") as error:
        pretrained.load_diffusers_dit(tmp_path)
    for word in ("'official'", "trained in", "'diffusers'", "DiTPipeline", "128", "127", "1e-5"):
        assert word in str(error.value)
    wrong: Any = "theirs"
    with pytest.raises(ValueError, match="'theirs' is unknown: choose from official, diffusers"):
        pretrained.load_diffusers_dit(tmp_path, arithmetic=wrong)
