"""A training run in a folder: what it computes, what it writes, and how it goes on."""

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from . import __version__, _report, checkpoint, diffusion as dfn
from ._common import check_positive, extra
from ._sampling import Sampling, draw
from ._types import Loss, Network
from .configs import Config, build
from .data import DIGITS_CLASSES, DIGITS_SHAPE, Images, batch_indices, check_labels, digits
from .guidance import drop_label
from .train import TrainState, ema_warmup, init_state, make_train_step

with extra("train"):
    from tqdm import tqdm

SCHEDULE_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes: all of its config.json."""

    steps: int = 4000
    """Number of training steps."""
    batch_size: int = 64
    """Images a step, over all devices."""
    learning_rate: float = 2e-3
    """Adam's, constant."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null label, for guidance."""
    ema_decay: float = 0.995
    """Of the moving average that is sampled from; warmed up as min(decay, (1 + n) / (10 + n))."""
    hidden_size: int = 64
    """Size of a token."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads of a block."""
    patch_size: int = 2
    """Side of a patch, in pixels."""
    block: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = "adaln-zero"
    """How blocks are conditioned: the paper's four designs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in during training; the state is always float32."""
    accumulate: int = 1
    """Micro-batches a step."""
    seed: int = 0
    """Of initialisation, data order, noise and samples."""
    guidance_scale: float = 1.5
    """Scale of classifier-free guidance in the pictures and the report."""
    sampling_steps: int = 50
    """DDIM steps of the pictures and the report."""
    log_every: int = 50
    """Training steps between rows of metrics.jsonl."""
    sample_every: int = 500
    """Training steps between validations, pictures and checkpoints."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Settings):
            value = getattr(self, field.name)
            if field.type is int and field.name != "seed":
                check_positive(**{field.name: value})
            if field.type is float and not math.isfinite(value):
                raise ValueError(f"{field.name}={value} must be finite")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")
        for name, end in (("label_dropout", 1.0), ("ema_decay", 1.0)):
            if not 0 <= getattr(self, name) <= end:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.sampling_steps > SCHEDULE_STEPS:
            raise ValueError(
                f"sampling_steps={self.sampling_steps} must be at most {SCHEDULE_STEPS}, the "
                "steps of the schedule"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")

    def record(self) -> dict[str, Any]:
        """As plain data, without what a subclass adds."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}

    @property
    def network(self) -> Config:
        """The network's configuration."""
        return Config(
            self.patch_size,
            self.hidden_size,
            self.depth,
            self.num_heads,
            in_channels=DIGITS_SHAPE[0],
            num_classes=DIGITS_CLASSES,
            block=self.block,
        )

    def key(self, purpose: int) -> PRNGKeyArray:
        """One of the run's keys: 0 initialises, 1 trains, 2 validates, 3 samples."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The files of a run."""

    path: Path

    config = property(lambda self: self.path / "config.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    checkpoint = property(lambda self: self.path / "checkpoint.npz")
    samples = property(lambda self: self.path / "samples.png")
    loss = property(lambda self: self.path / "loss.png")
    report = property(lambda self: self.path / "report.json")

    def check(self, *, overwrite: bool) -> None:
        """`FileExistsError` if a new run may not be put here."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} exists and is no folder: choose another --out")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not self.config.exists():
                raise FileExistsError(f"{self.path} holds other things: choose another --out")
            if not overwrite:
                raise FileExistsError(
                    f"{self.path} holds a run: go on with it (--resume), start over (--overwrite), "
                    "or choose another --out"
                )

    def begin(self, settings: Settings, step: int) -> None:
        """Makes the folder ready for training from `step` on; from 0, what was there goes."""
        self.path.mkdir(parents=True, exist_ok=True)
        if step == 0:
            for file in (self.metrics, self.checkpoint, self.samples, self.loss, self.report):
                file.unlink(missing_ok=True)
        record = {"equidit": __version__, "data": "digits", "settings": settings.record()}
        checkpoint.replace(self.config, json.dumps(record, indent=2) + "\n")
        # Rows beyond a checkpoint belong to steps that will be made again.
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        checkpoint.replace(self.metrics, "".join(kept))

    def settings(self) -> Settings:
        """The settings of the run that is there."""
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} is no run: it has no config.json")
        try:
            return Settings(**json.loads(self.config.read_text())["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.config} is damaged or of another version: {error}") from error

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, less a last one that was cut short."""
        rows = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """The paper's: Adam without weight decay, warm-up or clipping."""
    return optax.adam(settings.learning_rate)


def restore(folder: Folder, settings: Settings) -> TrainState:
    """The state of the run's checkpoint. No weight is initialised on the way."""

    def new() -> TrainState:
        network = build(settings.network, key=jax.random.key(0))
        return init_state(network, optimizer(settings))

    return checkpoint.restore(folder.checkpoint, eqx.filter_eval_shape(new))


def hybrid_loss(schedule: dfn.Schedule, label_dropout: float) -> Loss:
    """The paper's objective: the hybrid loss, with labels dropped now and then."""

    def loss(network: Network, example: Images, key: PRNGKeyArray) -> Float[Array, ""]:
        drop_key, diffusion_key = jax.random.split(key)
        label = drop_label(example.label, DIGITS_CLASSES, label_dropout, key=drop_key)
        image = jnp.asarray(example.image)
        return dfn.hybrid_loss(network, schedule, image, label, key=diffusion_key)

    return loss


@eqx.filter_jit
def validate(
    network: Network, schedule: dfn.Schedule, images: PyTree, key: PRNGKeyArray
) -> Float[Array, " quartiles"]:
    """Mean hybrid loss over `images` at one fixed step from each quartile of the schedule."""

    def terms(image: Array, label: Array, key: PRNGKeyArray) -> Float[Array, " quartiles"]:
        step_key, noise_key = jax.random.split(key)
        quarter = schedule.steps // 4
        t = jax.random.randint(step_key, (4,), 0, quarter) + quarter * jnp.arange(4)
        noise = jax.random.normal(noise_key, (4, *image.shape))

        def term(t: Array, noise: Array) -> Float[Array, ""]:
            return dfn.hybrid_loss(network, schedule, image, label, key=key, t=t, noise=noise)

        return jax.vmap(term)(t, noise)

    keys = jax.random.split(key, images.label.shape[0])
    return jax.vmap(terms)(images.image, images.label, keys).mean(axis=0)


def validation(settings: Settings, state: TrainState, held_out: Images) -> dict[str, Any]:
    """The row of metrics.jsonl for a state: its EMA's loss on the held-out images."""
    schedule = dfn.Schedule(dfn.linear_betas(SCHEDULE_STEPS))
    quartiles = np.asarray(validate(state.ema, schedule, held_out, settings.key(2)))
    return {
        "step": int(state.step),
        "validation_loss": float(quartiles.mean()),
        "validation_loss_by_quartile": quartiles.tolist(),
    }


class Interrupts:
    """Within `with`, the first Ctrl-C only sets `requested`; the second acts as usual."""

    requested = False

    def __enter__(self) -> "Interrupts":
        self.previous = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.previous)


