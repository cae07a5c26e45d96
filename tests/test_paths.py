"""Wherever a path is taken, a string is one, and whatever names a path."""

import importlib
import inspect
import os
import pkgutil
from pathlib import Path
from typing import get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import difference, published, tiny
from jaxtyping import TypeCheckError
from PIL import Image

import equidit as edt
from equidit import data, pretrained
from equidit._base import disk
from equidit._base.arguments import union_members
from equidit.checkpoint import Checkpoints
from equidit.cli import encoding, npz, resumable, sources
from equidit.pretrained import diffusers, official
from equidit.runs import report, state
from equidit.runs.folder import Folder
from equidit.runs.kinds import About
from equidit.runs.process import Diffusion
from equidit.runs.sampling import Sampling
from equidit.runs.settings import Settings

KEY = jax.random.key(0)
# Where paths come from elsewhere in the package.
COMMANDS = {"cli.main", "cli.train", "cli.sample", "cli.encode"}
PUBLISHED = {f"pretrained.{name}" for name in ("files", "folders", "pickles")}
INNER = {"checkpoint.backend", "runs.folder"} | PUBLISHED | COMMANDS
RECORDS = {"ImageFolder.__init__"}


class Named:
    """As any library may have it."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


FORMS = {
    "str": str,
    "relative": lambda path: os.path.relpath(path),
    "pathlib": Path,
    "PathLike": Named,
}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with one of everything that can be opened."""
    folder = tmp_path_factory.mktemp("there")
    published(folder)
    for name in ("pictures/a/1.png", "pictures/b/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "orange").save(folder / name)
    vae = pretrained.load_vae(folder / "vae")
    encoding.encode(vae, data.image_folder(folder / "pictures"), folder / "latents", size=8)
    save_dit(folder / "diffusers")
    settings, run = Settings(hidden_size=8, depth=1, num_heads=1), Folder(folder / "run")
    about = About((1, 8, 8), ("a", "b"), None)
    run.path.mkdir()
    run.begin(settings, about, 1)
    with Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(1, state.new_state(settings, about, None))
    return folder


def save_dit(path):
    network = edt.DiT(4, 2, 8, 1, 2, 3, key=KEY)
    pretrained.save_diffusers_dit(network, path, allow_mismatch=True)


def sampling():
    more = {"null": 10, "guidance_scale": 1.0, "sampler": "ddim", "key": KEY}
    return Sampling(tiny(), Diffusion(2), shape=(1, 8, 8), **more)


def saved(path):
    with Checkpoints(path) as checkpoints:
        checkpoints.save(3, {"a": jnp.arange(3)})
    with Checkpoints(path, read_only=True) as checkpoints:
        return checkpoints.restore({"a": jnp.arange(3)}).state


def encoded(path, there):
    folder = data.image_folder(there / "pictures")
    encoding.encode(pretrained.load_vae(there / "vae"), folder, path, size=8)
    return np.array(data.open_latents(path).mean)


def unfinished(path):
    work = resumable.Unfinished(path)
    with work.open({}, {"a": ((2,), np.float32)}, 2):
        work.write(0, a=np.ones(2))
        work.finish_folder()
    return np.load(Path(os.fspath(path)) / "a.npy")


def samples(path):
    npz.write_npz(path, sampling(), np.arange(2), batch_size=1, record={})
    return np.load(os.fspath(path))["arr_0"]


def picture(write, *arguments):
    def call(path):
        write(path, *arguments)
        return np.asarray(Image.open(os.fspath(path)))

    return call


def text(write):
    def call(path):
        write(path)
        return len(Path(os.fspath(path)).read_bytes())

    return call


def replaced(path):
    with disk.replacing(path) as file:
        file.write(b"abc")


def locked(path):
    with (
        disk.locked(path),
        pytest.raises(FileExistsError, match="another process"),
        disk.locked(path),
    ):
        pass


# Every function that takes a path; those that read, with what of `there` they are given.
READ = {
    "image_folder": ("pictures", lambda p: data.image_folder(p).label),
    "read_image": ("pictures/a/1.png", lambda p: data.read_image(p, 8)),
    "mapped": ("latents/mean.npy", lambda p: np.array(disk.mapped(p))),
    "open_latents": ("latents", lambda p: np.array(data.open_latents(p).mean)),
    "LatentSource.__init__": ("latents", lambda p: data.LatentSource(p).read(0, rng())),
    "LatentSource.__setstate__": ("latents", lambda p: data.LatentSource(p).read(0, rng())),
    "describe": ("dit.safetensors", lambda p: pretrained.describe(p, num_heads=4).config.depth),
    "load_dit": ("dit.safetensors", lambda p: pretrained.load_dit(p, num_heads=4)),
    "load_diffusers_dit": (
        "diffusers",
        lambda p: pretrained.load_diffusers_dit(p, arithmetic="official"),
    ),
    "load_vae": ("vae", pretrained.load_vae),
    "open_file": ("dit.safetensors", lambda p: official.open_file(p, num_heads=4).config.depth),
    "open_dit": ("diffusers", lambda p: diffusers.open_dit(p).config.depth),
    "restore_ema": ("run", state.restore_ema),
    "of_run": ("run", lambda p: sources.of_run(p).network),
}
WRITE = {
    "save_diffusers_dit": lambda p: (
        save_dit(p) or pretrained.load_diffusers_dit(p, arithmetic="official")
    ),
    "save_vae": lambda p: pretrained.save_vae(vae(), p) or pretrained.load_vae(p),
    "Checkpoints.__init__": saved,
    "Unfinished.__init__": unfinished,
    "write_npz": samples,
    "grid": picture(report.grid, np.zeros((1, 1, 1, 8, 8), np.float32), "a"),
    "loss_curve": picture(report.loss_curve, [{"step": 1, "loss": 1.0}]),
    "replace": text(lambda p: disk.replace(p, "abc")),
    "replacing": text(replaced),
    "to_disk": text(lambda p: disk.replace(p, "abc") or disk.to_disk(p)),
    "append": text(lambda p: disk.append(p, "abc")),
    "locked": text(locked),
}


def rng():
    return np.random.default_rng(0)


def vae():
    return edt.Autoencoder(1, 1, 2, (4, 4), 1, 2, key=KEY)


def _takes_path(annotation):
    members = [*union_members(annotation)]
    return any((get_origin(m) or m) in (Path, os.PathLike) for m in members)


def _functions():
    for module in pkgutil.walk_packages(edt.__path__, "equidit."):
        if module.name.removeprefix("equidit.") in INNER | {"__main__"}:
            continue
        room = importlib.import_module(module.name)
        for name, thing in vars(room).items():
            if getattr(thing, "__module__", None) != room.__name__:
                continue
            if inspect.isfunction(thing) and not name.startswith("_"):
                yield name, thing
            elif inspect.isclass(thing):
                for method, function in vars(thing).items():
                    if inspect.isfunction(function):
                        yield f"{name}.{method}", function


def test_every_path_may_be_a_string_and_the_table_has_it():
    found = set()
    for name, function in _functions():
        for parameter in inspect.signature(function).parameters.values():
            if name not in RECORDS and _takes_path(parameter.annotation):
                assert {*union_members(parameter.annotation)} >= {str, os.PathLike[str]}, name
                found.add(name)
    assert found == {*READ, *WRITE, "encode"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", READ)
def test_read_by_any_form_of_path(there, name, form):
    where, call = READ[name]
    assert difference(call(FORMS[form](there / where)), call(there / where)) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WRITE)
def test_written_by_any_form_of_path(tmp_path, name, form):
    kind = ".npz" if name == "write_npz" else ".png" if name in ("grid", "loss_curve") else ""
    paths = (tmp_path / f"plain{kind}", FORMS[form](tmp_path / f"formed{kind}"))
    plain, formed = map(WRITE[name], paths)
    assert difference(formed, plain) == 0


@pytest.mark.parametrize("form", FORMS)
def test_encoded_by_any_form_of_path(there, tmp_path, form):
    found = encoded(FORMS[form](tmp_path / "out"), there)
    assert difference(found, np.array(data.open_latents(there / "latents").mean)) == 0


def test_here_is_a_path(there, monkeypatch):
    monkeypatch.chdir(there / "latents")
    assert len(data.open_latents(".").label) == 2
    monkeypatch.chdir(there / "pictures")
    assert data.image_folder(".").classes == ("a", "b")
    with pytest.raises(FileExistsError, match="exists: choose another"):
        unfinished(".")


@pytest.mark.parametrize("wrong", [b"bytes", 3, None])
def test_what_is_no_path(wrong):
    for function in (data.image_folder, data.open_latents, Checkpoints, pretrained.load_vae):
        with pytest.raises(TypeCheckError):
            function(wrong)
