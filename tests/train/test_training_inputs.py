"""What the training step is handed, right and wrong: optimizers, losses, states, batches."""

# They are what the type checker refuses.
# pyright: reportArgumentType=false
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import difference, images, randomize
from jax.core import Tracer
from jax.sharding import AxisType, Mesh
from optax import contrib

import equidit as edt
from equidit import diffusion as dfn

KEY = jax.random.key(7)
BATCH = (images(4), jnp.arange(4))
SGD = optax.sgd(0.1)


def mesh(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))


class Small(eqx.Module):
    """Quick to compile: a matrix and a bias for the pixels."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x, t, cond):
        return (self.weight @ x.ravel() + self.bias).reshape(x.shape)


def small(seed=0):
    return randomize(Small(jnp.ones((64, 64)), jnp.ones(64)), seed)


def simple(network, example, key):
    image, label = example
    noise = jax.random.normal(key, image.shape)
    return jnp.square(network(image + noise, 500, label) - noise).mean()


@cache
def stepper(objective=simple, optimizer=SGD, **options):
    """The same step for all tests that ask for the same: it is compiled once."""
    return edt.make_train_step(objective, optimizer, **options)


class Halving:
    """An optimizer with nothing of optax."""

    def init(self, params):
        return jnp.zeros((), jnp.int32)

    def update(self, updates, state, params):
        return jax.tree.map(lambda p: -p / 2, params), state + 1


OPTIMIZERS: dict[str, Any] = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
    "adafactor": optax.adafactor(1e-3),
    "lion": optax.lion(1e-3),
    "lamb": optax.lamb(1e-3),
    "nadam": optax.nadam(1e-3),
    "polyak_sgd": optax.polyak_sgd(1e-1),
    "optimistic_adam_v2": optax.optimistic_adam_v2(1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "masked": optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(1e-3),
    "skip_not_finite": optax.MultiSteps(
        optax.adam(1e-3), 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 2),
    "MultiSteps of momo": optax.MultiSteps(contrib.momo(), 2),
    "acprop": contrib.acprop(1e-3),
    "ademamix": contrib.ademamix(1e-3),
    "adopt": contrib.adopt(1e-3),
    "cocob": contrib.cocob(),
    "dadapt_adamw": contrib.dadapt_adamw(),
    "dog": contrib.dog(),
    "dowg": contrib.dowg(),
    "madgrad": contrib.madgrad(1e-3),
    "mechanize": contrib.mechanize(optax.adam(1e-3)),
    "momo": contrib.momo(),
    "momo_adam": contrib.momo_adam(),
    "muon": contrib.muon(1e-3),
    "prodigy": contrib.prodigy(),
    "reduce_on_plateau": optax.chain(optax.adam(1e-3), contrib.reduce_on_plateau()),
    "schedule_free": contrib.schedule_free(optax.adam(1e-3, b1=0.0), 1e-3),
    "schedule_free_sgd": contrib.schedule_free_sgd(1e-3),
    "halving": Halving(),
}


# These ask no more of the step than "adam", "dog", "momo" or "schedule_free" do.
ALIKE = "adamw lion lamb nadam optimistic_adam_v2 acprop ademamix adopt madgrad dowg momo_adam"
ALIKE = (*ALIKE.split(), "schedule_free_sgd")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in OPTIMIZERS],
)
def test_any_optimizer_trains(name):
    optimizer = OPTIMIZERS[name]
    assert isinstance(optimizer, edt.Optimizer)
    before = small()
    state = edt.init_state(small(), optimizer)
    step = stepper(optimizer=optimizer)
    for _ in range(2):
        state, metrics = step(state, BATCH, KEY)
        assert np.isfinite(metrics["loss"])
        assert not metrics["skipped"]
    assert difference(state.network, before) > 0


KEEPERS = ["prodigy", "dog", "dowg", "mechanize", "schedule_free"]


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        *((name, "fsdp") for name in ("prodigy", "dog", "mechanize", "schedule_free", "momo")),
        ("MultiSteps", "fsdp"),
        pytest.param("dowg", "fsdp", marks=pytest.mark.slow),
        pytest.param("prodigy", "zero1", marks=pytest.mark.slow),
    ],
)
def test_any_optimizer_over_devices(name, sharding):
    optimizer, found = OPTIMIZERS[name], []
    for shared in (None, mesh(2)):
        options = {} if shared is None else {"mesh": shared, "sharding": sharding}
        if shared is None:
            state = edt.init_state(small(), optimizer)
        else:
            state = edt.init_sharded(small, optimizer, shared, sharding)
        step = stepper(optimizer=optimizer, **options)
        for _ in range(2):
            state, _ = step(state, BATCH, KEY)
        found.append(state.network)
    # The estimates of a step's size amplify the rounding of sums in another order.
    assert difference(*found) < 1e-4


@pytest.mark.parametrize("name", KEEPERS)
def test_no_buffer_is_in_a_state_twice(name):
    state = edt.init_state(small(), OPTIMIZERS[name])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    assert difference(state.network, small()) == 0


def test_the_loss_is_told_to_the_optimizer():
    told = []

    def update(updates, state, params, *, value, **_):
        jax.debug.callback(lambda v: told.append(float(v)), value)
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state, metrics = edt.make_train_step(simple, optimizer)(
        edt.init_state(small(), optimizer), BATCH, KEY
    )
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert told == [float(metrics["loss"])]


@pytest.mark.parametrize("kind", ["required", "optional"])
def test_the_loss_is_told_by_its_name(kind):
    told = []

    def required(updates, state, params, *, value):
        return updates, told.append(value) or state

    def optional(updates, state, params=None, value=None):
        return updates, told.append(value) or state

    optimizer = optax.GradientTransformation(
        lambda params: (), required if kind == "required" else optional
    )
    edt.make_train_step(simple, optimizer)(edt.init_state(small(), optimizer), BATCH, KEY)
    assert told[0].shape == ()


def test_numbers_beyond_jax_s_are_reported():
    def beyond(network, example, key):
        return simple(network, example, key), {"a": 2**40, "b": np.int64(2**40), "c": np.float64(2)}

    _, metrics = edt.make_train_step(beyond, SGD)(edt.init_state(small(), SGD), BATCH, KEY)
    assert [float(metrics[name]) for name in "abc"] == [2.0**40, 2.0**40, 2.0]


@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_a_network_of_numpy_arrays_trains(sharding):
    options = {"mesh": mesh(2), "sharding": sharding}
    states = [
        stepper(**options)(edt.init_state(network, SGD), BATCH, KEY)[0]
        for network in (small(), jax.device_get(small()))
    ]
    assert difference(states[0].network, states[1].network) == 0


class Hidden:
    """Holds a network where JAX does not see it."""

    def __init__(self):
        self.network = small()

    def __call__(self, x, t, cond):
        return self.network(x, t, cond)


def test_what_has_no_parameters_is_not_trained():
    for network in (Hidden(), lambda x, t, cond: x, {}):
        with pytest.raises(ValueError, match="without floating-point arrays"):
            edt.init_state(network, SGD)


def test_arrays_that_jax_does_not_see_are_refused():
    options = {"hidden_size": 8, "depth": 1, "num_heads": 1, "key": KEY}
    with pytest.raises(ValueError, match="conditioner is a Hidden, which is no pytree"):
        edt.DiT(1, 2, num_classes=None, conditioner=Hidden(), **options)
    with pytest.raises(ValueError, match="make_block returns is a Hidden, which is no pytree"):
        edt.DiT(1, 2, num_classes=3, block=lambda *_, key: Hidden(), **options)
    # A function has none.
    plain = partial(edt.DiT, 1, 2, num_classes=None, conditioner=lambda t, cond: cond)
    assert eqx.filter_eval_shape(plain, **options)


@pytest.mark.parametrize("decay", [1.5, -0.1, {"a": 0.5, "b": 2}])
def test_averages_that_are_none(decay):
    with pytest.raises(ValueError, match=r"ema_decay.* must lie in \[0, 1\]"):
        edt.make_train_step(simple, SGD, ema_decay=decay)
    with pytest.raises(ValueError, match="decay=2"):
        edt.ema_warmup(2)


def test_an_optimizer_that_wants_more():
    optimizer = optax.lbfgs()
    with pytest.raises(TypeError, match="value_fn") as error:
        edt.make_train_step(simple, optimizer)(edt.init_state(small(), optimizer), BATCH, KEY)
    assert "a loop of your own" in "".join(error.value.__notes__)


class Distilling(eqx.Module):
    """A loss that holds a teacher, as a Module and with a method."""

    teacher: Small

    def __call__(self, network, example, key):
        return self.weighed(1.0, network, example, key)

    def weighed(self, weight, network, example, key):
        image, label = example
        wanted = self.teacher(image, 0, label)
        return weight * jnp.square(network(image, 0, label) - wanted).mean()


def distil(teacher, network, example, key):
    return Distilling(teacher)(network, example, key)


def closing(teacher):
    return lambda *args: distil(teacher, *args)


TEACHING: dict[str, Any] = {
    "module": Distilling,
    "partial": lambda teacher: partial(distil, teacher),
    "partial by name": lambda teacher: partial(
        lambda *args, teacher: distil(teacher, *args), teacher=teacher
    ),
    "partial of a method": lambda teacher: partial(Distilling(teacher).weighed, 1.0),
    "partial in a partial": lambda teacher: partial(
        lambda loss, *args: loss(*args), partial(distil, teacher)
    ),
    "method": lambda teacher: Distilling(teacher).__call__,
}


def taught(loss, **options):
    state = edt.init_state(small(), SGD)
    return edt.make_train_step(loss, SGD, **options)(state, BATCH, KEY)


@pytest.fixture
def refuse_constants():
    """JAX warns of each program with constants as large as a teacher's matrix."""
    before = jax.config.jax_captured_constants_warn_bytes  # pyright: ignore
    jax.config.update("jax_captured_constants_warn_bytes", 64 * 64 * 4)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


