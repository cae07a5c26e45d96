"""The state of a run: how it begins, what a step makes of it, and what can be read back."""

from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ..checkpoint import Checkpoints
from ..configs import build
from ..seams import Network, StrPath
from ..train import TrainState, ema_warmup, init_sharded, init_state, make_train_step, shardings
from .folder import Folder
from .kinds import About
from .process import training_loss
from .settings import Settings


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """The paper's: Adam without weight decay, warm-up or clipping."""
    return optax.adam(settings.learning_rate)


def training_step(settings: Settings, about: About, mesh: Mesh | None) -> Any:
    """The run's step, of [`equidit.make_train_step`][]."""
    return make_train_step(
        training_loss(settings.process, about.num_classes, settings.label_dropout),
        optimizer(settings),
        ema_decay=ema_warmup(settings.ema_decay),
        dtype=None if settings.dtype == "float32" else jnp.dtype(settings.dtype),
        mesh=mesh,
        sharding=settings.sharding,
        accumulate=settings.accumulate,
        max_grad_norm=settings.max_grad_norm,
    )


def new_state(settings: Settings, about: About, mesh: Mesh | None) -> TrainState:
    """The state at step 0."""
    config = settings.network(about.shape[0], about.num_classes)
    make_network = partial(build, config, key=settings.key("init"))
    if mesh is None or settings.sharding == "replicated":
        return init_state(make_network(), optimizer(settings))
    return init_sharded(make_network, optimizer(settings), mesh, settings.sharding)


def state_like(settings: Settings, about: About, mesh: Mesh | None) -> TrainState:
    """The state's shapes, laid out on the devices. No weight is initialised."""
    like = eqx.filter_eval_shape(new_state, settings, about, None)
    if mesh is None:
        return like
    layout = shardings(like, mesh, settings.sharding)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arrays = eqx.filter(like, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return eqx.combine(jax.tree.map(placed, arrays, layout), like)


def restore_ema(path: StrPath) -> Network:
    """The averaged weights of a run's newest checkpoint. Nothing else is read."""
    folder = Folder(Path(path))
    settings, about = folder.read()
    like = state_like(settings, about, None)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        return checkpoints.restore_part(like.ema, "ema").state
