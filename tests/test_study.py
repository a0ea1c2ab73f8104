"""python -m pytest tests/test_study.py      (the cells, the statistics, and two cells of a study with random models)"""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, rows_of
from helpers import flags as train_flags
from helpers import run as train_run
from safetensors.torch import load_file

from configs import TrainConfig, parse
from study import gated_train, report
from study import run as study


def lines(values):
    """Finished cells {PAIR/ARM/REUSE/GATE/SEED: KL}; before training, all had half of it."""
    found = {}
    for name, x in values.items():
        start, end = ({"kl": y, "gap": y, "pass@8": y, "mean@8": y} for y in (x / 2, x))
        found[name] = {"cell": name, "start": start, "end": end, "seconds": 1}
    return found


def test_a_difference_is_paired_by_seed_averaged_by_pair_and_has_students_interval():
    """By hand: pairs differ by (.1 + .3) / 2, .1 and .3: mean .2, standard deviation .1, t(2) = 4.303."""
    base = {"7/lsm/heavy/none/0": 0.5, "7/lsm/heavy/none/1": 0.1, "8/lsm/heavy/none/0": 0.3, "9/lsm/heavy/none/0": 0.2}
    gated = {"7/lsm/heavy/block/0": 0.6, "7/lsm/heavy/block/1": 0.4, "8/lsm/heavy/block/0": 0.4}
    gated |= {"9/lsm/heavy/block/0": 0.5, "9/lsm/heavy/block/1": 9.0}  # the last has no partner
    arguments = ("lsm", "heavy", "block"), ("lsm", "heavy", "none"), "pass@"
    units, mean, low, high, p = report.difference(lines(base | gated), *arguments)
    assert units == pytest.approx([0.2, 0.1, 0.3]) and mean == pytest.approx(0.2)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-4), pytest.approx(0.2 + half, abs=1e-4))
    assert p == pytest.approx(0.0742, abs=1e-4)  # t = 2 sqrt(3): 1 - t / sqrt(t^2 + 2), in closed form for t(2)
    assert "+20.0 [-4.8, 44.8]" in report.gate_table(lines(base | gated), "pass@")
    seeds = {name: x for name, x in (base | gated).items() if name.startswith("7")}
    assert sorted(report.difference(lines(seeds), *arguments)[0]) == pytest.approx([0.1, 0.3])  # one pair: its seeds
    assert np.isnan(report.difference(lines({}), *arguments)[1])


def test_kls_are_compared_as_ratios():
    """By hand: twice, four times and eight times the KL: the geometric mean is four times, + 300 %."""
    kls = {f"{pair}/lsm/heavy/none/0": 0.1 for pair in (7, 8, 9)}
    kls |= {f"{pair}/lsm/heavy/block/0": 0.1 * 2 ** (pair - 6) for pair in (7, 8, 9)}
    _, mean, low, high, _ = report.difference(lines(kls), ("lsm", "heavy", "block"), ("lsm", "heavy", "none"), "kl")
    assert math.exp(mean) == pytest.approx(4)
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert (low, high) == (pytest.approx(math.log(4) - half, abs=1e-3), pytest.approx(math.log(4) + half, abs=1e-3))
    table = report.gate_table(lines(kls), "kl")
    assert "| no gate | 100 (100 to 100) |" in table
    assert "| no gate, against the untrained student | **+100 % [100, 100]** |" in table
    assert f"+300 % [{100 * math.expm1(low):.0f}, {100 * math.expm1(high):.0f}]" in table


def test_a_score_is_not_averaged_with_its_interval_or_its_estimate():
    end = {"pass@8": 0.5, "pass@8_low": 0.4, "pass@8_high": 0.7, "kl": 0.1, "kl_sampled": 0.3}
    assert report.score({"end": end}, "pass@") == 0.5 and report.score({"end": end}, "kl") == 0.1
    end = {"aime24/pass@8": 0.2, "aime24/pass@8_low": 0.0, "amc23/pass@8": 0.6, "amc23/pass@8_low": 0.0}
    assert report.score({"end": end}, "pass@") == pytest.approx(0.4)


def test_holm_by_hand():
    assert report.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert report.holm([0.6, 0.5]) == [1.0, 1.0]


def test_cells_of_one_pair_and_seed_differ_in_the_gate_alone():
    cells = study.cells("tiny", 2, [7, 8, 9])
    n_main, n_dose = 3 * 2 * 3 * 2 * 5, 3 * 2 * 5 * 2  # pairs x seeds x arms x reuses x gates, ...
    assert len(cells) == n_main + n_dose
    assert len(set(cells.values())) == len(cells) / 3  # only --student and --teacher differ between pairs
    none, block = (cells[f"8/opd_old/heavy/{gate}/1"].split() for gate in ("none", "block"))
    assert [(a, b) for a, b in zip(none, block, strict=True) if a != b] == [("none", "block")]
    for flags in study.DOSES.values():  # as many updates at every dose
        words = flags.split()
        assert int(words[1]) * int(words[3]) == 96


