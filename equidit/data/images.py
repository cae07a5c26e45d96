"""Folders of pictures, one subfolder a class, and how a picture becomes a square of pixels."""

import collections
import dataclasses
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer, UInt8

from .._base.common import check_positive, extra
from ..seams import StrPath

Small = Literal["refuse", "enlarge"]
"""What to do with a picture that is too small."""
# What Pillow lists, but cannot read by itself, or what holds measurements rather than a picture.
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# What Pillow may have been built without.
_FEATURES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}
_SPLITS = {"dev", "eval", "test", "testing", "train", "training", "val", "valid", "validation"}


class ImageError(ValueError):
    """A picture that cannot be used.

    **Fields:**

    - `damaged`: whether its bytes are no picture, rather than one of the wrong size or kind, or one
        that could not be read for now.
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
    - `ignored`: how many other things were left out.
    - `kinds`: how many of each kind: a suffix such as `".txt"`, or
        `"without suffix"`, `"hidden"`, `"broken link"`, `"link to a folder around it"`,
        `"no file"`, `"picture beside the class folders"`.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    label: Integer[np.ndarray, " batch"]
    ignored: int
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)


def image_folder(root: StrPath) -> ImageFolder:
    """Lists a folder of class folders. What is left out is counted.

    **Arguments:**

    - `root`: the folder; its subfolders are the classes, at any depth below them lie pictures.
        Links are followed, to files and to folders.

    **Returns:**

    The list: all files whose suffix Pillow knows as a picture's that it reads. None is opened.

    **Raises:**

    `FileNotFoundError` if there is none; `ValueError` if it has no class folders, one of them has
    no pictures, or they seem to be no classes: the splits of a data set (`train`, `val`), or one
    folder of several; `OSError` for a folder that cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    suffixes = _suffixes()
    names, kinds = [], collections.Counter[str]()
    for entry in os.scandir(root):
        kind = _kind(entry, suffixes)
        if kind == "folder":
            names.append(entry.name)
        else:
            kinds[kind or "picture beside the class folders"] += 1
    if not names:
        raise ValueError(
            f"{root} has no class folders: put the pictures into {root / 'NAME'}, one folder "
            "a class, or one for all"
        )
    files, label = [], []
    for number, name in enumerate(sorted(names)):
        pictures = []
        for parts, kind in _below(root, (name,), suffixes, (os.stat(root),)):
            if kind is None:
                pictures.append(parts)
            else:
                kinds[kind] += 1
        if not pictures:
            raise ValueError(
                f"{root / name} holds no pictures (such as .jpg, .png, .webp): fill it or remove it"
            )
        files += sorted(pictures)
        label += [number] * len(pictures)
    _check_classes(root, files)
    return ImageFolder(
        root,
        tuple(sorted(names)),
        tuple(map("/".join, files)),
        np.asarray(label, np.int32),
        kinds.total(),
        dict(sorted(kinds.items())),
    )


def left_out(folder: ImageFolder) -> str:
    """What a folder has beside the pictures that are read, in a line; empty if nothing."""
    counts = ", ".join(f"{count} {kind}" for kind, count in folder.kinds.items())
    return f"left out of {folder.root}: {counts}" if counts else ""


def _suffixes() -> set[str]:
    with extra("train"):
        from PIL import Image, features
    known = Image.registered_extensions()
    read = {
        name
        for name in Image.OPEN.keys() - _NO_PICTURES
        if name not in _FEATURES or features.check(_FEATURES[name])
    }
    # One with several views, which Pillow opens as a JPEG; and an array of floats.
    return {suffix for suffix, name in known.items() if name in read} - {".pfm"} | {".mpo"}


