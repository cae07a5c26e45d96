import dataclasses
from functools import partial
from typing import Any, assert_type

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BETAS, STEPS, VELOCITY, Pointwise, images, tiny, tree_allclose

import equidit as edt
from equidit import diffusion as dfn

every_betas = pytest.mark.parametrize("betas", [make() for make in BETAS.values()], ids=BETAS)
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
LABEL, KEY = jnp.asarray(3), jax.random.key(5)
UNKNOWN: Any = "other"


def test_the_docstring_of_a_schedule_names_its_tables():
    for field in dataclasses.fields(dfn.Schedule):
        assert f"`{field.name}`" in f"{dfn.Schedule.__doc__}"


def test_linear_betas():
    betas = dfn.linear_betas()
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas[[0, -1]], [1e-4, 2e-2], rtol=1e-12)
    np.testing.assert_allclose(np.diff(betas), np.diff(betas)[0], rtol=1e-9)
    # Shorter schedules reach about the same noise.
    assert np.prod(1 - dfn.linear_betas(100)) == pytest.approx(np.prod(1 - betas), rel=0.5)


def test_cosine_betas():
    betas = dfn.cosine_betas(100)
    signal = np.cos((np.arange(1, 100) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    signal /= np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:99], signal, rtol=1e-12)
    assert betas[-1] == 0.999


@every_betas
def test_tables_agree_with_each_other(betas):
    s = dfn.Schedule(betas)
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    close(s.sqrt_alphas_cumprod**2, s.alphas_cumprod)
    close(s.alphas_cumprod_prev[1:], s.alphas_cumprod[:-1])
    assert s.alphas_cumprod_prev[0] == 1
    assert (np.diff(s.alphas_cumprod) < 0).all()
    assert (s.posterior_variance <= s.betas).all()
    assert s.posterior_variance[0] == 0
    close(np.exp(s.posterior_log_variance_clipped[1:]), s.posterior_variance[1:], rtol=1e-5)
    assert s.posterior_log_variance_clipped[0] == s.posterior_log_variance_clipped[1]
    close(np.exp(s.log_betas), s.betas, rtol=1e-5)
    # The posterior of x0 given noiseless data is that data, scaled.
    mean = s.posterior_mean_coef1 + s.posterior_mean_coef2 * s.sqrt_alphas_cumprod
    close(mean, s.sqrt_alphas_cumprod_prev, rtol=1e-5)


@every_betas
@pytest.mark.parametrize("spec", ["1000", 100, "ddim25", [3, 5]])
def test_respacing_keeps_the_noise_levels(betas, spec):
    full = dfn.Schedule(betas)
    keep = dfn.space_timesteps(1000, spec)
    short = dfn.Schedule(betas, keep)
    assert short.steps == len(keep)
    np.testing.assert_array_equal(short.time, keep)
    np.testing.assert_array_equal(short.alphas_cumprod, full.alphas_cumprod[jnp.asarray(keep)])
    if len(keep) == 1000:
        np.testing.assert_allclose(short.betas, full.betas, rtol=2e-7)


def test_spacing_edges():
    assert dfn.space_timesteps(10, 10) == tuple(range(10))
    assert dfn.space_timesteps(10, "2") == (0, 9)
    assert dfn.space_timesteps(10, 1) == (0,)
    # 11 steps in two sections of 6 and 5.
    assert dfn.space_timesteps(11, "2,2") == (0, 5, 6, 10)
    assert dfn.space_timesteps(10, "ddim5") == (0, 2, 4, 6, 8)
    # A stride of 49.95: ADM adds it up, and so rounds the tenth step, 499.5, down.
    assert dfn.space_timesteps(1000, 21)[10] == 499
    assert dfn.space_timesteps(1000, np.int64(3)) == (0, 500, 999)
    one = dfn.Schedule(dfn.linear_betas(), [0])
    assert np.isfinite([np.asarray(table) for table in jax.tree.leaves(one)]).all()


@every_betas
def test_conversions_are_inverses(betas):
    s = dfn.Schedule(betas)
    x0, noise = images(2)
    for t in (0, 1, 500, 900):
        xt = dfn.q_sample(s, x0, t, noise)
        scale = float(s.sqrt_recip_alphas_cumprod[t])
        np.testing.assert_allclose(
            dfn.predict_x0(s, xt, t, noise), x0, rtol=0, atol=1e-6 * scale + 1e-6
        )
        error = 1e-6 * scale / float(s.sqrt_recipm1_alphas_cumprod[t])
        np.testing.assert_allclose(dfn.predict_eps(s, xt, t, x0), noise, rtol=0, atol=10 * error)


