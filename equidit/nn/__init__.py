"""The network: functions of tokens, layers, conditioning, blocks, stacks, and the DiT."""

from .attention import Attention as Attention
from .blocks import (
    AdaLNBlock as AdaLNBlock,
    AdaLNZeroBlock as AdaLNZeroBlock,
    CrossAttentionBlock as CrossAttentionBlock,
    InContextBlock as InContextBlock,
    TextCrossAttentionBlock as TextCrossAttentionBlock,
)
from .conditioning import (
    LabelConditioner as LabelConditioner,
    LabelEmbedder as LabelEmbedder,
    TextConditioner as TextConditioner,
    TextEmbedder as TextEmbedder,
    TimestepConditioner as TimestepConditioner,
    TimestepEmbedder as TimestepEmbedder,
)
from .counting import count_macs as count_macs
from .dit import DiT as DiT
from .layers import (
    MLP as MLP,
    FinalLayer as FinalLayer,
    LayerNorm as LayerNorm,
    Linear as Linear,
    PlainFinalLayer as PlainFinalLayer,
    RMSNorm as RMSNorm,
    SwiGLU as SwiGLU,
)
from .ops import (
    layer_norm as layer_norm,
    modulate as modulate,
    patchify as patchify,
    rms_norm as rms_norm,
    rotary_2d as rotary_2d,
    sincos_2d as sincos_2d,
    timestep_features as timestep_features,
    unpatchify as unpatchify,
)
from .parameters import (
    ParameterKind as ParameterKind,
    muon as muon,
    parameter_kinds as parameter_kinds,
)
from .stack import Stack as Stack
