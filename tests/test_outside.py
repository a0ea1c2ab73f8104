"""python -m pytest tests/test_outside.py      other people's data, models, machines and habits

ZOO=all python -m pytest tests/test_outside.py -k zoo: every architecture of the zoo, 3 minutes
"""

import gzip
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import toy_vocabulary
from helpers import ENV, ROOT, SHARED, far, finished, flags, join, metrics, run, start, start_child
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

import checkpoint
import common
import data
import evaluate
import policy
import report
import rollout
import toy
import train
from configs import EvalConfig, TrainConfig, parse

SMALL = dict(save_every=1, keep=9, eval_every=0, schedule="constant")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path, n, length=3):
    return write_jsonl(path, [{"problem": str(i) * length + "=?", "answer": str(i)} for i in range(n)])


def refused(argv, message):
    with pytest.raises(SystemExit, match=message) as stop:
        train.main(parse(TrainConfig, argv))
    assert "\n" not in str(stop.value.code)


# -----------------------------------------------------------------------------
# runs lost


def test_a_machine_without_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.versions.__wrapped__()["commit"] == ""


@pytest.mark.parametrize(
    "generation_config",
    [
        {"pad_token_id": -1}, {"do_sample": False, "min_p": 0.1}, {"do_sample": False, "typical_p": 0.5},
        {"length_penalty": 2.0}, {"early_stopping": True}, {"output_scores": True}, {"do_sample": False, "temperature": 0.6},
    ],
    ids=lambda x: "-".join(x),
)  # fmt: skip
def test_a_generation_config_that_transformers_refuses_to_write_is_kept_as_it_is(pair, tmp_path, generation_config):
    shutil.copytree(pair[1], tmp_path / "student")
    text = json.dumps({"eos_token_id": 2, **generation_config})
    (tmp_path / "student/generation_config.json").write_text(text)
    run((pair[0], tmp_path / "student"), tmp_path / "a", steps=1)
    assert (tmp_path / "a/final/generation_config.json").read_text() == text
    AutoModelForCausalLM.from_pretrained(tmp_path / "a/final")


def test_overlong_prompts_are_left_out_before_the_first_step(pair, tmp_path, capsys):
    """1 of 4 prompts fits. Two steps need it six times."""
    rows = [{"problem": "1" * n, "answer": "1"} for n in (5, 90, 91, 92)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    rows, _ = run(pair, tmp_path / "run", data=file, template="raw", max_prompt=64)
    assert (
        len(rows) == 2
        and "3 of 4 training prompts are longer than --max_prompt, and left out" in capsys.readouterr().out
    )


def slow_sampling():
    draw = rollout.Draw.__call__
    rollout.Draw.__call__ = lambda *args: time.sleep(0.02) or draw(*args)


@pytest.mark.parametrize("again", ["overwrite", "resume"])
def test_a_second_run_with_the_same_out_is_refused_and_the_first_goes_on(pair, tmp_path, again):
    out = tmp_path / "run"
    first = start(flags(pair, out, **SMALL | dict(steps=3)), slow_sampling)
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        time.sleep(0.01)
    options = {"overwrite": dict(overwrite="true", lr=1.0), "resume": dict(resume="auto", steps=3)}[again]
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot finish first on a busy machine
    refused(
        flags(pair, out, **SMALL | options), f"is in use by process {first.pid} on .*: stop it, or choose another --out"
    )
    os.kill(first.pid, signal.SIGCONT)
    assert join([first]) == 0
    assert len(metrics(out)) == 3 and json.loads((out / "config.json").read_text())["lr"] == 3e-3


def test_two_evaluations_with_the_same_out_exclude_each_other(tmp_path):
    lock = evaluate.claim(tmp_path, {"a": 1}, overwrite=False)
    with pytest.raises(ValueError, match="is in use by process"):
        evaluate.claim(tmp_path, {"a": 1}, overwrite=True)
    lock.close()
    evaluate.claim(tmp_path, {"a": 1}, overwrite=False).close()


def test_rotation_deletes_only_what_the_run_has_made(pair, tmp_path):
    out = tmp_path / "run"
    run(pair, out, **SMALL | dict(steps=2))
    for name in ("step-1-best", "step-best", "step-0002"):
        shutil.copytree(out / "step-1", out / name)
    shutil.rmtree(out / "step-0002")
    run(pair, out, **SMALL | dict(steps=4, keep=1, resume="true"))
    assert {path.name for path in out.glob("step-*")} == {"step-4", "step-1-best", "step-best"}


def test_prompt_ids_past_the_embedding_are_one_line(pair, tmp_path):
    """Chat tokens that were added to the tokenizer, with a model that was not resized."""
    folders = []
    for role, folder in zip(("teacher", "student"), pair, strict=True):
        shutil.copytree(folder, tmp_path / role)
        tokenizer = toy.tokenizer()
        tokenizer.add_tokens(["<|im_start|>"])
        tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] }}"
        tokenizer.save_pretrained(tmp_path / role)
        folders.append(tmp_path / role)
    message = r"has the token '<\|im_start\|>' with id 42, but the model knows 42 ids: resize its embeddings"
    refused(flags(folders, tmp_path / "run"), message)
    options = ["--model", str(folders[1]), "--data", "toy", "--out", str(tmp_path / "ev")]
    with pytest.raises(SystemExit, match=message):
        evaluate.main(parse(EvalConfig, options))


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_a_template_that_refuses_the_messages_is_one_line(pair, tmp_path, role):
    """Gemma's refuses a system message; some refuse an answer at the end."""
    shutil.copytree(pair[1], tmp_path / "student")
    tokenizer = toy.tokenizer()
    refuse = "{% if m['role'] == '" + role + "' %}{{ raise_exception('no " + role + "') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refuse + "{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "student")
    messages = [{"role": "user", "content": "1+1=?"}]
    messages.insert(0 if role == "system" else 1, {"role": role, "content": "ab"})
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": "q7", "prompt": messages, "answer": "2"}])
    message = f"refuses problem q7 with messages of the roles .*{role}.*: no {role}.*--template plain"
    refused(flags((pair[0], tmp_path / "student"), tmp_path / "run", data=file), message)
    options = ["--model", str(tmp_path / "student"), "--data", str(file), "--out", str(tmp_path / "ev")]
    with pytest.raises(SystemExit, match=message):
        evaluate.main(parse(EvalConfig, options))


