"""python -m pytest tests/test_train.py      (tiny random models, CPU; the two-rank tests take most of the time)"""

import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from helpers import ENV, ROOT, evaluations, far, finished, flags, metrics, refused, run, same
from safetensors.torch import load_file
from scenes import toy_vocabulary
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM, Qwen3Config, Qwen3ForCausalLM

import data
import policy
import rollout
import train
from configs import TrainConfig, command_line, parse
from policy import teacher_targets
from support import checkpoint, toy


def two_updates(make, **options):
    """Parameters after two plain SGD updates on one minibatch, of which the second sees drift; and what update returned."""
    student, _, (batches,), cfg, head = make(minibatches=1, grad_clip=0, **options)
    sgd = torch.optim.SGD(student.parameters(), lr=0.2)
    first = train.update(student, sgd, batches, cfg, head)
    second = train.update(student, sgd, batches, cfg, head)
    return {name: p.detach() for name, p in student.lm.named_parameters()}, first, second


# -----------------------------------------------------------------------------
# the invariants of the method


def test_first_pass_has_gates_of_exactly_one_and_the_base_loss(scene):
    """Invariant 1 through the whole update, and 5: its own log-probs are the old ones."""
    base, *_ = two_updates(scene, gate="none", tau=0)
    gated, first, second = two_updates(scene, gate="block")
    assert all((tensors["g"] == 1).all() for tensors in first[1])
    assert any((tensors["g"] < 1).any() for tensors in second[1])
    assert far(gated, base) > 0
    zero, *_ = two_updates(scene, gate="block", tau=0)
    assert far(zero, base) == 0


def test_scoring_pass_is_the_training_pass_bit_for_bit(scene):
    """Invariant 5: old log-probs come from the code path of the current ones."""
    for loss in ("opd", "lsm", "rkl"):
        student, _, minibatches, cfg, head = scene(loss=loss)
        for batch in minibatches[1]:
            logp = train.student_outputs(student, batch, cfg, head)["logp"]
            assert torch.equal(logp, batch.logp_old)
            with torch.no_grad():  # where no loss is computed beside them
                logp = policy.token_logprobs(student, batch, 1.0)
            torch.testing.assert_close(logp, batch.logp_old, rtol=0, atol=0 if loss == "opd" else 1e-5)


def test_responses_are_scored_where_they_stand(scene):
    """Right padding and packing, against one plain forward pass per response."""
    student, _, minibatches, _, _ = scene(micro_tokens=60)
    for batch in [batch for minibatch in minibatches for batch in minibatch]:
        logp = policy.token_logprobs(student, batch, 0.8).detach()
        for row, r in enumerate(batch.rollouts):
            logits = student.lm(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
            full = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(r.response)[:, None])[:, 0]
            torch.testing.assert_close(logp[batch.rows == row], full, rtol=1e-4, atol=1e-5)


SWITCHES = [
    ("loss", ["opd", "lsm", "fkl_topk", "tail_topk", "rkl", "fkl", "jsd"], {}),
    ("gate", ["none", "token", "block", "span", "sequence"], dict(span_min=2, span_max=6)),
    ("advantage", ["old", "current"], {}),
    ("stat", ["mean", "absmean", "rms"], {}), ("tau", [0.5, 1, 2], {}), ("block", [2, 4, 8], {}),
    ("span_min", [2, 4], dict(gate="span", span_max=9)), ("span_max", [3, 9], dict(gate="span", span_min=2)),
    ("clip_low", [0, 0.01], {}), ("clip_high", [0, 0.01], {}), ("dual_clip", [0, 0.5], dict(clip_low=0)),
    ("topk", [3, 4], dict(loss="lsm")),
    ("beta", [0.1, 0.9], dict(loss="jsd")), ("temperature", [0.7, 1.0], {}),
    ("temperature", [0.7, 1.0], dict(loss="lsm")), ("temperature", [0.7, 1.0], dict(loss="rkl")),
]  # fmt: skip


@pytest.mark.parametrize("name, values, options", SWITCHES, ids=[f"{s[0]}-{s[2].get('loss', '')}" for s in SWITCHES])
def test_every_switch_does_something(scene, name, values, options):
    """Invariant 8: any two values of a switch give different updates."""
    results = [two_updates(scene, **options | {name: value})[0] for value in values]
    for i, a in enumerate(results):
        assert all(far(a, b) > 0 for b in results[:i]), f"--{name} does nothing"


def test_jsd_has_the_two_kl_as_limits(scene):
    for beta, loss in ((0.0, "fkl"), (1.0, "rkl")):
        limit, *_ = two_updates(scene, loss="jsd", beta=beta)
        assert far(limit, two_updates(scene, loss=loss)[0]) == 0


