"""What `equidit sample` draws from: a run's folder, or published weights."""

from pathlib import Path
from typing import NamedTuple

from .. import pretrained
from ..pretrained.transformer import Arithmetic
from ..runs import task
from ..runs.folder import Folder
from ..runs.process import Diffusion, Process
from ..runs.state import restore_ema
from ..seams import Network, StrPath
from ..vae import Autoencoder


class Drawable(NamedTuple):
    """A class-conditional network, and what it makes.

    **Fields:**

    - `network`: what predicts.
    - `process`: that it was trained for.
    - `decoder`: the autoencoder of its latents; `None` for a network of images.
    - `shape`: of what it takes.
    - `num_classes`: also the null label.
    - `classes`: their names, of a run; empty where they are not known.
    - `published`: whether it is published weights rather than a run.
    """

    network: Network
    process: Process
    decoder: Autoencoder | None
    shape: tuple[int, int, int]
    num_classes: int
    classes: tuple[str, ...]
    published: bool


def of_run(path: StrPath, vae: str | None = None) -> Drawable:
    """The averaged weights of a run.

    **Arguments:**

    - `vae`: the autoencoder of its latents; `None` is the one that it was trained with.
    """
    settings, about = Folder(Path(path)).read()
    decoder = task.decoder(settings, about, vae)
    if about.latents and decoder is None:
        raise ValueError(f"{path} makes latents: give their autoencoder's folder (--vae DIR)")
    network = restore_ema(path)
    return Drawable(
        network,
        settings.process,
        decoder,
        about.shape,
        about.num_classes,
        about.classes,
        published=False,
    )


def of_weights(
    weights: str,
    vae: str | None,
    *,
    size: int | None = None,
    num_heads: int | None = None,
    select: str | None = None,
    arithmetic: Arithmetic | None = None,
) -> Drawable:
    """Published weights: an official file, or a folder of diffusers'.

    **Arguments:**

    - `weights`, `num_heads`, `select`, `arithmetic`: see [`equidit.pretrained.load_dit`][].
    - `vae`: see [`equidit.pretrained.load_vae`][]; `None` for a network of images, and for a
        pipeline's folder, which has one.
    - `size`: side of the images, in pixels; `None` is what the network was trained for.

    **Raises:**

    `ValueError` if these do not fit each other, or one is needed.
    """
    published = pretrained.describe(weights, num_heads=num_heads, select=select)
    config = published.config
    if published.time != "steps":
        raise ValueError(
            f"{weights} is a SiT, a flow whose network is told times in [0, 1]: DDPM and DDIM do "
            "not apply. In code, pretrained.load_dit gives the network"
        )
    if config.num_classes is None:
        raise ValueError(f"{weights} is not conditioned on classes")
    if published.kind == "diffusers" and arithmetic is None:
        raise ValueError(
            f"{weights} is a folder of diffusers': say --arithmetic official for weights that were "
            "trained in the original (the published ones), or --arithmetic diffusers"
        )
    if vae is None and (Path(weights) / "model_index.json").exists():
        vae = weights
    if vae is None and config.in_channels not in (1, 3):
        raise ValueError(
            f"the network has in_channels={config.in_channels}, so it makes latents: give their "
            "autoencoder's folder (--vae DIR), e.g. of stabilityai/sd-vae-ft-ema"
        )
    decoder = None if vae is None else pretrained.load_vae(vae)
    factor, channels = 1, config.in_channels
    if decoder is not None:
        factor, channels = decoder.downsampling, decoder.decoder.conv_in.weight.shape[1]
    if channels != config.in_channels:
        raise ValueError(
            f"the autoencoder {vae} has latents of {channels} channels, but the network "
            f"{weights} has in_channels={config.in_channels}: they do not belong together"
        )
    if size is None and published.sample_size is None:
        raise ValueError(f"{weights} does not say of what size its images are: give --size")
    size = size or factor * (published.sample_size or 0)
    if size < 1 or size % (factor * config.patch_size):
        raise ValueError(
            f"size={size} must be a multiple of {factor * config.patch_size}: the autoencoder's "
            f"downsampling {factor} times the patch size {config.patch_size}"
        )
    network = published.load(arithmetic=arithmetic)
    shape = (channels, size // factor, size // factor)
    return Drawable(network, Diffusion(), decoder, shape, config.num_classes, (), published=True)