ZOO = ["bloom", "gpt2", "gemma2_capped", "cohere_scaled"]
REFUSED = {
    "gemma2_capped": "caps its logits (final_logit_softcapping", "cohere_scaled": "scales or caps its logits",
    "granite_scaled": "scales or caps its logits",
}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """make(name) -> (teacher, student) of ../shared/tools/zoo.py."""
    script = SHARED / "tools" / "zoo.py"
    if not script.exists():
        pytest.skip(f"the zoo of architectures is not at {script}")
    out = tmp_path_factory.mktemp("zoo")
    names = [] if os.environ.get("ZOO") == "all" else ZOO
    subprocess.run([sys.executable, str(script), str(out), *names], check=True, capture_output=True)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_zoo_pairs_train_and_evaluate_or_are_refused_with_the_reason(zoo, tmp_path, ranks):
    file = questions(tmp_path / "q.jsonl", 4)
    for folder in sorted(path for path in zoo.iterdir() if path.is_dir()):
        pair, out = (folder / "teacher", folder / "student"), tmp_path / folder.name
        log = tmp_path / f"{folder.name}.log"
        options = dict(data=file, loss="lsm", max_prompt=100, max_response=12, grad_ckpt="true")
        code = finished(flags(pair, out, **options), log=log, ranks=ranks)
        reason = REFUSED.get(folder.name)
        assert code == (1 if reason else 0) and "Traceback" not in log.read_text(), log.read_text()[-3000:]
        if reason:
            assert reason in log.read_text().splitlines()[-1]
            continue
        if ranks == 1:
            argv = ["--model", out / "final", "--data", file, "--k", "2", "--max_tokens", "8", "--out", f"{out}-ev"]
            cfg = parse(EvalConfig, list(map(str, argv)))
            assert join([start_child(lambda cfg=cfg: evaluate.main(cfg))]) == 0