def test_teacher_runs_once_for_a_rollout_batch(pair, tmp_path, monkeypatch):
    """Invariant 6: whatever the number of epochs."""
    calls = []
    targets = policy.teacher_targets
    monkeypatch.setattr(policy, "teacher_targets", lambda *a: calls.append(1) or targets(*a))
    run(pair, tmp_path / "a", epochs=4, minibatches=1, micro_tokens=10**6)
    assert len(calls) == 2  # steps


@pytest.mark.parametrize("loss", ["opd", "lsm", "fkl_topk", "tail_topk", "rkl", "fkl", "jsd"])
def test_an_update_lowers_the_loss_that_it_is_made_for(scene, loss):
    """A small step down the gradient, then the loss of the same minibatch again."""
    student, _, (batches,), cfg, head = scene(minibatches=1, loss=loss, gate="none")
    sgd = torch.optim.SGD(student.parameters(), lr=0.01)
    losses = [train.update(student, sgd, batches, cfg, head)[0]["loss"] for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("loss", ["opd", "lsm", "fkl_topk", "tail_topk", "rkl", "fkl", "jsd"])
def test_merged_stop_tokens_are_one_outcome_whichever_the_teacher_prefers(pair, loss):
    """A teacher with two stop tokens swapped gives every loss the same value if they are merged, and another if not."""
    text = [1, 5, 6, 8, 9]
    logits = AutoModelForCausalLM.from_pretrained(pair[0])(torch.tensor([text])).logits[0, -1]
    ranked = [i for i in logits.argsort(descending=True).tolist() if i not in text]
    stops = [ranked[0], ranked[-1]]  # one likely, one not, as with two models that each know only their own
    rollouts = [rollout.Rollout(text[:2], [*text[2:], stop], [0.0] * 4, "stop") for stop in stops]
    cpu, losses = torch.device("cpu"), {}
    for merged in ([], stops):
        cfg = parse(TrainConfig, flags(pair, "unused", loss=loss, topk=8))
        vocabulary = toy_vocabulary(stops, merged)
        student, teacher = (policy.load_policy(path, cfg, vocabulary, cpu, trainable=False) for path in pair[::-1])
        weight = teacher.lm.get_input_embeddings().weight  # tied to the head
        for swapped in (False, True):
            weight.data[stops] = weight.data[stops[::-1] if swapped else stops]
            head = policy.whole_head(teacher)
            batch = data.collate(rollouts, cfg, vocabulary, cpu)
            batch.teacher = teacher_targets(teacher, batch, cfg)
            batch.logp_old = policy.token_logprobs(student, batch, 1.0) + 0.1
            outputs = train.student_outputs(student, batch, cfg, head)
            losses[bool(merged), swapped] = train.base_loss(outputs, batch, cfg)[0]
    torch.testing.assert_close(losses[True, False], losses[True, True], rtol=1e-4, atol=1e-5)
    assert (losses[False, False] - losses[False, True]).abs().max() > 1e-3


# -----------------------------------------------------------------------------
# the run


def test_resumed_run_is_the_run_that_was_not_stopped(pair, tmp_path):
    """Invariant 10: bit for bit, weights and metrics (but times), with the checkpoint of step 2 of 4."""
    options = dict(steps=4, save_every=2, keep=9)
    rows, weights = run(pair, tmp_path / "a", **options)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "step-4")
    shutil.rmtree(tmp_path / "b" / "final")
    (tmp_path / "b" / "step-3.tmp").mkdir()  # what a kill while saving leaves
    again, resumed = run(pair, tmp_path / "b", **options, resume=True)
    assert far(resumed, weights) == 0

    assert same(tmp_path / "a", tmp_path / "b") and len(again) == len(rows)


def test_sampler_out_of_step_stops_the_run(pair, tmp_path, monkeypatch):
    """Invariant 9: a sampler that keeps its first weights is found at the next step."""

    def broken(cfg, path, model, *args, **options):
        sampler = make(cfg, path, None, *args, **options)
        sampler.sync = lambda weights: None
        return sampler

    make = rollout.make_sampler
    monkeypatch.setattr(rollout, "make_sampler", broken)
    with pytest.raises(SystemExit, match="out of step.*nats.*step 2"):
        run(pair, tmp_path / "a", steps=3)


