"""Foreign bytes: every reader reads or refuses them, and does nothing else."""

import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import made
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.numpy import save

import equidit as edt
from benchmarks import fuzz
from benchmarks.mutating import LONGEST, mutated
from benchmarks.readers import READERS, Reader
from equidit._base.disk import mapped
from equidit.cli.encoding import encode
from equidit.cli.resumable import Unfinished
from equidit.data import ImageError, image_folder, open_latents, read_image
from equidit.pretrained import files
from equidit.runs.folder import Folder

# Each traces a network anew, or starts with PyTorch.
INPUTS = {"official DiT": 40, "diffusers' DiT": 40, "autoencoder": 40, ".pt file": 60}
quickly = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)


def make_harness(name, folder):
    if name == ".pt file":
        pytest.importorskip("torch")
    return fuzz.Harness(READERS[name], folder / "files")


@pytest.mark.parametrize("name", READERS)
def test_only_documented_errors_little_memory_no_hang_and_nothing_written(name, tmp_path):
    harness = make_harness(name, tmp_path)
    for seed in harness.seeds():
        assert harness.run(seed) is None
    assert harness.accepted > len(harness.names) - 1
    fuzz.by_mutation(harness, INPUTS.get(name, 300), seed=0)
    assert harness.record()["findings"] == []
    # Mutations that change nothing, or nothing but noise, would find nothing.
    assert harness.refused > 0 or name in ("metrics.jsonl", ".npz of samples")


def test_mutations_are_many_and_depend_on_the_seed_alone():
    for name in ("safetensors", "run's config.json", "cache of latents", ".npz of samples"):
        for contents in READERS[name].make().values():
            made = [
                [mutated(contents[0], random.Random(f"{seed}"), contents) for seed in range(200)]
                for _ in range(2)
            ]
            assert made[0] == made[1]
            assert len(set(made[0])) > 150
            assert max(map(len, made[0])) <= LONGEST


def _spin():
    until = time.process_time() + 20
    while time.process_time() < until:
        pass


VICES = {
    "KeyError": lambda path: {}[0],
    "ValueError without the file's name": lambda path: int("a"),
    "hangs": lambda path: _spin(),
    "takes too much memory": lambda path: np.ones(2**24),
    "changes its files": lambda path: os.utime(path / "a", (1, 1)),
    "opens b to write": lambda path: (path / "b").write_bytes(b""),
    "subprocess.Popen": lambda path: subprocess.run([sys.executable, "-c", ""]),
}


@pytest.mark.parametrize("vice", VICES)
def test_the_campaign_sees_what_a_reader_does_wrong(vice, tmp_path):
    def read(folder):
        if (folder / "a").read_bytes() == b"bad":
            VICES[vice](folder)

    reader = Reader(vice, lambda: {"a": [b"good"]}, read)
    harness = fuzz.Harness(reader, tmp_path / "files", seconds=0.2)
    assert harness.run(b"\0good") is None
    harness.inputs = 0  # Memory is looked at now and then, beginning with the first.
    found = harness.run(b"\0bad")
    assert found is not None
    assert found.startswith(vice)
    assert harness.record()["findings"][0]["what"] == found
    assert (harness.run(b"\0good"), os.listdir(tmp_path / "files")) == (None, ["a"])


def test_memory_that_a_reader_swallows_the_lack_of_is_seen(tmp_path):
    def read(folder):
        try:
            np.ones(2**40)
        except MemoryError as error:
            raise ValueError(f"{folder} is damaged") from error

    def gently(folder):
        if (folder / "a").read_bytes() == b"bad":
            read(folder)

    harness = fuzz.Harness(Reader("r", lambda: {"a": [b""]}, gently), tmp_path / "files")
    with fuzz.little_memory():
        found = harness.run(b"\0bad")
    assert found is not None
    assert found.startswith("takes too much memory")


