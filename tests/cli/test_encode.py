"""From a folder of pictures to a cache of latents, and back to what training reads."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_of, run
from helpers import published
from PIL import Image

from equidit import pretrained
from equidit.data import open_latents, read_image


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return published(tmp_path_factory.mktemp("published"))[1]


@pytest.fixture
def pictures(tmp_path):
    """Five pictures of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.jpg", "cat/3.png", "dog/1.png", "dog/2.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return tmp_path / "pictures"


def options(pictures, vae, out):
    sizes = ("--size", 32, "--batch-size", 1)
    return ("encode", "--images", pictures, "--vae", vae, "--out", out, *sizes)


def test_latents_are_the_moments_of_each_picture_and_its_mirror_image(pictures, vae, tmp_path):
    out = tmp_path / "latents"
    assert run(*options(pictures, vae, out)) == 0
    cache = open_latents(out)
    assert cache.label.tolist() == [0, 0, 0, 1, 1]
    assert cache.info["classes"] == ["cat", "dog"]
    assert (cache.info["size"], cache.info["downsampling"]) == (32, 2)
    names = (out / "files.txt").read_text().split()
    assert names == ["cat/1.png", "cat/2.jpg", "cat/3.png", "dog/1.png", "dog/2.png"]
    assert isinstance(cache.mean, np.memmap)
    autoencoder = pretrained.load_vae(vae)
    encode = eqx.filter_jit(autoencoder.encode)
    for row, name in enumerate(names):
        pixels = read_image(pictures / name, 32).astype(np.float32) / 127.5 - 1
        for mirrored, x in enumerate((pixels, pixels[..., ::-1])):
            latent = encode(jnp.asarray(x))
            assert np.abs(cache.mean[row, mirrored] - latent.mean).max() < 1e-5
            std = np.exp(latent.log_variance / 2)
            np.testing.assert_allclose(cache.std[row, mirrored], std, rtol=1e-4)
    assert np.abs(cache.mean[:, 0] - cache.mean[:, 1]).max() > 0.01
    assert {path.name for path in out.iterdir()} == {
        *("mean.npy", "std.npy", "label.npy", "files.txt", "info.json")
    }


def test_half_precision_is_the_same_rounded(pictures, vae, tmp_path):
    for dtype in ("float32", "float16"):
        assert run(*options(pictures, vae, tmp_path / dtype), "--dtype", dtype) == 0
    full, half = (open_latents(tmp_path / dtype) for dtype in ("float32", "float16"))
    assert half.mean.dtype == np.float16
    np.testing.assert_array_equal(half.mean, full.mean.astype(np.float16))
    np.testing.assert_array_equal(half.std, full.std.astype(np.float16))


def test_again_does_nothing_and_other_settings_are_refused(pictures, vae, tmp_path, capsys):
    out = tmp_path / "latents"
    assert run(*options(pictures, vae, out)) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(*options(pictures, vae, out)) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    message = error_of(capsys, *options(pictures, vae, out), "--dtype", "float16")
    assert "exists" in message
    assert "--overwrite" in message
    assert run(*options(pictures, vae, out), "--dtype", "float16", "--overwrite") == 0
    assert open_latents(out).mean.dtype == np.float16


def test_damaged_pictures(pictures, vae, tmp_path, capsys):
    out = tmp_path / "latents"
    whole = (pictures / "dog/1.png").read_bytes()
    (pictures / "dog/1.png").write_bytes(whole[:100])
    message = error_of(capsys, *options(pictures, vae, out))
    assert "dog/1.png is no picture, or damaged" in message
    assert not out.exists()
    with pytest.raises(FileNotFoundError, match="not finished: run the same"):
        open_latents(out)
    # The picture is mended, and the work goes on.
    (pictures / "dog/1.png").write_bytes(whole)
    assert run(*options(pictures, vae, out)) == 0
    (pictures / "dog/1.png").write_bytes(whole[:100])
    skipping = tmp_path / "skipping"
    capsys.readouterr()
    # Nothing is done when it stops, so that other settings are no reason against going on.
    assert "dog/1.png is no picture" in error_of(capsys, *options(pictures, vae, skipping))
    assert run(*options(pictures, vae, skipping), "--skip-corrupt") == 0
    printed = capsys.readouterr().out
    assert "4 pictures of 2 classes" in printed
    assert "1 damaged ones were skipped: dog/1.png" in printed
    cache = open_latents(skipping)
    assert cache.label.tolist() == [0, 0, 0, -1, 1]
    assert cache.info["skipped"] == ["dog/1.png"]
    rest = np.array([0, 1, 2, 4])
    np.testing.assert_array_equal(cache.mean[rest], open_latents(out).mean[rest])
    for path in pictures.rglob("*.*g"):
        path.write_bytes(b"")
    message = error_of(capsys, *options(pictures, vae, tmp_path / "none"), "--skip-corrupt")
    assert "none of the 5 pictures" in message


