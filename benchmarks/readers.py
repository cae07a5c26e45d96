"""Every reader that meets foreign bytes: valid files for it, how it is run, how it may refuse."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save

import equidit as edt
from equidit import pretrained
from equidit.checkpoint import Checkpoints, backend, checkpoints
from equidit.checkpoint.hashing import fingerprints
from equidit.checkpoint.record import Record, checksum
from equidit.cli import npz
from equidit.cli.resumable import Unfinished
from equidit.data import ImageError, LatentSource, image_folder, read_image
from equidit.pretrained import files, folders, tables, transformer
from equidit.pretrained.autoencoder import AUTOENCODER
from equidit.pretrained.diffusers import DIFFUSERS
from equidit.pretrained.official import OFFICIAL
from equidit.runs.folder import Folder
from equidit.runs.settings import Settings

Files = dict[str, list[bytes]]
PIXELS = 2**20
"""What Pillow's limit is set to meanwhile, lest 10^6 pictures that claim to be large take days."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader, and what it may do.

    **Fields:**

    - `make`: valid files by name, of each some variants. The first of each lie in a folder
        together; one at a time is replaced by foreign bytes.
    - `read`: runs the reader on that folder, as far as its files' values are looked at.
    - `errors`: those that it documents; each names the folder.
    - `modules`: whose code is watched by the coverage-guided engine.
    - `memory`: bytes that it may allocate in Python and NumPy, beside 16 times the files' size.
    - `leaves`: files that it may write: locks. `opens`: those that it may open to write.
    - `lay`: puts foreign bytes into the folder, where they are not one file's.
    - `seal`: makes a checksum in them right again.
    """

    name: str
    make: Callable[[], Files]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)
    modules: tuple[str, ...] = ()
    memory: int = 2**20
    leaves: frozenset[str] = frozenset()
    opens: frozenset[str] = frozenset()
    lay: Callable[[Path, bytes], None] | None = None
    seal: Callable[[bytes], bytes] | None = None


def _written(write: Callable[[Path], Any]) -> dict[str, bytes]:
    """The files that a function puts into a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "made"
        write(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _dit(arithmetic: transformer.Arithmetic = "official") -> edt.DiT:
    config = edt.Config(1, 4, 1, 1, 1, 2)
    skeleton = transformer.skeleton(arithmetic, config)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), skeleton)


def _arrays(network: Any, table: Any, dtype: Any = np.float16) -> dict[str, np.ndarray]:
    return {n: np.asarray(a, dtype) for n, a in tables.export(network, table).items()}


def _tensors() -> Files:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.random((2, 3), np.float32), "b.c": rng.random(4).astype(np.float16)}
    arrays |= {"d": rng.random(()), "e": np.zeros((0, 3), np.float32)}
    bfloat16 = {"a": arrays["a"].astype(jax.numpy.bfloat16)}
    return {
        "a.safetensors": [
            save(arrays, {"format": "pt"}),
            save(bfloat16),
            save({}),
        ]
    }


def _read_tensors(folder: Path) -> None:
    weights = files.read_file(folder / "a.safetensors")
    for tensor in weights.values():
        assert tensor.read().shape == tensor.shape


def _official() -> Files:
    arrays = _arrays(_dit(), OFFICIAL)
    table = np.asarray(edt.sincos_2d(4, (2, 2)), np.float16)[None]
    return {"dit.safetensors": [save(arrays | {"pos_embed": table}), save(arrays)]}


def _read_official(folder: Path) -> None:
    (path,) = folder.iterdir()
    pretrained.describe(path, num_heads=1)
    pretrained.load_dit(path, num_heads=1)


def _diffusers() -> Files:
    made = _written(lambda folder: pretrained.save_diffusers_dit(_dit("diffusers"), folder))
    arrays = _arrays(_dit("diffusers"), DIFFUSERS)
    shards = {"a.safetensors": dict(list(arrays.items())[::2])}
    shards["b.safetensors"] = dict(list(arrays.items())[1::2])
    places = {name: file for file, shard in shards.items() for name in shard}
    return {
        "config.json": [made["config.json"]],
        folders.INDEX: [_json({"metadata": {"total_size": 1}, "weight_map": places})],
        **{file: [save(shard)] for file, shard in shards.items()},
    }