def test_every_cell_of_the_gates_is_a_command_that_parses():
    for name, command in study.cells("gates", 1, [7]).items():
        program, rest = re.fullmatch(r"(train\.py|-m study\.gated_train) (--preset .*)", command).groups()
        parser = gated_train.make_parser()
        args, rest = parser.parse_known_args(rest.split())
        cfg = parse(TrainConfig, rest)
        assert (cfg.gate, cfg.eval_problems, cfg.block) == ("none" if "/none/" in name else "block", 128, 16)
        assert program != "train.py" or vars(args) == vars(parser.parse_args([]))  # no flag that train.py lacks


@pytest.mark.slow
def test_a_killed_study_goes_on_and_a_cell_comes_again_to_the_digit(pair, tmp_path, capsys):
    small = dict(teacher=pair[0], student=pair[1], prompts=2, group=2, max_response=12, steps=2, eval_problems=4, k=2)
    argv = ["--size", "real", "--seeds", "1", "--out", str(tmp_path)]
    argv += ["--flags", " ".join(f"--{name} {x}" for name, x in small.items())]
    study.main([*argv, "--only", "lsm/heavy", "--jobs", "2"])
    path = tmp_path / "study.jsonl"
    none, block = sorted(report.read(path).values(), key=lambda line: line["cell"], reverse=True)
    assert none["start"] == block["start"] and none["end"] != block["end"] and min(block["ess"]) < 1 == min(none["ess"])
    path.write_text(json.dumps(block) + "\n" + json.dumps(none)[:40])  # killed while it wrote the second line
    study.main([*argv, "--only", "lsm/heavy"])
    again = report.read(path)[none["cell"]]
    assert (again["end"], again["checksum"]) == (none["end"], none["checksum"])
    assert "2 cells are in" not in capsys.readouterr().out.splitlines()[-1]
    assert (
        study.run(study.argparse.Namespace(size="real", seeds=1, pairs=[], only="lsm/heavy", jobs=1, out=tmp_path))
        == path
    )


@pytest.mark.slow
def test_the_report_has_every_table_and_figure(tmp_path, capsys):
    gates = {g: 0.1 * i for i, g in enumerate(report.GATES)}
    cells = {f"{pair}/{arm}/{reuse}/{gate}/0": 0.5 + x * int(pair) for pair in "789" for arm in report.ARMS for reuse in report.REUSES for gate, x in gates.items()}  # fmt: skip
    cells |= {f"{pair}/{arm}/dose_{e}/none/0": 1 / e for pair in "789" for arm in ("rkl", "lsm") for e in report.EPOCHS}
    cells |= {"7/rkl/dose_2/none/0": 0.97, "8/rkl/dose_2/none/0": 0.98, "9/rkl/dose_2/none/0": 0.99}
    cells |= {f"{pair}/lsm/heavy/tau10/0": 0.25 for pair in "789"}
    cells |= {f"real/lsm/heavy/{gate}/{seed}": 0.5 + (gate == "block") * 0.1 * seed for gate in ("none", "block") for seed in range(3)}  # fmt: skip
    rows = [json.dumps(line | {"commit": "c", "hardware": "h"}) for line in lines(cells).values()]
    path = tmp_path / "study.jsonl"
    for i, row in enumerate(rows):  # angles of 0 and 60 degrees, norms of a half and double
        if "/tau10/" in row:
            numbers = {name: [0.5, 0.5] for name in ("ess", "gate_mean", "gate_sd", "drift_abs")}
            numbers |= {"cosine": [1.0, 0.5], "cosine_before": [0.0, 0.0], "norm_ratio": [0.5, 2.0]}
            rows[i] = json.dumps(json.loads(row) | {"leverage": numbers})
    path.write_text("".join(row + "\n" for row in rows))
    study.main(["--report", str(path)])
    out = capsys.readouterr().out
    assert "**+80.0 [55.2, 104.8]**" in out  # block: .1 times 7, 8 and 9
    assert "| lsm | 4 | 3 | **-75 % [-75, -75]** | **-75.0 [-75.0, -75.0]** | no |" in out
    assert "| -2.0 [-4.5, 0.5] | yes |" in out  # rkl at two epochs: -1, -2 and -3 points
    assert (
        "| lsm, heavy | tau10 | 3 | 0.5 | 0.500 | 0.500 | 30 | 90 | 1.00 | **-50 % [-50, -50]** | **-25.0 [-25.0, -25.0]** |"
        in out
    )
    assert "| lsm: tau10 against none | 3 |" in out
    assert report.change(lines({"7/rkl/heavy/none/0": 0.2, "7/rkl/heavy/tau1/0": 0.3}), ("rkl", "heavy", "tau1"), ("rkl", "heavy", "none"), "kl") == "+50 %, one run"  # fmt: skip
    toy, real = out.split("### another pair: KL to")
    assert "| block, against no gate | +10.0 [-14.8, 34.8] |" in real
    assert all(
        (tmp_path / f"{name}.png").stat().st_size > 5000
        for name in ("doses", "doses_dark", "leverage", "leverage_dark")
    )


