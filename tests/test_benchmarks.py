"""The benchmark suite: what it counts, its table of chips, and how it refuses bad input."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers import TESTS
from jax.sharding import AxisType, PartitionSpec as P

import equidit as edt
from benchmarks import (
    __main__ as suite,
    aot,
    common,
    compare,
    flops,
    hlo,
    mutations,
    report,
    scaling,
    throughput,
)
from equidit import devices


def test_every_part_is_listed_with_its_question(capsys):
    suite.main([])
    listing = capsys.readouterr().out
    scripts = {path.stem for path in suite.FOLDER.glob("*.py") if "def main(" in path.read_text()}
    assert scripts - {"__main__"} == set(suite.PARTS)
    for part in suite.PARTS:
        assert f"  {part} " in listing
    with pytest.raises(SystemExit, match=r"part 'flop' is unknown: choose from flops"):
        suite.main(["flop"])


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_has_its_place_and_its_test(mutation):
    source = mutations.place(mutation, mutations.ROOT).read_text()
    assert mutations.mutated(mutation, source) != source
    file, _, test = mutation.tests.partition("::")
    assert f"def {test}" in (TESTS / file).read_text()


def test_a_mutation_that_fits_nowhere_is_an_error():
    gone = dataclasses.replace(mutations.MUTATIONS[0], old="no such text")
    with pytest.raises(SystemExit, match=r"'exact GELU': 0 functions MLP\.__call__ have"):
        mutations.place(gone, mutations.ROOT)


@pytest.mark.parametrize("block", flops.BLOCKS)
@pytest.mark.parametrize("name", edt.CONFIGS)
def test_the_papers_tables(name, block):
    rows = [flops.cost(name, block, resolution) for resolution in flops.LATENT]
    for row in rows:
        assert row["agrees"] in (True, None)
        assert sum(row["shares"].values()) == pytest.approx(1)
    compared = {row["resolution"] for row in rows if row["agrees"]}
    wanted = {256} if block == "adaln-zero" or name == "DiT-XL/2" else set()
    assert compared == wanted | ({512} if (name, block) == ("DiT-XL/2", "adaln-zero") else set())


def test_agreement_can_fail():
    assert flops.agrees(1.4149, 1.41)
    assert not flops.agrees(1.4151, 1.41)
    assert flops.agrees(118.53, 118.64)
    assert not flops.agrees(118.50, 118.64)


def test_flops_writes_json_table_and_picture(tmp_path, capsys):
    args = ["flops", "--configs", "DiT-S/8", "DiT-B/2", "--blocks", "adaln-zero"]
    suite.main([*args, "--results", str(tmp_path)])
    assert "2 of 2 figures of the paper reproduced" in capsys.readouterr().out
    written = json.loads((tmp_path / "flops.json").read_text())
    assert {"date", "command", "machine", "device", "versions"} <= set(written)
    assert written["command"].startswith("python -m benchmarks.flops --configs DiT-S/8")
    assert len(written["results"]) == 4
    table = (tmp_path / "flops.md").read_text()
    assert "| DiT-B/2 | adaln-zero | 256 | 130.32 | 23.01 | 23.01 |" in table
    assert (tmp_path / "flops.png").stat().st_size > 1000


def test_bad_input(tmp_path):
    with pytest.raises(SystemExit, match=r"config 'DiT-S/3' is unknown: choose from DiT-S/8, "):
        suite.main(["flops", "--configs", "DiT-S/3", "--results", str(tmp_path)])
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(SystemExit, match=r"cannot be written to .*: pass --results FOLDER"):
            common.writable(folder)


def compiled(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    assert text is not None
    return hlo.Program(text)


def on_all(function, out):
    """`function` on eight devices, each with its part."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=out, check_vma=False)


def test_collectives_and_their_bytes():
    x = jnp.ones((64, 128))  # 8 x 128 of float32 a device
    whole = x.size * 4

    def exchange(part):
        gathered = jax.lax.all_gather(part, "data", tiled=True)
        return jax.lax.psum_scatter(gathered, "data", tiled=True)

    found = compiled(on_all(exchange, P("data")), x).collectives()
    assert {(c.kind, c.bytes, c.group, c.times) for c in found} == {
        ("all-gather", whole, 8, 1),
        ("reduce-scatter", whole, 8, 1),
    }
    assert hlo.total(found, lambda c: c.bytes) == {"all-gather": whole, "reduce-scatter": whole}


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    def loop(part):
        def body(x, _):
            return jax.lax.psum(jnp.sin(x), "data"), None

        return jax.lax.scan(body, part, None, length=5)[0]

    found = compiled(on_all(loop, P("data")), jnp.ones((8, 128))).collectives()
    assert hlo.total(found, lambda c: 1) == {"all-reduce": 5}
    assert hlo.total(found, lambda c: c.bytes) == {"all-reduce": 5 * 128 * 4}