class FakeWandb(types.ModuleType):
    """Remembers its calls; `error` is what init raises."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.errors = types.SimpleNamespace(Error=KeyError)
        self.util = types.SimpleNamespace(generate_id=lambda: f"id{len(self.started)}")
        self.started, self.logged, self.error = [], [], None

    def init(self, **options):
        if self.error:
            raise self.error
        self.started.append(options)

    def log(self, row, step):
        self.logged.append(step)


def test_a_resumed_run_goes_on_as_the_same_wandb_run(pair, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "run"
    run(pair, out, **SMALL | dict(log="wandb"))
    run(pair, out, **SMALL | dict(log="wandb", steps=3, resume="true"))
    assert [options["id"] for options in fake.started] == ["id0", "id0"] and fake.logged == [1, 2, 3]
    assert {options["dir"] for options in fake.started} == {str(out)}
    run(pair, out, **SMALL | dict(log="wandb", overwrite="true"))
    assert fake.started[-1]["id"] == "id2"  # another run
    fake.error = KeyError("api_key not configured")
    refused(flags(pair, tmp_path / "b", log="wandb"), "--log wandb: .*api_key not configured")


def test_a_resumed_run_purges_the_steps_that_tensorboard_has_from_before(pair, tmp_path, monkeypatch):
    made = []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append(purge_step)

        def add_scalar(self, *_):
            pass

    for name in ("tensorboard", "torch.utils.tensorboard"):
        fake = types.ModuleType(name)
        fake.__spec__, fake.SummaryWriter = importlib.machinery.ModuleSpec(name, None), Writer
        monkeypatch.setitem(sys.modules, name, fake)
    run(pair, tmp_path / "run", **SMALL | dict(log="tensorboard"))
    run(pair, tmp_path / "run", **SMALL | dict(log="tensorboard", steps=3, resume="true"))
    assert made == [None, 3]


def test_a_home_that_cannot_be_written_names_the_variable_to_set(tmp_path, monkeypatch):
    import datasets

    datasets.Dataset.from_list([{"problem": "1", "answer": "1"}]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match="a.parquet: .*set HF_HOME to a folder that can be written to"):
        data.load(str(tmp_path / "a.parquet"))


# -----------------------------------------------------------------------------
# numbers that were wrong


def test_two_problems_with_one_id_are_refused_in_training_and_in_evaluation(pair, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": i // 2, "problem": f"{i}=?", "answer": "1"} for i in range(4)])
    message = "rows 1 and 2, have the id '0'; every problem needs its own"
    refused(flags(pair, tmp_path / "run", eval_data=file, eval_every=1), message)
    with pytest.raises(SystemExit, match=message):
        evaluate.main(parse(EvalConfig, ["--model", pair[1], "--data", str(file), "--out", str(tmp_path / "ev")]))
    assert [p.id for p in sorted(data.load(str(file), seed=0), key=lambda p: p.prompt)] == ["0", "0-1", "1", "1-3"]


def test_a_problem_without_an_id_gets_its_rows_number(tmp_path):
    rows = [{"id": id, "problem": f"{i}=?", "answer": "1"} for i, id in enumerate((None, "x", "", " "))]
    assert [p.id for p in data.load(str(write_jsonl(tmp_path / "a.jsonl", rows)))] == ["a-0", "x", "a-2", "a-3"]


def test_every_sample_of_a_step_has_a_seed_of_its_own(pair, tmp_path):
    """Two problems for four prompts of a step."""
    rows, _ = run(pair, tmp_path / "run", data=questions(tmp_path / "q.jsonl", 2), template="raw", prompts=4, group=3)
    assert [row["rollout/distinct"] for row in rows] == [1, 1]
    problem = data.Problem("a", "1", "1")
    prompts = data.TrainingPrompts([(problem, [5])], 9, seed=0)
    jobs = prompts.jobs_of_step(0, 3, 4) + prompts.jobs_of_step(1, 3, 4)
    assert len({seed for _, seed in jobs}) == 24
    assert [seed for _, seed in jobs[:4]] == [common.seed_for(0, 0, "a", i) for i in range(4)]


def test_dropout_is_off_with_gradient_checkpointing_too(tmp_path):
    config = GPT2Config(vocab_size=42, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert config.attn_pdrop > 0 and config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    cfg = parse(TrainConfig, flags((tmp_path, tmp_path), "unused", grad_ckpt="true"))
    student = policy.load_policy(str(tmp_path), cfg, toy_vocabulary(), torch.device("cpu"), trainable=True)
    assert student.lm.training
    batch = data.collate([rollout.Rollout([1, 5], [6, 7, 8], [0.0] * 3, "stop")], cfg, toy_vocabulary(), "cpu")
    first, second = (policy.token_logprobs(student, batch, 1.0) for _ in range(2))
    assert torch.equal(first, second) and first.requires_grad


def test_dropout_stays_in_the_config_of_the_final_student(tmp_path):
    """It was off in training; the model that comes out is the user's own."""
    config = GPT2Config(vocab_size=42, n_embd=32, n_layer=1, n_head=2, n_positions=128, attn_pdrop=0.25)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    toy.tokenizer().save_pretrained(tmp_path / "m")
    run((tmp_path / "m", tmp_path / "m"), tmp_path / "run", steps=1)
    for file in ("config.json",):
        assert (tmp_path / "run/final" / file).read_text() == (tmp_path / "m" / file).read_text()


