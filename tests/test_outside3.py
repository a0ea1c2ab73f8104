"""python -m pytest tests/test_outside3.py      (faults that a reader of the whole code has found, each as its user would meet it)"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import finished, flags, join, run, start_ranks
from test_evaluate import FakeSampler, make_config, without_model
from test_outside import graded_row, write_jsonl
from transformers import AutoTokenizer

import checkpoint
import common
import evaluate
import metrics
import plot
import report
import rollout
import toy
import train
from configs import EvalConfig, TrainConfig, parse
from policy import stop_ids_of
from rollout import Rollout


def steps_of(out):
    return sorted(path.name for path in Path(out).glob("step-*"))


# -----------------------------------------------------------------------------
# evaluation


def test_an_evaluation_can_be_finished_with_another_batch(tmp_path, monkeypatch):
    """Parts of another size have other numbers; none may replace what an earlier start has sampled."""
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
    evaluate.run(make_config(tmp_path, out=str(tmp_path / "killed"), batch=16))
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1] and not list((tmp_path / "killed").glob("part-*"))


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


# -----------------------------------------------------------------------------
# a run's folder


def test_overwrite_does_not_delete_what_the_run_is_about_to_read(pair, tmp_path):
    run(pair, tmp_path / "a")
    second = (pair[0], str(tmp_path / "a/final"))
    for out, name in ((tmp_path / "a", "student"), (tmp_path / "a/final", "student")):
        with pytest.raises(SystemExit, match=f"--overwrite would delete --{name} .*/a/final: choose another --out"):
            train.main(parse(TrainConfig, flags(second, out, overwrite="true")))
    assert (tmp_path / "a/final/model.safetensors").exists() and steps_of(tmp_path / "a")
    train.main(parse(TrainConfig, flags(second, tmp_path / "b", overwrite="true")))


def test_an_overwrite_that_is_interrupted_leaves_no_checkpoint_to_a_new_run(pair, tmp_path, monkeypatch):
    run(pair, tmp_path, save_every=1)
    delete, done = checkpoint.delete, []

    def interrupted(path):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        delete(path)

    monkeypatch.setattr(checkpoint, "delete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.claim_folder(tmp_path, "config.json", overwrite=True)
    assert (tmp_path / "config.json").exists() and len(done) == 2
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="already holds a run"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=1)))


def test_an_overwrite_clears_what_a_kill_has_left_under_a_temporary_name(pair, tmp_path):
    """Whichever the file system lists first, final or final.tmp."""
    run(pair, tmp_path, steps=1)
    for name in ("final.tmp", "step-1.tmp", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torn").touch()
    checkpoint.claim_folder(tmp_path, "config.json", overwrite=True).close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_files_of_others_stay_where_they_are(tmp_path):
    (tmp_path / "thesis.tmp").write_text("my only copy")
    checkpoint.claim_folder(tmp_path, "config.json", overwrite=True).close()
    assert (tmp_path / "thesis.tmp").exists()


def test_a_run_without_a_checkpoint_is_told_what_works(pair, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="with --resume auto the run starts from the beginning"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, resume="true")))
    train.main(parse(TrainConfig, flags(pair, tmp_path, resume="auto", steps=1)))


def test_a_checkpoint_that_cannot_be_deleted_ends_both_ranks(pair, tmp_path):
    def one_rank(rank):
        def broken(path):
            raise OSError("the file is busy")

        checkpoint.delete = broken
        train.main(parse(TrainConfig, flags(pair, tmp_path / "out", steps=3, save_every=1, keep=1)))

    assert join(start_ranks(one_rank, 2, log=tmp_path / "log")) == 1
    assert (tmp_path / "log").read_text().count("train.py: the file is busy") == 1


def test_a_plot_of_a_killed_run_leaves_out_its_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert plot.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    plot.main([str(tmp_path)])
    assert (tmp_path / "curves.png").exists()


# -----------------------------------------------------------------------------
# an evaluation in the loop


def test_a_stop_during_an_evaluation_saves_the_finished_steps(pair, tmp_path, monkeypatch, capsys):
    """vLLM gives back empty responses then."""
    make = rollout.make_sampler

    def make_sampler(*args, **options):
        sampler = make(*args, **options)
        sample = sampler.sample

        def stopped(prompts, seeds, **sampling):
            if sampling["top_p"] == 1 and len(prompts) == 2:  # of the evaluation's second part
                os.kill(os.getpid(), 15)
                return [Rollout(prompt, [], [], "stopped") for prompt in prompts]
            return sample(prompts, seeds, **sampling)

        sampler.sample = stopped
        return sampler

    monkeypatch.setattr(rollout, "make_sampler", make_sampler)
    options = dict(steps=2, eval_every=1, eval_problems=2, k=2, top_p=0.9)
    cfg = parse(TrainConfig, flags(pair, tmp_path, **options))
    train.main(cfg)
    assert steps_of(tmp_path) == ["step-0"] and "stopped by SIGTERM after step 0" in capsys.readouterr().out


def test_a_teacher_that_goes_during_an_evaluation_costs_no_finished_step(pair, tmp_path, monkeypatch):
    calls = []
    targets = evaluate.LocalTeacher.targets

    def broken(self, batches):
        calls.append(1)
        if len(calls) == 3:  # evaluation, step 1, evaluation
            raise OSError("the server is gone")
        return targets(self, batches)

    monkeypatch.setattr(evaluate.LocalTeacher, "targets", broken)
    with pytest.raises(SystemExit, match="the server is gone"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=2, eval_every=1, eval_problems=2, k=1)))
    assert steps_of(tmp_path) == ["step-1"]


# -----------------------------------------------------------------------------
# models


def test_each_models_stop_tokens_are_read_with_its_own_tokenizer(tmp_path):
    """A teacher may have neither a generation_config.json nor the student's EOS."""
    paths = {}
    for role, eos in (("student", 2), ("teacher", 3)):
        paths[role] = str(tmp_path / role)
        model = toy.model(32, 2, seed=0)
        model.config.eos_token_id = eos
        model.save_pretrained(paths[role])
        (tmp_path / role / "generation_config.json").unlink()
        tokenizer = toy.tokenizer()
        tokenizer.eos_token = toy.VOCAB[eos]
        tokenizer.save_pretrained(paths[role])
    assert stop_ids_of(paths["teacher"], AutoTokenizer.from_pretrained(paths["student"])) == [2, 3]  # from config.json
    for role in paths:
        config = json.loads((tmp_path / role / "config.json").read_text())
        (tmp_path / role / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "eos" not in k}))
    cfg = parse(TrainConfig, ["--preset", "tiny"])
    _, vocabulary = train.load_tokenizer(paths, cfg)
    assert vocabulary.stop_ids == vocabulary.merged == [2, 3]