def test_bytes_of_a_loop():
    stacked, x = jnp.ones((6, 64, 64)), jnp.ones((64, 64))

    def loop(x, stacked):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stacked)[0]

    program = compiled(loop, x, stacked)
    once, often = program.traffic(once=True), program.traffic()
    # A body reads x and one slice of the stack, not all of it, and writes x.
    body = (often - once) / 5
    assert 3 * x.nbytes <= body <= 8 * x.nbytes


TPU = """HloModule m

%fused (a: f32[4,8], i: s32[]) -> f32[1,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,8]{1,0:T(8,128)} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (p: f32[4,8], i: s32[]) -> f32[1,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %near = f32[4,8]{1,0:T(8,128)S(1)} copy(%p)
  ROOT %f = f32[1,8]{1,0:T(8,128)} fusion(%p, %i), kind=kLoop, calls=%fused
}
"""


def test_tiles_slices_and_memory_on_the_chip():
    tile = 8 * 128 * 4
    assert hlo.num_bytes("(f32[4,8]{1,0:T(8,128)}, pred[3])") == 4 * 8 * 4 + 3
    assert hlo.stored_bytes("f32[4,8]{1,0:T(8,128)}") == tile
    assert hlo.stored_bytes("f32[4,8]{1,0:T(8,128)S(1)}") == 0
    # The copy reads p; the fusion reads the index and a slice, and writes a slice.
    assert hlo.Program(TPU).traffic() == tile + 4 + 2 * tile
    with pytest.raises(ValueError, match="not a compiled program"):
        hlo.Program("HloModule m")


def test_the_size_of_a_layout():
    assert hlo.num_bytes("bf16[2,3]{1,0}") == 12
    assert hlo.num_bytes("f8e4m3fn[7]") == 7
    with pytest.raises(ValueError, match="size of the type 'what'"):
        hlo.num_bytes("what[2]")


def test_chips_are_sane():
    for chip in devices.CHIPS:
        assert 4e13 < chip.flops < 1e16
        assert 2**33 < chip.memory < 2**39
        assert 1e11 < chip.bandwidth < 1e13
        assert chip.link < chip.bandwidth
        assert chip.devices in (1, 2)
        assert chip.source
        assert all(devices.chip_of(kind) is chip for kind in chip.kinds)
    names = {
        "TPU v3": "TPU v3",
        "TPU v5 lite": "TPU v5e",
        "TPU v5": "TPU v5p",
        "TPU v6 lite": "TPU v6e",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA A100-SXM4-40GB": "A100 40GB",
        "NVIDIA A100-SXM4-80GB": "A100 80GB",
        "NVIDIA L40S": "L40S",
        "NVIDIA L4": "L4",
    }
    assert {kind: getattr(devices.chip_of(kind), "name", None) for kind in names} == names
    for kind in ("cpu", "TPU v30", "NVIDIA L400", "NVIDIA GeForce RTX 9090"):
        assert devices.chip_of(kind) is None


def test_the_time_of_links():
    v3 = devices.chip_of("TPU v3")
    assert v3 is not None
    reduce, gather, exchange = (
        [hlo.Collective(kind, 10**9, 256, 1)] for kind in ("all-reduce", "all-gather", "all-to-all")
    )
    grid = [16, 8, 1]
    one = aot.link_seconds(gather, v3, grid)
    assert one == pytest.approx(255 / 256 * 1e9 / (4 * 82e9 / 2))
    assert aot.link_seconds(reduce, v3, grid) == pytest.approx(2 * one)
    # 16 / 4 links on average, over two of the four.
    assert aot.link_seconds(exchange, v3, grid) == pytest.approx(8 * one)
    assert aot.link_seconds(reduce, v3, [1, 1, 1]) == 0


@pytest.mark.parametrize("kind", ["TPU v3", "TPU v99"])
def test_the_estimate(kind):
    row = {"device_kind": kind, "matmul_flops_per_device": 61.5e12, "bytes_per_device": 900e9}
    found = aot.roofline(row, [], [16, 8, 1])
    if kind == "TPU v99":
        assert found["estimate"] is None
        assert "TPU v99 is not among TPU v2, TPU v3" in found["why_no_estimate"]
    else:
        assert found["estimate"]["terms"] == {"compute": 1.0, "memory": 2.0, "links": 0.0}
        assert found["estimate"]["seconds"] == 2.0
        assert found["estimate"]["bound"] == "memory"


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_the_programs_products_are_the_analytic_ones(remat, sharding):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    case = aot.Case("train", "", "DiT-S/4", 256, sharding, remat, "bfloat16", 16)
    function, arguments = aot.training(case, mesh)
    with jax.numpy_dtype_promotion("standard"):
        counted = 2 * edt.count_macs(function, *arguments)
    assert counted == pytest.approx(aot.analytic_flops(case), rel=0.03)


