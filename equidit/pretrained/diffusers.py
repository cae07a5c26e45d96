"""Folders of diffusers' `DiTTransformer2DModel`, loaded and saved."""

import dataclasses

from ..configs import Config
from ..nn.dit import DiT
from ..seams import StrPath
from .files import Weights
from .folders import open_folder, write_folder
from .sizes import Declared
from .tables import Table, export, name_of
from .transformer import Arithmetic, Opened, filled, kind_of, patches, said, sizes_of

_CLASS = "DiTTransformer2DModel"
_BLOCK = "transformer_blocks.#"
_EMBEDDER = f"{_BLOCK}.norm1.emb"
DIFFUSERS: Table = {
    "patch_embed": patches("pos_embed.proj"),
    "conditioner.timestep.up": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "conditioner.timestep.down": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "conditioner.label": f"{_EMBEDDER}.class_embedder.embedding_table",
    "blocks.stacked.attention.qkv": tuple(f"{_BLOCK}.attn1.to_{x}" for x in "qkv"),
    "blocks.stacked.attention.out": f"{_BLOCK}.attn1.to_out.0",
    "blocks.stacked.mlp.up": f"{_BLOCK}.ff.net.0.proj",
    "blocks.stacked.mlp.down": f"{_BLOCK}.ff.net.2",
    "blocks.stacked.modulation": f"{_BLOCK}.norm1.linear",
    "final.modulation": "proj_out_1",
    "final.linear": "proj_out_2",
}
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}


def load_diffusers_dit(path: StrPath, *, arithmetic: Arithmetic | None = None) -> DiT:
    """A DiT from a folder of diffusers' `DiTTransformer2DModel`, or of its `DiTPipeline`.

    **Arguments:**

    - `path`: a folder with `config.json` and `diffusion_pytorch_model.safetensors`, its shards with
        their index, or `.bin` (needs PyTorch), or a pipeline's folder with such a one as
        `transformer`.
    - `arithmetic`: `"official"` or `"diffusers"`, see above; `ValueError` if it is not said. For
        published weights the former is what they were trained in, for a model trained in diffusers
        the latter.

    **Returns:**

    The network, with float32 weights.

    **Raises:**

    As [`equidit.pretrained.load_dit`][]; `ValueError` also for a config of another kind of model,
    and if the blocks' own embedders of timestep and label differ: here one serves all.
    """
    arithmetic = said(arithmetic)
    return network_of(open_dit(path), arithmetic)


def open_dit(path: StrPath) -> Opened:
    """The DiT in a folder; its weights are not yet read."""
    # Published under the older name, when one class served several kinds of transformer.
    weights, declared = open_folder(
        path,
        (_CLASS, "Transformer2DModel"),
        subfolder="transformer",
        anchor=name_of(DIFFUSERS, "patch_embed.weight"),
    )
    config = _config_of(weights, declared)
    side = declared.fields.get("sample_size")
    return Opened(weights, config, None if side is None else declared.positive("sample_size"))


def network_of(opened: Opened, arithmetic: Arithmetic) -> DiT:
    """The network, with its weights."""
    return filled(opened.weights, DIFFUSERS, opened.config, arithmetic)


def _config_of(weights: Weights, declared: Declared) -> Config:
    declared.check_fixed(_FIXED)
    required = ("num_attention_heads", "attention_head_dim", "in_channels")
    for name in (*required, "patch_size", "num_layers", "num_embeds_ada_norm"):
        if name not in declared.fields:
            raise ValueError(f"{declared.source} lacks {name!r}")
    heads, head_dim, channels = map(declared.positive, required)
    config = sizes_of(weights, DIFFUSERS, "diffusers' DiT")
    out_channels = declared.fields.get("out_channels") or channels
    theirs = dataclasses.replace(declared, fields=declared.fields | {"out_channels": out_channels})
    theirs.check_agrees(_sizes(config), weights)
    if heads * head_dim != config.hidden_size:
        raise ValueError(
            f"{declared.source}: num_attention_heads={heads} of attention_head_dim={head_dim} make "
            f"{heads * head_dim}, but the tokens of {weights.source} have {config.hidden_size}"
        )
    return dataclasses.replace(config, num_heads=heads)


def _sizes(config: Config) -> dict[str, int | None]:
    """What the weights tell of diffusers' config."""
    return {
        "in_channels": config.in_channels,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.in_channels * (1 + config.learn_sigma),
        "patch_size": config.patch_size,
    }


def save_diffusers_dit(
    network: DiT, path: StrPath, *, sample_size: int = 32, allow_mismatch: bool = False
) -> None:
    """Writes a folder that diffusers' `DiTTransformer2DModel.from_pretrained` reads.

    **Arguments:**

    - `network`: a DiT of adaLN-Zero blocks and labels.
    - `path`: the folder. It is written as a whole, and replaces one of the same class.
    - `sample_size`: height and width of the latents, which diffusers' model is limited to.
    - `allow_mismatch`: whether to write a network of the official arithmetic, from whose outputs
        diffusers' then depart.

    **Raises:**

    `ValueError` for a network of the official arithmetic without `allow_mismatch`, and for one that
    diffusers' model cannot express; `FileExistsError` if `path` holds something else.
    """
    if (kind := kind_of(network)) is None:
        raise ValueError(
            "diffusers' DiT has adaLN-Zero blocks with GELU MLPs of 4 times the width, layer "
            "norms, a timestep and a label; this network has something else"
        )
    arithmetic, config = kind
    if arithmetic == "official" and not allow_mismatch:
        raise ValueError(
            "this network's timestep frequencies and norms are the official ones, and diffusers "
            "would compute something else from its weights: train or load it with "
            "arithmetic='diffusers', or pass allow_mismatch=True"
        )
    theirs = {
        "_class_name": _CLASS,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "sample_size": sample_size,
    }
    write_folder(path, theirs | _sizes(config) | _FIXED, export(network, DIFFUSERS))
