"""Tables of all objects that the laws are tested over, and what several tests share."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, jaxtyped

import equidit as edt
from equidit import diffusion as dfn

TESTS = Path(__file__).parent
ROOT = TESTS.parent
REFERENCES = TESTS / "references"
PAPER = json.loads((REFERENCES / "paper.json").read_text())

BLOCKS: dict[str, Callable[..., Any]] = {
    "adaln-zero": edt.AdaLNZeroBlock,
    "adaln": edt.AdaLNBlock,
    "cross-attention": edt.CrossAttentionBlock,
    "in-context": edt.InContextBlock,
    "text-cross-attention": edt.TextCrossAttentionBlock,
    "qk-norm": partial(
        edt.AdaLNZeroBlock, make_attention=partial(edt.Attention, qk_norm=edt.RMSNorm)
    ),
    "rotary": partial(
        edt.AdaLNZeroBlock, make_attention=partial(edt.Attention, rotary=edt.rotary_2d)
    ),
    "rms-swiglu": partial(edt.AdaLNZeroBlock, norm=edt.rms_norm, make_mlp=edt.SwiGLU),
    "in-context-variant": partial(
        edt.InContextBlock,
        make_attention=partial(edt.Attention, qk_norm=edt.LayerNorm, rotary=edt.rotary_2d),
        make_norm=edt.RMSNorm,
        make_mlp=edt.SwiGLU,
    ),
}
IDENTITY_AT_INIT = {
    "adaln-zero",
    "text-cross-attention",
    "qk-norm",
    "rotary",
    "rms-swiglu",
}
# What a block reads of its conditioning, beside positions.
READS_VECTOR = set(BLOCKS) - {"cross-attention", "in-context", "in-context-variant"}
READS_TOKENS = {"cross-attention", "text-cross-attention"}
PAPER_BLOCKS = ("adaln-zero", "adaln", "cross-attention", "in-context")
STEPS: dict[str, Callable[..., Any]] = {
    "ddpm-learned": partial(dfn.ddpm_step, variance="learned"),
    "ddpm-small": partial(dfn.ddpm_step, variance="small"),
    "ddpm-large": partial(dfn.ddpm_step, variance="large"),
    "ddpm-clip": partial(dfn.ddpm_step, clip=True),
    "ddim": dfn.ddim_step,
    "ddim-eta": partial(dfn.ddim_step, eta=1.0),
    "ddim-clip": partial(dfn.ddim_step, clip=True),
    "ddpm-v": partial(dfn.ddpm_step, prediction="v"),
    "ddim-x0": partial(dfn.ddim_step, prediction="x0"),
    "ddim-inversion": dfn.ddim_inversion_step,
}
GUIDANCE: dict[str, Callable[..., Any]] = {
    "plain": edt.guide,
    "channels": partial(edt.guide, channels=1),
    "interval": partial(edt.guide, interval=(200.0, 700.0)),
    "rescale": partial(edt.guide, rescale=0.7),
    "everything": partial(edt.guide, channels=1, interval=(0, 900), rescale=1.0),
}
# A prediction of one's own: the velocity of a straight line from x0 to the noise.
VELOCITY = dfn.Prediction(
    x0_and_eps=lambda xt, value, level: (
        (xt - level.noise * value) / (level.signal + level.noise),
        (xt + level.signal * value) / (level.signal + level.noise),
    ),
    target=lambda x0, eps, level: eps - x0,
    min_snr=lambda snr, gamma: jnp.minimum(snr, gamma) / jnp.square(1 + jnp.sqrt(snr)),
)
BETAS = {"linear": dfn.linear_betas, "cosine": dfn.cosine_betas}


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCES / f"{name}.npz") as archive:
        return dict(archive)


def randomize(tree: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Every array, or its shape, drawn anew: no zero-initialised gate hides what is behind it."""
    draw = np.random.default_rng(seed).standard_normal

    def drawn(leaf: Any) -> Any:
        is_array = eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(scale * draw(leaf.shape), leaf.dtype) if is_array else leaf

    return jax.tree.map(drawn, tree)


