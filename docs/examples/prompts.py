"""Prompts from a text encoder of Hugging Face, CLIP or T5, as `TextConditioner` takes them.

Run as `python docs/examples/prompts.py openai/clip-vit-large-patch14 "a red cube" "a blue ball"`,
or with a folder. Needs `pip install 'equidit[text]'` and PyTorch; of that, this is the small build:
`pip install torch --index-url https://download.pytorch.org/whl/cpu`.
"""

import sys
from functools import partial

import equinox as eqx
import jax
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel

import equidit as edt
from equidit import diffusion as dfn


def load(source):
    """The tokenizer and the text encoder, weights frozen, of a folder or an id on the hub."""
    # A checkpoint of CLIP holds a tower for pictures too: the automatic class does not take it.
    clip = AutoConfig.from_pretrained(source).model_type.startswith("clip")
    encoder = (CLIPTextModel if clip else AutoModelForTextEncoding).from_pretrained(source)
    return AutoTokenizer.from_pretrained(source), encoder.requires_grad_(False)


def encode(prompts, tokenizer, encoder, length=77):
    """Strings to the states of the encoder's last layer, float32 `(batch, length, text_dim)`, and
    which of them are not padding, bool `(batch, length)`, both NumPy. Longer prompts are cut.
    """
    tokens = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states.float().numpy(), mask.bool().numpy()


@eqx.filter_jit
def draw(network, prompt, key):
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 20))
    noise_key, key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (3, 16, 16))
    return dfn.sample(partial(dfn.ddim_step, network, schedule), schedule, noise, prompt, key=key)


def main(source, *prompts):
    embeddings, mask = encode(prompts, *load(source))
    text_dim = embeddings.shape[-1]
    config = edt.Config(2, 64, 4, 4, 3, None, block="text-cross-attention", text_dim=text_dim)
    network = edt.build(config, key=jax.random.key(0))  # untrained: it cannot draw yet
    guided = edt.guide(network, 4.0, network.conditioner.null)
    keys = jax.random.split(jax.random.key(1), len(prompts))
    pictures = jax.vmap(draw, (None, 0, 0))(guided, (embeddings, mask), keys)
    print(f"{len(prompts)} prompts of {mask.sum(1)} tokens -> pictures {pictures.shape}")


if __name__ == "__main__":
    main(*sys.argv[1:])
