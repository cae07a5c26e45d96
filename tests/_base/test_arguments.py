"""What a beginner hands over: NumPy arrays, Python numbers, lists, legacy keys, batches."""

# They are what the type checker refuses.
# pyright: reportArgumentType=false, reportCallIssue=false
import inspect
import subprocess
import sys
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import difference, images, randomize, tiny
from jaxtyping import AbstractArray, Array, Float, Int, Key, TypeCheckError
from site_names import public_names

import equidit as edt
from equidit import diffusion as dfn, metrics, vae
from equidit._base.arguments import accepting, union_members

X, Y, Z = images(3)
TOKENS = jax.random.normal(jax.random.key(2), (6, 8))
COND = edt.Conditioning(TOKENS[0], TOKENS[:2])
T, LABEL = jnp.asarray(5), jnp.asarray(3)
SCHEDULE = dfn.Schedule(dfn.linear_betas())
OUTPUT = jnp.concatenate([X, Y])
NETWORK = tiny()
KEY = jax.random.key(0)
PROMPT = (TOKENS[:, :4], jnp.arange(6) < 4)
AUTOENCODER = randomize(edt.Autoencoder(1, 1, 2, (4, 4), 1, 2, key=KEY))


def made(kind, *sizes, **options):
    return randomize(kind(*sizes, **options, key=KEY))


def muon_update(rate):
    optimizer = edt.muon(rate)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        return optimizer.update(TOKENS, optimizer.init(TOKENS), TOKENS)[0]


