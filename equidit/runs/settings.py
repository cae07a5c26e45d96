"""What a run computes: all of its config.json, with the defaults for each kind of data."""

import dataclasses
import math
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import jax

from .._base.common import check_positive
from .._base.records import differences
from ..configs import CONFIGS, Config
from ..data import Small
from ..nn.stack import Remat
from ..seams import PRNGKey
from ..train import Sharding
from .kinds import KINDS, Kind
from .process import SCHEDULE_STEPS, Diffusion, Process

Model = Literal[
    "tiny",
    "DiT-S/8",
    "DiT-S/4",
    "DiT-S/2",
    "DiT-B/8",
    "DiT-B/4",
    "DiT-B/2",
    "DiT-L/8",
    "DiT-L/4",
    "DiT-L/2",
    "DiT-XL/8",
    "DiT-XL/4",
    "DiT-XL/2",
]
MODELS = {"tiny": Config(2, 64, 4, 4)} | CONFIGS


Purpose = Literal["init", "train", "validate", "sample"]
"""What a run draws at random; each has a key of its own."""
# Folded into the seed: another number is another run.
_PURPOSES: dict[Purpose, int] = {"init": 0, "train": 1, "validate": 2, "sample": 3}


# Whether a setting may be another when a run goes on; one that may not makes it what it is.
_FREE = {"may_change": True}
_FIXED = {"may_change": False}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes. The defaults are for the digits."""

    data: str = field(default="digits", metadata=_FREE)
    """What to train on: "digits", the handwritten digits that ship with scikit-learn; "folder:DIR",
    pictures in one folder a class; or "latents:DIR", what `equidit encode` made."""
    model: Model = field(default="tiny", metadata=_FIXED)
    """"tiny" (width 64, depth 4), or one of the paper's, "DiT-S/8" to "DiT-XL/2"."""
    steps: int = field(default=4000, metadata=_FREE)
    """Number of training steps."""
    batch_size: int = field(default=64, metadata=_FIXED)
    """Images a step, over all devices."""
    learning_rate: float = field(default=2e-3, metadata=_FIXED)
    """Adam's, constant."""
    label_dropout: float = field(default=0.1, metadata=_FIXED)
    """Share of labels replaced by the null label, for guidance."""
    ema_decay: float = field(default=0.995, metadata=_FIXED)
    """Of the moving average that is sampled from; warmed up as min(decay, (1 + n) / (10 + n))."""
    hidden_size: int | None = field(default=None, metadata=_FIXED)
    """Size of a token, if not the model's."""
    depth: int | None = field(default=None, metadata=_FIXED)
    """Number of blocks, if not the model's."""
    num_heads: int | None = field(default=None, metadata=_FIXED)
    """Attention heads of a block, if not the model's."""
    patch_size: int | None = field(default=None, metadata=_FIXED)
    """Side of a patch, if not the model's."""
    block: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = field(
        default="adaln-zero", metadata=_FIXED
    )
    """How blocks are conditioned: the paper's four designs."""
    size: int = field(default=256, metadata=_FIXED)
    """Side that the pictures of a folder are cut to, in pixels."""
    small: Small = field(default="refuse", metadata=_FIXED)
    """What to do with pictures of a folder that are smaller."""
    skip_corrupt: bool = field(default=False, metadata=_FIXED)
    """Count damaged pictures, and take the next in their place, rather than stop."""
    held_out: int = field(default=256, metadata=_FIXED)
    """Examples of a folder or of latents that are kept for validation; of the digits it is 360."""
    vae: str | None = field(default=None, metadata=_FREE)
    """Folder of the latents' autoencoder, or its name on the Hugging Face hub: to see pictures."""
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=_FIXED)
    """What the network computes in during training; the state is always float32."""
    sharding: Sharding = field(default="replicated", metadata=_FREE)
    """What each device holds: all of the state, a part of optimizer and EMA, a part of all."""
    remat: Remat = field(default="none", metadata=_FREE)
    """What the backward pass computes again, to save memory: nothing, all but products, or all."""
    accumulate: int = field(default=1, metadata=_FIXED)
    """Micro-batches a step."""
    max_grad_norm: float | None = field(default=None, metadata=_FIXED)
    """The gradient is scaled down to this norm; by default never."""
    max_skipped: int = field(default=10, metadata=_FREE)
    """Steps in a row with a loss or gradient that is not finite, before the run is stopped. None of
    them touches the weights."""
    workers: int = field(default=0, metadata=_FREE)
    """Processes that read data; with 0 it is read in threads."""
    seed: int = field(default=0, metadata=_FIXED)
    """Of initialisation, data order, noise and samples."""
    guidance_scale: float = field(default=1.5, metadata=_FREE)
    """Scale of classifier-free guidance in the pictures and the report."""
    sampling_steps: int = field(default=50, metadata=_FREE)
    """DDIM steps of the pictures and the report."""
    report_samples: int = field(default=500, metadata=_FREE)
    """How many samples of the digits the report's figures are of."""
    log_every: int = field(default=50, metadata=_FREE)
    """Training steps between rows of metrics.jsonl."""
    sample_every: int = field(default=500, metadata=_FREE)
    """Training steps between validations, pictures and checkpoints."""
    keep_last: int = field(default=2, metadata=_FREE)
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = field(default=None, metadata=_FREE)
    """Checkpoints of steps that this divides are kept for ever."""
    save_errors: Literal["stop", "warn"] = field(default="stop", metadata=_FREE)
    """What a checkpoint that cannot be written does to the run."""

    def __post_init__(self) -> None:
        for name, value in self.record().items():
            if type(value) is int and name not in ("seed", "workers", "held_out"):
                check_positive(**{name: value})
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be finite")
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
        name, path = self.source
        if name not in KINDS or (path is not None) != KINDS[name].has_path:
            known = [f"{name}:DIR" if kind.has_path else name for name, kind in KINDS.items()]
            raise ValueError(f"data={self.data!r} must be one of {', '.join(known)}")

    @property
    def source(self) -> tuple[str, Path | None]:
        """The kind of data, and where they lie."""
        kind, _, path = self.data.partition(":")
        return kind, Path(path) if path else None

    @property
    def kind(self) -> Kind:
        """What the kind of data means for the run."""
        return KINDS[self.source[0]]

    @property
    def process(self) -> Process:
        """What the run minimises, and how its samples are drawn."""
        return Diffusion()

    def record(self) -> dict[str, Any]:
        """As plain data, without what a subclass adds."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)}

    def fixed(self) -> dict[str, Any]:
        """Those that make a run what it is."""
        fields = dataclasses.fields(Settings)
        return {f.name: getattr(self, f.name) for f in fields if not f.metadata["may_change"]}

    def check_resumes(self, saved: "Settings") -> None:
        """`ValueError` naming what may not differ from the settings of a run to go on with."""
        if differ := differences(self.fixed(), saved.fixed()):
            raise ValueError(f"a run goes on with its own settings; these differ: {differ}")

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

    def key(self, purpose: Purpose) -> PRNGKey:
        """The run's key for a purpose."""
        return jax.random.fold_in(jax.random.key(self.seed), _PURPOSES[purpose])


def defaults(data: str) -> dict[str, Any]:
    """What differs from the defaults of `Settings`, by the kind of data."""
    kind = KINDS.get(data.partition(":")[0])
    return {} if kind is None else dict(kind.recipe)
