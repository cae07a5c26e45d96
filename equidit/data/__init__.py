"""Data sets, and the order in which training sees them."""

from .images import (
    ImageError as ImageError,
    ImageFolder as ImageFolder,
    Small as Small,
    image_folder as image_folder,
    read_image as read_image,
)
from .latents import LatentCache as LatentCache, open_latents as open_latents
from .loading import Batches as Batches, batches as batches
from .sources import (
    DIGITS_CLASSES as DIGITS_CLASSES,
    DIGITS_SHAPE as DIGITS_SHAPE,
    ArraySource as ArraySource,
    FolderSource as FolderSource,
    Images as Images,
    Latents as Latents,
    LatentSource as LatentSource,
    Source as Source,
    Subset as Subset,
    check_labels as check_labels,
    digits as digits,
    held_out as held_out,
)