# Every public function and module with an array among its parameters, and what it is given.
CALLS: dict[str, tuple[Any, ...]] = {
    "patchify": (edt.patchify, X, 2),
    "unpatchify": (edt.unpatchify, edt.patchify(X, 2), 2, (4, 4)),
    "sincos_2d": (edt.sincos_2d, 8, (2, 3)),
    "timestep_features": (edt.timestep_features, T),
    "modulate": (edt.modulate, TOKENS, TOKENS[0], TOKENS[1]),
    "layer_norm": (edt.layer_norm, TOKENS),
    "rms_norm": (edt.rms_norm, TOKENS),
    "rotary_2d": (edt.rotary_2d, TOKENS.reshape(6, 2, 4), TOKENS[:, :2]),
    "Linear.__call__": (made(edt.Linear, 8, 4), TOKENS),
    "LayerNorm.__call__": (edt.LayerNorm(8), TOKENS),
    "RMSNorm.__call__": (edt.RMSNorm(8), TOKENS),
    "MLP.__call__": (made(edt.MLP, 8, 16), TOKENS),
    "SwiGLU.__call__": (made(edt.SwiGLU, 8, 16), TOKENS),
    "Attention.__call__": (made(edt.Attention, 8, 2), TOKENS, TOKENS[:3], jnp.arange(3) < 2),
    "FinalLayer.__call__": (made(edt.FinalLayer, 8, 2, 1), TOKENS, COND),
    "PlainFinalLayer.__call__": (randomize(edt.PlainFinalLayer(8, 2, 1, key=KEY)), TOKENS, COND),
    "AdaLNZeroBlock.__call__": (made(edt.AdaLNZeroBlock, 8, 2), TOKENS, COND),
    "AdaLNBlock.__call__": (made(edt.AdaLNBlock, 8, 2), TOKENS, COND),
    "InContextBlock.__call__": (made(edt.InContextBlock, 8, 2), TOKENS, COND),
    "CrossAttentionBlock.__call__": (made(edt.CrossAttentionBlock, 8, 2), TOKENS, COND),
    "TextCrossAttentionBlock.__call__": (made(edt.TextCrossAttentionBlock, 8, 2), TOKENS, COND),
    "Stack.__call__": (
        edt.Stack(lambda key: edt.AdaLNBlock(8, 2, key=key), 2, key=KEY),
        TOKENS,
        COND,
    ),
    "Conditioning.__init__": (edt.Conditioning, TOKENS[0], TOKENS[:2], jnp.arange(2) < 1),
    "TimestepEmbedder.__call__": (made(edt.TimestepEmbedder, 8), T),
    "LabelEmbedder.__call__": (made(edt.LabelEmbedder, 10, 8), LABEL),
    "TextEmbedder.__call__": (made(edt.TextEmbedder, 4, 8), *PROMPT),
    "LabelConditioner.__call__": (made(edt.LabelConditioner, 10, 8), T, LABEL),
    "TimestepConditioner.__call__": (made(edt.TimestepConditioner, 8), T),
    "TextConditioner.__call__": (made(edt.TextConditioner, 4, 8), T, PROMPT),
    "DiT.__call__": (NETWORK, X, T, LABEL),
    "DiT.embed": (NETWORK.embed, X, T, LABEL),
    "guide": (lambda s: edt.guide(NETWORK, s, 10)(X, T, LABEL), jnp.asarray(2.0)),
    "drop_label": (lambda *a: edt.drop_label(*a, key=KEY), LABEL, 10, jnp.asarray(0.5)),
    "ema_update": (edt.ema_update, NETWORK, NETWORK, jnp.asarray(0.5)),
    "ema_warmup": (lambda t: edt.ema_warmup(0.9)(t), T),
    "power_ema_decay": (lambda t: edt.power_ema_decay(0.1)(t), T),
    "muon": (muon_update, jnp.asarray(0.1)),
    "TrainState.__init__": (edt.TrainState, T, NETWORK, NETWORK, ()),
    "Autoencoder.encode": (AUTOENCODER.encode, X),
    "Autoencoder.decode": (AUTOENCODER.decode, jnp.concatenate([X, Y])),
    "q_sample": (dfn.q_sample, SCHEDULE, X, T, Y),
    "posterior": (dfn.posterior, SCHEDULE, X, Y, T),
    "predict_x0": (dfn.predict_x0, SCHEDULE, X, T, Y),
    "predict_eps": (dfn.predict_eps, SCHEDULE, X, T, Y),
    "predict_v": (dfn.predict_v, SCHEDULE, X, T, Y),
    "x0_and_eps": (dfn.x0_and_eps, SCHEDULE, X, T, Y),
    "vb_term": (dfn.vb_term, SCHEDULE, OUTPUT, X, Y, T),
    "hybrid_terms": (dfn.hybrid_terms, SCHEDULE, OUTPUT, X, Y, T, Z),
    "split_output": (dfn.split_output, OUTPUT, 1),
    "min_snr_weight": (dfn.min_snr_weight, SCHEDULE, T),
    "BitsPerDim.__init__": (dfn.BitsPerDim, TOKENS[0, 0], TOKENS[0, 1], TOKENS[0], TOKENS[1]),
    "LossSecondMoment.update": (dfn.LossSecondMoment(8, 2).update, jnp.arange(3), TOKENS[0, :3]),
    "frechet_distance": (metrics.frechet_distance, np.array(TOKENS), np.array(TOKENS[1:])),
    "nearest_distance": (metrics.nearest_distance, np.array(TOKENS), np.array(TOKENS[1:])),
    "Gaussian.__init__": (vae.Gaussian, X, Y),
}


def loss(function, x0, t, noise):
    return function(NETWORK, SCHEDULE, x0, LABEL, key=KEY, t=t, noise=noise)


def step(function, x, t):
    return function(NETWORK, SCHEDULE, x, t, LABEL, key=KEY)


SHORT = dfn.Schedule(dfn.linear_betas(), (0, 5, 999))
CALLS |= {
    name: (partial(loss, getattr(dfn, name)), X, T, Y)
    for name in ("simple_loss", "hybrid_loss", "vlb_loss", "rescaled_hybrid_loss")
}
CALLS |= {
    name: (partial(step, getattr(dfn, name)), X, T)
    for name in ("ddim_step", "ddpm_step", "ddim_inversion_step")
}
CALLS["bits_per_dim"] = (lambda x0: dfn.bits_per_dim(NETWORK, SHORT, x0, LABEL, key=KEY), X)