def test_rows_of_a_campaign_add_up():
    one = {"inputs": 3, "accepted": 1, "refused": 2, "seconds": 1.0, "coverage": {"DONE": [3, 4]}}
    one["findings"] = [{"what": "KeyError", "count": 1, "input": "AAAA"}]
    row = fuzz.merged(fuzz.merged({}, one, "mutated"), one, "guided")
    assert row["inputs"] == {"mutated": 3, "guided": 3}
    assert (row["accepted"], row["refused"], row["seconds"]) == (2, 4, 2.0)
    assert [(f["what"], f["count"]) for f in row["findings"]] == [("KeyError", 2)]
    assert "| a | 6 | 33% | 67% | 3 | KeyError |" in fuzz.table({"a": row})


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["mutated", "guided"])
def test_a_chunk_runs_in_a_process_of_its_own(engine, tmp_path):
    if engine == "guided":
        pytest.importorskip("atheris")
    row = fuzz.chunk("safetensors", engine, 400, 0, tmp_path)
    assert 400 <= row["inputs"] <= 410
    assert row["findings"] == []
    assert row["accepted"] > 0
    if engine == "guided":
        assert row["coverage"]["DONE"] >= row["coverage"]["INITED"]


# Structure, by hypothesis.

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
sides = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**31, 2**62, 10**30, True, 1.0, None]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "I8", "", None]),
        "shape": st.one_of(st.lists(sides, max_size=4), st.just([1] * 40), sides),
        "data_offsets": st.one_of(st.lists(sides | st.integers(0, 64), max_size=3), sides),
    }
)


def weights_of(path):
    """The weights in a file, or why it is refused."""
    try:
        found: Any = files.read_file(path)
    except ValueError as error:
        return str(error)
    return found[0] if isinstance(found, tuple) else found


@given(st.dictionaries(st.text(max_size=4), entries, max_size=4), st.integers(0, 64))
@quickly
def test_a_safetensors_header_cannot_claim_what_is_not_there(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "a.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    weights = weights_of(path)
    if isinstance(weights, str):
        assert str(path) in weights
        return
    assert weights.keys() == header.keys() - {"__metadata__"}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            assert 0 <= begin <= end <= size
            assert end - begin == math.prod(entry["shape"]) * DTYPES[entry["dtype"]]
            assert weights[name].read().shape == tuple(entry["shape"])


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from([np.float32, "f2"])),
        max_size=4,
    )
)
@quickly
def test_what_safetensors_writes_is_read(tmp_path_factory, shapes):
    path = tmp_path_factory.getbasetemp() / "b.safetensors"
    rng = np.random.default_rng(0)
    arrays = {n: rng.random(s).astype(d) for n, (s, d) in shapes.items()}
    path.write_bytes(save(arrays))
    weights = weights_of(path)
    assert isinstance(weights, dict)
    assert weights.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name].read(), array.astype(np.float32))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("run's config.json", "config.json"),
        ("cache of latents", "info.json"),
        ("checkpoint's record", "7/record/metadata"),
        ("unfinished work", "out.unfinished/settings.json"),
        ("metrics.jsonl", "metrics.jsonl"),
    ],
)
def test_any_json_in_any_place(name, file, tmp_path):
    harness = make_harness(name, tmp_path)
    at = harness.names.index(file)
    valid = harness.files[file][0]
    if name == "metrics.jsonl":
        valid = valid.splitlines()[0]

    @given(st.data(), json_values)
    @quickly
    def check(data, value):
        content = json.loads(valid)
        parent, key = {"": content}, ""
        while isinstance(parent[key], dict) and parent[key] and data.draw(st.booleans()):
            parent = parent[key]
            key = data.draw(st.sampled_from(sorted(parent)))
        if key:
            parent[key] = value
        else:
            content = value
        text = json.dumps(content).encode()
        seal = harness.reader.seal or (lambda text: text)
        assert harness.run(bytes([at]) + seal(text)) is None

    check()


# What was found, by name, as small as it was made.


def npy(header, data=b"", version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


INT = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }\n"


def header(descr, shape):
    return (INT % (descr, shape)).encode()


def headed(header):
    return len(header).to_bytes(8, "little") + header