def _kind(entry: os.DirEntry[str], suffixes: set[str]) -> str | None:
    """`None` for a picture, "folder", or why it is left out."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "broken link"
    if entry.is_dir():
        return "folder"
    if not entry.is_file():
        return "no file"
    suffix = os.path.splitext(entry.name)[1].lower()
    return None if suffix in suffixes else suffix or "without suffix"


def _below(
    root: Path, parts: tuple[str, ...], suffixes: set[str], around: tuple[os.stat_result, ...]
) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """All that lies in a folder, at any depth, as parts of a path from the root, with its kind."""
    folder = root.joinpath(*parts)
    here = os.stat(folder)
    if any(os.path.samestat(here, outer) for outer in around):
        yield parts, "link to a folder around it"
        return
    for entry in os.scandir(folder):
        inner, kind = (*parts, entry.name), _kind(entry, suffixes)
        if kind == "folder":
            yield from _below(root, inner, suffixes, (*around, here))
        else:
            yield inner, kind


def _check_classes(root: Path, files: list[tuple[str, ...]]) -> None:
    """Folders of class folders are refused where that is what they seem to be."""
    inner = {parts[0]: set[str]() for parts in files}
    for parts in files:
        inner[parts[0]].add(parts[1] if len(parts) > 2 else "")
    if any("" in names for names in inner.values()):
        return
    first = next(iter(inner))
    one = len(inner) == 1 and len(inner[first]) > 1
    if one or {name.lower() for name in inner} <= _SPLITS:
        names = ", ".join(sorted(inner[first])[:3])
        what = f"the one folder {first}" if one else f"the splits {', '.join(inner)}"
        raise ValueError(
            f"{root} has {what}, and no pictures but in the folders below ({names}): if those are "
            f"the classes, give {root / first}; else lay the pictures into {root / first} itself"
        )


def read_image(
    path: StrPath, size: int, *, small: Small = "refuse"
) -> UInt8[np.ndarray, "channels height width"]:
    """A picture as a square in colour: the middle of it, scaled so that its shorter side fits.

    It is halved by box averages while at least twice too large, then scaled bicubically, then cut,
    as in the data preparation of ADM. Grey pictures and palettes become colours, 16-bit grey is
    scaled to 8 bits, transparent parts are laid on white, and a camera's orientation is followed.
    Of several pictures in a file, such as an animation's, it is the first.

    **Arguments:**

    - `path`: of the picture.
    - `size`: side of the square, in pixels.
    - `small`: whether to `"refuse"` a picture whose shorter side is below `size`, or to
        `"enlarge"` it, as ADM does.

    **Returns:**

    Red, green and blue, 0 to 255, of `size` rows and columns.

    **Raises:**

    [`equidit.data.ImageError`][], naming the file, if it is no picture or damaged; and, where its
    field `damaged` is false, if it is too small, too large for Pillow or for the memory, of more
    than 16 bits a channel, or cannot be read (no permission, say).

    ??? cite

        [Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233), section 5.
    """
    check_positive(size=size)
    try:
        return _square(path, size, small)
    except MemoryError as error:
        raise ImageError(f"{path} does not fit into memory: scale it down or remove it") from error


def _square(path: StrPath, size: int, small: Small) -> np.ndarray:
    with extra("train"):
        from PIL import Image, ImageOps
    try:
        # From memory, where a reader that asks for what a chunk claims gets what there is.
        content = io.BytesIO(Path(path).read_bytes())
        with Image.open(content, formats=_formats()) as file:
            image = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{path} is larger than Pillow opens ({error}): scale it down or remove it, or in "
            "Python set PIL.Image.MAX_IMAGE_PIXELS = None"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"{path} cannot be read: {error}") from error
        raise ImageError(
            f"{path} is no picture, or damaged: {_said(error)}", damaged=True
        ) from error
    image = _in_colour(image, path)
    if min(image.size) < size and small == "refuse":
        raise ImageError(
            f"{path} has {image.width}x{image.height} pixels, less than {size}x{size}: take a "
            "smaller size, remove it, or have such pictures enlarged (small='enlarge')"
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


def _in_colour(image, path: StrPath):
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        # PIL would cut these off at 255 rather than scale them.
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path} has more than 16 bits a channel: convert it to 8 bits")
        # Single precision is enough: 257 is odd, so that nothing lies half-way between two bytes.
        scaled = np.divide(values, 257, dtype=np.float32)
        image = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
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
