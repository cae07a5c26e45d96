"""Pictures and .npz files from published weights and from runs, as a user asks for them."""

import subprocess
import zipfile
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from commands import error_of, run
from helpers import COMMAND, published, tiny, with_devices
from hypothesis import given, settings, strategies as st

import equidit as edt
from benchmarks import uneven
from equidit import cli, diffusion as dfn, pretrained
from equidit.cli.npz import random_labels, to_bytes
from equidit.runs import sampling
from equidit.runs.process import Diffusion

# The same in all tests: they share one compiled program.
STEPS = ("--steps", 3, "--guidance-scale", 4.0, "--guidance-channels", 3)
HEADS = ("--num-heads", 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name small published files."""
    weights, vae = published(tmp_path_factory.mktemp("published"))
    return ("--weights", weights, "--vae", vae, *HEADS)


def by_hand(files, labels, seed=0, scale=4.0):
    """The images that the command should make, by nothing but the library's public functions."""
    network = pretrained.load_dit(files[1], num_heads=4)
    vae = pretrained.load_vae(files[3])
    guided = edt.guide(network, scale, jnp.asarray(10), channels=3)
    schedule = dfn.Schedule(dfn.linear_betas(), dfn.space_timesteps(1000, 3))

    def one(label, index):
        noise_key, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        noise = jax.random.normal(noise_key, (4, 16, 16))
        step = partial(dfn.ddpm_step, guided, schedule)
        return vae.decode(dfn.sample(step, schedule, noise, label, key=key))

    index = jnp.arange(len(labels))
    return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(labels), index))


def test_picture_of_published_weights(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("sample", *files, *STEPS, "--labels", "2,7") == 0
    name = capsys.readouterr().out.strip()
    assert name == "sample-ddpm3-scale4-seed0.png"
    # Two rows of 32 pixels enlarged to 64, with gaps and a margin for the names.
    assert matplotlib.image.imread(name).shape[:2] == (2 * 68, 64 + 68)


def test_npz_holds_the_paper_s_samples(files, tmp_path):
    out = tmp_path / "samples.npz"
    options = ("--npz", "--count", 5, "--labels", "2,7", "--batch-size", 1, "--out", out)
    assert run("sample", *files, *STEPS, *options) == 0
    archive = np.load(out)
    assert archive.files == ["arr_0", "arr_1"]
    images, labels = archive["arr_0"], archive["arr_1"]
    assert (labels.dtype, labels.tolist()) == (np.int64, [2, 7, 2, 7, 2])
    assert (images.shape, images.dtype) == ((5, 32, 32, 3), np.uint8)
    expected = np.clip(127.5 * by_hand(files, [2, 7, 2, 7, 2]) + 128, 0, 255).astype(np.uint8)
    difference = images.astype(int) - expected.transpose(0, 2, 3, 1)
    assert np.abs(difference).max() <= 1
    assert images.std() > 20
    assert not zipfile.ZipFile(out).testzip()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def uneven_counts(uneven_files, count, size):
    out = uneven_files / f"{count}-{size}.npz"
    for what, path in (("sample", out), ("encode", out.with_suffix(""))):
        if path.exists():
            continue
        assert cli.run(uneven.command(what, uneven_files, count, size, path)) == 0
        expected = uneven.by_loop(what, uneven_files, count, size, path)
        found = uneven.written(what, path)
        assert len(found) == len(expected)
        assert uneven.rows_that_differ(found, expected) == 0


@pytest.mark.parametrize("count", [1, 11, 17])
def test_uneven_counts_are_as_the_plain_loop(uneven_files, count):
    """Less than a batch, less than one for each device, and a second go that is hardly filled."""
    uneven_counts(uneven_files, count, 2)


@pytest.mark.slow
@given(st.integers(1, 23), st.integers(1, 9))
@settings(derandomize=True, deadline=None, max_examples=6)
def test_other_counts_are_as_the_plain_loop(uneven_files, count, size):
    uneven_counts(uneven_files, count, size)


@pytest.fixture(scope="module")
def uneven_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    uneven.make_files(folder)
    return folder


def test_to_bytes():
    images = np.array([-2, -1, -0.5, 0, 1 / 255, 1, 3], np.float32)
    expected = [0, 0, 64, 128, 128, 255, 255]
    assert to_bytes(images[:, None, None, None]).ravel().tolist() == expected


def test_random_labels_belong_to_their_index():
    key = jax.random.key(0)
    labels = random_labels(5000, 10, key)
    np.testing.assert_array_equal(random_labels(100, 10, key), labels[:100])
    counts = np.bincount(labels, minlength=10)
    # Each is binomial with a deviation of 21.
    assert len(counts) == 10
    assert np.abs(counts - 500).max() < 4 * 21.2


@pytest.mark.slow
def test_devices_and_batches(files, tmp_path):
    """Another device count gives the same bytes, another batch size the same but for rounding."""

    def sampled(devices, batch_size):
        out = tmp_path / f"{devices}-{batch_size}.npz"
        options = ("--npz", "--count", 11, "--batch-size", batch_size, "--out", out)
        command = [*COMMAND, "sample", *files, *STEPS, *options]
        subprocess.run(
            [str(word) for word in command],
            env=with_devices(devices),
            check=True,
            capture_output=True,
        )
        return out

    one = sampled(1, 2)
    for devices in (2, 3):
        assert sampled(devices, 2).read_bytes() == one.read_bytes()
    images, other = (np.load(path)["arr_0"].astype(int) for path in (one, sampled(3, 3)))
    assert np.abs(images - other).max() <= 1


def test_draw_fills_up_and_cuts_off():
    network = tiny()
    drawn = sampling.Sampling(
        network,
        Diffusion(3),
        null=10,
        guidance_scale=2.0,
        sampler="ddim",
        shape=(1, 8, 8),
        key=jax.random.key(0),
    )
    labels = np.arange(11) % 10
    images = sampling.draw(drawn, labels, batch_size=2)
    assert images.shape == (11, 1, 8, 8)
    one = eqx.filter_jit(drawn.one)
    for index in (0, 10):
        alone = one(jnp.asarray(labels[index]), jnp.asarray(index))
        np.testing.assert_allclose(images[index], alone, atol=1e-4)
    assert np.abs(images[0] - images[10]).max() > 0.1


def test_interrupted_npz_goes_on_only_with_the_same_settings(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "samples.npz"
    common = ("sample", *files, *STEPS, "--npz", "--out", out, "--count", 12, "--batch-size", 1)
    whole, many = [], sampling._many

    def interrupted(*arguments):
        whole.append(1)
        if len(whole) > 1:
            raise KeyboardInterrupt
        return many(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("equidit.runs.sampling._many", interrupted)
        assert run(*common) == 130
    assert "go on if given again" in capsys.readouterr().err
    message = error_of(capsys, *common, "--seed", 1, "--guidance-scale", 2)
    assert "guidance_scale=2.0 (was 4.0)" in message
    assert "seed=1 (was 0)" in message
    assert not out.exists()
    assert run(*common) == 0
    resumed = out.read_bytes()
    # Done is done; another request needs leave to replace it.
    assert run(*common) == 0
    message = error_of(capsys, *common, "--seed", 1)
    assert "exists" in message
    assert "--overwrite" in message
    assert out.read_bytes() == resumed
    assert run(*common, "--overwrite") == 0
    assert out.read_bytes() == resumed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "10"], ["label 10", "0 to 9"]),
        (["--size", 30], ["size=30", "multiple of 4"]),
        (["--guidance-channels", 99], ["channels=99"]),
        (["--count", 0], ["count=0"]),
        (["--batch-size", 0], ["batch_size=0"]),
        (["--weights", "nowhere.pt"], ["nowhere.pt"]),
        (["--vae", "nowhere/at/all"], ["nowhere/at/all"]),
        (["--num-heads", 3], ["num_heads=3"]),
    ],
)
def test_bad_requests(files, tmp_path, capsys, arguments, words):
    out = tmp_path / "samples.npz"
    message = error_of(capsys, "sample", *files, "--npz", "--out", out, *arguments)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_of_other_latents(files, tmp_path, capsys):
    _, vae = published(tmp_path, latent_channels=8)
    message = error_of(capsys, "sample", *files, "--vae", vae)
    assert "latents of 8 channels" in message
    assert "in_channels=4" in message
    message = error_of(capsys, "sample", "--weights", files[1], *HEADS)
    assert "--vae" in message