NOT_ARRAYS = {
    "empty": b"",
    "no literal, which numpy takes for a program of Python 2": npy(b"{'deqcr'z '<"),
    "a header of gigabytes": npy(b"[\xff", version=3)[:10] + b"\xff\xff\xbf\xbf",
    "a negative shape": npy(header("<i4", "(-3145728,)"), bytes(12)),
    "a shape beyond int64": npy(header("<i4", "(9223372036854775808,)"), bytes(12)),
    "a true shape": npy(header("<i4", "(True,)"), bytes(12)),
    "objects": npy(header("|O", "(3,)"), bytes(24)),
    "strings": npy(header("a", "(3,)"), bytes(12)),
    "bytes of no type": npy(header("|V4", "(3,)"), bytes(12)),
    "no such size": npy(header("<f3", "(3,)"), bytes(9)),
    "columns": npy(b"{'descr': [], 'fortran_order': False, 'shape': (3,), }\n", bytes(12)),
    "one byte short": npy(header("<i4", "(3,)"), bytes(11)),
    "one byte more": npy(header("<i4", "(3,)"), bytes(13)),
    "too many axes": npy(header("<i4", f"({'1, ' * 40})"), bytes(4)),
    "cut within the header": npy(header("<i4", "(3,)"))[:30],
}


