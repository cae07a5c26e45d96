"""A network of all that the training step tells apart, quick to compile, and steps of it."""

from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import images, randomize, tiny
from jax.sharding import AxisType, Mesh

import equidit as edt
from equidit import diffusion as dfn

SCHEDULE = dfn.Schedule(dfn.linear_betas())
BATCH = (images(16, (1, 4, 4)), jnp.arange(16) % 10)
KEY = jax.random.key(7)
# SGD, because Adam's normalisation would hide gradients that are too large by a factor.
SGD = optax.sgd(0.1)
WARMUP = edt.ema_warmup(0.99)
# Sums in another order: float32 rounding of a mean over 16 examples.
ORDER = 1e-6


class Layer(eqx.Module):
    linear: edt.Linear

    def __call__(self, tokens, cond):
        return tokens + jnp.tanh(self.linear(tokens)) * cond.vector[None]


class Toy(eqx.Module):
    """A table, single layers and a stack: all kinds of arrays that devices share or do not."""

    table: jax.Array
    up: edt.Linear
    layers: edt.Stack
    down: edt.Linear

    def __init__(self, width, depth, remat):
        keys = jax.random.split(KEY, 3)
        layer = lambda key: Layer(edt.Linear(width, width, key=key))  # noqa: E731
        self.table = jnp.ones((11, width))
        self.up = edt.Linear(4, width, key=keys[0])
        self.layers = edt.Stack(layer, depth, remat=remat, key=keys[1])
        self.down = edt.Linear(width, 4, key=keys[2])

    def __call__(self, x, t, cond):
        tokens = self.layers(self.up(x.reshape(4, 4)), edt.Conditioning(self.table[cond]))
        return self.down(tokens).reshape(x.shape)


def toy(width=16, depth=2, remat=None):
    return randomize(Toy(width, depth, remat))


def dit(block: Any = edt.AdaLNZeroBlock):
    return tiny(hidden_size=8, num_heads=2, block=block)


def loss(network, example, key):
    image, label = example
    drop_key, key = jax.random.split(key)
    label = edt.drop_label(label, 10, 0.3, key=drop_key)
    noise = jax.random.normal(key, image.shape)
    return jnp.square(network(image + noise, 500, label) - noise).mean()


def hybrid(network, example, key):
    image, label = example
    drop_key, key = jax.random.split(key)
    label = edt.drop_label(label, 10, 0.3, key=drop_key)
    return dfn.hybrid_loss(network, SCHEDULE, image, label, key=key)


def mesh(count, order=None):
    devices = np.array(jax.devices()[:count])
    return Mesh(
        devices if order is None else devices[order], ("data",), axis_types=(AxisType.Auto,)
    )


def stepper(optimizer=SGD, objective=loss, *, ema_decay: Any = 0.9, **options):
    """The same step for all tests that ask for the same: it is compiled once."""
    options |= {"loss": objective, "optimizer": optimizer, "ema_decay": ema_decay}
    return _stepper(*sorted(options.items()))


@cache
def _stepper(*options):
    return edt.make_train_step(**dict(options))


def trained(step, optimizer=SGD, *, steps=2, make=toy, batch=BATCH):
    state = edt.init_state(make(), optimizer)
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch, KEY)
        history.append(metrics)
    return state, history


def run(optimizer=SGD, *, steps=2, make=toy, batch=BATCH, **options):
    step = stepper(optimizer, **options)
    return trained(step, optimizer, steps=steps, make=make, batch=batch)
