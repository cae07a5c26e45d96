"""Diffusion Transformers in JAX: pure functions and shape-typed Equinox modules."""

import sys as _sys

from jaxtyping import install_import_hook as _install_import_hook

# Before the hook: what runs at every call is not itself checked.
from ._arguments import Finder as _Finder

# Checks every shape of the library at trace time; JAXTYPING_DISABLE=1 turns it off.
_checks = _install_import_hook("equidit", "beartype.beartype").hook
_sys.meta_path.insert(0, _Finder("equidit", _checks))

from . import diffusion as diffusion, hosts as hosts, pretrained as pretrained, vae as vae
from ._blocks import (
    AdaLNBlock as AdaLNBlock,
    AdaLNZeroBlock as AdaLNZeroBlock,
    CrossAttentionBlock as CrossAttentionBlock,
    InContextBlock as InContextBlock,
    TextCrossAttentionBlock as TextCrossAttentionBlock,
)
from ._conditioning import (
    LabelConditioner as LabelConditioner,
    LabelEmbedder as LabelEmbedder,
    TextConditioner as TextConditioner,
    TextEmbedder as TextEmbedder,
    TimestepConditioner as TimestepConditioner,
    TimestepEmbedder as TimestepEmbedder,
)
from ._counting import count_macs as count_macs
from ._dit import DiT as DiT
from ._layers import (
    MLP as MLP,
    Attention as Attention,
    FinalLayer as FinalLayer,
    LayerNorm as LayerNorm,
    Linear as Linear,
    PlainFinalLayer as PlainFinalLayer,
    RMSNorm as RMSNorm,
    SwiGLU as SwiGLU,
)
from ._ops import (
    layer_norm as layer_norm,
    modulate as modulate,
    patchify as patchify,
    rms_norm as rms_norm,
    rotary_2d as rotary_2d,
    sincos_2d as sincos_2d,
    timestep_features as timestep_features,
    unpatchify as unpatchify,
)
from ._parameters import (
    ParameterKind as ParameterKind,
    muon as muon,
    parameter_kinds as parameter_kinds,
)
from ._stack import Stack as Stack
from ._types import (
    Block as Block,
    Conditioning as Conditioning,
    Loss as Loss,
    Network as Network,
    Optimizer as Optimizer,
)
from .configs import (
    CONFIGS as CONFIGS,
    Config as Config,
    build as build,
    macs_by_part as macs_by_part,
    num_macs as num_macs,
    num_params as num_params,
)
from .guidance import drop_label as drop_label, guide as guide
from .train import (
    TrainState as TrainState,
    cast as cast,
    ema_update as ema_update,
    ema_warmup as ema_warmup,
    init_sharded as init_sharded,
    init_state as init_state,
    make_train_step as make_train_step,
    power_ema_decay as power_ema_decay,
    reconstruct_ema as reconstruct_ema,
    shardings as shardings,
    std_to_gamma as std_to_gamma,
)
from .vae import Autoencoder as Autoencoder

__version__ = "0.1.0"
