"""`equidit encode`."""

import dataclasses
from pathlib import Path

from .. import pretrained
from ..data.images import Small, image_folder, left_out
from .encoding import Dtype, encode


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encode a folder of pictures into a cache of latents that training reads.

    Pictures lie in one folder a class. Of each the middle square is taken, as it is and mirrored,
    and the mean and standard deviation of its latent are kept. Where the command was interrupted,
    it goes on if it is given again.
    """

    images: Path
    """Folder of the class folders."""
    vae: str
    """Folder of the autoencoder, or its name on the Hugging Face hub."""
    out: Path
    """Folder of the latents."""
    size: int = 256
    """Side of the pictures, in pixels."""
    small: Small = "refuse"
    """What to do with pictures that are smaller."""
    skip_corrupt: bool = False
    """Count damaged pictures rather than stop at the first."""
    dtype: Dtype = "float32"
    """Of the latents on disk; float16 halves them."""
    batch_size: int = 8
    """Pictures at a time on a device."""
    overwrite: bool = False
    """Replace the latents that are there."""


def encode_command(command: Encode) -> None:
    folder = image_folder(command.images)
    skipped = encode(
        pretrained.load_vae(command.vae),
        folder,
        command.out,
        size=command.size,
        small=command.small,
        skip_corrupt=command.skip_corrupt,
        dtype=command.dtype,
        batch_size=command.batch_size,
        overwrite=command.overwrite,
    )
    print(f"{len(folder.files) - len(skipped)} pictures of {len(folder.classes)} classes")
    if skipped:
        print(f"{len(skipped)} damaged ones were skipped: {', '.join(skipped[:5])}")
    if folder.ignored:
        print(left_out(folder))
    print(command.out)
