"""Are samples and latents where they belong, at counts that no batch size divides?

Draws counts, batch sizes and numbers of devices, gives `equidit sample --npz` and `equidit encode`
with them, and compares every byte with a plain loop over the rows; kills some at a random moment,
and gives them again. `--package DIR` has another checkout's package do the work.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEVICES = (1, 2, 3, 5, 8)
LARGEST = 40


def drawn(rng: random.Random) -> tuple[int, int, int]:
    """A count, a batch size and a number of devices: more often just beside a multiple."""
    size = rng.randint(1, 9)
    near = size * rng.randint(1, 4) + rng.choice((-1, 0, 1, 1))
    count = max(1, rng.choice((near, rng.randint(1, LARGEST))))
    return count, size, rng.choice(DEVICES)


def make_files(folder: Path) -> None:
    """A small official DiT, its autoencoder, and pictures of three classes."""
    import jax
    from PIL import Image
    from safetensors.numpy import save_file

    import equidit as edt
    from equidit.pretrained import official, tables

    network = edt.DiT(4, 2, 16, 1, 4, 10, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    network = jax.tree.unflatten(structure, leaves)
    arrays = {n: np.array(a) for n, a in tables.export(network, official.OFFICIAL).items()}
    arrays["pos_embed"] = np.array(edt.sincos_2d(16, (4, 4)))[None]
    save_file(arrays, folder / "dit.safetensors")
    vae = edt.Autoencoder(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, key=jax.random.key(2)
    )
    edt.pretrained.save_vae(vae, folder / "vae")
    rng = np.random.default_rng(0)
    for i in range(LARGEST):
        path = folder / "pictures" / f"{i % 3}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)


def command(what: str, folder: Path, count: int, size: int, out: Path) -> list[str]:
    """The command's words. For pictures a folder of so many is made beside the result."""
    shared = ["--vae", folder / "vae", "--batch-size", size, "--out", out]
    if what == "sample":
        weights = ["--weights", folder / "dit.safetensors", "--num-heads", 4, "--steps", 2]
        return [str(w) for w in ("sample", *weights, "--npz", "--count", count, *shared)]
    pictures = out.with_name(f"pictures-{count}")
    for path in sorted((folder / "pictures").rglob("*.png"), key=lambda p: p.name)[:count]:
        place = pictures / path.relative_to(folder / "pictures")
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(path)
    return [str(w) for w in ("encode", "--images", pictures, "--size", 16, *shared)]


def by_loop(what: str, folder: Path, count: int, size: int, out: Path) -> list[np.ndarray]:
    """What the command should write: a plain loop over groups, put where their rows are."""
    import jax
    import jax.numpy as jnp

    import equidit as edt
    from equidit.cli import encoding, npz
    from equidit.runs import sampling as drawing
    from equidit.runs.process import Diffusion

    vae = edt.pretrained.load_vae(folder / "vae")
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    if what == "sample":
        sampling = drawing.Sampling(
            edt.pretrained.load_dit(folder / "dit.safetensors", num_heads=4),
            Diffusion(2),
            null=10,
            guidance_scale=1.5,
            sampler="ddpm",
            shape=(4, 8, 8),
            key=jax.random.key(0),
            decoder=vae,
        )
        labels = npz.random_labels(count, 10, jax.random.fold_in(jax.random.key(0), 1))
        images = np.zeros((count, 16, 16, 3), np.uint8)
        for first in range(0, count, size):
            rows = np.arange(first, first + size)
            label, index = jnp.asarray(labels[rows % count]), jnp.asarray(rows)
            found = np.asarray(drawing._many(sampling, mesh, label, index))
            images[first : first + size] = npz.to_bytes(found)[: count - first]
        return [images, labels]
    from equidit.data import image_folder, read_image

    listed = image_folder(out.with_name(f"pictures-{count}"))
    mean, std = np.zeros((2, count, 2, 4, 8, 8), np.float32)
    for first in range(0, count, size):
        pixels = np.zeros((size, 3, 16, 16), np.uint8)
        for i, name in enumerate(listed.files[first : first + size]):
            pixels[i] = read_image(listed.root / name, 16)
        found = encoding._moments(vae, mesh, jnp.asarray(pixels))
        mean[first : first + size], std[first : first + size] = (
            np.asarray(moment)[: count - first] for moment in found
        )
    return [mean, std, listed.label]


