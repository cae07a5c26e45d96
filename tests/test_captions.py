"""The example of captions: its data, its checker, and a run of a few steps."""

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "docs" / "examples" / "captions.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_captions", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_checker_reads_fresh_pictures(example):
    rng = np.random.default_rng(0)
    captions = 5 * example.CAPTIONS
    images = np.stack([example.draw(caption, rng) for caption in captions])
    assert images.shape == (1000, 3, 32, 32)
    assert images.dtype == np.float32
    assert abs(images).max() <= 1
    assert len({image.tobytes() for image in images}) == 1000
    figures = example.judge(images, captions)
    assert figures["caption"] >= 0.99
    share = figures["caption"]
    assert figures["standard_error"] == pytest.approx((share * (1 - share) / 1000) ** 0.5)
    assert all(figures[name] >= share for name in example.Caption._fields)
    # With the noise of a sampler, too.
    noisy = images[:200] + rng.normal(0, 0.05, images[:200].shape)
    assert example.judge(noisy, captions[:200])["caption"] >= 0.99


def test_the_checker_refuses_wrong_captions(example):
    rng = np.random.default_rng(1)
    captions = example.CAPTIONS
    images = np.stack([example.draw(caption, rng) for caption in captions])
    for name in example.Caption._fields:
        values = sorted({getattr(caption, name) for caption in captions})
        wrong = [
            c._replace(**{name: values[(values.index(getattr(c, name)) + 1) % len(values)]})
            for c in captions
        ]
        figures = example.judge(images, wrong)
        assert figures["caption"] <= 0.01
        assert figures[name] <= 0.01
        others = set(example.Caption._fields) - {name}
        assert all(figures[other] >= 0.99 for other in others)


def test_the_checker_refuses_what_is_no_picture(example):
    rng = np.random.default_rng(2)
    assert set(example.read(np.zeros((3, 32, 32), np.float32))) == {"?"}
    assert "?" in example.read(rng.uniform(-1, 1, (3, 32, 32)))
    a, b = (
        example.draw(example.Caption("small", "red", "square", place), rng)
        for place in ("top left", "bottom right")
    )
    assert example.read(a + b).shape == "?"


def test_held_out_pairs_are_never_trained_on(example):
    held_out = {(c.colour, c.shape) for c in example.HELD_OUT}
    assert held_out == example.NEVER_SEEN
    captions, images = [], []
    for step in range(60):
        some, pictures = example.training_batch(step, 32, 0)
        captions += some
        images += [*pictures]
    pairs = {(c.colour, c.shape) for c in captions}
    assert pairs == {(c.colour, c.shape) for c in example.SEEN}
    assert not pairs & held_out
    assert {colour for colour, _ in pairs} == set(example.COLOURS)
    assert {shape for _, shape in pairs} == set(example.SHAPES)
    # As the pictures have it, not the captions alone.
    assert example.judge(images[:500], captions[:500])["caption"] >= 0.99
    again = example.training_batch(1, 32, 0)
    assert again[0] == captions[32:64]
    np.testing.assert_array_equal(again[1], images[32:64])
    assert example.training_batch(1, 32, 1)[0] != again[0]


def test_prompts(example):
    embeddings, mask = example.encode(example.CAPTIONS)
    assert embeddings.shape == (200, example.LENGTH, example.TEXT_DIM)
    assert len({prompt.tobytes() for prompt in embeddings}) == 200
    # Order is not told to the network: the words of a prompt must differ as a set.
    assert len({frozenset(str(caption).split()) for caption in example.CAPTIONS}) == 200
    words = [len(str(caption).split()) for caption in example.CAPTIONS]
    np.testing.assert_array_equal(mask, np.arange(example.LENGTH) < np.array(words)[:, None])
    assert set(words) == {5, 6}
    np.testing.assert_array_equal(embeddings.any(axis=2), mask)


def test_a_short_run(example, tmp_path, capsys):
    small = shlex.split("--steps 3 --batch-size 4 --hidden-size 16 --depth 1 --samples 8")
    out = tmp_path / "run"
    example.main([*small, "--out", str(out)])
    record = json.loads((out / "captions.json").read_text())
    assert record["settings"]["steps"] == 3
    assert record["versions"]["jax"] == jax.__version__
    results = record["results"]
    assert list(results) == ["held out", "seen", "unconditional", "chance"]
    assert results["chance"]["caption"] == 1 / 200
    # Three steps teach nothing.
    for name in ("seen", "held out", "unconditional"):
        assert 0 <= results[name]["caption"] < 0.1
        assert results[name]["caption"] <= min(results[name][k] for k in example.Caption._fields)
    picture = matplotlib.image.imread(out / "captions.png")
    assert picture.shape == (720, 1040, 4)
    assert picture[..., :3].std() > 0.05
    printed = capsys.readouterr().out
    assert "held out" in printed
    assert str(out) in printed