def made(kind: Callable[..., Any], *sizes: Any, seed: int = 0, scale: float = 0.1, **options: Any):
    """A module with random weights, without compiling what would initialise it."""
    build = partial(kind, *sizes, **options)
    shapes = eqx.filter_eval_shape(lambda key: build(key=key), jax.random.key(0))
    return randomize(shapes, seed, scale)


def difference(a: Any, b: Any) -> float:
    """The largest difference of any two leaves, relative to that leaf's largest entry."""
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [np.shape(x) for x in left] == [np.shape(y) for y in right]
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(left, right, strict=True)
    ]
    return max(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30) for x, y in pairs)


def tree_allclose(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Whether all leaves agree to `tolerance` of their largest entry; 0 is bit for bit."""
    return difference(a, b) <= tolerance


TINY: dict[str, Any] = {
    "in_channels": 1,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}


def tiny(**overrides: Any) -> edt.DiT:
    """A small network with random weights, for digits-like inputs of 1x8x8."""
    return made(edt.DiT, **(TINY | overrides))


class Pointwise(eqx.Module):
    """A network that knows its inputs apart, for laws that ask no more of one: it compiles at once.

    It takes what `tiny()` does, and gives every pixel by itself.
    """

    mix: jax.Array
    time: jax.Array
    label: jax.Array

    def __init__(self, *, in_channels: int = 1, learn_sigma: bool = True, seed: int = 0):
        keys, out = jax.random.split(jax.random.key(seed), 3), in_channels * (1 + learn_sigma)
        shapes = ((out, in_channels), (out,), (11, out))
        self.mix, self.time, self.label = map(jax.random.normal, keys, shapes)

    def __call__(self, x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        dtype = self.mix.dtype
        told = self.label[cond] + self.time * (jnp.asarray(t) / 1000).astype(dtype)
        mixed = jnp.einsum("oc,chw->ohw", self.mix, x.astype(dtype))
        return jnp.tanh(mixed + told[:, None, None]).astype(x.dtype)


def images(count: int, shape: tuple[int, ...] = (1, 8, 8), seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, *shape)), jnp.float32)


def check_fields(module: Any) -> None:
    """jaxtyping does not check the fields of a class with an `__init__` of its own."""
    with jaxtyped("context"):  # pyright: ignore[reportGeneralTypeIssues]
        for field in dataclasses.fields(module):
            if isinstance(field.type, type) and issubclass(field.type, AbstractArray):
                assert isinstance(getattr(module, field.name), field.type), field.name


def official(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a golden network, under the original names."""
    prefix = "state_dict/"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def published(folder: Path, *, latent_channels: int = 4) -> tuple[Path, Path]:
    """A small official file of a DiT for 32x32 images, and its autoencoder's folder."""
    from safetensors.numpy import save_file

    from equidit.pretrained.official import OFFICIAL
    from equidit.pretrained.tables import export

    network = tiny(in_channels=4, hidden_size=16)
    arrays = {name: np.array(leaf) for name, leaf in export(network, OFFICIAL).items()}
    arrays["pos_embed"] = np.array(edt.sincos_2d(16, (8, 8)))[None]
    save_file(arrays, folder / "dit.safetensors")
    vae = edt.Autoencoder(
        latent_channels=latent_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        key=jax.random.key(1),
    )
    edt.pretrained.save_vae(vae, folder / "vae")
    return folder / "dit.safetensors", folder / "vae"


COMMAND = [
    sys.executable,
    "-c",
    "import sys; from equidit.__main__ import main; sys.exit(main())",
]


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process that sees so many CPU devices."""
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(count)}


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(commands: list[list[Any]], timeout: float, **options: Any) -> None:
    """Runs processes that wait for one another; what they said is shown if one of them fails."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, **pipes, **options) for command in commands]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(said)[-4000:]
