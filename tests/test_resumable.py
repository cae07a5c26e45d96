"""Work that is killed goes on, and ends in the same bytes."""

import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from helpers import COMMAND, published, with_devices
from PIL import Image

from equidit._resumable import Partial

ARRAYS = {"a": ((10, 3), np.float32)}


def test_groups_are_kept_and_the_last_is_shorter(tmp_path):
    work = Partial(tmp_path / "result")
    with work.open({"seed": 0}, ARRAYS, 3):
        assert work.remaining() == [0, 1, 2]
        work.write(2, a=np.full((2, 3), 2.0))
        work.write(0, a=np.full((4, 3), 0.5))
    again = Partial(tmp_path / "result")
    with again.open({"seed": 0}, ARRAYS, 3):
        assert again.remaining() == [1]
        assert not again.complete()
        again.write(1, a=np.full((4, 3), 1.0))
        assert again.complete()
        again.finish_folder()
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["a.npy"]
    rows = np.load(tmp_path / "result" / "a.npy")
    assert rows[:, 0].tolist() == [0.5] * 4 + [1.0] * 4 + [2.0] * 2


def test_one_process_at_a_time(tmp_path):
    work, other = Partial(tmp_path / "result"), Partial(tmp_path / "result")
    with (
        work.open({}, ARRAYS, 3),
        pytest.raises(FileExistsError, match="another process"),
        other.open({}, ARRAYS, 3),
    ):
        pass
    with other.open({}, ARRAYS, 3):
        assert other.remaining() == [0, 1, 2]


def test_what_is_there_is_not_lost(tmp_path):
    work = Partial(tmp_path / "result")
    (tmp_path / "result.unfinished").mkdir()
    (tmp_path / "result.unfinished" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="other things"), work.open({}, ARRAYS, 3):
        pass
    (tmp_path / "result.unfinished" / "thesis.tex").unlink()
    with work.open({"seed": 0}, ARRAYS, 3):
        work.write(0, a=np.ones((4, 3)))
    with (
        pytest.raises(ValueError, match=r"seed=1 \(was 0\)"),
        work.open({"seed": 1}, ARRAYS, 3),
    ):
        pass
    with work.open({"seed": 0}, ARRAYS, 3):
        assert work.remaining() == [1, 2]


def test_begun_but_killed_before_it_was_ready(tmp_path):
    folder = tmp_path / "result.unfinished"
    folder.mkdir()
    (folder / "a.npy").write_bytes(b"half")
    (folder / "settings.json.partial").write_text("{")
    work = Partial(tmp_path / "result")
    with work.open({}, ARRAYS, 3):
        assert work.remaining() == [0, 1, 2]
        work.write(0, a=np.ones((4, 3)))


def _commands(folder):
    """Both commands that go on, with the file or folder that they leave."""
    weights, vae = published(folder)
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 36, 3), np.uint8)).save(path)
    sample = ["--weights", weights, "--vae", vae, "--num-heads", 4, "--steps", 40, "--npz"]
    return {
        "sample": ["sample", *sample, "--count", 24, "--batch-size", 1, "--out"],
        "encode": [
            *("encode", "--images", folder / "pictures", "--vae", vae, "--size", 32),
            *("--batch-size", 1, "--out"),
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
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if done.exists():
            assert sum(done.read_bytes()) >= before
    subprocess.run([*words, out], check=True, env=with_devices(1))
    assert _contents(out) == _contents(tmp_path / "whole")
    assert not out.with_name("killed.unfinished").exists()
