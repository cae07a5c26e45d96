"""The benchmark suite: what it counts, its table of chips, and how it refuses bad input."""

import json

import pytest

import equidit as edt
from benchmarks import __main__ as suite, common, flops


def test_every_part_is_listed_with_its_question(capsys):
    suite.main([])
    listing = capsys.readouterr().out
    scripts = {path.stem for path in suite.FOLDER.glob("*.py") if "def main(" in path.read_text()}
    assert scripts - {"__main__"} == set(suite.PARTS)
    for part in suite.PARTS:
        assert f"  {part} " in listing
    with pytest.raises(SystemExit, match=r"part 'flop' is unknown: choose from flops"):
        suite.main(["flop"])


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