DIVIDED = [{"mesh": 2}, {"mesh": 2, "sharding": "fsdp", "accumulate": 2}]


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in TEACHING]
    + [(name, options) for name in ("module", "partial") for options in DIVIDED],
    ids=str,
)
def test_arrays_of_a_loss_are_no_constants(refuse_constants, name, options):
    if "mesh" in options:
        options = options | {"mesh": mesh(options["mesh"])}
    teacher = small(1)
    state, metrics = taught(TEACHING[name](teacher), **options)
    assert not _gone(teacher)
    wanted = jax.vmap(lambda n, x: jnp.square(n(x, 0, 0) - teacher(x, 0, 0)).mean(), (None, 0))
    assert metrics["loss"] == pytest.approx(float(wanted(small(), BATCH[0]).mean()), rel=1e-5)
    assert difference(state.network, small()) > 0


def test_what_a_loss_closes_over_is_a_constant(refuse_constants):
    with pytest.raises(UserWarning, match="constants"):
        taught(closing(small(1)))


def test_a_loss_s_arrays_change_nothing_but_the_program():
    for teacher in (small(1), small(2)):
        loss = eqx.tree_at(lambda loss: loss.teacher, Distilling(small(3)), teacher)
        assert difference(taught(loss), taught(closing(teacher))) < 1e-6


