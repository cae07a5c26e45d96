"""A tiny DiT learns to draw captions such as "a small red circle top left", in ten CPU minutes.

Some pairs of colour and shape never occur in training. A checker reads each sample back into a
caption, by rules, and so tells how often the network follows captions with those pairs.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from tqdm import tqdm

import equidit as edt
from equidit import diffusion as dfn

Image = Float[np.ndarray, "3 32 32"]
Images = Float[np.ndarray, "batch 3 32 32"]
Prompts = tuple[Float[np.ndarray, "batch length text_dim"], Bool[np.ndarray, "batch length"]]
LENGTH, TEXT_DIM = 6, 64
SCHEDULE = dfn.Schedule(dfn.linear_betas())


class Caption(NamedTuple):
    """What a picture shows: one object."""

    size: str
    colour: str
    shape: str
    place: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place}"


SIZES = {"small": 6.0, "large": 9.5}  # half the side of the bounding box, in pixels
COLOURS = {
    "red": (0.9, -0.9, -0.9),
    "green": (-0.9, 0.5, -0.7),
    "blue": (-0.9, -0.6, 0.9),
    "yellow": (0.9, 0.7, -0.9),
    "purple": (0.2, -0.9, 0.5),
}
# Signed distance to the edge, for y downwards. Every shape fills its bounding box.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda y, x, r: np.hypot(y, x) - r,
    "square": lambda y, x, r: np.maximum(abs(y), abs(x)) - r,
    "triangle": lambda y, x, r: np.maximum(y - r, (2 * abs(x) - y - r) / np.sqrt(5)),
    "cross": lambda y, x, r: np.maximum(
        np.minimum(abs(y), abs(x)) - 0.4 * r, np.maximum(abs(y), abs(x)) - r
    ),
}
PLACES = {
    "top left": (10.5, 10.5),
    "top right": (10.5, 20.5),
    "bottom left": (20.5, 10.5),
    "bottom right": (20.5, 20.5),
    "centre": (15.5, 15.5),
}
CAPTIONS = [Caption(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, PLACES)]
NEVER_SEEN = {("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")}
HELD_OUT = [c for c in CAPTIONS if (c.colour, c.shape) in NEVER_SEEN]
SEEN = [c for c in CAPTIONS if (c.colour, c.shape) not in NEVER_SEEN]

# A fixed random vector for each word stands for a text encoder.
WORDS = sorted({word for caption in CAPTIONS for word in str(caption).split()})
VECTORS = np.random.default_rng(0).normal(size=(len(WORDS), TEXT_DIM)).astype(np.float32)


def encode(captions: Sequence[Caption]) -> Prompts:
    """The prompts of captions: a vector for each word, padded, and which are words."""
    embeddings = np.zeros((len(captions), LENGTH, TEXT_DIM), np.float32)
    mask = np.zeros((len(captions), LENGTH), bool)
    for row, caption in enumerate(captions):
        index = [WORDS.index(word) for word in str(caption).split()]
        embeddings[row, : len(index)] = VECTORS[index]
        mask[row, : len(index)] = True
    return embeddings, mask


def coverage(shape: str, y: float, x: float, radius: float) -> Float[np.ndarray, "32 32"]:
    """How much of each pixel a shape covers, from 0 to 1."""
    rows, columns = np.mgrid[:32, :32]
    return np.clip(0.5 - SHAPES[shape](rows - y, columns - x, radius), 0, 1)


def draw(caption: Caption, rng: np.random.Generator) -> Image:
    """A picture of a caption in [-1, 1], on grey; place, size and colour vary a little."""
    y, x = PLACES[caption.place] + rng.uniform(-0.75, 0.75, 2)
    radius = SIZES[caption.size] + rng.uniform(-0.5, 0.5)
    colour = COLOURS[caption.colour] + rng.uniform(-0.1, 0.1, 3)
    return (colour[:, None, None] * coverage(caption.shape, y, x, radius)).astype(np.float32)


def read(image: Image) -> Caption:
    """The caption that a picture deserves, by rules; "?" for what cannot be told."""
    edge = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
    difference = abs(image - np.median(edge, axis=1)[:, None, None]).max(axis=0)
    if difference.max() < 0.5:
        return Caption("?", "?", "?", "?")
    mask = difference > difference.max() / 2
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    y, x = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    radius = (rows[-1] - rows[0] + columns[-1] - columns[0] + 2) / 4

    def overlap(fit: Sequence[Any]) -> float:
        template = coverage(*fit) > 0.5
        return (mask & template).sum() / (mask | template).sum()

    def nearest(table: dict[str, Any], value: Any, within: float) -> str:
        distance = {name: np.linalg.norm(np.subtract(table[name], value)) for name in table}
        name = min(distance, key=lambda name: float(distance[name]))
        return name if distance[name] <= within else "?"

    # Thin ends fall out of the mask, so its bounding box is not quite the shape's.
    shifts, growths = np.array([-0.5, 0, 0.5]), np.array([0, 0.5])
    fits = itertools.product(SHAPES, y + shifts, x + shifts, radius + growths)
    best: Sequence[Any] = max(fits, key=overlap)
    return Caption(
        size=nearest(SIZES, best[3], within=1.5),
        colour=nearest(COLOURS, np.median(image[:, mask], axis=1), within=0.6),
        shape=best[0] if overlap(best) > 0.75 else "?",
        place=nearest(PLACES, best[1:3], within=3),
    )


def training_batch(step: int, size: int, seed: int) -> tuple[list[Caption], Images]:
    """Random captions, none of them held out, and fresh pictures of them."""
    rng = np.random.default_rng((seed, step))
    captions = [SEEN[i] for i in rng.integers(len(SEEN), size=size)]
    return captions, np.stack([draw(caption, rng) for caption in captions])


def loss(network: edt.DiT, example: Any, key: PRNGKeyArray) -> Float[Array, ""]:
    """Squared error of the clean picture, times its signal-to-noise ratio clipped to [1, 5].

    To predict the noise, a network must carry all of it through; one as narrow as this struggles.
    """
    image, prompt = example
    drop_key, key = jax.random.split(key)
    prompt = edt.drop_label(prompt, network.conditioner.null, 0.1, key=drop_key)
    weight = lambda schedule, t: jnp.clip(schedule.snr[t], 1, 5)  # noqa: E731
    return dfn.simple_loss(
        network, SCHEDULE, image, prompt, key=key, prediction="x0", weight=weight
    )


def train(options: argparse.Namespace) -> edt.DiT:
    """A trained network, its weights averaged."""
    sizes = {"hidden_size": options.hidden_size, "depth": options.depth, "num_heads": 4}
    pictures = {"in_channels": 3, "patch_size": 4, "learn_sigma": False, "num_classes": None}
    text = {"block": "text-cross-attention", "text_dim": TEXT_DIM, "text_length": LENGTH}
    config = edt.Config(**sizes, **pictures, **text, mlp_ratio=2)
    network = edt.build(config, key=jax.random.key(options.seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, options.steps))
    train_step = edt.make_train_step(loss, optimizer, ema_decay=edt.ema_warmup(0.995))
    state = edt.init_state(network, optimizer)
    key = jax.random.key(options.seed + 1)
    for step in tqdm(range(options.steps), unit="step"):
        captions, images = training_batch(step, options.batch_size, options.seed)
        state, _ = train_step(state, (images, encode(captions)), key)
    return jax.block_until_ready(state.ema)


@eqx.filter_jit
def sample(network: edt.Network, prompts: Any, key: PRNGKeyArray) -> Array:
    """A picture for each prompt, by 50 DDIM steps."""
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 50))
    step = partial(dfn.ddim_step, network, schedule, prediction="x0", clip=True)

    def one(prompt: Any, key: PRNGKeyArray) -> Array:
        noise_key, key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (3, 32, 32))
        return dfn.sample(step, schedule, noise, prompt, key=key)

    return jax.vmap(one)(prompts, jax.random.split(key, len(prompts[1])))


def judge(images: Images, captions: Sequence[Caption]) -> dict[str, float]:
    """The share of pictures that follow the whole caption, its standard error; each attribute."""
    right = np.array([np.equal(read(i), c) for i, c in zip(images, captions, strict=True)])
    share = right.all(axis=1).mean()
    error = np.sqrt(share * (1 - share) / len(right))
    attributes = dict(zip(Caption._fields, right.mean(axis=0).tolist(), strict=True))
    return {"caption": float(share), "standard_error": float(error)} | attributes


def picture(path: Path, images: Images, captions: Sequence[Caption]) -> None:
    """Writes a grid of pictures under their captions, in red where the checker disagrees."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(5, 8, figsize=(13, 9))
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.T.flat, images, captions, strict=False):
        axis.imshow(np.clip(image.transpose(1, 2, 0) / 2 + 0.5, 0, 1))
        label = f"a {caption.size} {caption.colour}\n{caption.shape} {caption.place}"
        axis.set_title(label, fontsize=9, color="black" if read(image) == caption else "red")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def evaluate(network: edt.DiT, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Draws samples for seen and held-out captions and for none; writes the picture."""
    guided = edt.guide(network, options.guidance_scale, network.conditioner.null)

    def draw_samples(prompts: Prompts, number: int) -> Images:
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        return np.asarray(sample(guided, prompts, key))

    seen, held_out = (
        [pool[i % len(pool)] for i in range(options.samples)] for pool in (SEEN, HELD_OUT)
    )
    no_words = jax.tree.map(np.zeros_like, encode(seen))
    images = draw_samples(encode(held_out), 0)
    picture(options.out / "captions.png", images, held_out)
    tables = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}
    return {
        "held out": judge(images, held_out),
        "seen": judge(draw_samples(encode(seen), 1), seen),
        "unconditional": judge(draw_samples(no_words, 2), seen),
        "chance": {"caption": 1 / len(CAPTIONS)} | {k: 1 / len(v) for k, v in tables.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, draws, judges; prints the figures and writes them, and a picture, to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/captions"), help="a folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument(
        "--samples", type=int, default=320, help="for seen, held-out and no captions"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    network = train(options)
    seconds = time.perf_counter() - start
    results = evaluate(network, options)
    packages = ("equidit", "jax", "jaxlib", "equinox", "optax", "numpy")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {"cores": os.cpu_count(), "device": jax.devices()[0].device_kind},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "training_seconds": seconds,
        "images_per_second": options.steps * options.batch_size / seconds,
        "results": results,
    }
    (options.out / "captions.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, row in results.items():
        print(f"{name:13}  " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"trained in {seconds:.0f} s; the picture and the figures are in {options.out}")


if __name__ == "__main__":
    main()