def train(
    settings: Settings,
    folder: Folder,
    *,
    resume: bool,
    overwrite: bool,
    given: Collection[str] = (),
) -> bool:
    """Trains to the end, or to the first Ctrl-C: whether it got to the end.

    A run that is resumed keeps its saved settings; `given` names those of `settings` that were
    asked for nevertheless.

    **Raises:**

    `FileExistsError` for a folder that holds a run, unless told what to do with it; `ValueError`
    for settings that do not fit each other, the devices, or the run to go on with.
    """
    if resume:
        settings = _merge(settings, folder.settings(), given)
        state = restore(folder, settings)
        if int(state.step) > settings.steps:
            raise ValueError(
                f"{folder.path} is at step {state.step}, beyond steps={settings.steps}"
            )
    else:
        folder.check(overwrite=overwrite)
        state = init_state(build(settings.network, key=settings.key(0)), optimizer(settings))
    train_set, held_out = digits()
    check_labels(train_set.label, DIGITS_CLASSES)
    schedule = dfn.Schedule(dfn.linear_betas(SCHEDULE_STEPS))
    step_fn = _train_step(settings, schedule)

    def batch(step: int) -> Images:
        index = batch_indices(step, settings.batch_size, len(train_set.label), seed=settings.seed)
        return Images(train_set.image[index], train_set.label[index])

    if not resume:
        # Settings that do not fit the devices or each other fail here, before anything is written.
        jax.eval_shape(step_fn, state, batch(0), settings.key(1))
    folder.begin(settings, int(state.step))
    clock = _Throughput(settings.batch_size)
    start = int(state.step)
    with Interrupts() as interrupts, tqdm(total=settings.steps, initial=start, unit="step") as bar:
        for done in range(start + 1, settings.steps + 1):
            state, metrics = step_fn(state, batch(done - 1), settings.key(1))
            clock.count += 1
            bar.update()
            stop = interrupts.requested or done == settings.steps
            save = stop or done % settings.sample_every == 0
            if save or done % settings.log_every == 0:
                row = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
                row["images_per_second"] = clock.rate()
                bar.set_postfix_str(
                    f"loss {row['loss']:.3f}, gradient norm {row['grad_norm']:.3f}, "
                    f"{row['images_per_second']:.0f} images/s"
                )
                if not math.isfinite(row["loss"] + row["grad_norm"]):
                    raise ArithmeticError(
                        f"the loss is {row['loss']} and the gradient norm {row['grad_norm']} at "
                        f"step {done}: try a lower --learning-rate; the last checkpoint, if there "
                        f"is one, is {folder.checkpoint}"
                    )
                folder.append({"step": done} | row)
            if save:
                # The checkpoint last: rows beyond it are dropped when the run goes on.
                folder.append(validation(settings, state, held_out))
                checkpoint.save(folder.checkpoint, state)
                _report.loss_curve(folder.loss, folder.rows())
                if not stop:
                    images = sample(settings, state.ema, np.arange(100) // 10)
                    _report.grid(folder.samples, images.reshape(10, 10, *DIGITS_SHAPE), range(10))
                clock.restart()
            if stop:
                break
    return int(state.step) == settings.steps


def _train_step(settings: Settings, schedule: dfn.Schedule) -> Any:
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return make_train_step(
        hybrid_loss(schedule, settings.label_dropout),
        optimizer(settings),
        ema_decay=ema_warmup(settings.ema_decay),
        dtype=None if settings.dtype == "float32" else jnp.dtype(settings.dtype),
        mesh=mesh if devices > 1 else None,
        accumulate=settings.accumulate,
    )


class _Throughput:
    """Images a second since the last reading, time spent on other work left out."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.count, self.since = 0, time.perf_counter()

    def rate(self) -> float:
        rate = self.count * self.batch_size / (time.perf_counter() - self.since)
        self.restart()
        return rate


def sample(settings: Settings, network: Network, labels: np.ndarray) -> np.ndarray:
    """Draws from a run's network by the run's settings, one image a label."""
    sampling = Sampling(
        network,
        dfn.Schedule(
            dfn.linear_betas(SCHEDULE_STEPS),
            dfn.space_timesteps(SCHEDULE_STEPS, settings.sampling_steps),
        ),
        null=DIGITS_CLASSES,
        guidance_scale=settings.guidance_scale,
        sampler="ddim",
        shape=DIGITS_SHAPE,
        key=settings.key(3),
    )
    return draw(sampling, labels)


def report(folder: Folder, *, samples: int = 500) -> dict[str, Any]:
    """Draws from a finished run; writes samples.png and report.json and returns the latter."""
    settings = folder.settings()
    label = np.arange(samples, dtype=np.int32) % DIGITS_CLASSES
    state = restore(folder, settings)
    image = sample(settings, state.ema, label)
    first = image[: 10 * DIGITS_CLASSES].reshape(10, DIGITS_CLASSES, *DIGITS_SHAPE)
    _report.grid(folder.samples, first.swapaxes(0, 1), range(DIGITS_CLASSES))
    train_set, held_out = digits()
    figures = validation(settings, state, held_out)
    figures |= _report.quality(Images(image, label), train_set, held_out)
    folder.report.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _merge(settings: Settings, saved: Settings, given: Collection[str]) -> Settings:
    """The saved settings, with what may change in mid-run as given."""
    changed = {
        name: getattr(settings, name)
        for name in settings.record().keys() & set(given)
        if getattr(settings, name) != getattr(saved, name)
    }
    if fixed := changed.keys() - {"steps", "log_every", "sample_every"}:
        listed = ", ".join(f"{n}={changed[n]} (was {getattr(saved, n)})" for n in sorted(fixed))
        raise ValueError(f"a run goes on with its own settings; these differ: {listed}")
    return dataclasses.replace(saved, **changed)
