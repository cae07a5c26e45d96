"""Diffusion Transformers in JAX: pure functions and shape-typed Equinox modules."""

import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any

from jaxtyping import install_import_hook as _install_import_hook

# Before the hook: what runs at every call is not itself checked.
from ._base.arguments import Finder as _Finder

# Checks every shape of the library at trace time; JAXTYPING_DISABLE=1 turns it off.
_checks = _install_import_hook("equidit", "beartype.beartype").hook
_sys.meta_path.insert(0, _Finder("equidit", _checks))

from . import diffusion as diffusion, hosts as hosts, vae as vae
from .configs import (
    CONFIGS as CONFIGS,
    Config as Config,
    build as build,
    macs_by_part as macs_by_part,
    num_macs as num_macs,
    num_params as num_params,
)
from .guidance import drop_label as drop_label, guide as guide
from .nn import (
    MLP as MLP,
    AdaLNBlock as AdaLNBlock,
    AdaLNZeroBlock as AdaLNZeroBlock,
    Attention as Attention,
    CrossAttentionBlock as CrossAttentionBlock,
    DiT as DiT,
    FinalLayer as FinalLayer,
    InContextBlock as InContextBlock,
    LabelConditioner as LabelConditioner,
    LabelEmbedder as LabelEmbedder,
    LayerNorm as LayerNorm,
    Linear as Linear,
    ParameterKind as ParameterKind,
    PlainFinalLayer as PlainFinalLayer,
    RMSNorm as RMSNorm,
    Stack as Stack,
    SwiGLU as SwiGLU,
    TextConditioner as TextConditioner,
    TextCrossAttentionBlock as TextCrossAttentionBlock,
    TextEmbedder as TextEmbedder,
    TimestepConditioner as TimestepConditioner,
    TimestepEmbedder as TimestepEmbedder,
    count_macs as count_macs,
    layer_norm as layer_norm,
    modulate as modulate,
    muon as muon,
    parameter_kinds as parameter_kinds,
    patchify as patchify,
    rms_norm as rms_norm,
    rotary_2d as rotary_2d,
    sincos_2d as sincos_2d,
    timestep_features as timestep_features,
    unpatchify as unpatchify,
)
from .seams import (
    Block as Block,
    Conditioning as Conditioning,
    Loss as Loss,
    Network as Network,
    Optimizer as Optimizer,
)
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

if _TYPE_CHECKING:
    from . import (
        checkpoint as checkpoint,
        data as data,
        devices as devices,
        metrics as metrics,
        pretrained as pretrained,
    )

__version__ = "0.1.0"

_LATER = ("checkpoint", "data", "devices", "metrics", "pretrained")


def __getattr__(name: str) -> _Any:
    """Rooms that a network alone does without are imported when they are first asked for."""
    if name in _LATER:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