def test_traced_and_plain_indices_agree():
    s, (x0, noise) = dfn.Schedule(dfn.linear_betas()), images(2)
    traced = jax.jit(lambda t: dfn.q_sample(s, x0, t, noise))(jnp.asarray(7))
    assert tree_allclose(traced, dfn.q_sample(s, x0, 7, noise), 1e-6)
    for t in (-1, 1000):
        assert np.isnan(jax.jit(dfn.q_sample)(s, x0, jnp.asarray(t), noise)).all()
        forms: tuple[Any, ...] = (t, np.int64(t), np.asarray(t), jnp.asarray(t))
        for known in forms:
            with pytest.raises(ValueError, match=f"t={t} is no index of a schedule of 1000 steps"):
                dfn.q_sample(s, x0, known, noise)


@every_step
def test_step_laws(step):
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 10))
    network, x = Pointwise(), images(3)
    t, label = jnp.asarray([0, 4, 9]), jnp.asarray([0, 3, 10])
    keys = jax.random.split(KEY, 3)

    def one(x, t, label, key):
        return step(network, schedule, x, t, label, key=key)

    loop = jnp.stack([one(*args) for args in zip(x, t, label, keys, strict=True)])
    assert loop.shape == x.shape
    assert tree_allclose(jax.jit(jax.vmap(one))(x, t, label, keys), loop, 1e-5)
    # A bfloat16 network leaves the state in float32.
    low = step(edt.cast(network, jnp.bfloat16), schedule, x[1], t[1], label[1], key=KEY)
    assert low.dtype == jnp.float32
    # A state in bfloat16 is computed on in float32 and stays what it was.
    half = step(network, schedule, x[1].astype(jnp.bfloat16), t[1], label[1], key=KEY)
    assert half.dtype == jnp.bfloat16
    assert tree_allclose(loop[1], step(network, schedule, x[1], t[1], label[1], key=keys[1]), 1e-5)
    # The last step is deterministic.
    again = [one(x[0], t[0], label[0], jax.random.key(seed)) for seed in (1, 2)]
    assert tree_allclose(*again)


@every_step
def test_network_is_told_the_original_time(step):
    schedule = dfn.Schedule(dfn.linear_betas(), (0, 400, 777))
    told = []

    def network(x, t, cond):
        told.append((float(t), cond))
        return jnp.concatenate([x, x])

    for t in (2, 1, 0):
        step(network, schedule, images(1)[0], t, "cond", key=KEY)
    assert told == [(777, "cond"), (400, "cond"), (0, "cond")]


def as_prediction(network, schedule, kind):
    """A network that predicts eps, made to predict something else."""

    def converted(x, t, cond):
        index = jnp.searchsorted(schedule.time, t)
        eps, values = jnp.split(network(x, t, cond), 2)
        x0 = dfn.predict_x0(schedule, x, index, eps)
        value = {"x0": x0, "v": dfn.predict_v(schedule, x0, index, eps), VELOCITY: eps - x0}[kind]
        return jnp.concatenate([value, values])

    return converted


@pytest.mark.parametrize("kind", ["x0", "v", VELOCITY], ids=["x0", "v", "of-ones-own"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("step", [dfn.ddpm_step, dfn.ddim_step])
def test_predictions_are_equivalent(step, clip, kind):
    schedule, network = dfn.Schedule(dfn.linear_betas(), (0, 400, 777)), Pointwise()
    converted = as_prediction(network, schedule, kind)
    for t in (0, 2):
        args = (schedule, images(1)[0], t, LABEL)
        expected = step(network, *args, key=KEY, clip=clip, with_x0=True)
        assert tree_allclose(
            expected,
            step(converted, *args, key=KEY, clip=clip, prediction=kind, with_x0=True),
            1e-5,
        )


@every_betas
@pytest.mark.parametrize("t", [0, 1, 500, 900])
def test_conversions(betas, t):
    s = dfn.Schedule(betas)
    x0, eps = images(2)
    xt = dfn.q_sample(s, x0, t, eps)
    values: list[tuple[dfn.PredictionLike, jax.Array]] = [
        ("eps", eps),
        ("x0", x0),
        ("v", dfn.predict_v(s, x0, t, eps)),
        (VELOCITY, eps - x0),
    ]
    for kind, value in values:
        # What is derived by division by a small number is as much less exact.
        small = min(float(s.sqrt_alphas_cumprod[t]), float(s.sqrt_one_minus_alphas_cumprod[t]))
        assert tree_allclose((x0, eps), dfn.x0_and_eps(s, xt, t, value, kind), 1e-6 / small)


@pytest.mark.parametrize(
    "step", [step for step in STEPS.values() if step is not dfn.ddim_inversion_step]
)
def test_clipping(step):
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 10))
    network = lambda x, t, cond: jnp.concatenate([-90 * x, x])  # noqa: E731
    clipped = isinstance(step, partial) and step.keywords.get("clip", False)
    last, x0 = step(network, schedule, images(1)[0], 0, None, key=KEY, with_x0=True)
    assert tree_allclose(last, x0, 1e-6)
    assert (np.abs(x0).max() <= 1) == clipped


