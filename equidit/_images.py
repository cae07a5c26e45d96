"""Folders of pictures, one subfolder a class, and how a picture becomes a square of pixels."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer, UInt8

from ._common import extra

Small = Literal["refuse", "enlarge"]
"""What to do with a picture that is too small."""
# What Pillow lists, but cannot read by itself, or what holds measurements rather than a picture.
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class ImageError(ValueError):
    """A picture that cannot be used.

    **Fields:**

    - `damaged`: whether it cannot be read at all, rather than being of the wrong size or kind.
    """

    def __init__(self, message: str, *, damaged: bool = False):
        """**Arguments:**

        - `message`: what is wrong, naming the file.
        - `damaged`: see above.
        """
        super().__init__(message)
        self.damaged = damaged


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder in their order: by class, then by name.

    **Fields:**

    - `root`: the folder.
    - `classes`: names of the subfolders, sorted: label 0 is the first.
    - `files`: the pictures below them, as paths from `root`.
    - `label`: each one's class.
    - `ignored`: number of other files.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    label: Integer[np.ndarray, " batch"]
    ignored: int


def image_folder(root: Path) -> ImageFolder:
    """Lists a folder of class folders. Hidden files are left out.

    **Arguments:**

    - `root`: the folder; its subfolders are the classes, at any depth below them lie pictures.

    **Returns:**

    The list. No picture is opened.

    **Raises:**

    `FileNotFoundError` if there is none; `ValueError` if it has no class folders, or one of them no
    pictures (`.jpg`, `.png`, `.webp`, `.bmp`, `.tif`).
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not folders:
        raise ValueError(
            f"{root} has no class folders: put the pictures into {root / 'NAME'}, one folder "
            "a class"
        )
    files, label, ignored = [], [], 0
    for number, folder in enumerate(folders):
        found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name[0] != "."]
        pictures = [p for p in found if p.suffix.lower() in _SUFFIXES]
        if not pictures:
            raise ValueError(
                f"{folder} holds no pictures ({', '.join(sorted(_SUFFIXES))}): fill it or remove it"
            )
        files += [path.relative_to(root).as_posix() for path in pictures]
        label += [number] * len(pictures)
        ignored += len(found) - len(pictures)
    names = tuple(folder.name for folder in folders)
    return ImageFolder(root, names, tuple(files), np.asarray(label, np.int32), ignored)


def read_image(
    path: Path, size: int, *, small: Small = "refuse"
) -> UInt8[np.ndarray, "channels height width"]:
    """A picture as a square in colour: the middle of it, scaled so that its shorter side fits.

    It is halved by box averages while at least twice too large, then scaled bicubically, then cut,
    as in the data preparation of ADM. Grey pictures and palettes become colours, 16-bit grey is
    scaled to 8 bits, transparent parts are laid on white, and a camera's orientation is followed.

    **Arguments:**

    - `path`: of the picture.
    - `size`: side of the square, in pixels.
    - `small`: whether to `"refuse"` a picture whose shorter side is below `size`, or to
        `"enlarge"` it, as ADM does.

    **Returns:**

    Red, green and blue, 0 to 255, of `size` rows and columns.

    **Raises:**

    [`equidit.data.ImageError`][], naming the file, if it is no picture, damaged, too small, or of
    more than 16 bits a channel.

    ??? cite

        [Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233), section 5.
    """
    with extra("train"):
        from PIL import Image, ImageOps
    try:
        # From memory, where a reader that asks for what a chunk claims gets what there is.
        content = io.BytesIO(path.read_bytes())
        with Image.open(content, formats=_formats()) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:
        raise ImageError(
            f"{path} is no picture, or damaged: {_said(error)}", damaged=True
        ) from error
    image = _in_colour(image, path)
    if min(image.size) < size and small == "refuse":
        raise ImageError(
            f"{path} has {image.width}x{image.height} pixels, less than {size}x{size}: take a "
            "smaller --size, remove it, or have such pictures enlarged (--small enlarge)"
        )
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ImageError(
            f"{path} of {image.width}x{image.height} would become {width}x{height}, more pixels "
            "than Pillow's limit, before the middle is cut out: remove it"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    square = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _said(error: Exception) -> str:
    """What Pillow says, without the name of an object."""
    return str(error).partition(" <")[0]


def _formats() -> tuple[str, ...]:
    """Those that are opened, whatever a file is called: of others Pillow starts programs."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NO_PICTURES)


def _in_colour(image, path: Path):
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        # PIL would cut these off at 255 rather than scale them.
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path} has more than 16 bits a channel: convert it to 8 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError(f"{path} has floating-point pixels: convert it to 8 bits")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{path} is damaged: {error}", damaged=True) from error
