"""Published weights, read and written: official DiT files, and diffusers' folders of DiTs and VAEs.

**Two arithmetics.** diffusers' `DiTTransformer2DModel` holds the official weights, but computes
something else than the network that they were trained in: the frequencies of its
timestep features are `10000 ** (-i / 127)`, not `10000 ** (-i / 128)`, and the norm before its MLPs
has an epsilon of 1e-5, not 1e-6. `arithmetic="official"` is what the weights were trained in,
`"diffusers"` gives the same pictures as `DiTPipeline`.

**Safety.** Nothing in a file is executed, and nothing is allocated on its word. Weights are loaded
as float32, whatever the file has, without a random initialisation on the way.

**The hub.** Where a path does not exist, `owner/name` is downloaded by huggingface-hub. Official
files are `owner/name/file.pt`.
"""

from .autoencoder import load_vae as load_vae, save_vae as save_vae
from .diffusers import (
    load_diffusers_dit as load_diffusers_dit,
    save_diffusers_dit as save_diffusers_dit,
)
from .official import from_state_dict as from_state_dict, load_dit as load_dit
from .published import Published as Published, describe as describe
