"""Work that is killed goes on, and ends in the same bytes."""

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import COMMAND, published, with_devices
from hypothesis import given, settings, strategies as st
from PIL import Image

from equidit._base.disk import locked
from equidit.cli import resumable
from equidit.cli.resumable import Unfinished

ARRAYS = {"a": ((10, 3), np.float32)}


def test_groups_are_kept_and_the_last_is_shorter(tmp_path):
    work = Unfinished(tmp_path / "result")
    with work.open({"seed": 0}, ARRAYS, 4):
        assert work.remaining() == [0, 1, 2]
        work.write(2, a=np.full((2, 3), 2.0))
        work.write(0, a=np.full((4, 3), 0.5))
    again = Unfinished(tmp_path / "result")
    with again.open({"seed": 0}, ARRAYS, 4):
        assert again.remaining() == [1]
        assert not again.complete()
        again.write(1, a=np.full((4, 3), 1.0))
        assert again.complete()
        again.finish_folder()
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["a.npy"]
    rows = np.load(tmp_path / "result" / "a.npy")
    assert rows[:, 0].tolist() == [0.5] * 4 + [1.0] * 4 + [2.0] * 2


def test_arrays_of_others_are_never_deleted(tmp_path):
    work = Unfinished(tmp_path / "result")
    work.folder.mkdir()
    (work.folder / "settings.json").write_text('{"theirs": 1}')
    np.save(work.folder / "theirs.npy", np.ones(3))
    for overwrite in (False, True):
        with (
            pytest.raises(ValueError, match="begun with other settings"),
            work.open({"seed": 0}, ARRAYS, 4, overwrite=overwrite),
        ):
            pass
    assert (np.load(work.folder / "theirs.npy") == 1).all()


@pytest.mark.parametrize("name", ["files.txt", "info.json.partial", "info.json"])
def test_what_was_killed_just_before_its_end_goes_on(tmp_path, name):
    work = Unfinished(tmp_path / "result")
    with work.open({"seed": 0}, ARRAYS, 4):
        for group in range(3):
            work.write(group, a=np.full((len(work.rows(group)), 3), group))
        (work.folder / name).write_text("")
    again = Unfinished(tmp_path / "result")
    with again.open({"seed": 0}, ARRAYS, 4):
        assert again.complete()
        again.finish_folder()
    assert (tmp_path / "result" / "a.npy").exists()
    (work.folder).mkdir()
    (work.folder / "thesis.tex").write_text("")
    with (
        pytest.raises(FileExistsError, match="holds other things"),
        Unfinished(tmp_path / "result").open({"seed": 0}, ARRAYS, 4, overwrite=True),
    ):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("groups", [0, 1])
def test_work_of_other_settings_goes_if_none_is_done_or_it_is_unwanted(tmp_path, groups, overwrite):
    work = Unfinished(tmp_path / "result")
    with work.open({"seed": 0}, {"old": ((7, 2), np.float32)}, 3):
        for group in range(groups):
            work.write(group, old=np.ones((3, 2)))
    again = Unfinished(tmp_path / "result")
    if groups and not overwrite:
        with (
            pytest.raises(ValueError, match=r"seed=1 \(was 0\).*--overwrite"),
            again.open({"seed": 1}, ARRAYS, 4, overwrite=overwrite),
        ):
            pass
        assert work.remaining() == [1, 2]
        return
    with again.open({"seed": 1}, ARRAYS, 4, overwrite=overwrite):
        assert again.remaining() == [0, 1, 2]
        for group in range(3):
            again.write(group, a=np.full((len(again.rows(group)), 3), group))
        again.finish_folder()
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["a.npy"]


