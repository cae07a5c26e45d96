"""Published weights to read: of small networks of ours, and of PyTorch's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, golden, made, official

import equidit as edt

torch = pytest.importorskip("torch", reason="needs PyTorch and diffusers")
diffusers = pytest.importorskip("diffusers", reason="needs PyTorch and diffusers")


def small(**sizes):
    """A network of random weights, of which nothing is computed."""
    return made(edt.DiT, **(TINY | sizes))


def tensors(arrays):
    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}


def state_dict(name="dit_tiny"):
    return tensors(official(golden(name)))


def change_config(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def their_dit(learn_sigma=True):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8 if learn_sigma else 4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.15, generator=generator)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    return model


def dit_inputs():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 4, 8, 8)).astype(np.float32)
    return x, np.array([0, 7, 500, 999], np.int32), np.array([0, 3, 4, 5], np.int32)


def their_output(model):
    x, t, label = map(torch.tensor, dit_inputs())
    with torch.no_grad():
        return model(x, t.long(), label.long()).sample.numpy()


@jax.jit
def forward(network, *inputs):
    return jax.vmap(network)(*inputs)


def our_output(network):
    return np.asarray(forward(network, *map(jnp.asarray, dit_inputs())))
