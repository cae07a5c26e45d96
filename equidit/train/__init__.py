"""A small training step, and the state that it carries."""

from .._base.parts import whole as whole
from .ema import (
    Decay as Decay,
    ema_update as ema_update,
    ema_warmup as ema_warmup,
    power_ema_decay as power_ema_decay,
    reconstruct_ema as reconstruct_ema,
    std_to_gamma as std_to_gamma,
)
from .sharding import (
    Sharding as Sharding,
    shardings as shardings,
)
from .state import (
    TrainState as TrainState,
    cast as cast,
    init_sharded as init_sharded,
    init_state as init_state,
)
from .step import make_train_step as make_train_step