@given(st.integers(1, 40), st.integers(1, 12), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_row_is_written_once_by_the_group_that_owns_it(count, size, random):
    expected = np.arange(count * 2, dtype=np.float32).reshape(count, 2)
    arrays = {"a": ((count, 2), np.float32), "label": ((count,), np.int32)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        order = list(range(-(-count // size)))
        random.shuffle(order)
        # In two goes, as if interrupted, and in any order.
        for part in (order[: len(order) // 2], order[len(order) // 2 :]):
            work = Unfinished(path)
            with work.open({}, arrays, size):
                for group in part:
                    assert not work.complete()
                    with pytest.raises(ValueError, match="never written"):
                        work.check_complete()
                    rows = range(count)[group * size : (group + 1) * size]
                    assert work.rows(group) == rows
                    work.write(group, a=expected[rows], label=np.array(rows))
                    with pytest.raises(ValueError, match="written already"):
                        work.write(group, a=expected[rows], label=np.array(rows))
        work.finish_folder()
        np.testing.assert_array_equal(np.load(path / "a.npy"), expected)
        np.testing.assert_array_equal(np.load(path / "label.npy"), np.arange(count))


def test_a_group_is_written_whole_to_its_own_rows(tmp_path):
    work = Unfinished(tmp_path / "result")
    arrays = {"a": ((10, 3), np.float32), "label": ((10,), np.int32)}
    whole = {"a": np.ones((4, 3)), "label": np.ones(4)}
    with work.open({}, arrays, 4):
        for wrong in (
            {"a": np.ones((3, 3)), "label": np.ones(4)},
            {"a": np.ones((5, 3)), "label": np.ones(5)},
            {"a": np.ones((4, 3))},
            whole | {"b": np.ones(4)},
        ):
            with pytest.raises(ValueError, match="group 0 has 4 rows of a, label"):
                work.write(0, **wrong)
        with pytest.raises(ValueError, match="group 2 has 2 rows"):
            work.write(2, **whole)
        with pytest.raises(ValueError, match="group 3 has 0 rows"):
            work.write(3, **whole)
        work.write(0, **whole)
        assert work.remaining() == [1, 2]
        with pytest.raises(ValueError, match="2 groups of rows were never written"):
            work.finish_folder()
        # A row that nobody wrote can be told by its label.
        assert (np.load(work.array_path("label"))[4:] < -1).all()
    assert not (tmp_path / "result").exists()


def test_work_of_before_is_not_gone_on_with(tmp_path):
    """It has no format, and may have groups in the rows of others."""
    work = Unfinished(tmp_path / "result")
    with work.open({"seed": 0}, ARRAYS, 4):
        work.write(0, a=np.ones((4, 3)))
    (work.folder / "settings.json").write_text('{"seed": 0}')
    with (
        pytest.raises(ValueError, match=r"format of unfinished work=2 \(was None\).*begin anew"),
        work.open({"seed": 0}, ARRAYS, 4),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", b"{"),
        ("settings.json", b"[1]"),
        ("settings.json", b"[" * 100_000),
        ("done", b"\1"),
        ("a.npy", b"half"),
        ("a.npy", None),
    ],
)
def test_damaged_work_is_told(tmp_path, name, content):
    work = Unfinished(tmp_path / "result")
    with work.open({}, ARRAYS, 4):
        pass
    if content is None:
        np.save(work.folder / name, np.zeros((4, 3), np.float32))
    else:
        (work.folder / name).write_bytes(content)
    with (
        pytest.raises(ValueError, match=f"{name} is damaged.*delete that folder"),
        work.open({}, ARRAYS, 4),
    ):
        pass


def test_one_process_at_a_time(tmp_path):
    work, other = Unfinished(tmp_path / "result"), Unfinished(tmp_path / "result")
    with (
        work.open({}, ARRAYS, 4),
        pytest.raises(FileExistsError, match="another process"),
        other.open({}, ARRAYS, 4),
    ):
        pass
    with other.open({}, ARRAYS, 4):
        assert other.remaining() == [0, 1, 2]


def test_what_may_go_is_decided_under_the_lock(tmp_path, monkeypatch):
    work = Unfinished(tmp_path / "result")
    with work.open({"seed": 0}, ARRAYS, 4):
        pass

    @contextlib.contextmanager
    def taken_late(path):
        with locked(path):
            # Who had it until now has made a group.
            (work.folder / "done").write_bytes(b"\1\0\0")
            yield

    monkeypatch.setattr(resumable, "locked", taken_late)
    with pytest.raises(ValueError, match=r"seed=1 \(was 0\)"), work.open({"seed": 1}, ARRAYS, 4):
        pass
    assert work.remaining() == [1, 2]


def test_what_is_there_is_not_lost(tmp_path):
    work = Unfinished(tmp_path / "result")
    (tmp_path / "result.unfinished").mkdir()
    (tmp_path / "result.unfinished" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="other things"), work.open({}, ARRAYS, 4):
        pass
    (tmp_path / "result.unfinished" / "thesis.tex").unlink()
    with work.open({"seed": 0}, ARRAYS, 4):
        work.write(0, a=np.ones((4, 3)))
    with (
        pytest.raises(ValueError, match=r"seed=1 \(was 0\)"),
        work.open({"seed": 1}, ARRAYS, 4),
    ):
        pass
    with work.open({"seed": 0}, ARRAYS, 4):
        assert work.remaining() == [1, 2]


def test_begun_but_killed_before_it_was_ready(tmp_path):
    folder = tmp_path / "result.unfinished"
    folder.mkdir()
    (folder / "a.npy").write_bytes(b"half")
    (folder / "settings.json.partial").write_text("{")
    work = Unfinished(tmp_path / "result")
    with work.open({}, ARRAYS, 4):
        assert work.remaining() == [0, 1, 2]
        work.write(0, a=np.ones((4, 3)))


def _commands(folder):
    """Both commands that go on, with the file or folder that they leave."""
    weights, vae = published(folder)
    rng = np.random.default_rng(0)
    for i in range(23):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 36, 3), np.uint8)).save(path)
    sample = ["--weights", weights, "--vae", vae, "--num-heads", 4, "--steps", 40, "--npz"]
    return {
        "sample": ["sample", *sample, "--count", 23, "--batch-size", 2, "--out"],
        "encode": [
            *("encode", "--images", folder / "pictures", "--vae", vae, "--size", 32),
            *("--batch-size", 2, "--out"),
        ],
    }


def _contents(path):
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes()


def _count(done):
    """Groups that are done; 0 where there is no such work, or none any more."""
    try:
        return sum(done.read_bytes())
    except FileNotFoundError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "encode"])
def test_kill_9_at_random_moments(tmp_path, name):
    """Three kills, at random moments of the start, of the work and of the end."""
    words = [*COMMAND, *(str(word) for word in _commands(tmp_path)[name])]
    started = time.monotonic()
    subprocess.run([*words, tmp_path / "whole"], check=True, env=with_devices(1))
    duration = time.monotonic() - started
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    out = tmp_path / "killed"
    for attempt in range(3):
        process = subprocess.Popen([*words, out], env=with_devices(1), start_new_session=True)
        done = out.with_name("killed.unfinished") / "done"
        before = _count(done)
        if attempt < 2:
            # In the midst of the work, however long the start takes.
            wanted = before + rng.randrange(1, 8)
            while process.poll() is None and _count(done) < wanted:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.05)
        else:
            time.sleep(rng.random() * duration)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if done.exists():
            assert sum(done.read_bytes()) >= before
    subprocess.run([*words, out], check=True, env=with_devices(1))
    assert _contents(out) == _contents(tmp_path / "whole")
    assert not out.with_name("killed.unfinished").exists()