def test_a_data_file_that_has_changed_is_refused_on_resume(pair, tmp_path):
    file = questions(tmp_path / "q.jsonl", 6)
    run(pair, tmp_path / "run", data=file, template="raw", **SMALL)
    questions(tmp_path / "q.jsonl", 6, length=4)
    argv = flags(pair, tmp_path / "run", data=file, template="raw", **SMALL | dict(resume="true", steps=3))
    refused(argv, "--resume: the training prompts are not those that the run began with")


def test_an_empty_gold_answer_is_refused_in_evaluation(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"problem": "1", "answer": "1"}, {"problem": "2", "answer": " "}])
    with pytest.raises(ValueError, match="a.jsonl, row 2: answer is empty; evaluation needs an answer"):
        data.load(str(file))
    assert len(data.load(str(file), seed=0)) == 2  # training does not


CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3?"},
]  # fmt: skip


@pytest.mark.parametrize("template", ["raw", "plain", "Q: {question}\\nA:"])
def test_text_templates_keep_the_system_message_and_earlier_turns(template):
    class Words:
        chat_template = bos_token_id = None

        def __call__(self, text):
            return {"input_ids": text}

    text = data.encode(data.Problem("a", CHAT, "4"), Words(), template)
    assert "Be brief.\n\n1?\n\n2\n\n3?" in text


def test_a_text_template_that_begins_with_bos_gets_no_second_one():
    tokenizer = toy.tokenizer()
    ids = data.encode(data.Problem("a", "1+1", "2"), tokenizer, "<bos>{question}")
    assert tokenizer.decode(ids) == "<bos>1+1"


# -----------------------------------------------------------------------------
# an hour of someone's evening


def test_a_checkpoint_is_evaluated_like_any_model(pair, tmp_path):
    """evaluate.py --model run/step-2 is evaluate.py --model run/final, for the last step; on two ranks, too."""
    run(pair, tmp_path / "run", **SMALL)
    options = "--data toy --limit 3 --k 2 --max_tokens 9 --device cpu --model".split()
    rows = []
    for name in ("step-2", "final"):
        evaluate.main(parse(EvalConfig, [*options, str(tmp_path / "run" / name), "--out", str(tmp_path / name)]))
        rows.append((tmp_path / name / "samples.jsonl").read_bytes())
    assert rows[0] == rows[1]
    exported = load_file(tmp_path / "run/step-2/model/model.safetensors")
    assert far(exported, load_file(tmp_path / "run/final/model.safetensors")) == 0
    assert checkpoint.latest(tmp_path / "run").name == "step-2"

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "evaluate.py", *options, tmp_path / "run" / "step-1", "--out", tmp_path / "two"]
    subprocess.run(command, cwd=ROOT, env=ENV, check=True, timeout=90, capture_output=True)
    assert (tmp_path / "run" / "step-1" / "model" / "config.json").exists()


def test_data_files_of_many_kinds(tmp_path):
    rows = [{"problem": "é1", "answer": "1"}, {"problem": "2", "answer": "2"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "UPPER.JSONL").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "table.csv").write_text('problem,answer\né1,1\n"2",2\n')
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    for name in ("bom.jsonl", "UPPER.JSONL", "list.json", "table.csv", "a.jsonl.gz"):
        problems = data.load(str(tmp_path / name))
        assert [(p.prompt, p.answer) for p in problems] == [("é1", "1"), ("2", "2")], name


def test_a_corrupt_line_is_named_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1", "answer": "1"}\n\n{"problem": \n')
    with pytest.raises(ValueError, match="a.jsonl is not a readable jsonl file: line 3: "):
        data.load(str(tmp_path / "a.jsonl"))


def chat_tokenizer(template):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_an_assistants_prefill_is_continued():
    template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer = chat_tokenizer(template)
    chat = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2+"}]
    text = "".join(tokenizer.convert_ids_to_tokens(data.encode(data.Problem("a", chat, "4"), tokenizer)))
    assert text.endswith("2+") and text.count("a:") == 1


