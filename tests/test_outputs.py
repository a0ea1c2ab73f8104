"""docs/outputs.md against what runs write: python -m pytest tests/test_outputs.py"""

import json
import re

import matplotlib
import pytest
from helpers import ROOT, flags, graded_row, questions, rows_of, run, write_jsonl

import data
import evaluate
import train
from configs import EvalConfig, parse

matplotlib.use("Agg")
PAGE = (ROOT / "docs/outputs.md").read_text()
SECTIONS = dict(re.findall(r"(?ms)^## (\S+)\n(.*?)(?=^## |\Z)", PAGE))  # {file: what the page says of it}
RUNS = {  # flags of small runs that together write every column
    "tiny": dict(loss="lsm", eval_every=1, k=8, eval_problems=4, trace_every=1),
    "opd": dict(loss="opd", gate="span", steps=1, trace_every=1, advantage="current"),
    "tail": dict(loss="tail_topk", gate="token", steps=1, temperature=0.7),
    "forward": dict(loss="fkl_topk", gate="sequence", steps=1, stat="rms"),
    "full": dict(loss="jsd", gate="none", steps=1, eval_every=1, k=2, eval_problems=3, template="raw"),
}


@pytest.fixture(scope="module")
def outputs(pair, tmp_path_factory):
    """A folder with the runs in out/, and an evaluation of the first one's student."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, "TOY_TRAINING", 256)  # with these problems, a response of a random student stops
        for name, options in RUNS.items():
            if name == "full":  # two held-out sets
                options = options | dict(eval_data=f"toy,{questions(folder / 'set.jsonl', 3)}")
            run(pair, f"out/{name}", **options)
        argv = "--model out/tiny/final --data toy --eval_problems 4 --n 9 --max_response 8"
        evaluate.main(parse(EvalConfig, argv.split()))
    return folder


def columns_on_the_page(file):
    return set(re.findall(r"(?m)^\| `(\S+)` \| [^|\s]", SECTIONS[file]))


def columns_written(outputs, file):
    """The columns of this file that any run wrote, by the names that the page has for them."""
    if file == "results.json":
        results = json.loads((outputs / "out/eval/tiny/toy" / file).read_text())
        names = {*results} | {f"metrics.{name}" for record in results["metrics"] for name in record}
    else:
        folders = ["out/eval/tiny/toy"] if file == "samples.jsonl" else [f"out/{name}" for name in RUNS]
        folders = [outputs / folder for folder in folders if (outputs / folder / file).exists()]
        rows = [row for folder in folders for row in rows_of(folder, file)]
        names = {name for row in rows for name in row}
        names |= {f"epochs.{name}" for row in rows for epoch in row.get("epochs", []) for name in epoch}
    names = {re.sub(r"@\d+", "@K", name) for name in names}
    return {re.sub(r"^eval/(toy|set)/", "eval/", name) for name in names}  # with several held-out sets: eval/SET/kl


@pytest.mark.parametrize("file", SECTIONS)
def test_every_column_that_is_written_is_on_the_page_and_the_reverse(outputs, file):
    assert columns_on_the_page(file) == columns_written(outputs, file)


def results_of_block(outputs, file, monkeypatch):
    """The variables that the page's Python lines for this file leave."""
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", SECTIONS[file])
    monkeypatch.chdir(outputs)
    names = {}
    exec(compile(code, f"docs/outputs.md, {file}", "exec"), names)
    return names


def test_the_pandas_lines_of_the_page_draw_what_the_files_hold(outputs, monkeypatch):
    evaluations = rows_of(outputs / "out/tiny", "evaluations.jsonl")
    (line,) = results_of_block(outputs, "evaluations.jsonl", monkeypatch)["axes"].lines
    assert line.get_xydata().tolist() == [[row["step"], row["eval/pass@8"]] for row in evaluations]
    metrics = rows_of(outputs / "out/tiny", "metrics.jsonl")
    found = results_of_block(outputs, "metrics.jsonl", monkeypatch)["metrics"]
    assert found["loss"].tolist() == pytest.approx([row["loss"] for row in metrics])
    gates = rows_of(outputs / "out/tiny", "trace.jsonl")[0]["epochs"][-1]["gate"]
    assert results_of_block(outputs, "trace.jsonl", monkeypatch)["last_epoch"]["gate"].tolist() == pytest.approx(gates)
    curve = results_of_block(outputs, "results.json", monkeypatch)["curve"]
    assert len(curve) == 9 and (curve["low"] <= curve["high"]).all()


def test_pandas_reads_ids_and_answers_as_text_and_seeds_exactly(outputs, monkeypatch, tmp_path):
    found = results_of_block(outputs, "samples.jsonl", monkeypatch)["samples"]
    expected = rows_of(outputs / "out/eval/tiny/toy", "samples.jsonl")
    assert found.astype(object).where(found.notna(), None).to_dict("records") == expected
    folder = tmp_path / "out/eval/tiny/toy"
    folder.mkdir(parents=True)
    rows = [graded_row(i, 0) | dict(problem=f"0{i}", gold="07", answer="1e2", seed=2**53 - 1 - i) for i in range(2)]
    write_jsonl(folder / "samples.jsonl", rows)
    assert results_of_block(tmp_path, "samples.jsonl", monkeypatch)["samples"].to_dict("records") == rows


def test_a_sampler_out_of_step_leaves_no_row_of_that_step(pair, tmp_path, monkeypatch):
    """The page says that the run stops there."""
    monkeypatch.setattr(train, "OUT_OF_STEP", {"cpu": -1.0})
    with pytest.raises(SystemExit, match="out of step"):
        train.main(parse(train.TrainConfig, flags(pair, tmp_path / "run")))
    assert rows_of(tmp_path / "run", "metrics.jsonl") == []
