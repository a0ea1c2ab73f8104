"""evaluate.py with a fake sampler: sampling, resuming, grading again, comparing. Run: python -m pytest tests/test_evaluate.py"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import graded_row, join, start_ranks, write_jsonl

import data
import evaluate
import rollout
from configs import EvalConfig, TrainConfig, parse
from data import Problem
from support import grade, report, statistics, toy
from support.common import seed_for
from support.errors import draw_or_warn
from support.grade import Grader
from support.statistics import read_rows
from support.vocabulary import Vocabulary


class FakeTokenizer:
    chat_template = None
    added_tokens_decoder = {}

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode()

    def convert_ids_to_tokens(self, ids):
        return list(map(chr, ids))

    def get_vocab(self):
        return {chr(i): i for i in range(256)}


class FakeSampler:
    """Right where the seed says so, which is what a sampler does as far as evaluate.py can see."""

    def __init__(self, pause=0.0):
        self.pause, self.calls, self.options = pause, [], None

    def sample(self, prompts, seeds, **options):
        self.calls.append(len(prompts))
        self.options = options
        time.sleep(self.pause)
        texts = [f"\\boxed{{{'7' if seed % 3 == 0 else seed % 11 + 20}}}" for seed in seeds]
        finish = ["length" if seed % 5 == 0 else "stop" for seed in seeds]
        responses = [list(text.encode()) for text in texts]
        return [rollout.Rollout(p, r, [0.0] * len(r), f) for p, r, f in zip(prompts, responses, finish, strict=True)]


PROBLEMS = [Problem(f"p{i}", f"question {i}?", "7") for i in range(10)]
PROMPTS = [(problem, [1]) for problem in PROBLEMS]
SAMPLING = dict(max_tokens=8, temperature=1.0, top_p=0.9, top_k=0)


# -----------------------------------------------------------------------------
# sampling


def test_evaluate_counts_what_the_sampler_gave():
    rows = evaluate.evaluate(FakeSampler(), FakeTokenizer(), PROMPTS, k=2, n=4, batch=12, **SAMPLING)
    found = statistics.metrics(rows, 2)
    assert list(found) == ["pass@2", "mean@4", "truncated", "length", "no_answer"]
    seeds = [[seed_for("eval", 0, p.id, i) for i in range(4)] for p in PROBLEMS]
    assert [row["seed"] for row in rows] == sum(seeds, [])
    right = [[seed % 3 == 0 for seed in of] for of in seeds]
    assert found["mean@4"] == pytest.approx(np.mean(right))
    assert found["pass@2"] == pytest.approx(statistics.pass_at_k(4, [sum(x) for x in right])[:, 1].mean())
    assert found["truncated"] == pytest.approx(np.mean([row["seed"] % 5 == 0 for row in rows]))
    assert found["no_answer"] == 0


@pytest.mark.parametrize("batch", [1, 3, 7, 1000])
def test_rows_come_in_order_on_every_rank_whatever_the_batch(monkeypatch, batch):
    """Three ranks, which are threads here, share the problems."""
    named, done = [("set", *prompt) for prompt in PROMPTS], {("set", "p3", 1)}
    expected = [(p.id, i) for p in PROBLEMS for i in range(2) if (p.id, i) != ("p3", 1)]
    this, barrier, shares, found = threading.local(), threading.Barrier(3), {}, {}

    def gather(rows):
        shares[this.rank] = rows
        barrier.wait()
        parts = [shares[rank] for rank in range(3)]
        barrier.wait()
        return parts

    monkeypatch.setattr(evaluate, "rank", lambda: this.rank)
    monkeypatch.setattr(evaluate, "world_size", lambda: 3)
    monkeypatch.setattr(evaluate, "gather", gather)
    samplers = [FakeSampler() for _ in range(3)]

    def one_rank(rank):
        this.rank = rank
        with Grader(workers=1) as grader:
            options = dict(seed=0, batch=batch, **SAMPLING)
            parts = evaluate.answer_all(
                samplers[rank], FakeTokenizer(), evaluate.jobs_of(named, 2, done), grader, **options
            )
            found[rank] = [(row["problem"], row["sample"]) for rows in parts for row in rows]

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == dict.fromkeys(range(3), expected)
    assert sum(sum(sampler.calls) for sampler in samplers) == len(expected)
    assert max(max(sampler.calls) for sampler in samplers) <= max(batch, 2)  # the samples of a problem stay together


# -----------------------------------------------------------------------------
# the command


def make_config(tmp_path, **settings):
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(dict(id=p.id, problem=p.prompt, answer=p.answer)) + "\n" for p in PROBLEMS))
    defaults = dict(model="fake", data=str(data), out=str(tmp_path / "out"), k=2, n=4, batch=8, max_response=8)
    return EvalConfig(**defaults | settings)


def without_model(monkeypatch):
    """evaluate.py with a sampler and a tokenizer that need no model; the sampler."""
    sampler = FakeSampler()
    context = transformers.PretrainedConfig(max_position_embeddings=512, vocab_size=256)
    vocabulary = Vocabulary(256, set(), [], [])
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda *_, **__: (FakeTokenizer(), vocabulary))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: context)
    monkeypatch.setattr(rollout, "make_sampler", lambda *_, **__: sampler, raising=False)
    monkeypatch.setattr(Grader, "check", lambda self: None)  # a worker takes a second or two to start
    return sampler


@pytest.fixture
def fake(monkeypatch):
    return without_model(monkeypatch)


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr(evaluate, "draw_or_warn", draw_or_warn)  # helpers took it out


def test_the_command_keeps_every_completion_and_its_settings(tmp_path, fake, pictures, capsys):
    evaluate.main(make_config(tmp_path, paper=True))
    rows = read_rows(tmp_path / "out")
    assert [(row["problem"], row["sample"]) for row in rows] == [(p.id, i) for p in PROBLEMS for i in range(4)]
    assert {"seed", "text", "tokens", "finish", "answer", "correct", "reason", "gold"} <= set(rows[0])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["top_p"] == 0.9 and results["versions"]["math-verify"]
    (record,) = results["metrics"]
    assert results["identity"]["problems of set"] and record["benchmark"] == "set" and len(record["curve"]) == 4
    assert (tmp_path / "out" / "pass_at_k.png").stat().st_size > 10_000
    names = {file.name for file in (tmp_path / "out").iterdir() if not file.name.startswith(".")}
    assert names == {"identity.json", "samples.jsonl", "results.json", "pass_at_k.png"}
    printed = capsys.readouterr().out
    assert "OPD + Block64" in printed and "pass@2 %" in printed


def test_a_finished_evaluation_is_not_sampled_again_and_another_one_is_refused(tmp_path, fake):
    evaluate.main(make_config(tmp_path))
    calls = len(fake.calls)
    evaluate.main(make_config(tmp_path, k=4))
    assert len(fake.calls) == calls
    with pytest.raises(SystemExit, match="with temperature 1.0, not 0.5"):
        evaluate.main(make_config(tmp_path, temperature=0.5))
    PROBLEMS[0].answer = "8"
    try:
        with pytest.raises(SystemExit, match="problems of set '[0-9a-f]{16}', not '[0-9a-f]{16}'"):
            evaluate.main(make_config(tmp_path))
    finally:
        PROBLEMS[0].answer = "7"
    evaluate.main(make_config(tmp_path, temperature=0.5, overwrite=True))
    assert len(fake.calls) == 2 * calls


def test_a_grader_that_does_not_work_ends_an_evaluation_before_its_first_sample(tmp_path, fake, monkeypatch):
    def check(self):
        raise ValueError("the grader does not work here: crash")

    monkeypatch.setattr(Grader, "check", check)
    with pytest.raises(SystemExit, match="the grader does not work here: crash"):
        evaluate.main(make_config(tmp_path))
    assert not fake.calls


def test_kept_samples_are_graded_again(tmp_path, fake, monkeypatch, capsys):
    """Another version of the grader may have graded them: one table, one grader."""
    evaluate.main(make_config(tmp_path))
    path = tmp_path / "out/samples.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"correct": true', '"correct": false'))
    evaluate.main(make_config(tmp_path))
    assert path.read_text() == whole
    assert json.loads((tmp_path / "out/results.json").read_text())["identity"]["grader"].startswith(
        f"{grade.VERSION} with"
    )


def test_an_evaluation_knows_its_weights_by_their_content(tmp_path, fake):
    """Not by their files' times: another student may be as old, and a copy of this one is newer."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
        os.utime(model / name, (100, 100))
    cfg = make_config(tmp_path, model=str(model))
    evaluate.main(cfg)
    calls = len(fake.calls)
    os.utime(model / "model.safetensors", (200, 200))
    evaluate.main(cfg)  # the same weights
    (model / "model.safetensors").write_text("MODEL.safetensors")
    os.utime(model / "model.safetensors", (100, 100))
    with pytest.raises(SystemExit, match="holds another evaluation, with weights"):
        evaluate.main(cfg)
    assert len(fake.calls) == calls