def test_command_line_end_to_end(pair, tmp_path):
    """The real commands, train.py and evaluate.py: files, metrics, a final model that loads, pictures."""
    command = [
        sys.executable,
        "train.py",
        *flags(pair, tmp_path / "run", eval_every=1, eval_problems=4, k=2, save_every=1),
    ]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows, evaluated = metrics(tmp_path / "run"), evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and [row["step"] for row in evaluated] == [0, 1, 2]
    assert all(math.isfinite(x) for row in rows + evaluated for x in row.values() if isinstance(x, float))
    names = {"eval/pass@2", "eval/pass@2_low", "eval/pass@2_high", "eval/mean@2", "eval/kl_sampled", "eval/kl"}
    assert names <= evaluated[0].keys() and {"loss", "kl_sampled", "gate/ess", "lr"} <= rows[0].keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").chat_template
    assert all((tmp_path / "run" / name).stat().st_size > 5000 for name in ("curves.png", "gates.png"))
    assert checkpoint.latest(tmp_path / "run").name == "step-2"
    start, end, places = done.stdout.strip().split("\n\n")  # two tables, and where the results are
    said = dict(line.split(maxsplit=1) for line in start.splitlines())
    assert (said["preset"], said["loss"], said["gate"]) == ("tiny", "opd", "block, 4 tokens, tau 1")
    assert (said["student"], said["data"], said["held"]) == (pair[1], "toy, 4096 problems", "out  toy, 4 problems")
    assert said["reuse"] == "2 epochs x 2 minibatches = 4 updates in a step" and said["sampler"].startswith("hf")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["out"] == said["out"] == str(tmp_path / "run") and len(config) == len(fields(TrainConfig))
    said = dict(line.split(maxsplit=1) for line in end.splitlines()[2:])
    first, last = (f"{100 * row['eval/mean@2']:.1f}" for row in (evaluated[0], evaluated[-1]))
    assert said["eval/mean@2"].split() == [first, "%", last, "%"]
    assert said["kl_sampled"].split() == [
        f"{rows[0]['kl_sampled']:.3f}",
        "nats",
        f"{rows[1]['kl_sampled']:.3f}",
        "nats",
    ]
    assert f"{tmp_path}/run/final" in places
    assert "step/s" in done.stderr and "Loading" not in done.stderr and "Writing" not in done.stderr  # one bar
    refused(command[2:], "already holds a run")
    options = "--data toy --eval_problems 2 --k 1 --max_response 4 --model".split()
    command = [sys.executable, "evaluate.py", *options, tmp_path / "run/final", "--out", tmp_path / "evaluation"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "pass@1 %" in done.stdout, done.stderr
    assert (tmp_path / "evaluation/pass_at_k.png").stat().st_size > 5000


RANKS = dict(steps=3, micro_tokens=70, minibatches=2, schedule="constant")


def said(folder):
    return "".join(path.read_text()[-3000:] for path in folder.glob("log*"))


@pytest.mark.parametrize(
    "options, student",
    [
        (dict(loss="lsm", gate="block"), "tied"), pytest.param(dict(loss="opd", gate="block"), "untied", marks=pytest.mark.slow),
        pytest.param(dict(loss="jsd", gate="span"), "biased", marks=pytest.mark.slow),
    ],
    ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else x,
)  # fmt: skip
def test_two_ranks_are_one_process(pair, tmp_path, options, student):
    """FSDP2 on gloo, unequal micro-batches: the same parameters on the same global batch, for heads of all kinds."""
    if student != "tied":
        torch.manual_seed(3)
        size = dict(vocab_size=42, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        make = {"untied": (Qwen3Config, Qwen3ForCausalLM), "biased": (PhiConfig, PhiForCausalLM)}[student]
        # a key's bias on dimensions that do not turn has no gradient but rounding, and Adam makes steps of that
        rope = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0)
        size |= dict(num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)
        lm = make[1](make[0](**size, rope_parameters=rope))
        assert (lm.lm_head.bias is not None) == (student == "biased")
        pair = pair[0], str(tmp_path / "student")
        lm.save_pretrained(pair[1])
        toy.tokenizer().save_pretrained(pair[1])
    options = options | RANKS
    _, one = run(pair, tmp_path / "one", **options)
    assert finished(flags(pair, tmp_path / "two", **options), log=tmp_path / "log", ranks=2) == 0, said(tmp_path)
    assert far(load_file(tmp_path / "two" / "final" / "model.safetensors"), one) < 1e-4


@pytest.mark.slow
def test_two_nodes_are_one_process(pair, tmp_path, monkeypatch):
    """torchrun on each of two nodes, which are this machine."""
    monkeypatch.setattr(data, "TOY_TRAINING", 4096)  # as in a Python of its own; helpers has made it smaller
    options = RANKS | dict(loss="lsm", gate="block")
    _, one = run(pair, tmp_path / "one", **options)
    where = f"--rdzv_endpoint=localhost:{random.randint(20000, 60000)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv_backend=c10d", where, "train.py", *flags(pair, tmp_path / "two", **options)]
    jobs = []
    for i in range(2):
        with (tmp_path / f"log{i}").open("w") as log:
            jobs.append(subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=log))
    assert [job.wait(timeout=300) for job in jobs] == [0, 0], said(tmp_path)
    assert far(load_file(tmp_path / "two" / "final" / "model.safetensors"), one) < 1e-4


