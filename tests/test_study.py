"""python -m pytest tests/test_study.py      (two cells of a study, random models)"""

import json
import math

import pytest

from study import run as study


def lines(values):
    """Finished cells {LOSS/REUSE/VARIANT/SEED: mean@8}."""
    return {
        name: dict(cell=name, end={"mean@8": x, "pass@8": x, "gap": x}, seconds=1, commit="c", hardware="h", ess=[1.0])
        for name, x in values.items()
    }


def test_differences_are_paired_by_seed_with_students_interval():
    """By hand: differences .1, .2, .3: mean .2, standard deviation .1, t(2) = 4.303."""
    none = {f"lsm/heavy/none/{i}": x for i, x in enumerate((0.5, 0.1, 0.3, 0.9))}
    block = {f"lsm/heavy/block/{i}": x for i, x in enumerate((0.6, 0.3, 0.6))}
    diffs, mean, half = study.paired(lines(none | block), "lsm", "heavy", "block", "mean@")
    assert diffs == pytest.approx([0.1, 0.2, 0.3]) and mean == pytest.approx(0.2)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    table = study.table(lines(none | block), "mean@")
    assert "45.0 ± 34.2 (4)" in table and "+20.0 [-4.8, 44.8] (3)" in table
    sure = {f"lsm/heavy/span/{i}": none[f"lsm/heavy/none/{i}"] + 0.1 + 0.001 * i for i in range(3)}
    assert "**+10.1 [9.9, 10.3]** (3)" in study.table(lines(none | sure), "mean@")
    assert study.certain(lines(none | block | sure), "mean@") == (1, 2)


def test_cells_of_one_seed_differ_in_the_gate_alone():
    args = study.argparse.Namespace(size="tiny", flags="", seeds=5, sweep_seeds=3, probes=1)
    cells = study.cells(args)
    count = {v: sum(name.split("/")[2] == v for name in cells) for v in (*study.MAIN, *study.SWEEP, "probe")}
    assert all(count[v] == 4 * 5 for v in study.MAIN) and all(count[v] == 4 * 3 for v in study.SWEEP)
    assert not any(" " in name for name in cells)  # they are folders and parts of commands
    assert count["probe"] == 4 and len(set(cells.values())) == len(cells) - 4  # a probe repeats an ungated run
    none, block = (cells[f"opd/heavy/{v}/2"].split() for v in ("none", "block"))
    assert [(a, b) for a, b in zip(none, block, strict=True) if a != b] == [("none", "block")]


def test_a_killed_study_goes_on_and_a_cell_comes_again_to_the_digit(pair, tmp_path, monkeypatch):
    small = dict(teacher=pair[0], student=pair[1], prompts=2, group=2, max_response=12, steps=2, eval_problems=4, k=2)
    flags = " ".join(f"--{name} {x}" for name, x in small.items())
    monkeypatch.setattr(study, "PAIRS", [("lsm", "heavy")])
    monkeypatch.setattr(study, "MAIN", ("none",))
    monkeypatch.setattr(study, "SWEEP", {"tau_3": study.SWEEP["tau_3"]})
    argv = ["--flags", flags, "--seeds", "1", "--sweep_seeds", "1", "--jobs", "2"]
    study.main([*argv, "--out", str(tmp_path / "a")])
    path = tmp_path / "a" / "study.jsonl"
    cell, probe, tau = sorted(study.read(path), key=lambda line: line["cell"])
    assert tau["cell"] == "lsm/heavy/tau_3/0" and tau["ess"] != cell["ess"]
    assert cell["end"] == probe["end"] and cell["checksum"] == probe["checksum"]  # a probe only looks
    assert all((tmp_path / "a" / name).stat().st_size > 5000 for name in ("effects.png", "diagnostics.png"))
    by_epoch = probe["epochs"]
    assert by_epoch.keys() == set("012345") and by_epoch["5"]["none/cos"] == pytest.approx(1, abs=1e-3)
    assert by_epoch["5"]["token/cos"] < 1 and 0 <= by_epoch["5"]["cancelled"] <= 1
    path.write_text(json.dumps(tau) + "\n" + json.dumps(cell) + "\n" + json.dumps(probe)[:40])  # killed while it wrote
    study.main([*argv, "--out", str(tmp_path / "a")])
    again = study.read(path)
    assert again[:2] == [tau, cell] and len(again) == 3 and again[2]["end"] == probe["end"]  # one cell was run again
    assert study.probe_table({"probe": probe}).count("\n") == 2
    study.main([*argv, "--only", "probe", "--seeds", "9", "--out", str(tmp_path / "a")])
    assert len(study.read(path)) == 3  # the probe is there, and nothing else is wanted