def test_ddim_eta_1_has_the_posterior_variance():
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 10))
    x = jnp.zeros((1, 64, 64))
    args = (lambda x, t, cond: x, schedule, x, 5, None)
    out = dfn.ddim_step(*args, key=KEY, eta=1.0)
    assert out.std() == pytest.approx(float(jnp.sqrt(schedule.posterior_variance[5])), rel=0.05)
    small = dfn.ddpm_step(*args, key=KEY, variance="small")
    # With eta = 1 DDIM is DDPM (DDIM, section 4.1).
    assert tree_allclose(out, small, 1e-5)


def test_learned_variance_spans_the_two_bounds():
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 10))
    x = images(1)[0]

    def network(value):
        return lambda x, t, cond: jnp.concatenate([x, jnp.full_like(x, value)])

    bounds: dict[float, dfn.Variance] = {-1.0: "small", 1.0: "large"}
    for value, variance in bounds.items():
        learned = dfn.ddpm_step(network(value), schedule, x, 5, None, key=KEY)
        fixed = dfn.ddpm_step(network(0.0), schedule, x, 5, None, key=KEY, variance=variance)
        assert tree_allclose(learned, fixed, 1e-6)


def test_sample_returns_what_is_asked_for():
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 5))
    network, noise = Pointwise(), images(1)[0]
    plain, with_x0 = (partial(dfn.ddpm_step, network, schedule, with_x0=w) for w in (False, True))
    run = partial(dfn.sample, schedule=schedule, noise=noise, cond=LABEL, key=KEY)
    x = run(plain)
    end, states = run(plain, trajectory=True)
    other, x0s = run(with_x0, has_aux=True)
    last, (states_too, x0s_too) = run(with_x0, has_aux=True, trajectory=True)
    assert all(tree_allclose(x, y, 1e-6) for y in (end, other, last, states[-1], x0s[-1]))
    assert tree_allclose((states, x0s), (states_too, x0s_too), 1e-6)
    assert states.shape == x0s.shape == (5, 1, 8, 8)
    # In the order of the steps: the first is the one from the last step of the schedule.
    key = jax.random.fold_in(KEY, 4)
    first = dfn.ddpm_step(network, schedule, noise, 4, LABEL, key=key, with_x0=True)
    assert tree_allclose(first, (states[0], x0s[0]), 1e-5)


def test_types_follow_what_is_asked_for():
    """Each `assert_type` is held by the type checker, the structures here."""
    schedule, x, network = dfn.Schedule(dfn.linear_betas(), (0, 500)), images(1)[0], Pointwise()

    def calls():
        next_x = partial(dfn.ddpm_step, network, schedule)
        both = partial(dfn.ddim_step, network, schedule, with_x0=True)
        assert_type(edt.guide(network, 2.0, 10), edt.Network)
        return [
            assert_type(next_x(x, 1, LABEL, key=KEY), jax.Array),
            assert_type(both(x, 1, LABEL, key=KEY), tuple[jax.Array, jax.Array]),
            assert_type(dfn.sample(next_x, schedule, x, LABEL, key=KEY), jax.Array),
            assert_type(
                dfn.sample(both, schedule, x, LABEL, key=KEY, has_aux=True),
                tuple[jax.Array, jax.Array],
            ),
            assert_type(
                dfn.sample(next_x, schedule, x, LABEL, key=KEY, trajectory=True),
                tuple[jax.Array, jax.Array],
            ),
            assert_type(
                dfn.sample(both, schedule, x, LABEL, key=KEY, has_aux=True, trajectory=True),
                tuple[jax.Array, tuple[jax.Array, jax.Array]],
            ),
        ]

    found = jax.tree.map(lambda a: len(a.shape), jax.eval_shape(calls))
    assert found == [3, (3, 3), 3, (3, 4), (3, 4), (3, (4, 4))]