def weighed(weight, network, example, key):
    assert not isinstance(weight, Tracer)
    return float(weight) * simple(network, example, key)


TWICE = partial(weighed, 2.0)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("number", [np.float32(2), np.array(2.0, np.float32), jnp.asarray(2.0)])
def test_a_number_that_a_loss_holds_stays_a_number(number, devices):
    """What takes Python numbers, such as `vb_weight`, takes none that is traced."""
    options = {} if devices == 1 else {"mesh": mesh(devices)}
    wanted = stepper(TWICE, **options)(edt.init_state(small(), SGD), BATCH, KEY)
    assert difference(taught(partial(weighed, number), **options), wanted) == 0


def test_a_teacher_that_the_state_holds_is_a_copy():
    network = small()
    state = edt.init_state(network, SGD)
    step = edt.make_train_step(Distilling(network), SGD)
    with pytest.raises(ValueError, match=r"the same array.*jnp\.copy"):
        step(state, BATCH, KEY)
    stepper()(state, BATCH, KEY)
    with pytest.raises(ValueError, match="the loss has arrays that are gone"):
        step(edt.init_state(small(), SGD), BATCH, KEY)
    with pytest.raises(ValueError, match="the loss has arrays that are gone"):
        edt.make_train_step(Distilling(network), SGD, mesh=mesh(2))


def telling(network, example, key):
    value = simple(network, example, key)
    return value, {"double": 2 * value, "dropped": example[1] == 0, "one": 1, "label": example[1]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"accumulate": 4},
        *(
            {"mesh": 2, "sharding": sharding} | more
            for sharding in ("replicated", "fsdp")
            for more in ({}, {"accumulate": 2})
        ),
    ],
)
def test_what_a_loss_reports_joins_the_metrics(options):
    if "mesh" in options:
        options = options | {"mesh": mesh(options["mesh"])}
    state, metrics = stepper(telling, **options)(edt.init_state(small(), SGD), BATCH, KEY)
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, 0), i) for i in range(4)]
    rows = [simple(small(), (BATCH[0][i], BATCH[1][i]), key) for i, key in enumerate(keys)]
    mean = float(np.mean(rows))
    expected = {"loss": mean, "double": 2 * mean, "dropped": 0.25, "one": 1.0, "label": 1.5}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-6)
    plain, _ = stepper(**options)(edt.init_state(small(), SGD), BATCH, KEY)
    assert difference(state, plain) < 1e-6