def test_the_samplers_products():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    case = aot.Case("sample", "", "DiT-S/4", 256, "replicated", "none", "bfloat16", 16, steps=10)
    function, arguments = aot.sampling(case, mesh)
    with jax.numpy_dtype_promotion("standard"):
        counted = 2 * edt.count_macs(function, *arguments)
    assert counted == pytest.approx(aot.analytic_flops(case), rel=0.03)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'equidit\[tpu\]'"):
        aot.devices_of("v3:16x8")


def test_a_device_of_unknown_kind_has_no_mfu():
    found, reason = throughput.peak_of(SimpleNamespace(platform="tpu", device_kind="TPU v99"), [])
    assert found is None
    assert "peak of 'TPU v99' is unknown; known are TPU v2" in reason
    assert (
        throughput.peak_of(SimpleNamespace(platform="tpu", device_kind="TPU v3"), [])[0] == 61.5e12
    )


def test_what_does_not_fit_is_recorded():
    def fails(*args):
        raise MemoryError("no room")

    function = SimpleNamespace(lower=fails)
    found = throughput.measure(function, [], False, 1, lambda: None)
    assert found == {"error": "out of memory", "message": "no room"}
    with pytest.raises(AttributeError):
        throughput.measure(SimpleNamespace(), [], False, 1, lambda: None)


@pytest.mark.parametrize(("long", "timed"), [(60.0, 3), (0.0, 1)])
def test_a_long_call_is_timed_once(monkeypatch, long, timed):
    monkeypatch.setattr(throughput, "LONG", long)
    calls = []
    found = throughput.measure(jax.jit(jnp.sin), [jnp.ones(3)], False, 3, lambda: calls.append(0))
    assert len(found["seconds"]) == timed
    assert len(calls) == len(found["matmul_seconds"]) == (4 if timed == 3 else 1)


def test_machines_side_by_side(tmp_path):
    row = {"config": "DiT-S/8", "devices": 1, "sharding": "fsdp", "kind": "weak", "batch_size": 8}
    row |= {"seconds": [2.0], "images_per_second": 4.0, "efficiency": 1.0}
    for machine in ("cpu", "h100"):
        (tmp_path / f"scaling-{machine}.json").write_text(json.dumps({"results": [row]}))
    text = report.write_report(scaling.REPORT, tmp_path)
    assert text.splitlines()[0].startswith("| machine | config |")
    assert {line.split("|")[1].strip() for line in text.splitlines()[2:]} == {"cpu", "h100"}
    assert scaling.counts(6) == [1, 2, 4, 6]


def test_plain_torch_is_the_same_network():
    torch = pytest.importorskip("torch")
    from benchmarks.plain_torch import DiT

    model = DiT(edt.CONFIGS["DiT-S/8"])
    assert sum(p.numel() for p in model.parameters()) == edt.num_params("DiT-S/8")
    with torch.no_grad():
        out = model(torch.zeros(2, 4, 32, 32), torch.tensor([1, 2]), torch.tensor([3, 1000]))
    assert out.shape == (2, 8, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-5), ("bfloat16", 8 * 2.0**-8)])
def test_the_sides_of_a_comparison_agree(tmp_path, monkeypatch, dtype, apart):
    pytest.importorskip("torch")
    # Each side is a process, which compiles for a handful of calls.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    small = ["--configs", "DiT-S/8", "--batch-size", "1", "--threads", "1", "--repetitions", "1"]
    sides = ["--sides", "plain", "diffusers"]
    compare.main([*small, *sides, "--dtype", dtype, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("compare-*.json")
    rows = json.loads(path.read_text())["results"]
    assert {(row["task"], row["side"]) for row in rows} == {
        (task, side) for task in ("forward", "train") for side in ("plain", "diffusers")
    }
    for row in rows:
        assert row["dtype"] == dtype
        assert 0 < row["difference"] < apart
        assert row["wall"] > 0


def test_where_a_comparison_runs(monkeypatch):
    assert compare.device_of("cpu") == "cpu"
    with pytest.raises(SystemExit, match="PyTorch has no tpu"):
        compare.device_of("tpu")
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        compare.device_of("gpu")