def test_the_committed_cells_can_be_reported(tmp_path, capsys):
    shutil.copy(ROOT / "study" / "study.jsonl", tmp_path)
    study.main(["--report", str(tmp_path / "study.jsonl")])
    out = capsys.readouterr().out
    assert "nan" not in out
    assert "| rkl against opd_current | 6 | **-74 % [-77, -71]** |" in out  # as the page says
    assert (tmp_path / "doses.png").exists() and (tmp_path / "leverage.png").exists()


def test_the_study_gates_in_closed_form():
    """Three segments of two tokens. Drift -.2 with the teacher above (away .2); +.5 with a = .3 (beyond by .2); +.1, a = .3."""
    segments = torch.tensor([0, 0, 1, 1, 2, 2])
    d = torch.tensor([-0.4, 0.0, 0.2, 0.8, 0.1, 0.1])
    a = torch.tensor([1.0, 1.0, 0.1, 0.5, 0.3, 0.3])
    away, beyond = math.exp(-0.4), math.exp(-0.4)  # tau 2 times .2
    for kind, expected in {
        "excess": [away, away, beyond, beyond, 1, 1],
        "away": [away, away, 1, 1, 1, 1],
        "beyond": [1, 1, beyond, beyond, 1, 1],
        "plain": [math.exp(-0.4)] * 2 + [math.exp(-1)] * 2 + [math.exp(-0.2)] * 2,
        "mask": [1, 1, 1, 0, 1, 1],  # at least one token, if 1 % of them is less
    }.items():
        g, s = gated_train.study_gate(kind, d, a, segments, "block", 2.0, "mean")
        assert g.tolist() == pytest.approx(expected), kind
        assert s.tolist() == pytest.approx([-0.2, -0.2, 0.5, 0.5, 0.1, 0.1])
        g, _ = gated_train.study_gate(kind, 0 * d, a, segments, "block", 2.0, "mean")
        assert g.tolist() == [1.0] * 6, kind  # nothing has drifted
        assert len(gated_train.study_gate(kind, d[:0], a[:0], segments[:0], "block", 2.0, "mean")[0]) == 0


@pytest.mark.parametrize("denominator, ratio", [("gates", 1.0), ("n", 0.5)])
def test_the_leverage_of_a_constant_gate_is_none(denominator, ratio, pair, tmp_path, monkeypatch):
    """Every gate is .5: with the sum of gates as denominator the gradient is the ungated one, with N it is half of that."""
    monkeypatch.setattr(gated_train, "study_gate", lambda kind, d, *_: (torch.full_like(d, 0.5), torch.zeros_like(d)))
    argv = ["--denominator", denominator, "--measure_every", "1"]
    gated_train.main(argv + train_flags(pair, tmp_path, steps=1, epochs=2, minibatches=2, loss="lsm", micro_tokens=64))
    rows = rows_of(tmp_path, "leverage.jsonl")
    assert [row["update"] for row in rows] == [2, 3, 4]  # the first has no drift
    for row in rows:
        assert row["cosine"] == pytest.approx(1, abs=1e-6) and row["norm_ratio"] == pytest.approx(ratio, rel=1e-5)
        assert (row["ess"], row["gate_sd"], row["gate_mean"]) == (1, 0, 0.5) and row["drift_abs"] > 0


@pytest.mark.parametrize("loss", ["opd", "rkl"])
def test_measuring_leverage_changes_no_bit_of_a_run(loss, pair, tmp_path):
    options = dict(loss=loss, epochs=2, minibatches=2, tau=10)
    _, weights = train_run(pair, tmp_path / "train", **options)
    gated_train.main(["--measure_every", "1", *train_flags(pair, tmp_path / "study", **options)])
    again = load_file(tmp_path / "study" / "final" / "model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in weights.items())
    rows = rows_of(tmp_path / "study", "leverage.jsonl")
    assert all(row["cosine"] < 1 and row["ess"] < 1 for row in rows) and len(rows) == 6