WRONG_LOSSES: dict[str, tuple[Any, str]] = {
    "an image": (lambda n, e, k: e[0], r"one number an example.*returned f32\[1,8,8\]"),
    "nothing": (lambda n, e, k: None, "returned None"),
    "a list": (lambda n, e, k: [jnp.ones(())], r"returned \[f32\[\]\]"),
    "a pair without names": (lambda n, e, k: (jnp.ones(()), None), r"returned \(f32\[\], None\)"),
    "two numbers": (lambda n, e, k: (jnp.ones(()), jnp.ones(())), r"\(f32\[\], f32\[\]\)"),
    "a named image": (lambda n, e, k: (jnp.ones(()), {"a": e[0]}), r"'a': f32\[1,8,8\]"),
    "a dictionary": (lambda n, e, k: {"loss": jnp.ones(())}, r"'loss': f32\[\]"),
    "a whole number": (lambda n, e, k: e[1], r"i32\[\].*floating-point"),
    "a taken name": (lambda n, e, k: (e[0].sum(), {"losses": 1.0}), "'losses'.*grad_norm"),
    "no name": (lambda n, e, k: (e[0].sum(), {3: 1.0}), "named 3"),
    "a complex number": (lambda n, e, k: (e[0].sum(), {"a": jnp.asarray(1j)}), "one number"),
    "a key": (lambda n, e, k: (e[0].sum(), {"a": k}), "one number"),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_what_a_loss_must_not_return(name):
    wrong, words = WRONG_LOSSES[name]
    state = edt.init_state(small(), SGD)
    with pytest.raises(ValueError, match=words):
        edt.make_train_step(wrong, SGD)(state, BATCH, KEY)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_metrics_print_single_numbers():
    _, metrics = stepper(telling)(edt.init_state(small(), SGD), BATCH, KEY)
    printed = str(metrics)
    assert f"'loss': {np.asarray(metrics['loss'])!s}," in printed
    assert "'losses': f32[4]" in printed
    assert "'skipped': False" in printed
    assert len(printed.splitlines()) == 1
    assert metrics["losses"].shape == (4,)
    # A dictionary and a tree like others.
    assert isinstance(metrics, dict)
    assert list(dict(metrics)) == list(metrics)
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: x + x, m))(metrics)
    assert type(doubled) is type(metrics)
    assert doubled["double"] == 2 * metrics["double"]
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(metrics)]
    assert names == list(metrics)
    seen = []
    jax.eval_shape(lambda m: seen.append(str(m)), metrics)
    assert "'loss': f32[]" in seen[0]


def test_a_state_is_used_once():
    step = stepper()
    network = small()
    state = edt.init_state(network, SGD)
    kept = jax.tree.map(jnp.copy, state)
    step(state, BATCH, KEY)
    with pytest.raises(ValueError, match=r"donates.*the step returned.*jnp\.copy"):
        step(state, BATCH, KEY)
    with pytest.raises(
        ValueError, match=r"the network has arrays that are gone.*\.weight.*donates"
    ):
        edt.init_state(network, SGD)
    # Of two states of one network, the second loses it to the first.
    one, two = (edt.init_state(kept.network, SGD) for _ in range(2))
    step(one, BATCH, KEY)
    with pytest.raises(ValueError, match=r"the state has arrays that are gone.*the network that"):
        step(two, BATCH, KEY)


def _gone(tree):
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def test_an_average_may_begin_as_the_network_itself():
    """Arrays are values: that two fields of a state are one array is the step's business."""
    state = edt.init_state(small(), SGD)
    state = eqx.tree_at(lambda s: s.ema, state, state.network)
    step = stepper()
    found, _ = step(state, BATCH, KEY)
    expected, _ = step(edt.init_state(small(), SGD), BATCH, KEY)
    assert difference(found, expected) == 0


