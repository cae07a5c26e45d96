"""What a file or folder of published weights holds, whichever of the layouts it has."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from ..configs import Config
from ..nn.dit import DiT
from ..seams import StrPath
from . import diffusers, official
from .files import is_file
from .transformer import Arithmetic, Time, said


@dataclasses.dataclass(frozen=True)
class Published:
    """What a file or folder of weights holds: see [`equidit.pretrained.describe`][].

    **Fields:**

    - `config`: the network's sizes.
    - `sample_size`: height and width of the latents that it was made for, or `None` if the file
        does not tell.
    - `time`: `"steps"` if the network is told the time in diffusion steps, `"unit"` if in [0, 1],
        as SiT's are.
    - `kind`: `"official"` for a file, to be read by [`equidit.pretrained.load_dit`][]; or
        `"diffusers"` for a folder, by [`equidit.pretrained.load_diffusers_dit`][].
    """

    config: Config
    sample_size: int | None
    time: Time
    kind: Literal["official", "diffusers"]
    # No field: what is described is plain data, and compared as such.
    _network_of: ClassVar[Callable[[Arithmetic], DiT] | None] = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: a copy in another process cannot load itself."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def load(self, *, arithmetic: Arithmetic | None = None) -> DiT:
        """The network, from what `describe` has open: nothing is looked up or parsed again.

        **Arguments:**

        - `arithmetic`: as for [`equidit.pretrained.load_dit`][] or
            [`equidit.pretrained.load_diffusers_dit`][]; `None` is `"official"` for a file.

        **Returns:**

        The network, with float32 weights; of a network and its average, the average.

        **Raises:**

        As those functions do; `ValueError` for one that `describe` did not return, or that was
        pickled since.
        """
        if self._network_of is None:
            raise ValueError("only what describe returns can load itself: call describe(path)")
        if arithmetic is None and self.kind == "official":
            arithmetic = "official"
        return self._network_of(said(arithmetic))


def describe(
    path: StrPath, *, num_heads: int | None = None, select: str | None = None
) -> Published:
    """What a file or folder with a DiT holds, from its headers and config: no weights are read.

    From the hub, though, it is the whole file that is downloaded, and kept.

    **Arguments:**

    - `path`: a file for [`equidit.pretrained.load_dit`][], or a folder for
        [`equidit.pretrained.load_diffusers_dit`][]. A SiT is told by the model's name in the file's
        own arguments, or else by a file name that begins with `SiT`.
    - `num_heads`, `select`: as for `load_dit`. A folder's config has its own heads, and there is
        nothing to select.

    **Returns:**

    What it holds.

    **Raises:**

    As those functions do for damaged files and other networks, as far as names and shapes tell;
    `ValueError` if a folder's config has another `num_heads`, or one is to be selected from.
    """
    if is_file(path):
        kind, opened = "official", official.open_file(path, num_heads=num_heads, select=select)
        network_of = partial(official.network_of, opened)
    else:
        if select is not None:
            raise ValueError(f"select={select!r} is for a file: the folder {path} has one network")
        kind, opened = "diffusers", diffusers.open_dit(path)
        if num_heads not in (None, heads := opened.config.num_heads):
            raise ValueError(f"num_heads={num_heads}, but {opened.weights.source} has {heads}")
        network_of = partial(diffusers.network_of, opened)
    published = Published(opened.config, opened.sample_size, opened.time, kind)
    object.__setattr__(published, "_network_of", network_of)
    return published
