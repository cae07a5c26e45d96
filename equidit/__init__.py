"""Diffusion Transformers in JAX: pure functions and shape-typed Equinox modules."""

from jaxtyping import install_import_hook as _install_import_hook

# Checks every shape of the library at trace time; JAXTYPING_DISABLE=1 turns it off.
_install_import_hook("equidit", "beartype.beartype")

from . import diffusion as diffusion
from ._blocks import AdaLNZeroBlock as AdaLNZeroBlock, Stack as Stack
from ._dit import DiT as DiT
from ._layers import (
    MLP as MLP,
    Attention as Attention,
    FinalLayer as FinalLayer,
    LabelConditioner as LabelConditioner,
    LabelEmbedder as LabelEmbedder,
    Linear as Linear,
    TimestepConditioner as TimestepConditioner,
    TimestepEmbedder as TimestepEmbedder,
)
from ._ops import (
    layer_norm as layer_norm,
    modulate as modulate,
    patchify as patchify,
    sincos_2d as sincos_2d,
    timestep_features as timestep_features,
    unpatchify as unpatchify,
)
from ._types import (
    Block as Block,
    Conditioning as Conditioning,
    Loss as Loss,
    Network as Network,
)
from .configs import (
    CONFIGS as CONFIGS,
    Config as Config,
    build as build,
    num_macs as num_macs,
    num_params as num_params,
)
from .guidance import drop_label as drop_label, guide as guide
from .train import (
    TrainState as TrainState,
    cast as cast,
    ema_update as ema_update,
    ema_warmup as ema_warmup,
    init_state as init_state,
    make_train_step as make_train_step,
)

__version__ = "0.1.0"