def test_a_checkpoint_of_a_model_with_its_own_code_can_be_evaluated(tmp_path, monkeypatch):
    source = tmp_path / "student"
    toy.model(32, 2, seed=0).save_pretrained(source)
    toy.tokenizer().save_pretrained(source)
    (source / "mine.py").write_text(
        "from transformers import Qwen3ForCausalLM\nclass Mine(Qwen3ForCausalLM):\n    pass\n"
    )
    config = json.loads((source / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (source / "config.json").write_text(json.dumps(config))
    argv = flags((source, source), tmp_path / "out", steps=1, trust_remote_code="true")
    assert finished(argv, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    checkpoint.export(tmp_path / "out/step-1", trust_remote_code=True)
    assert (tmp_path / "out/step-1/model/mine.py").exists() and (tmp_path / "out/final/mine.py").exists()


def test_the_toy_needs_no_vllm_on_a_gpu():
    assert parse(TrainConfig, ["--preset", "tiny", "--device", "cuda"]).rollout == "hf"


def test_the_models_behind_a_teachers_server_are_not_guessed(tmp_path):
    cfg = parse(TrainConfig, ["--preset", "qwen3", "--out", str(tmp_path), "--teacher_url", "http://x"])
    (tmp_path / "final").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    metrics.write_model_card(cfg)
    assert "Thinking-Space" not in (tmp_path / "final/README.md").read_text()


# -----------------------------------------------------------------------------
# ranks and metrics


def test_nodes_with_unequal_numbers_of_ranks_load_their_models(tmp_path):
    """Local ranks 0 and 1 on one node, 0 on the other."""

    def one_rank(rank):
        os.environ["LOCAL_RANK"] = str([0, 1, 0][rank])
        os.environ["LOCAL_WORLD_SIZE"] = str([2, 2, 1][rank])
        common.init_device(parse(TrainConfig, ["--preset", "tiny"]))
        with common.one_rank_at_a_time():
            pass
        common.barrier()
        torch.distributed.destroy_process_group()

    assert join(start_ranks(one_rank, 3, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def test_positions_without_a_token_have_no_gate(tmp_path):
    position = torch.tensor([(i + 0.5) / 10 for i in range(10)])
    values = metrics.by_position(torch.ones(10), position)
    assert values == [None, 1.0] * 10 or values == [1.0, None] * 10
    rows = [{"step": i, "gate/by_position": values} for i in (1, 2)]
    plot.draw_gates(json.loads(json.dumps(rows)), tmp_path / "gates.png", "gates")
    assert (tmp_path / "gates.png").stat().st_size > 3000


def test_a_student_of_nan_is_a_bad_update_and_not_a_sampler_out_of_step(pair, tmp_path, monkeypatch):
    position_loss = train.position_loss

    def broken(*args):
        logp, loss, info = position_loss(*args)
        return logp * math.nan, loss * math.nan, info

    monkeypatch.setattr(train, "position_loss", broken)
    with pytest.raises(SystemExit, match="2 updates in a row were not finite"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=9, minibatches=1, epochs=1, max_bad_updates=2)))


def test_a_sampler_of_nan_is_out_of_step(pair, tmp_path, monkeypatch):
    sample = rollout.HFSampler.sample

    def broken(self, *args, **options):
        rollouts = sample(self, *args, **options)
        rollouts[0].logprobs[0] = math.nan
        return rollouts

    monkeypatch.setattr(rollout.HFSampler, "sample", broken)
    with pytest.raises(SystemExit, match="the sampler is out of step"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=1)))


def test_the_sampler_gets_room_for_the_longest_sequence_only(tmp_path, monkeypatch):
    without_model(monkeypatch)
    asked = {}

    def make_sampler(*_, **options):
        asked.update(options)
        return FakeSampler()

    monkeypatch.setattr(rollout, "make_sampler", make_sampler)
    cfg = make_config(tmp_path)
    evaluate.run(cfg)
    longest = max(len(ids) for _, _, ids in evaluate.prepare(cfg, torch.device("cpu"))[3])
    assert asked == {"max_len": longest + cfg.max_tokens}
    assert longest + cfg.max_tokens < 512  # the model's context