def test_a_long_problem_takes_no_tokens_from_the_others(pair, tmp_path, capsys, monkeypatch):
    """Its own responses end where the context does, and the table counts it."""
    sampled = []
    sample = rollout.HFSampler.sample
    monkeypatch.setattr(
        rollout.HFSampler, "sample", lambda *args, **options: sampled.extend(r := sample(*args, **options)) or r
    )
    context = json.loads((Path(pair[1]) / "config.json").read_text())["max_position_embeddings"]
    rows = [{"problem": "1" * length, "answer": "5"} for length in (3, 4, context - 7)]
    data_flags = ["--data", str(write_jsonl(tmp_path / "long.jsonl", rows))]
    argv = [
        "--model",
        pair[1],
        *data_flags,
        "--out",
        str(tmp_path / "out"),
        *"--k 2 --max_response 20 --template raw".split(),
    ]
    evaluate.main(parse(EvalConfig, argv))
    lengths = {len(r.prompt): [] for r in sampled}
    for r in sampled:
        lengths[len(r.prompt)].append(len(r.response) if r.finish == "length" else 20)
    longest = max(lengths)
    assert len(lengths) == 3 and lengths.pop(longest) == [context - longest] * 2 and context - longest < 10
    assert all(found == [20, 20] for found in lengths.values())
    printed = capsys.readouterr().out
    assert "20 tokens at most, for 1 problems only until the context" in printed
    header, _, line = printed[printed.index(" problems  ") :].splitlines()[:3]
    assert header.endswith("context < max_response") and line.split()[-1] == "1"