def written(what: str, out: Path) -> list[np.ndarray]:
    """What the command wrote; of samples of an older version, the images alone."""
    if what == "sample":
        with np.load(out) as archive:
            return [archive[name] for name in archive.files]
    return [np.load(out / f"{name}.npy") for name in ("mean", "std", "label")]


def rows_that_differ(found: list[np.ndarray], expected: list[np.ndarray]) -> int:
    """How many rows are not, byte for byte, what the plain loop made."""
    same = np.ones(len(expected[0]), bool)
    for a, b in zip(found, expected, strict=False):
        same &= (a == b).reshape(len(b), -1).all(axis=1)
    return int((~same).sum())


def _work(draws: list[dict[str, Any]], folder: Path) -> None:
    """In a process of its own, which sees so many devices: carries out draws, a JSON line each."""
    from equidit import cli

    for draw in draws:
        what, count, size = draw["command"], draw["count"], draw["batch_size"]
        out = folder / f"{what}-{draw['number']}"
        if what == "sample":
            out = out.with_suffix(".npz")
        words = command(what, folder, count, size, out)
        with contextlib.redirect_stdout(sys.stderr):
            if draw["kill"]:
                draw["killed"] = _killed(words)
            status = cli.run(words)
        wrong = (
            count
            if status
            else rows_that_differ(written(what, out), by_loop(what, folder, count, size, out))
        )
        print(json.dumps(draw | {"wrong_rows": wrong}), flush=True)


def _killed(words: list[str]) -> str:
    """Kills the command at a random moment, and says how far it had come."""
    code = "import sys; from equidit.__main__ import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], start_new_session=True, stdout=subprocess.DEVNULL
    )
    out = Path(words[-1])
    done = out.with_name(out.name + ".unfinished") / "done"
    rng = random.Random(" ".join(words))
    wanted = rng.randint(0, 3)
    count = 0
    while process.poll() is None and count <= wanted:
        time.sleep(0.002)
        with contextlib.suppress(OSError):
            count = sum(done.read_bytes()) + (wanted == 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return f"after {count} groups" if process.wait() else "too late"


def campaign(draws: int, kills: int, seed: int, package: Path) -> list[dict[str, Any]]:
    """So many draws of each command, of which so many are killed first."""
    rng, todo = random.Random(seed), []
    for number in range(draws):
        count, size, devices = drawn(rng)
        for what in ("sample", "encode"):
            todo.append(
                {"command": what, "number": number, "count": count, "batch_size": size}
                | {"devices": devices, "kill": number < kills}
            )
    rows = []
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{Path(__file__).parents[1]}"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_files(folder)
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for devices in sorted({draw["devices"] for draw in todo}):
            part = [draw for draw in todo if draw["devices"] == devices]
            environment["JAX_NUM_CPU_DEVICES"] = str(devices)
            script = [sys.executable, __file__, "--worker", json.dumps(part), str(folder)]
            lines = subprocess.run(
                script, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            rows += map(json.loads, lines.splitlines())
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws, prints what is wrong, and writes the JSON."""
    from benchmarks.common import write

    parser = argparse.ArgumentParser(prog="python -m benchmarks uneven", description=__doc__)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10, help="how many are killed first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--name", default="uneven", help="of the JSON")
    options = parser.parse_args(arguments)
    rows = campaign(options.draws, options.kills, options.seed, options.package.absolute())
    counts = Counter(
        f"{row['command']}: {'wrong' if row['wrong_rows'] else 'as the plain loop'}" for row in rows
    )
    path = write(options.name, {"seed": options.seed, "counts": counts, "rows": rows})
    print(json.dumps(counts, indent=2), path, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
