"""Whole samples against diffusers' `DiTPipeline`: network, guidance, DDIM and autoencoder at once.

Its conventions: the null label is 1000, all channels of the noise are guided (not three, as in the
paper's tables), the learned variance is not used, and images are in [0, 1], clipped.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from test_vae import SIZES, autoencoder, theirs as their_vae
from weights import change_config, diffusers, small, torch

import equidit as edt
from equidit import diffusion as dfn, pretrained
from equidit.pretrained.official import OFFICIAL
from equidit.pretrained.tables import export

# Ten evaluations in float32 in another framework, and tables of float32 in diffusers.
TOLERANCE = 1e-4
STEPS, SCALE = 10, 3.0
LABELS = [3, 999, 0]
LATENTS = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def their_dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.1, generator=generator)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        model.transformer_blocks[1].norm1.emb.load_state_dict(first)
    return model


def pipeline(transformer, vae):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False
    )
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_images(pipe, monkeypatch, scale=SCALE):
    module = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **options: torch.tensor(LATENTS))
    options = {"guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "np"}
    return pipe(LABELS, **options).images


# Two programs, so that the larger, the decoder's, is compiled once for all of them.
@jax.jit
def latents(guided, schedule, noise, label):
    step = partial(dfn.ddim_step, guided, schedule)
    run = partial(dfn.sample, step, schedule, key=jax.random.key(0))
    return jax.vmap(run)(noise, label)


@jax.jit
def decoded(vae, latents):
    return jax.vmap(vae.decode)(latents)


def our_images(network, vae, scale=SCALE, channels=None):
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, STEPS, "leading"))
    guided = edt.guide(network, scale, null=1000, channels=channels)
    images = decoded(vae, latents(guided, schedule, LATENTS, jnp.asarray(LABELS)))
    return np.moveaxis(np.clip(np.asarray(images) / 2 + 0.5, 0, 1), 1, -1)


def seen(images):
    """The share of pixels that are not clipped."""
    return float(((images > 0) & (images < 1)).mean())


@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_their_pipeline_here(tmp_path, monkeypatch, scale):
    pipe = pipeline(their_dit(), their_vae(torch, SIZES))
    pipe.save_pretrained(tmp_path)
    target = their_images(pipe, monkeypatch, scale)
    assert target.shape == (3, 32, 32, 3)
    assert seen(target) > 0.5
    network = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    vae = pretrained.load_vae(tmp_path)
    assert tree_allclose(target, our_images(network, vae, scale), TOLERANCE)
    if scale == SCALE:
        official = pretrained.load_diffusers_dit(tmp_path, arithmetic="official")
        for other in (
            our_images(official, vae),
            our_images(network, vae, channels=3),
            our_images(network, vae, scale=1.1 * SCALE),
        ):
            assert not tree_allclose(target, other, 10 * TOLERANCE)


def test_our_networks_in_their_pipeline(tmp_path, monkeypatch):
    weights = export(small(in_channels=4, num_heads=2, num_classes=1000), OFFICIAL)
    network = pretrained.from_state_dict(weights, num_heads=2, arithmetic="diffusers")
    vae = autoencoder()
    pretrained.save_diffusers_dit(network, tmp_path / "transformer", sample_size=8)
    pretrained.save_vae(vae, tmp_path / "vae")
    pipe = pipeline(
        diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "transformer"),
        diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"),
    )
    target = their_images(pipe, monkeypatch)
    assert seen(target) > 0.5
    assert tree_allclose(target, our_images(network, vae), TOLERANCE)


def test_published_folders(tmp_path, monkeypatch):
    """With the older class name, as diffusers reads it too."""
    pipe = pipeline(their_dit(), their_vae(torch, SIZES))
    pipe.save_pretrained(tmp_path)
    change_config(tmp_path / "transformer" / "config.json", _class_name="Transformer2DModel")
    change_config(tmp_path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    network = pretrained.load_diffusers_dit(tmp_path, arithmetic="diffusers")
    target = their_images(again, monkeypatch)
    assert tree_allclose(target, our_images(network, pretrained.load_vae(tmp_path)), TOLERANCE)