def test_temperature_0_is_greedy_decoding(pair, tmp_path, fake, capsys):
    argv = [
        "--model",
        "fake",
        "--temperature",
        "0",
        "--data",
        make_config(tmp_path).data,
        "--out",
        str(tmp_path / "out"),
    ]
    evaluate.main(parse(EvalConfig, argv))
    assert sum(fake.calls) == len(PROBLEMS)
    assert {name: fake.options[name] for name in ("temperature", "top_p", "top_k")} == dict(
        temperature=1.0, top_p=1.0, top_k=1
    )
    assert "pass@1 %" in capsys.readouterr().out
    for wrong in ("--n 2", "--temperature -1", "--temperature nan"):
        with pytest.raises(SystemExit):
            parse(EvalConfig, [*argv, *wrong.split()])
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--temperature", "0"])
    assert "--temperature 0 is greedy decoding, and --n is 2" in capsys.readouterr().err


def test_a_torn_last_line_is_dropped_and_its_part_sampled_again(tmp_path, fake):
    evaluate.main(make_config(tmp_path))
    path = tmp_path / "out" / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    calls = len(fake.calls)
    evaluate.main(make_config(tmp_path))
    assert path.read_bytes() == whole
    assert calls < len(fake.calls) < 2 * calls


def test_regrading_gives_the_same_verdicts_without_a_model(tmp_path, fake, monkeypatch, capsys):
    evaluate.main(make_config(tmp_path))
    monkeypatch.delattr(rollout, "make_sampler", raising=False)
    evaluate.main(EvalConfig(regrade=str(tmp_path / "out"), k=2))
    assert (tmp_path / "out/regraded/samples.jsonl").read_bytes() == (tmp_path / "out/samples.jsonl").read_bytes()
    assert "0 of 40 verdicts changed" in capsys.readouterr().out