def test_a_micro_batch_without_tokens_changes_nothing(scene):
    """A rank with fewer micro-batches than another takes part in its collectives with one of these."""
    student, teacher, (batches,), cfg, _ = scene(minibatches=1)
    empty = data.collate(
        [rollout.Rollout([1, 5], [6, 2], [0.0, 0.0], "stop")], cfg, toy_vocabulary(), "cpu", empty=True
    )
    empty.teacher = teacher_targets(teacher, empty, cfg)
    empty.logp_old = torch.zeros(0)
    sgd = torch.optim.SGD(student.parameters(), lr=0.2)
    train.update(student, sgd, [*batches, empty], cfg)
    with_empty = {name: p.detach().clone() for name, p in student.lm.named_parameters()}
    other, _, (batches,), _, _ = scene(minibatches=1)
    train.update(other, torch.optim.SGD(other.parameters(), lr=0.2), batches, cfg)
    assert far(with_empty, {name: p.detach() for name, p in other.lm.named_parameters()}) == 0


def written(path, text):
    path.write_text(text)
    return path


# -----------------------------------------------------------------------------
# wrong input: one line, no traceback, before a model loads


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(nonsense=1), "nonsense"), (dict(gate="blocks"), "invalid choice"), (dict(preset="huge"), "invalid choice"),
        (dict(topk=1, loss="lsm"), "--topk"), (dict(block=0), "--block"), (dict(tau=-1), "--tau"), (dict(top_p=0), "--top_p"),
        (dict(top_p=1.5), "--top_p"), (dict(temperature=0), "--temperature"), (dict(epochs=0), "--epochs"), (dict(lr="x"), "--lr"),
        (dict(temperature=0.001), "vLLM would sample at 0.01"),  # vllm-project/vllm#3063; it says so in a warning only
        (dict(beta=2), "--beta"), (dict(span_max=3), "--span_max"), (dict(minibatches=7), "--minibatches"), (dict(clip_low=-1), "--clip_low"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line(pair, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, flags(pair, tmp_path / "a", **options))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "argv, student, steps", [(["--device", "cpu"], "toy", 40), (["--preset", "qwen3"], "Qwen/Qwen3-1.7B-Base", 200)]
)
def test_help_shows_the_defaults_that_hold(capsys, argv, student, steps):
    with pytest.raises(SystemExit):
        parse(TrainConfig, [*argv, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"hub name, folder, or toy (default: {student})" in text
        and f"rollout batches to sample (default: {steps})" in text
    )
    cfg = parse(TrainConfig, [*argv, "--out", "", "--preset", argv[1] if "qwen3" in argv else ""])
    assert (cfg.student, cfg.out) == (student, f"out/{cfg.preset}")


def test_one_token_of_support_is_refused_only_where_it_says_nothing(pair, tmp_path):
    for options in (dict(loss="tail_topk"), dict(loss="rkl")):
        parse(TrainConfig, flags(pair, tmp_path / "a", topk=1, **options))
    rows, _ = run(pair, tmp_path / "a", topk=1, loss="tail_topk")
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("local, world, launcher", [(1, 1, "python"), (8, 8, "torchrun --nproc_per_node 8"),
    (8, 16, "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --nproc_per_node 8")])  # fmt: skip
def test_the_command_that_goes_on_names_its_ranks(monkeypatch, local, world, launcher):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    cfg = parse(TrainConfig, ["--preset", "tiny", "--out", "a b", "--lr", "3e-4"])
    monkeypatch.chdir(ROOT)
    assert command_line(cfg) == f"cd {ROOT} && {launcher} train.py --preset tiny --out 'a b' --lr 0.0003"
    monkeypatch.chdir(ROOT.parent)
    assert command_line(cfg).startswith(f"cd {ROOT.parent} && {launcher} {ROOT.name}/train.py ")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda tmp: dict(data=tmp / "missing.jsonl"), "no such file"),
        (lambda tmp: dict(data=written(tmp / "a.jsonl", "")), "empty"),
        (lambda tmp: dict(data=written(tmp / "b.jsonl", '{"x": 1}\n')), "columns"),
        (lambda tmp: dict(data=written(tmp / "c.jsonl", '{"x": \n')), "readable"),
        (lambda tmp: dict(max_response=600), "context"), (lambda tmp: dict(topk=50, loss="lsm"), "vocabulary"),
        (lambda tmp: dict(resume=True), "no complete checkpoint"), (lambda tmp: dict(student=tmp / "nowhere"), "nowhere"),
        (lambda tmp: dict(max_prompt=3), "longer than --max_prompt"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_before_models_load(pair, tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(train, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train.main(parse(TrainConfig, flags(pair, tmp_path / "a", **make(tmp_path))))
    assert message in str(stop.value.code) and str(stop.value.code).count("\n") == 0