def test_sample_in_low_precision():
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 5))
    step = partial(
        dfn.ddpm_step, edt.cast(tiny(hidden_size=8, depth=1, num_heads=2), jnp.bfloat16), schedule
    )
    x = dfn.sample(step, schedule, images(1)[0].astype(jnp.bfloat16), LABEL, key=KEY)
    assert x.dtype == jnp.bfloat16
    assert np.isfinite(x.astype(jnp.float32)).all()
    loss = dfn.hybrid_loss(Pointwise(), schedule, x, LABEL, key=KEY)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize(("eta", "draws"), [(0, False), (0.0, False), (0.5, True)])
def test_ddim_without_noise_draws_none(eta, draws):
    schedule, x = dfn.Schedule(dfn.linear_betas()), images(1)[0]
    network = lambda x, t, cond: 0.3 * x  # noqa: E731

    def step(eta, key):
        return dfn.ddim_step(network, schedule, x, 500, None, key=key, eta=eta)

    assert ("random_bits" in str(jax.make_jaxpr(lambda key: step(eta, key))(KEY))) == draws
    assert tree_allclose(step(eta, KEY), step(jnp.asarray(eta, jnp.float32), KEY))


def test_gradient_with_respect_to_eta_is_finite():
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 5))

    def total(eta, t):
        return dfn.ddim_step(Pointwise(), schedule, images(1)[0], t, LABEL, key=KEY, eta=eta).sum()

    for t in (0, 3):
        for eta in (0.0, 1.0):
            assert np.isfinite(jax.grad(total)(jnp.asarray(eta), t))


def test_zero_terminal_signal():
    """A last beta of 1 leaves nothing of x0: x0- and v-prediction can start there."""
    schedule = dfn.Schedule([0.1, 0.5, 1.0])
    x0, noise = images(2)
    assert tree_allclose(dfn.q_sample(schedule, x0, 2, noise), noise)
    for kind in ("x0", "v"):
        value = x0 if kind == "x0" else dfn.predict_v(schedule, x0, 2, noise)
        assert tree_allclose((x0, noise), dfn.x0_and_eps(schedule, noise, 2, value, kind), 1e-6)
        assert np.isfinite(dfn.min_snr_weight(schedule, 2, prediction=kind))
    assert dfn.min_snr_weight(schedule, 2) == 1


def test_sample_refuses_what_does_not_fit():
    full, short = dfn.Schedule(dfn.linear_betas()), dfn.Schedule(dfn.linear_betas(), (0, 500))
    x, network = images(1)[0], Pointwise()
    with pytest.raises(ValueError, match="a schedule of 1000 steps, but schedule has 2"):
        dfn.sample(partial(dfn.ddim_step, network, full), short, x, LABEL, key=KEY)
    plain, with_x0 = (partial(dfn.ddim_step, network, short, with_x0=w) for w in (False, True))
    pair = (x, x)
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (with_x0, x, {}, "has_aux=False, but the step returned .*pass has_aux=True"),
        (plain, x, {"has_aux": True}, "has_aux=True, but the step returned .*pass has_aux=False"),
        (_remembering, pair, {"has_aux": True}, "has_aux=True, but the step returned"),
        (lambda x, *_, key: {"x": x}, x, {}, "a step returns the next x"),
    ]
    for step, start, options, words in wrong:
        with pytest.raises(ValueError, match=words):
            dfn.sample(step, short, start, LABEL, key=KEY, **options)


def _remembering(state, t, cond, *, key):
    x, previous = state
    return x + previous + jnp.float32(t), x


@pytest.mark.parametrize("ascending", [False, True])
def test_a_state_may_be_a_pair(ascending):
    schedule = dfn.Schedule(dfn.linear_betas(), (0, 1, 2))
    run = partial(dfn.sample, schedule=schedule, cond=None, key=KEY, ascending=ascending)
    state, states = (jnp.ones(()), jnp.zeros(())), []
    for t in range(3) if ascending else reversed(range(3)):
        state = _remembering(state, float(t), None, key=KEY)
        states.append(state)
    start = (jnp.ones(()), jnp.zeros(()))
    assert run(_remembering, noise=start) == state
    end, found = run(_remembering, noise=start, trajectory=True)
    assert end == state
    assert tree_allclose(found, tuple(map(jnp.stack, zip(*states, strict=True))))
    collecting = lambda *args, key: (_remembering(*args, key=key), args[1])  # noqa: E731
    end, times = run(collecting, noise=start, has_aux=True)
    assert end == state
    assert times.tolist() == ([0, 1, 2] if ascending else [2, 1, 0])