FORMS = {
    "numpy": lambda a: np.asarray(a, np.float64 if a.dtype == np.float32 else a.dtype),
    "lists and numbers": lambda a: np.asarray(a).tolist(),
}


def _given(arguments, form):
    """The arguments with every plain array in another form; modules are left as they are."""

    def give(argument):
        if isinstance(argument, tuple):
            return tuple(map(give, argument))
        return form(argument) if eqx.is_array(argument) else argument

    return [give(argument) for argument in arguments]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_whatever_jnp_asarray_takes_is_an_array(name, form):
    function, *arguments = CALLS[name]
    expected, found = function(*arguments), function(*_given(arguments, FORMS[form]))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b) or isinstance(b, float)
    assert difference(found, expected) == 0


@pytest.mark.parametrize("name", ["DiT.__call__", "q_sample", "patchify", "ddim_step", "modulate"])
def test_under_transformations_too(name):
    function, *arguments = CALLS[name]
    first, *rest = arguments if name != "q_sample" else arguments[1:]
    if name == "q_sample":
        function = lambda *a: dfn.q_sample(SCHEDULE, *a)  # noqa: E731
    expected = function(first, *rest)
    given = _given(rest, np.asarray)
    found = jax.jit(lambda a: function(a, *given))(first)
    assert difference(found, expected) < 1e-5
    mapped = jax.vmap(lambda a: function(a, *given))(np.stack([first, first]))
    assert difference(mapped[1], expected) < 1e-5


def _takes_arrays(function):
    for parameter in inspect.signature(function).parameters.values():
        members = [m for m in union_members(parameter.annotation) if inspect.isclass(m)]
        dtypes = {m.dtype for m in members if issubclass(m, AbstractArray)}
        if dtypes and Key not in dtypes:
            return True
    return False


def test_the_table_has_every_function_and_module():
    rooms = {room.__name__ for room in (edt, dfn, vae, metrics)}
    for path, thing in public_names().items():
        room, _, name = path.rpartition(".")
        if room not in rooms or getattr(thing, "_is_protocol", False):
            continue
        functions = {name: thing} if inspect.isfunction(thing) else {}
        if inspect.isclass(thing):
            methods = {method: f for method, f in vars(thing).items() if inspect.isfunction(f)}
            functions = {
                f"{name}.{method}": f
                for method, f in methods.items()
                if not method.startswith("_") or method in ("__init__", "__call__")
            }
        for full, function in functions.items():
            assert full in CALLS or not _takes_arrays(function), full


def test_legacy_keys_are_keys():
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    assert difference(tiny_with(old), tiny_with(new)) == 0
    assert difference(tiny_with(np.asarray(old)), tiny_with(new)) == 0
    found = [dfn.ddpm_step(NETWORK, SCHEDULE, X, 5, 3, key=key) for key in (old, new)]
    assert difference(*found) == 0
    mapped = [
        jax.vmap(lambda k: edt.drop_label(jnp.asarray(3), 10, 0.5, key=k))(jax.random.split(key, 9))
        for key in (old, new)
    ]
    assert difference(*mapped) == 0
    with pytest.raises(TypeCheckError, match="key"):
        tiny_with(3)


def tiny_with(key):
    return edt.DiT(1, 2, 8, 1, 2, 3, key=key)


def test_numbers_and_tuples_of_numpy():
    sizes = map(np.int64, (1, 2, 8, 1, 2, 3))
    network = edt.DiT(*sizes, mlp_ratio=np.float32(2.0), learn_sigma=np.True_, key=KEY)
    assert network.out_channels == 2
    assert edt.unpatchify(edt.patchify(X, jnp.asarray(2)), np.int32(2), [4, np.int64(4)]).shape
    assert edt.ema_warmup(np.float64(0.5))(jnp.asarray(100)) == 0.5
    assert edt.layer_norm(TOKENS, jnp.asarray(1e-6)).shape == TOKENS.shape