def test_template_args_reach_the_chat_template(pair, tmp_path):
    template = "{% if enable_thinking %}a{% else %}b{% endif %}"
    tokenizer = chat_tokenizer(template)
    chat = data.Problem("a", [{"role": "user", "content": "1?"}], "4")
    encoded = [
        tokenizer.decode(data.encode(chat, tokenizer, "auto", args)) for args in ('{"enable_thinking": true}', "{}")
    ]
    assert encoded == ["a", "b"]
    for wrong in ("[1]", "{"):
        with pytest.raises(SystemExit):
            parse(TrainConfig, flags(pair, tmp_path, template_args=wrong))


def test_gemma2s_cap_is_refused_by_name(tmp_path):
    config = Gemma2Config(
        vocab_size=42, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=1e-4, final_logit_softcapping=30.0,
    )  # fmt: skip
    lm = Gemma2ForCausalLM(config)  # of logits so small that the cap does not show
    with pytest.raises(ValueError, match="final_logit_softcapping 30"):
        policy.check_head(lm, "m")


def test_a_newline_that_ends_the_turn_is_no_stop_token():
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["\n"]})
    newline, end = tokenizer.convert_tokens_to_ids(["\n", "<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n<|im_end|>\n{% endfor %}"
    assert policy.end_of_turn(tokenizer) == [end] and newline not in policy.stop_ids(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert policy.end_of_turn(tokenizer) == []


def test_the_toys_problems_are_held_out_only_if_it_trains_on_them(tmp_path):
    tokenizer = toy.tokenizer()
    cfg = parse(
        TrainConfig, ["--preset", "tiny", "--max_prompt", "200", "--data", str(questions(tmp_path / "q.jsonl", 2))]
    )
    assert data.load_problems(cfg, tokenizer, 42)[1] == {}
    cfg = parse(TrainConfig, ["--preset", "tiny", "--eval_problems", "3"])
    assert [len(prompts) for prompts in data.load_problems(cfg, tokenizer, 42)[1].values()] == [3]


def test_the_command_that_resumes_works_from_another_folder(pair, tmp_path, monkeypatch):
    from configs import command_line

    monkeypatch.chdir(ROOT)
    out = os.path.relpath(tmp_path / "run")
    cfg = parse(TrainConfig, flags(pair, out, **SMALL | dict(steps=1)))
    train.main(cfg)
    cfg.steps, cfg.resume = 2, "true"
    command = command_line(cfg).replace("&& python", f"&& {sys.executable}")
    subprocess.run(command, shell=True, cwd="/", check=True, capture_output=True)
    assert len(metrics(tmp_path / "run")) == 2


def graded_row(i, sample):
    return dict(data="q", problem=f"q-{i}", sample=sample, seed=0, tokens=3, finish="stop", gold="1", text="\\boxed{1}",
                answer="1", correct=True, reason="equal")  # fmt: skip


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
    options = ["--model", pair[1], "--data", "toy", "--limit", "4", "--k", "1", "--max_tokens", "5", "--batch", "1"]
    evaluate.main(parse(EvalConfig, [*options, "--out", str(tmp_path / "one")]))
    cfg = parse(EvalConfig, [*options, "--out", str(tmp_path / "two")])
    rows = (tmp_path / "one/samples.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # as a kill of two ranks would leave it
    (tmp_path / "two/samples.jsonl").unlink()
    for rank, row in ((0, 0), (1, 1), (0, 2)):
        (tmp_path / f"two/part-2-1-{rank:03d}-{row // 2:05d}.jsonl").write_text(rows[row])
    evaluate.main(cfg)
    assert (tmp_path / "two/samples.jsonl").read_text() == "".join(rows) and not list(Path(cfg.out).glob("part-*"))


def test_repeated_rows_cost_no_problem_its_place(tmp_path, monkeypatch):
    """A cap on problems, not on rows: DAPO's file repeats each about 100 times."""
    monkeypatch.setattr(data, "MAX_PROBLEMS", 9)
    rows = [{"problem": str(i % 9), "answer": "1"} for i in range(900)]
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    assert sorted(p.prompt for p in data.load(file, seed=1)) == [str(i) for i in range(9)]
    monkeypatch.setattr(data, "MAX_PROBLEMS", 4)
    assert len(data.load(file, seed=1)) == 4