def test_small_pictures(pictures, vae, tmp_path, capsys):
    Image.new("RGB", (20, 60)).save(pictures / "dog/1.png")
    out = tmp_path / "latents"
    for more in ((), ("--skip-corrupt",)):  # small is not damaged
        message = error_of(capsys, *options(pictures, vae, out), *more, "--overwrite")
        assert "dog/1.png has 20x60 pixels" in message
        assert "--small enlarge" in message
        for path in (tmp_path / "latents.unfinished").iterdir():
            path.unlink()
    assert run(*options(pictures, vae, out), "--small", "enlarge") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", 31], ["size=31", "multiple of 2"]),
        (["--size", 0], ["size=0"]),
        (["--batch-size", 0], ["batch_size=0"]),
        (["--images", "nowhere"], ["nowhere"]),
        (["--vae", "nowhere/at/all"], ["nowhere/at/all"]),
    ],
)
def test_bad_requests(pictures, vae, tmp_path, capsys, arguments, words):
    out = tmp_path / "latents"
    message = error_of(capsys, *options(pictures, vae, out), *arguments)
    assert all(word in message for word in words), message
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}


def test_moments_that_are_not_finite(pictures, tmp_path, capsys):
    _, folder = published(tmp_path)
    autoencoder = pretrained.load_vae(folder)
    broken = jax.tree.map(lambda leaf: leaf * jnp.inf, autoencoder)
    pretrained.save_vae(broken, tmp_path / "broken")
    message = error_of(capsys, *options(pictures, tmp_path / "broken", tmp_path / "latents"))
    assert "cat/1.png are not finite" in message


def test_damaged_caches(pictures, vae, tmp_path):
    out = tmp_path / "latents"
    with pytest.raises(FileNotFoundError, match="`equidit encode` makes one"):
        open_latents(out)
    assert run(*options(pictures, vae, out)) == 0
    info = json.loads((out / "info.json").read_text())
    for change, message in (
        ({"format": 99}, "format 99.*update it"),
        ({"count": 4}, r"damaged.*info\.json says 4 pictures"),
    ):
        (out / "info.json").write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=message):
            open_latents(out)
    (out / "info.json").write_text("{")
    with pytest.raises(ValueError, match=r"info\.json is damaged"):
        open_latents(out)
    (out / "info.json").write_text(json.dumps(info))
    (out / "std.npy").write_bytes((out / "std.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        open_latents(out)


def test_caches_of_before(pictures, vae, tmp_path):
    """Of format 1 those open whose batch size put every picture into its own row."""
    out = tmp_path / "latents"
    assert run(*options(pictures, vae, out)) == 0
    info = json.loads((out / "info.json").read_text())
    for size, whole in ((1, True), (5, True), (7, True), (3, True), (4, False)):
        (out / "info.json").write_text(json.dumps(info | {"format": 1, "batch_size": size}))
        if whole:
            assert open_latents(out).info["format"] == 1
        else:
            with pytest.raises(ValueError, match=r"rows of others.*5 pictures and batch_size=4"):
                open_latents(out)
    # Given again, a whole one of format 1 is taken as it is.
    (out / "info.json").write_text(json.dumps(info | {"format": 1}))
    assert run(*options(pictures, vae, out)) == 0
    assert json.loads((out / "info.json").read_text())["format"] == 1


def test_rows_that_were_never_written(pictures, vae, tmp_path):
    out = tmp_path / "latents"
    assert run(*options(pictures, vae, out)) == 0
    label = np.load(out / "label.npy")
    label[3] = np.iinfo(np.int32).min
    np.save(out / "label.npy", label)
    with pytest.raises(ValueError, match="1 rows that were never written, row 3"):
        open_latents(out)