WRONG = {
    "bytes for an image": (lambda: edt.patchify(np.ones((1, 8, 8), np.uint8), 2), "u8[1,8,8]"),
    "whole numbers for an image": (lambda: edt.patchify([[[1, 2], [3, 4]]], 2), "i32[1,2,2]"),
    "a ragged list": (lambda: edt.patchify([[[1.0, 2.0], [3.0]]], 2), "channels height width"),
    "a float for a label": (lambda: NETWORK(X, 5, 3.5), "label"),
    "truth for a label": (lambda: NETWORK(X, 5, True), "label"),
    "text for a time": (lambda: NETWORK(X, "5", 3), "parameter 't'"),
    "nothing for an image": (lambda: NETWORK(None, 5, 3), "parameter 'x'"),
    "a vector for a time": (lambda: NETWORK(X, np.arange(3), 3), "i32[3]"),
    "a float for a size": (lambda: edt.patchify(X, 2.0), "patch_size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_array_is_the_same_clear_error(name):
    call, word = WRONG[name]
    with pytest.raises(TypeCheckError) as error:
        call()
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["patchify", "DiT.__call__", "q_sample", "ddpm_step", "modulate"])
def test_a_batch_is_told_of_vmap(name):
    function, *arguments = CALLS[name]
    batch = [np.stack([a, a]) if eqx.is_array(a) and a.ndim > 1 else a for a in arguments]
    with pytest.raises(TypeCheckError) as error:
        function(*batch)
    assert "map a batch by jax.vmap" in str(error.value)
    assert "one axis more than" in str(error.value)


def test_another_number_of_axes_is_not_told_of_vmap():
    for shape in ((8, 8), (2, 2, 1, 8, 8)):
        with pytest.raises(TypeCheckError) as error:
            edt.patchify(np.ones(shape), 2)
        assert "vmap" not in str(error.value)


def test_errors_are_short_however_large_the_network():
    network = edt.build("DiT-S/8", key=KEY)
    state = edt.init_state(network, optax.adam(1e-3))
    for call in (
        lambda: edt.ema_update(network, network, network),
        lambda: dfn.ddim_step(SCHEDULE, network, X, 5, 3, key=KEY),
        lambda: edt.patchify(state, 2),
        lambda: edt.guide(network, state, 3),
    ):
        with pytest.raises(TypeCheckError) as error:
            call()
        assert len(str(error.value).splitlines()) < 15
        assert len(str(error.value)) < 3000
        assert error.value.__cause__ is None


def test_one_of_your_own():
    def double(x: Float[Array, " dim"], i: Int[Array, ""] | None = None, n: int = 1):
        assert isinstance(x, jax.Array)
        return 2 * x, i, n

    accept = accepting(double)
    x, i, n = accept([1, 2.5], n=np.int8(3))
    assert (x.tolist(), i, n) == ([2.0, 5.0], None, 3)
    assert isinstance(accept(np.ones(2), 7)[1], jax.Array)
    assert inspect.signature(accept) == inspect.signature(double)


def test_without_checks_arguments_come_in_alike(monkeypatch):
    monkeypatch.setenv("JAXTYPING_DISABLE", "1")
    code = """
import jax, numpy as np, equidit as edt
network = edt.DiT(1, 2, 8, 1, 2, 3, key=jax.random.PRNGKey(0))
print(network(np.ones((1, 8, 8)), 5, 2).shape)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 8, 8)"


def test_strings_outside_a_literal_name_the_choices():
    @accepting
    def draw(mode: Literal["fast", "exact"] | None = None) -> str | None:
        return mode

    assert (draw(), draw("fast"), draw(None)) == (None, "fast", None)
    with pytest.raises(ValueError, match=r"mode='exakt' is unknown: did you mean 'exact'\?"):
        draw(mode="exakt")
