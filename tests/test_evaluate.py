"""evaluate.py with a fake sampler: sampling, resuming, grading again, comparing. Run: python -m pytest tests/test_evaluate.py"""

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import transformers

import evaluate
import report
import rollout
from common import seed_for
from configs import EvalConfig
from data import Problem


class FakeTokenizer:
    chat_template = None
    added_tokens_decoder = {}

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode()

    def get_vocab(self):
        return {chr(i): i for i in range(256)}


class FakeSampler:
    """Right where the seed says so, which is what a sampler does as far as evaluate.py can see."""

    def __init__(self, pause=0.0):
        self.pause, self.calls = pause, []

    def sample(self, prompts, seeds, *, max_tokens, temperature, top_p, top_k):
        self.calls.append(len(prompts))
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
    found, rows = evaluate.evaluate(FakeSampler(), FakeTokenizer(), PROMPTS, k=2, n=4, batch=12, **SAMPLING)
    assert list(found) == ["pass@2", "mean@4", "truncated", "length", "no_answer"]
    seeds = [[seed_for("eval", 0, p.id, i) for i in range(4)] for p in PROBLEMS]
    assert [row["seed"] for row in rows] == sum(seeds, [])
    right = [[seed % 3 == 0 for seed in of] for of in seeds]
    assert found["mean@4"] == pytest.approx(np.mean(right))
    assert found["pass@2"] == pytest.approx(report.pass_at_k(4, [sum(x) for x in right])[:, 1].mean())
    assert found["truncated"] == pytest.approx(np.mean([row["seed"] % 5 == 0 for row in rows]))
    assert found["no_answer"] == 0


def test_parts_do_not_depend_on_the_batch_and_ranks_share_the_problems(monkeypatch):
    named = [("set", *prompt) for prompt in PROMPTS]
    whole = [job for part in evaluate.split_jobs(named, 2, 1000) for job in part]
    assert [job for part in evaluate.split_jobs(named, 2, 3) for job in part] == whole
    assert [len(part) for part in evaluate.split_jobs(named, 2, 7)] == [6, 6, 6, 2]
    shares = []
    for rank in range(3):
        monkeypatch.setattr(evaluate, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(evaluate, "world_size", lambda: 3)
        shares += [job[1].id for part in evaluate.split_jobs(named, 1, 2) for job in part]
    assert sorted(shares) == sorted(p.id for p in PROBLEMS)


# -----------------------------------------------------------------------------
# the command


def make_config(tmp_path, **settings):
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(dict(id=p.id, problem=p.prompt, answer=p.answer)) + "\n" for p in PROBLEMS))
    defaults = dict(model="fake", data=str(data), out=str(tmp_path / "out"), k=2, n=4, batch=8, max_tokens=8)
    return EvalConfig(**defaults | settings)


def without_model(monkeypatch):
    """evaluate.py with a sampler and a tokenizer that need no model; the sampler."""
    sampler = FakeSampler()
    context = transformers.PretrainedConfig(max_position_embeddings=512, vocab_size=256)
    for auto, found in ((transformers.AutoTokenizer, FakeTokenizer()), (transformers.AutoConfig, context)):
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, found=found, **__: found)
    monkeypatch.setattr(rollout, "make_sampler", lambda *_, **__: sampler, raising=False)
    return sampler


@pytest.fixture
def fake(monkeypatch):
    return without_model(monkeypatch)


def test_the_command_keeps_every_completion_and_its_settings(tmp_path, fake, capsys):
    evaluate.main(make_config(tmp_path, paper=True))
    rows = report.read_rows(tmp_path / "out")
    assert [(row["problem"], row["sample"]) for row in rows] == [(p.id, i) for p in PROBLEMS for i in range(4)]
    assert {"seed", "text", "tokens", "finish", "answer", "correct", "reason", "gold"} <= set(rows[0])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["top_p"] == 0.9 and results["versions"]["math-verify"]
    assert results["identity"]["problems of set"] and len(results["metrics"]["set"]["curve"]) == 4
    assert (tmp_path / "out" / "pass_at_k.png").stat().st_size > 10_000
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        ".lock",
        "identity.json",
        "samples.jsonl",
        "results.json",
        "pass_at_k.png",
    }
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


def test_no_model_and_no_finished_run_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished run in out/: give --model"):
        evaluate.main(EvalConfig())


def run_child(tmp_path, out, kill_after=None):
    """The command in a process of its own; True if it ended by itself."""

    def child():
        with pytest.MonkeyPatch.context() as patch:
            without_model(patch).pause = 0.03
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
    assert not list((tmp_path / "killed").glob("part-*"))