def test_a_parameter_in_two_places_is_refused():
    network = small()
    both = {"a": network, "b": eqx.tree_at(lambda n: n.bias, network, jnp.ones(64))}
    with pytest.raises(ValueError, match=r"network\['a'\]\.weight and network\['b'\]\.weight"):
        edt.init_state(both, SGD)
    copied = jax.tree.map(jnp.copy, both)
    assert difference(edt.init_state(copied, SGD).network, both) == 0
    with pytest.raises(ValueError, match=r"eqx\.nn\.Shared"):
        edt.init_sharded(lambda: both, SGD, mesh(2), "fsdp")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((images(4), jnp.zeros(3)), [r"batch[0] (4, 1, 8, 8)", "batch[1] (3,)", "first axis"]),
        ((images(4), jnp.zeros(())), ["batch[1] ()"]),
        ((images(4), [0, 1, 2, 3]), ["batch[1][0] is a int, 0", "np.asarray"]),
        ({"x": images(4), "name": "cats"}, ["batch['name'] is a str, 'cats'"]),
        ({"x": images(4), "name": np.array(list("cats"))}, ["batch['name'] is a ndarray"]),
        ({"x": images(4), "name": np.array([None] * 4)}, ["batch['name'] is a ndarray"]),
        ((), ["no leaves"]),
        (None, ["no leaves"]),
        (3.0, ["batch is a float"]),
    ],
)
def test_batches_that_are_none(batch, words):
    state = edt.init_state(small(), SGD)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        stepper()(state, batch, KEY)
    assert all(word in str(error.value) for word in words), error.value
    assert not _gone(state)


@pytest.mark.parametrize("dtype", ["bf16", "half precision", "int8", jnp.int32, bool, "complex64"])
def test_dtypes_that_are_none(dtype):
    for use in (
        partial(edt.make_train_step, simple, SGD, dtype=dtype),
        partial(edt.cast, 1, dtype),
    ):
        with pytest.raises(ValueError, match=r"dtype=.*'bfloat16', 'float16', 'float32'"):
            use()


def test_dtypes_by_name():
    for name in ("bfloat16", "float16", np.dtype("float32"), jnp.bfloat16):
        assert edt.cast(small(), name).weight.dtype == jnp.dtype(name)


class Unmapped(eqx.Module):
    """A block as a newcomer writes it: equinox's layers take one token."""

    linear: eqx.nn.Linear

    def __init__(self, dim, num_heads, mlp_ratio, *, key):
        self.linear = eqx.nn.Linear(dim, dim, key=key)

    def __call__(self, tokens, cond):
        return self.linear(tokens)


class Wrong(eqx.Module):
    linear: edt.Linear

    def __init__(self, dim, num_heads, mlp_ratio, *, key):
        self.linear = edt.Linear(dim + 1, dim, key=key)

    def __call__(self, tokens, cond):
        return self.linear(tokens)


@pytest.mark.parametrize("block", [Unmapped, Wrong])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_in_a_block_names_it(block, compiled):
    shapes = eqx.filter_eval_shape(edt.DiT, 1, 2, 32, 2, 4, 10, block=block, key=KEY)
    network = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    call = eqx.filter_jit(network) if compiled else network
    with pytest.raises(TypeError if block is Unmapped else ValueError) as error:
        call(images(1)[0], 5, 3)
    notes = "\n".join(error.value.__notes__)
    assert f"in a {block.__name__}, called with tokens of shape (16, 32)" in notes
    assert ("jax.vmap(layer)" in notes) == (block is Unmapped)
    # The first cause stays in sight.
    assert ("dot_general" if block is Unmapped else "made for 33") in str(error.value)


def test_split_output():
    x, y = images(2, (3, 4, 4))
    assert dfn.split_output(x, 3)[1] is None
    both = jnp.concatenate([x, y]).astype(jnp.bfloat16)
    value, variance = dfn.split_output(both, 3)
    assert variance is not None
    assert value.dtype == variance.dtype == jnp.float32
    assert (
        difference((value, variance), (both[:3].astype(jnp.float32), both[3:].astype(jnp.float32)))
        == 0
    )
    for channels in (1, 2, 4, 6 + 1):
        with pytest.raises(ValueError, match=rf"of {channels} channels"):
            dfn.split_output(both, channels)


def test_a_flow_of_one_s_own_ignores_the_variance():
    """The loss of the process guide, on a network with a learned variance and on its first half."""

    def flow_loss(network, x0):
        noise = jax.random.normal(KEY, x0.shape)
        output = network((x0 + noise) / 2, jnp.asarray(500.0), jnp.asarray(3))
        velocity, _ = dfn.split_output(output, x0.shape[0])
        return jnp.square(velocity - (noise - x0)).mean()

    network, x0 = (lambda x, t, cond: jnp.concatenate([2 * x, 3 * x])), images(1)[0]
    half = lambda x, t, cond: network(x, t, cond)[:1]  # noqa: E731
    assert difference(flow_loss(network, x0), flow_loss(half, x0)) == 0