def test_progress_is_reported_from_within_jit():
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 6))
    seen = []

    @jax.jit
    def run(network, noise):
        step = partial(dfn.ddim_step, network, schedule)
        draw = lambda x: dfn.sample(  # noqa: E731
            step, schedule, x, LABEL, key=KEY, progress=lambda i: seen.append(int(i))
        )
        return jax.vmap(draw)(noise)

    jax.block_until_ready(run(Pointwise(), images(3)))
    jax.effects_barrier()
    # Once a step, however many are drawn together.
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]


def test_the_step_at_which_nan_arose_is_named():
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 6))

    def network(x, t, cond):
        return jnp.where(t < schedule.time[cond], jnp.nan, x)

    def run(cond, **options):
        step = partial(dfn.ddim_step, network, schedule)
        return dfn.sample(step, schedule, images(1)[0], cond, key=KEY, **options)

    assert np.isnan(run(jnp.asarray(4))).all()
    with pytest.raises(Exception, match="not finite after the step at t=3"):
        jax.block_until_ready(eqx.filter_jit(run)(jnp.asarray(4), check_finite=True))
    assert tree_allclose(run(jnp.asarray(0)), run(jnp.asarray(0), check_finite=True), 1e-6)


def test_inversion_then_sampling_returns():
    """The error falls as 1/steps. Data are N(0, diag), the network is theirs."""
    full = dfn.Schedule(dfn.linear_betas())
    variance = jnp.asarray([0.25, 1.0, 4.0]).reshape(3, 1, 1)

    def network(x, t, cond):
        index = t.astype(jnp.int32)
        noise = full.sqrt_one_minus_alphas_cumprod[index]
        return noise * x / (full.alphas_cumprod[index] * variance + jnp.square(noise))

    x0 = jnp.sqrt(variance) * images(1, (3, 1, 1))[0]

    def error(steps):
        short = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, steps))
        inverse, forward = (
            partial(step, network, short) for step in (dfn.ddim_inversion_step, dfn.ddim_step)
        )
        latent = dfn.sample(inverse, short, x0, None, key=KEY, ascending=True)
        back = dfn.sample(forward, short, latent, None, key=KEY)
        # The latent is the noise that the exact flow gives: the data, whitened.
        return float(jnp.abs(back - x0).max()), float(
            jnp.abs(latent - x0 / jnp.sqrt(variance)).max()
        )

    returned, latent = np.transpose([error(steps) for steps in (10, 100, 1000)])
    assert returned[2] < 1e-2
    assert latent[2] < 2e-2
    assert (returned[:-1] / returned[1:] > 5).all()
    assert (returned[1] / returned[2]) < 20


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", range(0, 1000, 100)),
        ("trailing", range(99, 1000, 100)),
        ("linspace", [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
        ("fractional", [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
    ],
)
def test_spacings(spacing, expected):
    assert dfn.space_timesteps(1000, 10, spacing) == tuple(expected)
    assert dfn.space_timesteps(1000, 1000, spacing) == tuple(range(1000))
    for count in (1, 3, 7, 300, 999):
        kept = dfn.space_timesteps(1000, count, spacing)
        assert len(set(kept)) == count
        assert (np.diff(kept) > 0).all()
        assert (kept[-1] == 999) or spacing == "leading" or (count == 1 and spacing != "trailing")


@pytest.mark.parametrize("loss", [dfn.simple_loss, dfn.hybrid_loss])
def test_losses(loss):
    schedule, network, x0 = dfn.Schedule(dfn.linear_betas()), Pointwise(), images(1)[0]
    value = jax.jit(lambda n: loss(n, schedule, x0, LABEL, key=KEY))(network)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    assert tree_allclose(value, loss(network, schedule, x0, LABEL, key=KEY), 1e-5)
    assert value != loss(network, schedule, x0, LABEL, key=jax.random.key(6))
    low = loss(edt.cast(network, jnp.bfloat16), schedule, x0, LABEL, key=KEY)
    assert low.dtype == jnp.float32
    assert tree_allclose(value, low, 0.05)


def test_the_bound_teaches_the_variance_only():
    schedule = dfn.Schedule(dfn.linear_betas())
    x0, noise, eps, values = images(4)
    for t in (0, 500):
        xt = dfn.q_sample(schedule, x0, t, noise)

        def terms(eps, values, t=t, xt=xt):
            return dfn.hybrid_terms(schedule, jnp.concatenate([eps, values]), x0, xt, t, noise)

        mse, vb = (jax.grad(lambda e, v, i=i: terms(e, v)[i], (0, 1))(eps, values) for i in (0, 1))
        assert (mse[1] == 0).all()
        assert (vb[0] == 0).all()
        assert (np.abs(mse[0]) > 0).all()
        # At t = 0 some bins are certain, and certain of their certainty.
        assert (np.abs(vb[1]) > 0).mean() > (0.5 if t == 0 else 0.99)


def test_sample_is_the_loop_and_compiles_one_step():
    network = Pointwise()
    noise = images(1)[0]

    def run(schedule):
        return dfn.sample(
            partial(dfn.ddpm_step, network, schedule), schedule, noise, LABEL, key=KEY
        )

    short = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 4))
    x = noise
    for t in (3, 2, 1, 0):
        x = dfn.ddpm_step(network, short, x, t, LABEL, key=jax.random.fold_in(KEY, t))
    assert tree_allclose(run(short), x, 1e-5)

    def size(steps):
        schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, steps))
        return str(jax.make_jaxpr(run)(schedule)).count(" = ")

    assert size(4) == size(50)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dfn.linear_betas(20), ["steps=20", "21"]),
        (lambda: dfn.cosine_betas(0), ["steps=0"]),
        (lambda: dfn.Schedule([0.1, 0.0]), ["(0, 1]"]),
        (lambda: dfn.Schedule([0.1, 1.1]), ["(0, 1]"]),
        (lambda: dfn.Schedule([]), ["betas"]),
        (lambda: dfn.Schedule([1.0, 0.5]), ["below 1 before the last"]),
        (lambda: dfn.space_timesteps(1000, []), ["[]", "'10,15,20'"]),
        (lambda: dfn.space_timesteps(1000, "ddim50,10"), ["'ddim50,10'"]),
        (lambda: dfn.Schedule([0.1, 0.2], [1, 0]), ["keep=[1, 0]", "increasing"]),
        (lambda: dfn.Schedule([0.1, 0.2], [0, 2]), ["keep=[0, 2]", "2 steps"]),
        (lambda: dfn.space_timesteps(10, 11), ["spec=11", "11 of a section of 10"]),
        (lambda: dfn.space_timesteps(10, 0), ["spec=0"]),
        (lambda: dfn.space_timesteps(10, "six"), ["'six'", "'10,15,20'"]),
        (lambda: dfn.space_timesteps(10, "ddim"), ["'ddim'"]),
        (lambda: dfn.space_timesteps(1000, "ddim300"), ["'ddim300'", "stride"]),
        (lambda: dfn.space_timesteps(10, 5, UNKNOWN), ["'other'", "leading, trailing, linspace"]),
        (lambda: dfn.space_timesteps(10, 11, "leading"), ["11 of 10"]),
        (lambda: dfn.space_timesteps(10, "2,2", "leading"), ["sections"]),
        (lambda: dfn.space_timesteps(10, "ddim5", "leading"), ["'ddim5'", "'leading'"]),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range(eta):
    schedule, x = dfn.Schedule(dfn.linear_betas()), images(1)[0]
    with pytest.raises(ValueError, match=rf"eta={eta} must lie in \[0, 1\]"):
        dfn.ddim_step(Pointwise(), schedule, x, 5, LABEL, key=KEY, eta=eta)


def test_bad_networks_and_variances():
    schedule, x = dfn.Schedule(dfn.linear_betas()), images(1)[0]
    same = lambda x, t, cond: x  # noqa: E731
    with pytest.raises(ValueError, match=r"learn_sigma=True.*'small' or 'large'"):
        dfn.ddpm_step(same, schedule, x, 5, None, key=KEY)
    with pytest.raises(ValueError, match=r"'other' is unknown.*learned.*small.*large"):
        dfn.ddpm_step(same, schedule, x, 5, None, key=KEY, variance=UNKNOWN)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\).*1 channels, or 2"):
        dfn.ddim_step(lambda x, t, cond: jnp.ones((3, 8, 8)), schedule, x, 5, None, key=KEY)
    with pytest.raises(ValueError, match="learn_sigma=True"):
        dfn.hybrid_loss(same, schedule, x, None, key=KEY)