@pytest.mark.parametrize("what", NOT_ARRAYS)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_no_array_of_numbers(what, mode, tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(NOT_ARRAYS[what])
    with pytest.raises(ValueError, match=r"a\.npy is damaged"):
        mapped(path, mode)
    assert path.read_bytes() == NOT_ARRAYS[what]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8", ">f8"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 3, 4, 5, 6)])
def test_what_numpy_writes_is_mapped(dtype, shape, tmp_path):
    array = np.random.default_rng(0).random(shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    found = mapped(tmp_path / "a.npy")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


def test_a_truncated_array_of_unfinished_work_is_not_filled_up(tmp_path):
    arrays = {"a": ((4, 2), np.float32)}
    work = Unfinished(tmp_path / "out")
    with work.open({}, arrays, 2):
        work.write(1, a=np.ones((2, 2)))
    path = work.array_path("a")
    os.truncate(path, path.stat().st_size - 8)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a\.npy is damaged"), work.open({}, arrays, 2):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("done", [None, b"", b"\1", b"\0\1\0", b"\2\1"])
def test_a_damaged_list_of_what_is_done_is_refused(done, tmp_path):
    work, arrays = Unfinished(tmp_path / "out"), {"a": ((4, 2), np.float32)}
    with work.open({}, arrays, 2):
        pass
    path = work.folder / "done"
    path.unlink() if done is None else path.write_bytes(done)
    with pytest.raises(ValueError, match="done is damaged"), work.open({}, arrays, 2):
        pass


FOUND = {
    # reader, file: contents by what is wrong with them
    ("cache of latents", "info.json"): {
        "no JSON object": b"[]",
        "nested without an end": b"[" * 2000,
        "a number of thousands of digits": b"7" * 5000,
        "no count": b'{"format": 2, "classes": ["a"], "autoencoder": ""}',
        "a true format": b'{"format": true, "count": 3, "classes": [], "autoencoder": ""}',
        "a format in words": b'{"format": "2"}',
        "classes that are a number": b'{"format": 2, "count": 3, "classes": 7, "autoencoder": ""}',
        "a class that is no name": (
            b'{"format": 2, "count": 3, "classes": [1], "autoencoder": ""}'
        ),
        "an older one without a batch size": (
            b'{"format": 1, "count": 3, "classes": ["a"], "autoencoder": ""}'
        ),
        "a count that is no number": (
            b'{"format": 2, "count": NaN, "classes": ["a"], "autoencoder": ""}'
        ),
    },
    ("cache of latents", "label.npy"): {
        "labels without an axis": npy(header("<i4", "()"), bytes(4)),
        "labels that are not whole": npy(header("<f4", "(3,)"), bytes(12)),
    },
    ("checkpoint's record", "7/record/metadata"): {
        "a field is missing": b'{"format": 1, "step": 7}',
        "a field is unknown": (
            b'{"format": 1, "step": 7, "data": {}, "config": {}, "arrays": {}, "a": 1}'
        ),
        "arrays that are a number": (
            b'{"format": 1, "step": 7, "data": {}, "config": {}, "arrays": 1}'
        ),
        "an array that is a number": (
            b'{"format": 1, "step": 7, "data": {}, "config": {}, "arrays": {"step": 2}}'
        ),
        "an array without a fingerprint": (
            b'{"format": 1, "step": 7, "data": {}, "config": {}, "arrays": {"step": ["", []]}}'
        ),
        "data that are a number": (
            b'{"format": 1, "step": 7, "data": 7, "config": {}, "arrays": {}}'
        ),
        "nested too deep": (
            b'{"format": 1, "step": 7, "data": {}, "arrays": {}, "config": '
            + b'{"a":' * 600
            + b"1"
            + b"}" * 601
        ),
    },
    ("unfinished work", "out.unfinished/settings.json"): {
        "keys that cannot be sorted": b'[[1, 2], ["a", 3]]',
        "nested without an end": b"[" * 2000,
    },
    ("diffusers' DiT", "diffusion_pytorch_model.safetensors.index.json"): {
        "a name that is a number": b'{"weight_map": [[1, "a.safetensors"]]}',
        "a name that no disk takes": b'{"weight_map": {"a": "' + b"x" * 300 + b'.safetensors"}}',
    },
    ("safetensors", "a.safetensors"): {
        "an empty array of a shape that does not exist": headed(
            b'{"e":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 10**20
        ),
    },
}


@pytest.mark.parametrize(
    ("place", "what"), [(place, what) for place, found in FOUND.items() for what in found]
)
def test_what_was_found_is_refused_by_name(place, what, tmp_path):
    name, file = place
    harness = make_harness(name, tmp_path)
    content = FOUND[place][what]
    if harness.reader.seal is not None:
        content = harness.reader.seal(content)
    assert harness.run(bytes([harness.names.index(file)]) + content) is None
    assert (harness.accepted, harness.refused) == (0, 1)


def changed(content, **changes):
    record = json.loads(content)
    for name, value in changes.items():
        (record["about"] if name in record["about"] else record["settings"])[name] = value
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": None},
        {"steps": False},
        {"learning_rate": True},
        {"steps": 5e-324},
        {"learning_rate": "0"},
        {"data": [[]]},
        {"data": 0.5},
        {"depth": 0},
        {"num_heads": 1.5},
        {"block": "adaln-one"},
        {"dtype": "int8"},
        {"shape": []},
        {"shape": [1, 8]},
        {"shape": [1, 8, 0]},
        {"shape": [1, 8, 10**30]},
        {"classes": []},
        {"classes": [1, 2]},
        {"classes": 5},
        {"autoencoder": 1},
    ],
)
def test_a_runs_config_of_wrong_types_is_refused_by_name(change, tmp_path):
    content = READERS["run's config.json"].make()["config.json"][0]
    path = tmp_path / "config.json"
    path.write_bytes(changed(content))
    Folder(tmp_path).read()
    path.write_bytes(changed(content, **change))
    with pytest.raises(ValueError, match=r"config\.json is damaged or of another version"):
        Folder(tmp_path).read()


def test_damaged_rows_of_metrics_are_left_out(tmp_path):
    good = {"step": 50, "loss": 0.5, "mfu": None, "skipped": 0}
    held = {"step": 50, "validation_loss": 0.5, "validation_loss_by_quartile": [0.1] * 4}
    bad = (
        b'{"step": 5',
        b"\xcb\xff",
        b"5",
        b"[]",
        b"{}",
        b"[" * 2000,
        b'{"step": ' + b"7" * 5000 + b"}",
        b'{"step": null}',
        b'{"step": true}',
        b'{"step": 1, "loss": null}',
        b'{"step": 1, "loss": "a"}',
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
        b'{"step": 1, "loss": 1, "a": {}}',
        b'{"step": 1, "validation_loss": 1}',
        b'{"step": 1, "validation_loss": 1, "validation_loss_by_quartile": [1, 2, 3]}',
        b'{"step": 1, "validation_loss": 1, "validation_loss_by_quartile": [1, 2, 3, null]}',
    )
    kept = [json.dumps(row).encode() for row in (good, held)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([kept[0], *bad, kept[1], *bad]))
    assert Folder(tmp_path).rows() == [good, held]