def test_of_several_networks_one_is_selected(files, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(files[1])
    both = {f"model.{name}": array for name, array in arrays.items()}
    both |= {f"ema.{name}": array + (name != "pos_embed") for name, array in arrays.items()}
    path = tmp_path / "both.safetensors"
    save_file(both, path)
    options = ("sample", "--weights", path, *files[2:], *STEPS, "--labels", 1)
    message = error_of(capsys, *options)
    assert all(word in message for word in ("--select", "'model.'", "'ema.'"))
    assert "--select belongs to --weights" in error_of(capsys, "sample", tmp_path, "--select", "a")
    assert "select='a' is no network" in error_of(capsys, *options, "--select", "a")
    pictures = []
    for name, weights in (("model.", path), ("ema.", path), ("", files[1])):
        out = tmp_path / "new" / f"of-{name}.png"
        selected = ("--select", name) if name else ()
        assert run(*options, "--weights", weights, *selected, "--out", out) == 0
        pictures.append(matplotlib.image.imread(out))
    np.testing.assert_array_equal(pictures[0], pictures[2])
    assert np.abs(pictures[1] - pictures[2]).max() > 0


def test_what_must_be_said(files, tmp_path, capsys):
    assert "either a run's folder, or --weights" in error_of(capsys, "sample")
    assert "either" in error_of(capsys, "sample", tmp_path, *files)
    assert "--size belongs to --weights" in error_of(capsys, "sample", tmp_path, "--size", 32)
    network = pretrained.load_dit(files[1], num_heads=4, arithmetic="diffusers")
    pretrained.save_diffusers_dit(network, tmp_path / "dit", sample_size=16)
    options = ("sample", "--weights", tmp_path / "dit", "--vae", files[3], *STEPS)
    assert "--arithmetic" in error_of(capsys, *options)
    out = tmp_path / "a.png"
    assert run(*options, "--arithmetic", "diffusers", "--labels", 1, "--out", out) == 0
    sit = tmp_path / "SiT.safetensors"
    sit.write_bytes(files[1].read_bytes())
    assert "SiT" in error_of(capsys, "sample", "--weights", sit, *files[2:])
