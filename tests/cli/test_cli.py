"""The command, as a user calls it."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import get_args

import jax
import matplotlib.image
import numpy as np
import pytest
from commands import error_of, run, saved, share_steps
from helpers import COMMAND, tree_allclose

from equidit import hosts
from equidit.cli.sample import numbers_of
from equidit.cli.train import example_labels
from equidit.configs import CONFIGS
from equidit.runs import sampling
from equidit.runs.folder import Folder
from equidit.runs.log import Log
from equidit.runs.settings import MODELS, Model, Settings

# As many samples for the report as for the picture: one program draws both.
SMALL = shlex.split(
    "--hidden-size 16 --depth 1 --num-heads 2 --sampling-steps 4 --batch-size 16 "
    "--report-samples 100"
)
EVERY = shlex.split("--log-every 2 --sample-every 4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run; those after it that compute the same use its compiled step."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        assert run("train", "digits", "--out", out, "--steps", 6, *SMALL, *EVERY) == 0
        yield out


@pytest.fixture(scope="module")
def stopped(trained, tmp_path_factory):
    """The same run begun in the place of another, traced from step 4 on, and interrupted in
    step 5; and what it said."""
    out = tmp_path_factory.mktemp("runs") / "my digits"
    shutil.copytree(trained, out)
    begin, begun = Log.step, []

    def interrupted(self, waited):
        begin(self, waited)
        begun.append(1)
        if len(begun) == 5:
            signal.raise_signal(signal.SIGINT)

    words = ("train", "--out", out, "--overwrite", "--steps", 8, "--profile", 4)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(Log, "step", interrupted)
        assert run(*words, *SMALL, *EVERY) == 0
    return out, printed.getvalue()


def test_what_a_run_leaves(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "loss.png", "samples.png", "checkpoints"}
    assert any(path.name.startswith("events") for path in (trained / "tensorboard").iterdir())
    assert not [name for name in names if name.endswith(".partial")]
    config = json.loads((trained / "config.json").read_text())
    assert config["settings"]["data"] == "digits"
    assert config["settings"]["hidden_size"] == 16
    assert config["about"]["classes"] == list("0123456789")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 6]
    for row in rows:
        assert row.keys() >= (
            {"loss", "grad_norm", "param_norm", "images_per_second", "mfu", "data_wait"}
            if "loss" in row
            else {"validation_loss", "validation_loss_by_quartile"}
        )
    report = json.loads((trained / "report.json").read_text())
    assert Settings().report_samples == 500
    assert report["samples"] == report["frechet_at"] == 100
    assert 0 < report["accuracy_held_out"] <= 1
    assert report["frechet"] > report["frechet_floor"] > 0
    assert report["nearest"] > 0
    quartiles = report["validation_loss_by_quartile"]
    assert report["validation_loss"] == pytest.approx(np.mean(quartiles))


def test_pictures_show_something(trained):
    for name in ("samples.png", "loss.png"):
        pixels = matplotlib.image.imread(trained / name)
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels)) > 20


def test_a_run_that_is_stopped_says_how_to_go_on(stopped):
    out, printed = stopped
    assert f"equidit train digits --out '{out}' --resume" in printed
    rows = Folder(out).rows()
    # Of the run that was there before nothing is left.
    assert [row["step"] for row in rows] == [2, 4, 4, 5, 5]
    assert "validation_loss" in rows[-1]
    assert not (out / "report.json").exists()


def test_a_trace_is_whole_even_if_the_run_ends_within_it(stopped, tmp_path, capsys):
    out, _ = stopped
    (trace,) = (out / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size
    words = ("train", "--out", tmp_path / "run", *SMALL, "--steps", 3, "--profile", 4)
    assert "not among the steps to do, 1 to 3" in error_of(capsys, *words)
    assert not (tmp_path / "run").exists()
    message = error_of(capsys, "train", "--out", out, "--resume", "--profile", 3)
    assert "profile=3 is not among the steps to do, 6 to 8" in message


def test_resume_is_bit_exact(stopped, trained, tmp_path, capsys):
    out = tmp_path / "digits"
    shutil.copytree(stopped[0], out)
    assert run("train", "--out", out, "--steps", 6, "--resume") == 0
    assert tree_allclose(saved(out), saved(trained))
    assert (out / "samples.png").read_bytes() == (trained / "samples.png").read_bytes()
    assert f"equidit sample {out}" in capsys.readouterr().out


def test_sample(trained, capsys):
    common = ("--steps", 3, "--per-label", 2, "--labels")
    assert run("sample", trained, *common, "3,1,4") == 0
    first = capsys.readouterr().out.strip()
    assert first == str(trained / "sample-ddim3-scale1.5-seed0.png")
    assert run("sample", trained, *common, "3", "1", "4", "--out", trained / "again.png") == 0
    assert (trained / "again.png").read_bytes() == Path(first).read_bytes()
    for change in (["--sampler", "ddpm"], ["--guidance-scale", 1], ["--seed", 1]):
        other = trained / "other.png"
        assert run("sample", trained, *common, "3,1,4", "--out", other, *change) == 0
        assert other.read_bytes() != (trained / "again.png").read_bytes()


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as exit:
        run("train", "--help")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "latents:DIR" in text
    for setting in Settings().record().keys() - {"data"}:
        assert f"--{setting.replace('_', '-')}" in text
    assert "400000" not in text
    with pytest.raises(SystemExit):
        run("train", "--data", "folder:nowhere", "--help")
    # The defaults shown are those of the kind of data.
    assert "400000" in capsys.readouterr().out


def test_every_setting_may_change_when_a_run_goes_on_or_may_not():
    decided = {f.name: f.metadata["may_change"] for f in dataclasses.fields(Settings)}
    assert set(decided.values()) == {True, False}
    assert Settings().fixed().keys() == {name for name, free in decided.items() if not free}
    other = {"data": "folder:a", "steps": 5, "workers": 1, "vae": "b", "save_errors": "warn"}
    Settings(**other).check_resumes(Settings())
    with pytest.raises(ValueError, match=r"differ: batch_size=8 \(was 64\), seed=1 \(was 0\)$"):
        Settings(batch_size=8, seed=1, steps=5).check_resumes(Settings())


def test_each_purpose_has_the_key_that_it_always_had():
    settings = Settings(seed=3)
    for number, purpose in enumerate(("init", "train", "validate", "sample")):
        expected = jax.random.fold_in(jax.random.key(3), number)
        assert (settings.key(purpose) == expected).all()


def test_models_are_the_paper_s_and_a_small_one():
    assert get_args(Model) == ("tiny", *CONFIGS) == tuple(MODELS)


def test_a_folder_that_exists(trained, tmp_path, capsys):
    before = saved(trained)
    message = error_of(capsys, "train", "--out", trained)
    assert "--resume" in message
    assert "--overwrite" in message
    assert tree_allclose(saved(trained), before)
    assert "exclude" in error_of(capsys, "train", "--out", trained, "--resume", "--overwrite")
    (tmp_path / "thesis.tex").write_text("precious")
    assert "other things" in error_of(capsys, "train", "--out", tmp_path, "--overwrite")
    assert "no folder" in error_of(capsys, "train", "--out", tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", 0], ["steps=0"]),
        (["--batch-size", 12], ["batch of 12", "8 devices", "8 or 16"]),
        (["--patch-size", 3], ["height=8", "patch_size=3"]),
        (["--hidden-size", 20, "--num-heads", 3], ["dim=20", "num_heads=3"]),
        (["--learning-rate", "nan"], ["learning_rate=nan"]),
        (["--learning-rate", -1], ["learning_rate=-1"]),
        (["--label-dropout", 1.5], ["label_dropout=1.5"]),
        (["--ema-decay", 2], ["ema_decay=2"]),
        (["--sampling-steps", 2000], ["sampling_steps=2000", "1000"]),
        (["--seed", -1], ["seed=-1"]),
        (["--resume"], ["no run", "config.json"]),
    ],
)
def test_bad_settings_write_nothing(tmp_path, capsys, arguments, words):
    out = tmp_path / "digits"
    message = error_of(capsys, "train", "--out", out, *arguments)
    assert all(word in message for word in words), message
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "3,10"], ["label 10", "0 to 9"]),
        (["--labels", "-1"], ["label -1", "0 to 9"]),
        (["--labels", ""], ["labels=", "no whole number such as those of 3,1,4"]),
        (["--labels", "3,x"], ["labels='3,x'", "'x' is no whole number", "choose from"]),
        (["--labels"], ["labels=", "no whole number"]),
        (["--steps", 1001], ["1001", "1000"]),
        (["--steps", 0], ["0"]),
        (["--per-label", 0], ["per_label=0"]),
        (["--guidance-scale", "nan"], ["scale=nan"]),
        (["--count", 5], ["--count belongs to --npz"]),
        (["--overwrite"], ["--overwrite belongs to --npz"]),
        (["--npz", "--per-label", 5], ["--per-label belongs to a picture"]),
        (["--out", "."], [". is a folder"]),
    ],
)
def test_bad_sampling(trained, capsys, monkeypatch, arguments, words):
    before = {path.name for path in trained.iterdir()}
    monkeypatch.setattr(sampling, "_many", None)  # nothing is drawn
    message = error_of(capsys, "sample", trained, *arguments)
    assert all(word in message for word in words), message
    assert before == {path.name for path in trained.iterdir()}


def test_unknown_names_list_the_known_ones(trained, capsys):
    for arguments, names in (
        (["sample", trained, "--sampler", "euler"], ["ddim", "ddpm"]),
        (["train", "mnist"], ["digits", "folder:DIR", "latents:DIR"]),
        (["train", "--data", "latents"], ["digits", "folder:DIR", "latents:DIR"]),
        (["train", "--model", "DiT-H/2"], ["tiny", "DiT-XL/2"]),
        (["evaluate"], ["train", "sample"]),
    ):
        message = error_of(capsys, *arguments)
        assert all(name in message for name in names), message


def test_damaged_and_foreign_runs(stopped, trained, tmp_path, capsys):
    assert "no run" in error_of(capsys, "sample", tmp_path / "nowhere")
    out = tmp_path / "digits"
    shutil.copytree(stopped[0], out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps(config | {"settings": config["settings"] | {"depth": 2}})
    )
    assert "depth" in error_of(capsys, "train", "--out", out, "--resume")
    assert "another model" in error_of(capsys, "sample", out)
    for text in ("{", "[]", '{"settings": {"width": 3}}'):
        (out / "config.json").write_text(text)
        assert "config.json is damaged" in error_of(capsys, "sample", out)
    # As it was before there was this setting.
    del config["settings"]["report_samples"]
    (out / "config.json").write_text(json.dumps(config))
    for file in (out / "checkpoints" / "5").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    # The one before it is whole, and training goes on from there.
    assert run("sample", out, "--steps", 4, "--out", tmp_path / "a.png") == 0
    # Ten classes, ten of each, enlarged from 8 pixels to 64.
    shape = matplotlib.image.imread(tmp_path / "a.png").shape
    assert shape[:2] == (10 * 68, 64 + 10 * 68)
    more = ("--steps", 6, "--report-samples", 100)
    assert run("train", "--out", out, "--resume", *more) == 0
    assert "5" in capsys.readouterr().err
    assert tree_allclose(saved(out), saved(trained))

    def rows(folder):
        rates = {"images_per_second": 0, "mfu": 0, "data_wait": 0}
        return [row | rates for row in Folder(folder).rows()]

    assert rows(out) == rows(trained)
    shutil.rmtree(out / "checkpoints")
    assert "checkpoint" in error_of(capsys, "sample", out)


def test_resume_takes_what_is_asked_for_even_if_it_is_the_default(trained, capsys):
    # 64 is the default batch size, and this run's is 16.
    message = error_of(capsys, "train", "--out", trained, "--resume", "--batch-size", 64)
    assert "batch_size=64 (was 16)" in message
    assert "seed=0" not in error_of(capsys, "train", "--out", trained, "--resume", "--steps=5")


def test_resume_refuses_other_settings(trained, capsys):
    out = ("--out", trained, "--resume")
    message = error_of(capsys, "train", *out, "--batch-size", 32)
    assert "batch_size=32 (was 16)" in message
    assert "beyond steps=5" in error_of(capsys, "train", *out, "--steps", 5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    out = tmp_path / "digits"
    message = error_of(
        capsys,
        *("train", "--out", out, "--learning-rate", 1e30, "--steps", 40, *SMALL),
        *("--log-every", 1, "--sample-every", 2, "--max-skipped", 3),
    )
    assert "in a row" in message
    assert "--learning-rate" in message
    # The first step is taken; of those that were not, no weight is touched.
    skipped = [row["skipped"] for row in Folder(out).rows() if "skipped" in row]
    assert sum(skipped) >= 3
    assert f"The last good checkpoint is step 2 in {out}" in message
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(out)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_asked_to_stop_leaves_a_checkpoint_to_go_on_from(tmp_path, number):
    out = tmp_path / "my digits"
    command = [*COMMAND, "train", "--out", str(out)]
    settings = [*SMALL, "--steps", "100000", "--log-every", "1", "--sample-every", "100000"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *settings], env=environment, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"equidit train digits --out '{out}' --resume" in printed
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    stopped = rows[-1]["step"]
    assert "validation_loss" in rows[-1]
    assert run("train", "--out", out, "--resume", "--steps", stopped + 1) == 0
    assert Folder(out).rows()[-1]["step"] == stopped + 1


def test_labels_by_name():
    classes = ("cat", "dog", "7", "tabby, cat")
    assert numbers_of(["dog", "0", "cat", " 3"], classes) == [1, 0, 0, 3]
    # A name that looks like a number is asked which it is, but for a class of that number.
    with pytest.raises(ValueError, match=r"'7' is the name of class number 2: write =7 .* \+7"):
        numbers_of(["7"], classes)
    assert numbers_of(["=7", "+7", "=dog", "2"], classes) == [2, 7, 1, 2]
    assert numbers_of(["1", "0"], ("0", "1")) == [1, 0]
    for word in ("0", "1"):
        with pytest.raises(ValueError, match=f"{word}.* is the name of class number"):
            numbers_of([word], ("1", "0"))
    with pytest.raises(ValueError, match=r"'dgo' is no whole number.*did you mean 'dog'"):
        numbers_of(["cat", "dgo"], classes)
    with pytest.raises(ValueError, match=r"'dog' is no whole number such as those of 3,1,4$"):
        numbers_of(["dog"], ())


@pytest.mark.parametrize(
    ("classes", "example"),
    [
        (tuple("0123456789"), "3,1,4"),
        (("cat", "dog"), "cat,dog"),
        (("cat",), "cat"),
        (tuple(f"n{i}" for i in range(1000)), "n3,n1,n4"),
        (("tabby, cat", "dog"), "0,1"),
        (("-1", "dog"), "0,1"),
    ],
)
def test_the_hint_names_labels_that_there_are(classes, example):
    assert example_labels(classes) == example
    numbers = numbers_of(example.split(","), classes)
    assert all(0 <= number < len(classes) for number in numbers)


def test_a_divided_state_on_one_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "data_mesh", lambda: None)
    for mode in ("zero1", "fsdp"):
        words = ("digits", "--out", tmp_path / "run", "--sharding", mode, *SMALL)
        message = error_of(capsys, "train", *words)
        assert f"sharding='{mode}' divides" in message
        assert "--sharding replicated" in message