@pytest.mark.parametrize(
    "change", [{"norm_num_groups": 3}, {"norm_num_groups": 10**4000}, {"norm_num_groups": 0}]
)
def test_an_autoencoders_groups_are_checked_by_name(change, tmp_path):
    for name, (content, *_) in READERS["autoencoder"].make().items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"config\.json: norm_num_groups"):
        edt.pretrained.load_vae(tmp_path)


def test_head_sizes_of_thousands_of_digits_are_refused_by_name(tmp_path):
    for name, (content, *_) in READERS["diffusers' DiT"].make().items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "config.json"
    more = {"num_attention_heads": 10**4000, "attention_head_dim": 10**4000}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    with pytest.raises(ValueError, match=r"config\.json: num_attention_heads"):
        edt.pretrained.load_diffusers_dit(tmp_path, arithmetic="official")


# Pictures.


def test_a_program_for_a_printer_is_no_picture(tmp_path):
    # Pillow would start Ghostscript on it.
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    harness = make_harness("picture", tmp_path)
    assert harness.run(b"\0" + path.read_bytes()) is None
    with pytest.raises(ImageError, match=r"a\.png is no picture, .*cannot identify image file$"):
        read_image(path, 8)


def chunk(kind, content, length=None):
    length = len(content) if length is None else length
    return (
        struct.pack(">I", length) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def test_a_chunk_that_claims_gigabytes_is_given_what_there_is(tmp_path):
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    harness = make_harness("picture", tmp_path)
    for kind in (b"IDAT", b"tEXt", b"iCCP", b"abcd"):
        with fuzz.little_memory():
            assert harness.run(b"\0" + png(ihdr, chunk(kind, b"a", 2**31))) is None


def test_a_palette_of_too_many_transparencies_is_damaged(tmp_path):
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0))
    palette, rows = chunk(b"PLTE", bytes(12)), chunk(b"IDAT", zlib.compress(bytes(72)))
    path = tmp_path / "a.png"
    path.write_bytes(png(ihdr, palette, chunk(b"tRNS", bytes(4096)), rows))
    with pytest.raises(ImageError, match=r"a\.png is damaged") as error:
        read_image(path, 8)
    assert error.value.damaged


def test_a_thin_picture_is_not_enlarged_beyond_pillows_limit(tmp_path):
    Image.new("RGB", (1, 60_000)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png of 1x60000 would become 256x15360000") as error:
        read_image(tmp_path / "a.png", 256, small="enlarge")
    assert not error.value.damaged
    assert read_image(tmp_path / "a.png", 2, small="enlarge").shape == (3, 2, 2)


def test_a_bomb_is_refused(tmp_path):
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(png(ihdr, chunk(b"IDAT", zlib.compress(bytes(9)))))
    with fuzz.little_memory(), pytest.raises(ImageError, match=r"a\.png"):
        read_image(tmp_path / "a.png", 8)


def test_names_that_are_no_text_are_encoded(tmp_path):
    sizes = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    vae = made(edt.Autoencoder, **sizes)
    folder = tmp_path / "pictures"
    odd = os.fsdecode(b"caf\xe9\n")
    try:
        (folder / odd).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system has no such names")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    (folder / odd / os.fsdecode(b"\xff.png")).write_bytes(file.getvalue())
    listed = image_folder(folder)
    assert encode(vae, listed, tmp_path / "out", size=8) == []
    assert open_latents(tmp_path / "out").info["classes"] == [odd]
    assert encode(vae, listed, tmp_path / "out", size=8) == []
    names = (tmp_path / "out" / "files.txt").read_bytes()
    assert os.fsdecode(names) == listed.files[0] + "\n"
    assert Path(folder / listed.files[0]).is_file()