def test_compare_reads_folders_files_and_seeds(tmp_path, fake, capsys):
    for seed in range(3):
        evaluate.main(make_config(tmp_path, seed=seed, out=str(tmp_path / f"seed{seed}")))
    arms = [f"base={tmp_path}/seed0/samples.jsonl", f"new={tmp_path}/seed[12]"]
    evaluate.main(EvalConfig(compare=arms, k=2, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert "difference" in printed and "new" in printed
    assert (tmp_path / "pass_at_k.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no finished evaluation"):
        evaluate.main(EvalConfig(compare=[arms[0], "missing"], k=2))


def make_evaluation(folder, seed, **identity):
    folder.mkdir()
    rows = [graded_row(i, s) | {"correct": (i * s + seed) % 3 > 0} for i in range(6) for s in range(2)]
    write_jsonl(folder / "samples.jsonl", rows)
    (folder / "identity.json").write_text(json.dumps(identity))
    (folder / "results.json").write_text("{}")
    return folder


def compare(tmp_path, *arms):
    report.compare(EvalConfig(compare=list(arms), k=2, out=str(tmp_path)))


def test_a_run_or_a_name_is_compared_once(tmp_path):
    """A repeated name replaced the first one; one run given four times counted as four training seeds."""
    a, b = (make_evaluation(tmp_path / name, i) for i, name in enumerate("ab"))
    (tmp_path / "link").symlink_to(a)
    with pytest.raises(ValueError, match="the name new or one of its runs is given twice"):
        compare(tmp_path, f"base={a}", f"new={b}", f"new={a}")
    for again in (a, f"{a}/samples.jsonl", tmp_path / "link", f"{tmp_path}/[a]"):
        with pytest.raises(ValueError, match="is given twice"):
            compare(tmp_path, f"base={b}", f"new={a},{again}")
        with pytest.raises(ValueError, match="is given twice"):
            compare(tmp_path, f"base={a}", f"new={b},{again}")


def test_a_comparison_says_what_differs_besides_the_models(tmp_path, capsys):
    base = dict(max_response=512, temperature=0.2, n=2, template="auto", weights="a", grader="2 with x")
    arms = {
        "same": {"weights": "b"}, "old": {"max_tokens": 99}, "hot": {"temperature": 1.0}, "template": {"template": "plain"},
        "graded": {"grader": "1 with x"}, "again": {"weights": "b"},
    }  # fmt: skip
    folders = {"base": make_evaluation(tmp_path / "base", 0, **base)}
    for i, (name, changes) in enumerate(arms.items()):
        folders[name] = make_evaluation(tmp_path / name, i, **base | changes)
    compare(tmp_path, f"base={folders['base']}", f"new={folders['same']}")
    assert "warning" not in capsys.readouterr().out
    for name, warning in (
        ("old", "max_response 512 (base), 99 (new)"), ("hot", "temperature 0.2 (base), 1.0 (new)"), ("template", "template auto (base), plain (new)"),
    ):  # fmt: skip
        compare(tmp_path, f"base={folders['base']}", f"new={folders[name]}")
        assert f"warning: they differ in more than the model: {warning}" in capsys.readouterr().out
        with pytest.raises(ValueError, match="runs of one variant have different settings: .* and .* .new."):
            compare(tmp_path, f"base={folders['base']}", f"new={folders['same']},{folders[name]}")
    with pytest.raises(ValueError, match="grader 2 with x .base., 1 with x .new.: .*--regrade"):
        compare(tmp_path, f"base={folders['base']}", f"new={folders['graded']}")
    compare(tmp_path, f"base={folders['base']}", f"new={folders['same']},{folders['again']}")
    assert "runs of new have the same weights, and count as different training seeds" in capsys.readouterr().out


def test_a_regraded_evaluation_keeps_its_settings(tmp_path, fake, capsys):
    evaluate.main(make_config(tmp_path, temperature=0.5))
    evaluate.main(EvalConfig(regrade=str(tmp_path / "out"), k=2))
    old, new = (report.read_identity(tmp_path / name) for name in ("out", "out/regraded"))
    assert new == old | {"regraded": str(tmp_path / "out")} and new["temperature"] == 0.5 and new["grader"]


def test_no_model_and_no_finished_run_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished run in out/: give --model"):
        evaluate.main(EvalConfig())


def run_child(tmp_path, out, kill_after=None):
    """The command in a process of its own; True if it ended by itself."""

    def child():
        with pytest.MonkeyPatch.context() as patch:
            without_model(patch).pause = 0.06
            evaluate.main(make_config(tmp_path, out=str(tmp_path / out)))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    if kill_after is not None:
        while not (tmp_path / out / "identity.json").exists() and process.is_alive():
            time.sleep(0.005)
        time.sleep(kill_after)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def test_killed_and_resumed_it_writes_the_same_file(tmp_path):
    """KILLS=20 for the long form."""
    make_config(tmp_path)
    assert run_child(tmp_path, "whole")
    rng = random.Random(0)
    kills = int(os.environ.get("KILLS", 3))
    ended = [run_child(tmp_path, "killed", rng.uniform(0, 0.25)) for _ in range(kills)]
    assert not all(ended)
    assert run_child(tmp_path, "killed")
    whole, killed = ((tmp_path / out / "samples.jsonl").read_bytes() for out in ("whole", "killed"))
    assert killed == whole


def test_regrading_fewer_samples_than_k_writes_nothing(tmp_path):
    write_jsonl(tmp_path / "samples.jsonl", [graded_row(i, s) for i in range(2) for s in range(2)])
    with pytest.raises(SystemExit, match="--k is 8, but there are 2 sample"):
        evaluate.main(parse(EvalConfig, ["--regrade", str(tmp_path)]))
    assert not (tmp_path / "regraded").exists()


def test_a_path_with_an_equals_sign_can_be_compared(tmp_path, capsys):
    for name in ("lr=3", "lr=4"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "samples.jsonl", [graded_row(i, 0) for i in range(2)])
    paths = [f"{tmp_path}/lr=3", f"new={tmp_path}/lr=4"]
    report.compare(EvalConfig(compare=paths, k=1, out=str(tmp_path)))
    assert "lr=3" in (out := capsys.readouterr().out) and "new" in out


def test_an_evaluation_can_be_finished_on_another_number_of_ranks(pair, tmp_path, monkeypatch):
    """Its rows do not depend on it."""
    options = ["--model", pair[1], *"--data toy --eval_problems 4 --k 1 --max_response 5 --batch 1".split()]
    evaluate.main(parse(EvalConfig, [*options, "--out", str(tmp_path / "one")]))
    cfg = parse(EvalConfig, [*options, "--out", str(tmp_path / "two")])
    rows = (tmp_path / "one/samples.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # as a kill would leave it
    (tmp_path / "two/results.json").unlink()
    (tmp_path / "two/samples.jsonl").write_text("".join(rows[:2]) + rows[2][:20])
    assert join(start_ranks(lambda rank: evaluate.main(cfg), 2, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "two/samples.jsonl").read_text() == "".join(rows)


def test_an_evaluation_can_be_finished_with_another_batch(tmp_path, monkeypatch):
    """And until it is, it cannot be compared with others."""
    sampler = without_model(monkeypatch)
    whole = make_config(tmp_path, out=str(tmp_path / "whole"))
    evaluate.run(whole)
    calls = []

    def sample(prompts, seeds, **options):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return FakeSampler.sample(sampler, prompts, seeds, **options)

    monkeypatch.setattr(sampler, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(make_config(tmp_path, out=str(tmp_path / "killed"), batch=8))
    with pytest.raises(ValueError, match="no finished evaluation: .*killed was stopped"):
        read_rows(tmp_path / "killed")
    evaluate.run(make_config(tmp_path, out=str(tmp_path / "killed"), batch=16))
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1] and len(read_rows(tmp_path / "killed")) == 40


def test_the_default_model_is_that_of_the_run_that_finished_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for when, name in ((200, "first"), (100, "second")):  # "first" began last, and finished first
        final = tmp_path / "out" / name / "final"
        final.mkdir(parents=True)
        (final / "config.json").write_text("{}")
        os.utime(final / "config.json", (when, when))
    for when, name in ((300, "first"), (400, "second")):
        os.utime(tmp_path / "out" / name / "final", (when, when))
    assert evaluate.choose_model("")[0] == "out/second/final"


def test_a_model_has_one_name_and_a_run_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/a/final").mkdir(parents=True)
    assert {evaluate.choose_model(name) for name in ("out/a/final", "out/a/final/", "./out/a/final")} == {
        ("out/a/final", "a")
    }
    (tmp_path / "out/a/metrics.jsonl").touch()
    with pytest.raises(ValueError, match="out/a is a run; name its student, out/a/final"):
        evaluate.choose_model("out/a")


def test_variants_are_compared_on_the_benchmarks_that_all_runs_have(tmp_path, capsys):
    for name, benchmarks in (("a", "qr"), ("b", "qr"), ("c", "q")):
        (tmp_path / name).mkdir()
        rows = [graded_row(i, s) | {"data": benchmark} for benchmark in benchmarks for i in range(2) for s in range(2)]
        write_jsonl(tmp_path / name / "samples.jsonl", rows)
    a, b, c = (str(tmp_path / name) for name in "abc")
    report.compare(EvalConfig(compare=[a, f"new={b},{c}"], k=1, out=str(tmp_path)))
    assert "pass@1" in capsys.readouterr().out
    write_jsonl(tmp_path / "c" / "samples.jsonl", [graded_row(i, 0) for i in range(2)])
    with pytest.raises(ValueError, match=r"runs of one variant have \[1, 2\] samples of each problem"):
        report.compare(EvalConfig(compare=[a, f"new={b},{c}"], k=1, out=str(tmp_path)))


def test_the_sampler_gets_room_for_the_longest_sequence_only(tmp_path, monkeypatch):
    without_model(monkeypatch)
    asked = {}

    def make_sampler(*_, **options):
        asked.update(options)
        return FakeSampler()

    monkeypatch.setattr(rollout, "make_sampler", make_sampler)
    cfg = make_config(tmp_path)
    evaluate.run(cfg)
    longest = max(
        len(ids) for _, _, ids in evaluate.prepare(cfg, *evaluate.choose_model(cfg.model), torch.device("cpu"))[3]
    )
    assert asked == {"max_len": longest + cfg.max_response}
    assert longest + cfg.max_response < 512  # the model's context


class OneResponse:
    """A sampler that always gives the same response."""

    def __init__(self, response, finish):
        self.response, self.finish = response, finish

    def sample(self, prompts, seeds, **sampling):
        return [rollout.Rollout(p, self.response, [0.0] * len(self.response), self.finish) for p in prompts]


def answer_to(tokenizer, prompt, response, finish="stop"):
    """What evaluate.py takes for the answer in this response."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)]
    jobs = [("set", data.Problem("a", prompt, "7"), ids[0], 0)]
    with grade.Grader(workers=1) as grader:
        return evaluate.answer(OneResponse(ids[1], finish), tokenizer, jobs, grader, seed=0)[0]["answer"]


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_that_the_prompt_opens_is_not_graded(special):
    """vllm-project/vllm#13125: DeepSeek-R1's template ends the prompt with <think>, so a response has no opening tag."""
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    assert answer_to(tokenizer, "1+1=?<think>\n", "\\boxed{5}", "length") is None
    assert answer_to(tokenizer, "1+1=?<think>\n", "\\boxed{5}</think>\\boxed{7}") == "7"
    assert answer_to(tokenizer, "1+1=?<think>\n\n</think>\n\n", "\\boxed{5}") == "5"


def test_think_tags_that_are_special_tokens_are_seen():
    """huggingface/trl#2897, verl-project/verl#1724: they vanished with the other special tokens."""
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    assert answer_to(tokenizer, "1+1=?", "<think>\\boxed{5}") is None
    assert answer_to(tokenizer, "1+1=?", "<think>\\boxed{5}</think>7") == "7"
    assert answer_to(tokenizer, "1+1=?", "\\boxed{1<pad>4}<eos>") == "14"  # other special tokens vanish