def _read_diffusers(folder: Path) -> None:
    pretrained.describe(folder)
    pretrained.load_diffusers_dit(folder, arithmetic="diffusers")


def _autoencoder() -> Files:
    skeleton = eqx.filter_eval_shape(
        edt.Autoencoder,
        latent_channels=1,
        block_out_channels=(2,),
        layers_per_block=1,
        norm_num_groups=1,
        key=jax.random.key(0),
    )
    vae = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), skeleton)
    made = _written(lambda folder: pretrained.save_vae(vae, folder))
    weights = save(_arrays(vae, AUTOENCODER))
    return {"config.json": [made["config.json"]], "diffusion_pytorch_model.safetensors": [weights]}


def _torch() -> Files:
    import argparse

    import torch

    arrays = _arrays(_dit(), OFFICIAL)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    args = argparse.Namespace(model="DiT-S/2", num_classes=2)
    full = {"model": tensors, "ema": tensors, "opt": {}, "args": args}
    found = []
    for content, new in ((tensors, True), (full, True), (tensors, False)):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=new)
        found.append(file.getvalue())
    return {"dit.pt": found}


def _samples() -> Files:
    def write(folder: Path) -> None:
        folder.mkdir()
        images = folder / "images.npy"
        np.save(images, np.zeros((1, 2, 2, 3), np.uint8))
        npz._wrap(images, np.zeros(1, np.int32), folder / "a.npz", npz._mark({"seed": 0}))
        images.unlink()

    return {"a.npz": [_written(write)["a.npz"]]}


def _latents() -> Files:
    info = {"format": 2, "autoencoder": "0" * 16, "pictures": "00000000", "count": 3, "size": 16}
    info |= {"small": "refuse", "skip_corrupt": True, "dtype": "float32", "batch_size": 2}
    info |= {"classes": ["a", "b"], "downsampling": 8, "skipped": ["b/1.png"]}
    older = info | {"format": 1, "batch_size": 3}
    moments = np.ones((3, 2, 1, 2, 2))
    return {
        "info.json": [_json(info), _json(older)],
        "mean.npy": [_npy(moments.astype(np.float32)), _npy(moments.astype(np.float16))],
        "std.npy": [_npy(moments.astype(np.float32))],
        "label.npy": [_npy(np.array([0, 1, -1], np.int32))],
    }


def _read_latents(folder: Path) -> None:
    source = LatentSource(folder)
    info = source.cache.info
    assert isinstance(info["autoencoder"], str)
    assert all(isinstance(name, str) for name in info["classes"])
    for index in range(min(3, len(source.label))):
        found = source.read(index, np.random.default_rng(index))
        assert found.mean.dtype == found.std.dtype == np.float32


def _run() -> Files:
    about = {"shape": [1, 8, 8], "classes": ["0", "1"], "autoencoder": None}
    record = {"equidit": "0", "settings": Settings().record(), "about": about}
    others = Settings(data="latents:a", model="DiT-S/2", keep_every=5, max_grad_norm=1.0).record()
    latents = {"shape": [4, 32, 32], "classes": ["a", "b"], "autoencoder": "0" * 16}
    return {"config.json": [_json(record), _json(record | {"settings": others, "about": latents})]}


def _read_run(folder: Path) -> None:
    settings, about = Folder(folder).read()
    settings.network(about.shape[0], about.num_classes)
    assert all(isinstance(name, str) for name in about.classes)
    assert settings.steps + settings.seed >= 1


def _metrics() -> Files:
    row = {"step": 50, "loss": 0.5, "grad_norm": 1.5, "param_norm": 2.0, "images_per_second": 9.0}
    row |= {"data_wait": 0.0, "mfu": None, "skipped": 0, "corrupt": 0}
    more = {"step": 50, "validation_loss": 0.5, "validation_loss_by_quartile": [0.1, 0.2, 0.3, 0.4]}
    lines = [json.dumps(line) for line in (row, more, row | {"step": 100})]
    return {"metrics.jsonl": ["\n".join(lines).encode() + b"\n", lines[0].encode()[:40]]}


def _read_metrics(folder: Path) -> None:
    rows = Folder(folder).rows()
    for row in rows:
        assert row["step"] <= row["step"] + 1
        if "loss" in row:
            assert row["loss"] is None or row["loss"] * 1.0 is not None
        if "validation_loss" in row:
            assert [row["validation_loss_by_quartile"][i] * 1.0 for i in range(4)]


