"""Runs on pictures and latents, on one host and on two, and what they refuse."""

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import matplotlib.image
import numpy as np
import pytest
from commands import error_of, run, saved, share_steps
from helpers import COMMAND, free_port, published, tree_allclose, with_devices
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import incidents, kills
from equidit.checkpoint import CheckpointError, Checkpoints
from equidit.runs.folder import Folder
from equidit.runs.watch import Interrupts

SMALL = shlex.split(
    "--model tiny --hidden-size 16 --depth 1 --num-heads 2 --batch-size 8 --steps 6 --workers 0 "
    "--log-every 2 --sample-every 4 --sampling-steps 3 --held-out 4 --learning-rate 1e-3"
)
# As a run's own pictures: the same program draws both.
DRAWN = ("--steps", 3, "--guidance-scale", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two classes, cut from photographs that scikit-learn ships; and a small VAE."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            top, left = rng.integers(0, 427 - 96), rng.integers(0, 640 - 96)
            picture = Image.fromarray(photograph[top : top + 96, left : left + 96])
            picture.save(folder / "pictures" / name / f"{i}.jpg")
    published(folder)
    return folder


@pytest.fixture(scope="module")
def latents(folder):
    """The pictures, encoded."""
    words = ("--vae", folder / "vae", "--out", folder / "latents", "--size", 32, "--batch-size", 1)
    assert run("encode", "--images", folder / "pictures", *words) == 0
    return folder / "latents"


@pytest.fixture(scope="module")
def trained(folder, latents):
    """A run on them, and what it said; others that compute the same use its compiled step."""
    out, printed = folder / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        words = ("train", "--data", f"latents:{latents}", "--out", out, *SMALL)
        with contextlib.redirect_stdout(printed):
            assert run(*words, "--vae", folder / "vae") == 0
        yield out, printed.getvalue()


def rows(out):
    return Folder(out).rows()


def test_from_pictures_to_latents_to_samples(trained, tmp_path):
    out, printed = trained
    assert "Validation loss" in printed
    config = json.loads((out / "config.json").read_text())
    assert config["about"]["shape"] == [4, 16, 16]
    assert config["about"]["classes"] == ["flower", "temple"]
    # The paper's recipe, where nothing else was said.
    assert config["settings"]["ema_decay"] == 0.9999
    assert {row["step"] for row in rows(out)} == {2, 4, 6}
    assert len(np.unique(matplotlib.image.imread(out / "samples.png"))) > 20
    picture = tmp_path / "a.png"
    words = ("--labels", "0,1", "--per-label", 4, *DRAWN, "--out", picture)
    assert run("sample", out, *words) == 0
    # The rows are two of four images of 32 pixels, enlarged to 64.
    assert matplotlib.image.imread(picture).shape[:2] == (2 * 68, 64 + 4 * 68)
    resumed = tmp_path / "resumed"
    shutil.copytree(out, resumed)
    # As if it had been killed after step 4.
    shutil.rmtree(resumed / "checkpoints" / "6")
    assert run("train", "--out", resumed, "--resume", "--steps", 6, "--workers", 0) == 0
    assert tree_allclose(saved(resumed), saved(out))


def test_pictures_as_they_are_of_one_class(folder, tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(folder / "pictures" / "temple", pictures / "temple")
    (pictures / "temple" / "3.jpg").write_bytes(b"")
    (pictures / "temple" / "notes.txt").write_text("")
    (pictures / "temple" / "gone.jpg").symlink_to("nowhere.jpg")
    more = ("--size", 16, "--held-out", 2, "--steps", 4, "--skip-corrupt")
    assert run("train", f"folder:{pictures}", "--out", out, *SMALL, *more) == 0
    said = capsys.readouterr().err
    assert said.count(f"left out of {pictures}: 1 .txt, 1 broken link") == 1
    # One of ten is damaged, and 32 were read; it may lie among the held out.
    assert 0 < sum(row.get("corrupt", 0) for row in rows(out)) < 8
    about = json.loads((out / "config.json").read_text())["about"]
    assert (about["shape"], about["classes"]) == ([3, 16, 16], ["temple"])
    assert (out / "samples.png").exists()
    picture = tmp_path / "a.png"
    assert run("sample", out, "--labels", "temple", *DRAWN, "--out", picture) == 0
    assert "label 1" in error_of(capsys, "sample", out, "--labels", "1", "--steps", 2)


def test_bad_data(folder, latents, tmp_path, capsys):
    out = ("--out", tmp_path / "run", *SMALL)

    def message(*words):
        said = error_of(capsys, "train", *words)
        assert not (tmp_path / "run").exists()
        return said

    pictures = folder / "pictures"
    assert "nowhere" in message("folder:nowhere", *out)
    (tmp_path / "empty").mkdir()
    assert "no class folders" in message(f"folder:{tmp_path / 'empty'}", *out)
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "pictures").symlink_to(pictures)
    assert "the one folder pictures" in message(f"folder:{tmp_path / 'around'}", *out)
    few = message(f"folder:{pictures}", *out, "--batch-size", 24, "--size", 16)
    assert "20 examples" in few
    assert "held_out=4" in few
    assert "multiple" in message(f"latents:{latents}", *out, "--batch-size", 12)
    assert "height=18" in message(f"folder:{pictures}", *out, "--size", 18, "--patch-size", 4)
    _, other = published(tmp_path, latent_channels=8)
    assert "fingerprint" in message(f"latents:{latents}", *out, "--vae", other)
    assert "no cache of latents" in message(f"latents:{pictures}", *out)
    (tmp_path / "file").write_text("")
    unwritable = ("--out", tmp_path / "file" / "run", *SMALL)
    assert "file" in message(f"latents:{latents}", *unwritable)


def test_a_damaged_picture_is_named(folder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    for name in ("a", "b"):
        shutil.copytree(folder / "pictures" / "temple", pictures / name)
        for i in (8, 9):
            (pictures / name / f"{i}.jpg").unlink()
    (pictures / "b" / "5.jpg").write_bytes(b"not a picture")
    # All of them are in the first batch.
    words = (*SMALL, "--size", 16, "--batch-size", 16, "--held-out", 0)
    message = error_of(capsys, "train", f"folder:{pictures}", "--out", tmp_path / "run", *words)
    assert "b/5.jpg is no picture, or damaged" in message
    assert "example " in message


def test_other_data_are_refused_when_a_run_goes_on(trained, folder, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    config = json.loads((out / "config.json").read_text())
    config["settings"]["vae"] = None
    (out / "config.json").write_text(json.dumps(config))
    message = error_of(capsys, "train", "digits", "--out", out, "--resume")
    assert "is not what the run was begun with" in message
    assert "--vae" in error_of(capsys, "sample", out, "--labels", "0")
    assert "label 2" in error_of(capsys, "sample", out, "--labels", "2", "--vae", folder / "vae")


def hosts(*words, count=2, devices=4):
    """Starts so many processes that train together."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                *COMMAND,
                *map(str, words),
                *("--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)),
                *("--process-id", str(i)),
            ],
            env=with_devices(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


@pytest.mark.slow
def test_sigterm_to_one_host_stops_both_at_one_step(latents, tmp_path):
    out = tmp_path / "run"
    more = ("--steps", 100_000, "--log-every", 1, "--sample-every", 100_000, "--out", out)
    processes = hosts("train", f"latents:{latents}", *SMALL, *more)
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert all(process.poll() is None for process in processes), processes[0].communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert f"equidit train latents:{latents} --out {out} --resume" in printed[0]
    assert int(saved(out).step) == rows(out)[-1]["step"]


@pytest.mark.slow
def test_two_hosts_make_the_same_run_as_one(latents, tmp_path):
    words = ("train", f"latents:{latents}", *SMALL, "--sharding", "zero1", "--out")
    processes = hosts(*words, tmp_path / "two")
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    # One of them speaks and writes.
    assert "Validation loss" in printed[0]
    assert "Validation loss" not in printed[1]
    assert run(*words, tmp_path / "one") == 0
    assert jax.device_count() == 8
    assert tree_allclose(saved(tmp_path / "two"), saved(tmp_path / "one"))
    names = ("step", "loss", "grad_norm", "validation_loss")
    kept = [
        [{name: row.get(name) for name in names} for row in rows(tmp_path / out)]
        for out in ("one", "two")
    ]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_had_begun(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "lock").write_text("")
    (out / "config.json.partial").write_text("{")
    assert run("train", "digits", "--out", out, *SMALL, "--steps", 2) == 0
    # And one that was killed before its first checkpoint.
    for path in (out / "checkpoints").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    assert run("train", "digits", "--out", out, "--resume") == 0
    assert int(saved(out).step) == 2


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_same_in_the_end(tmp_path):
    counts = kills.campaign(5, seed=random.randrange(2**32), folder=tmp_path)
    assert counts["kills"] >= 5
    assert counts["no checkpoint lost"] == counts["kills"]
    assert counts["runs equal bit for bit"] >= 1
    assert not counts.keys() & {"runs that differ", "could not go on", "a checkpoint lost"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "disk full on two hosts, save_errors=warn",
        "kill -9 of a data worker",
        "kill -9 of the second of two hosts",
    ],
)
def test_a_run_to_which_something_happens(tmp_path, name):
    if name.startswith("disk") and os.geteuid():
        pytest.skip("a small disk wants root")
    assert not incidents.INCIDENTS[name](tmp_path).startswith("WRONG")


def test_a_save_that_fails_stops_the_run_or_not(trained, latents, tmp_path, capsys, monkeypatch):
    """Of one host's saves the newest fails: after the fact, as asynchronous ones do."""
    wait = Checkpoints.wait

    def broken(self):
        failed = self._saving == 2
        wait(self)
        if failed:
            raise CheckpointError("the checkpoint of step 2 could not be saved")

    monkeypatch.setattr(Checkpoints, "wait", broken)
    words = ("train", f"latents:{latents}", *SMALL, "--steps", 2, "--out")
    assert "step 2 could not" in error_of(capsys, *words, tmp_path / "stop")
    assert run(*words, tmp_path / "warn", "--save-errors", "warn") == 0
    assert "step 2 could not" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_is_as_ever(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append("theirs"))
    try:
        with Interrupts() as interrupts:
            assert not interrupts.stop(1)
            signal.raise_signal(number)
            assert interrupts.stop(1)
            assert heard == []
            signal.raise_signal(number)
            assert heard == ["theirs"]
        signal.raise_signal(number)
        assert heard == ["theirs"] * 2
    finally:
        signal.signal(number, before)


def test_a_run_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    handlers = []

    def run() -> None:
        with Interrupts() as interrupts:
            handlers.append(signal.getsignal(signal.SIGINT))
            assert not interrupts.stop(1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
    assert handlers == [before]
