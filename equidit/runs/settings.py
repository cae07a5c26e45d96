"""What a run computes: all of its config.json, with the defaults for each kind of data."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax

from .._base.common import check_positive
from .._base.texts import check_choice
from ..configs import CONFIGS, Config
from ..seams import PRNGKey

SCHEDULE_STEPS = 1000
MODELS = {"tiny": Config(2, 64, 4, 4)} | CONFIGS


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes. The defaults are for the digits."""

    data: str = "digits"
    """What to train on: "digits", the handwritten digits that ship with scikit-learn; "folder:DIR",
    pictures in one folder a class; or "latents:DIR", what `equidit encode` made."""
    model: str = "tiny"
    """"tiny" (width 64, depth 4), or one of the paper's, "DiT-S/8" to "DiT-XL/2"."""
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
    hidden_size: int | None = None
    """Size of a token, if not the model's."""
    depth: int | None = None
    """Number of blocks, if not the model's."""
    num_heads: int | None = None
    """Attention heads of a block, if not the model's."""
    patch_size: int | None = None
    """Side of a patch, if not the model's."""
    block: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = "adaln-zero"
    """How blocks are conditioned: the paper's four designs."""
    size: int = 256
    """Side that the pictures of a folder are cut to, in pixels."""
    small: Literal["refuse", "enlarge"] = "refuse"
    """What to do with pictures of a folder that are smaller."""
    skip_corrupt: bool = False
    """Count damaged pictures, and take the next in their place, rather than stop."""
    held_out: int = 256
    """Examples of a folder or of latents that are kept for validation; of the digits it is 360."""
    vae: str | None = None
    """Folder of the latents' autoencoder, or its name on the Hugging Face hub: to see pictures."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in during training; the state is always float32."""
    sharding: Literal["replicated", "zero1", "fsdp"] = "replicated"
    """What each device holds: all of the state, a part of optimizer and EMA, a part of all."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again, to save memory: nothing, all but products, or all."""
    accumulate: int = 1
    """Micro-batches a step."""
    max_grad_norm: float | None = None
    """The gradient is scaled down to this norm; by default never."""
    max_skipped: int = 10
    """Steps in a row with a loss or gradient that is not finite, before the run is stopped. None of
    them touches the weights."""
    workers: int = 0
    """Processes that read data; with 0 it is read in threads."""
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
    keep_last: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept for ever."""
    save_errors: Literal["stop", "warn"] = "stop"
    """What a checkpoint that cannot be written does to the run."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Settings):
            value = getattr(self, field.name)
            if type(value) is int and field.name not in ("seed", "workers", "held_out"):
                check_positive(**{field.name: value})
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}={value} must be finite")
        for name in ("seed", "workers", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("learning_rate", "max_grad_norm"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.sampling_steps > SCHEDULE_STEPS:
            raise ValueError(
                f"sampling_steps={self.sampling_steps} must be at most {SCHEDULE_STEPS}, the "
                "steps of the schedule"
            )
        check_choice("model", self.model, MODELS)
        kind, path = self.source
        if kind not in ("digits", "folder", "latents") or (path is None) != (kind == "digits"):
            raise ValueError(f"data={self.data!r} must be digits, folder:DIR or latents:DIR")

    @property
    def source(self) -> tuple[str, Path | None]:
        """The kind of data, and where they lie."""
        kind, _, path = self.data.partition(":")
        return kind, Path(path) if path else None

    def record(self) -> dict[str, Any]:
        """As plain data, without what a subclass adds."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}

    def network(self, in_channels: int, num_classes: int) -> Config:
        """The network's configuration."""
        sizes = {
            name: value
            for name in ("hidden_size", "depth", "num_heads", "patch_size")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(
            MODELS[self.model],
            **sizes,
            in_channels=in_channels,
            num_classes=num_classes,
            block=self.block,
            remat=self.remat,
        )

    def key(self, purpose: int) -> PRNGKey:
        """One of the run's keys: 0 initialises, 1 trains, 2 validates, 3 samples."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)


PAPER: dict[str, Any] = {
    "model": "DiT-XL/2",
    "steps": 400_000,
    "batch_size": 256,
    "learning_rate": 1e-4,
    "ema_decay": 0.9999,
    "log_every": 100,
    "sample_every": 10_000,
    "guidance_scale": 4.0,
    "workers": 2,
}
"""The paper's recipe, section 4: the defaults for folders and latents."""


def defaults(data: str) -> dict[str, Any]:
    """What differs from the defaults of `Settings`, by the kind of data."""
    return {} if data == "digits" else PAPER