_CONFIG = {"model": {"depth": 2}, "seed": 0}


def _state() -> dict[str, Any]:
    return {"ema": {"w": np.ones((2, 3), np.float32)}, "step": np.ones((), np.int32)}


@functools.cache
def _saved() -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The arrays of a checkpoint, and their fingerprints."""
    arrays = {"ema/w": jax.numpy.ones((2, 3)), "step": jax.numpy.ones((), jax.numpy.int32)}
    return arrays, fingerprints(arrays)


def _checkpoint() -> Files:
    arrays = {"ema/w": ["float32", [2, 3]], "step": ["int32", []]}
    described = {name: [*array, _saved()[1][name]] for name, array in arrays.items()}
    record = Record(7, {"step": 7}, _CONFIG, described).to_json()
    return {"7/record/metadata": [json.dumps(record).encode()]}


def _read_checkpoint(folder: Path) -> None:
    arrays, digits = _saved()

    def read_arrays(folder: Path, wanted: Any) -> dict[str, jax.Array]:
        return {name: arrays[name] for name in wanted}

    with (
        # The record alone is foreign.
        mock.patch.object(backend, "read_arrays", read_arrays),
        mock.patch.object(checkpoints, "fingerprints", lambda found: {n: digits[n] for n in found}),
        Checkpoints(folder, read_only=True) as opened,
    ):
        restored = opened.restore(_state(), config=_CONFIG)
        assert restored.step == 7
        assert isinstance(restored.data, dict)


def _sealed(data: bytes) -> bytes:
    """A record with its checksum made right."""
    try:
        record = json.loads(data)
        content = {name: value for name, value in record.items() if name != "checksum"}
        return json.dumps(content | {"checksum": checksum(content)}).encode()
    except (ValueError, AttributeError, RecursionError):
        return data


_ARRAYS = {"a": ((5, 2), np.float32), "label": ((5,), np.int32)}


def _unfinished() -> Files:
    def write(folder: Path) -> None:
        folder.mkdir()
        work = Unfinished(folder / "out")
        with work.open({"seed": 0, "labels": [1, 2]}, _ARRAYS, 2):
            work.write(1, a=np.ones((2, 2)), label=np.ones(2))

    return {name: [content] for name, content in _written(write).items() if content}


def _read_unfinished(folder: Path) -> None:
    work = Unfinished(folder / "out")
    with work.open({"seed": 0, "labels": [1, 2]}, _ARRAYS, 2):
        assert set(work.remaining()) <= {0, 1, 2}


def _pictures() -> Files:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 7, 4), np.uint8)
    colour, clear = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    grey = Image.fromarray(rng.integers(0, 2**16, (9, 7), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = colour.quantize(4)
    saved: list[tuple[Any, str, dict[str, Any]]] = [
        (colour, "PNG", {"exif": exif}),
        (clear, "PNG", {}),
        (grey, "PNG", {}),
        (palette, "PNG", {"transparency": b"\0\x80\xff\xff"}),
        (colour.convert("1"), "PNG", {}),
        (colour, "JPEG", {"exif": exif}),
        (colour, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "BMP", {}),
        (palette, "BMP", {}),
        (colour, "GIF", {}),
        (palette, "GIF", {"transparency": 1}),
        (colour, "TIFF", {}),
        (grey, "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        (colour.convert("CMYK"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        (colour, "WEBP", {}),
        (clear, "WEBP", {"lossless": True}),
    ]
    found = []
    for image, kind, options in saved:
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append(file.getvalue())
    # Of other kinds, which a picture's name does not promise.
    found.append(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    found.append(b"P6 9 7 255\n" + pixels[..., :3].tobytes())
    return {"a.png": found}


def _read_picture(folder: Path) -> None:
    with warnings.catch_warnings(), mock.patch.object(Image, "MAX_IMAGE_PIXELS", PIXELS):
        warnings.simplefilter("ignore")
        try:
            found = read_image(folder / "a.png", 8, small="enlarge")
        except ImageError as error:
            if "more pixels" not in str(error):
                raise
            return
        assert found.shape == (3, 8, 8)
        with contextlib.suppress(ImageError):
            read_image(folder / "a.png", 4)


def _names_of_pictures() -> Files:
    names = (
        b"cat/a.png\0cat/b.jpg\0dog/c.PNG\0dog/.hidden\0dog/notes.txt\0",
        b"a/b/c/d.webp\0b/e.bmp",
    )
    return {"names": list(names)}


def _lay_names(folder: Path, data: bytes) -> None:
    """A tree of empty files, named by what lies between zero bytes."""
    root = folder / "tree"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name in data[:4096].split(b"\0")[:12]:
        parts = [part[:200] for part in name.split(b"/")[:5] if part not in (b"", b".", b"..")]
        with contextlib.suppress(OSError):
            path = Path(os_path(b"/".join(parts)))
            (root / path.parent).mkdir(parents=True, exist_ok=True)
            (root / path).touch()


def os_path(name: bytes) -> str:
    """A name as Python has those that are no text."""
    return name.decode(errors="surrogateescape")


def _read_names(folder: Path) -> None:
    found = image_folder(folder / "tree")
    assert len(found.files) == len(found.label) > 0
    assert all((found.root / name).is_file() for name in found.files)
    json.loads(json.dumps(found.classes))


READERS = {
    reader.name: reader
    for reader in (
        # The fastest first.
        Reader(
            ".npz of samples",
            _samples,
            lambda folder: npz._made_with(folder / "a.npz"),
            modules=("equidit.cli.npz", "zipfile"),
        ),
        Reader("metrics.jsonl", _metrics, _read_metrics, modules=("equidit.runs.folder",)),
        Reader("safetensors", _tensors, _read_tensors, modules=("equidit.pretrained.files",)),
        Reader(
            "run's config.json",
            _run,
            _read_run,
            modules=("equidit.runs.folder", "equidit.runs.settings", "equidit.configs"),
        ),
        Reader(
            "cache of latents",
            _latents,
            _read_latents,
            modules=("equidit.data.latents", "numpy.lib._format_impl"),
        ),
        Reader(
            "unfinished work",
            _unfinished,
            _read_unfinished,
            errors=(ValueError, FileExistsError),
            modules=("equidit.cli.resumable", "numpy.lib._format_impl"),
            leaves=frozenset({"lock"}),
            opens=frozenset({"a.npy", "label.npy"}),
        ),
        Reader(
            "names in a folder",
            _names_of_pictures,
            _read_names,
            modules=("equidit.data.images",),
            lay=_lay_names,
        ),
        Reader(
            "picture",
            _pictures,
            _read_picture,
            errors=(ImageError,),
            modules=(
                "equidit.data.images",
                *(f"PIL.{kind}ImagePlugin" for kind in ("Bmp", "Gif", "Jpeg", "Png", "Tiff")),
            ),
            memory=16 * PIXELS,
        ),
        Reader(
            "checkpoint's record",
            _checkpoint,
            _read_checkpoint,
            modules=("equidit.checkpoint.record", "equidit.checkpoint.checkpoints"),
            seal=_sealed,
        ),
        Reader(
            ".pt file",
            _torch,
            _read_official,
            modules=(
                "equidit.pretrained.files",
                "equidit.pretrained.pickles",
                "equidit.pretrained.unwrap",
                "equidit.pretrained.official",
                "equidit.pretrained.sizes",
                "equidit.pretrained.transformer",
                "torch._weights_only_unpickler",
                "torch._utils",
            ),
        ),
        Reader(
            "official DiT",
            _official,
            _read_official,
            modules=(
                "equidit.pretrained.files",
                "equidit.pretrained.unwrap",
                "equidit.pretrained.tables",
                "equidit.pretrained.official",
                "equidit.pretrained.sizes",
                "equidit.pretrained.transformer",
            ),
        ),
        Reader(
            "diffusers' DiT",
            _diffusers,
            _read_diffusers,
            modules=(
                "equidit.pretrained.files",
                "equidit.pretrained.folders",
                "equidit.pretrained.sizes",
                "equidit.pretrained.tables",
                "equidit.pretrained.diffusers",
                "equidit.pretrained.transformer",
            ),
        ),
        Reader(
            "autoencoder",
            _autoencoder,
            lambda folder: pretrained.load_vae(folder),
            modules=(
                "equidit.pretrained.files",
                "equidit.pretrained.folders",
                "equidit.pretrained.sizes",
                "equidit.pretrained.tables",
                "equidit.pretrained.autoencoder",
            ),
        ),
    )
}
