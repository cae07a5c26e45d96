"""Data sets, and the order in which training sees them."""

from .images import (
    ImageError as ImageError,
    ImageFolder as ImageFolder,
    Small as Small,
    image_folder as image_folder,
    read_image as read_image,
)
from .latents import LatentCache as LatentCache, open_latents as open_latents
from .sources import (
    DIGITS_CLASSES as DIGITS_CLASSES,
    DIGITS_SHAPE as DIGITS_SHAPE,
    ArraySource as ArraySource,
    Batches as Batches,
    FolderSource as FolderSource,
    Images as Images,
    Latents as Latents,
    LatentSource as LatentSource,
    Source as Source,
    Subset as Subset,
    batches as batches,
    check_labels as check_labels,
    digits as digits,
    held_out as held_out,
)
