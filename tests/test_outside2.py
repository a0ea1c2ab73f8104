"""python -m pytest tests/test_outside2.py      thirteen more kinds of fault that users of this field's systems have reported"""

import ast
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import ENV, ROOT, flags, join, metrics, run, start
from safetensors.torch import load_file, save_file
from test_outside import SMALL, chat_tokenizer, refused, slow_sampling
from tokenizers import Tokenizer, decoders, models, processors
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

import checkpoint
import common
import data
import evaluate
import grade
import plot
import policy
import report
import rollout
import toy
import train
from configs import TOPK_LOSSES, EvalConfig, TrainConfig, parse

# -----------------------------------------------------------------------------
# numbers silently wrong


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


@pytest.mark.parametrize("loss", TOPK_LOSSES)
def test_a_teacher_that_gives_nan_is_seen_by_every_loss(scene, loss):
    """huggingface/trl#5594, microsoft/LMOps#38. The top-K losses left such tokens out, and trained on the others."""
    student, _, minibatches, cfg, _ = scene(loss=loss)
    batch = minibatches[0][0]
    batch.teacher["topk_logq"][1] = torch.nan
    assert train.position_loss(student, batch, cfg, None)[1].isnan().tolist() == [
        i == 1 for i in range(len(batch.rows))
    ]


def test_a_model_of_nan_is_refused_by_name(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    refused(flags((tmp_path / "teacher", pair[1]), tmp_path / "run"), "teacher gives NaN logits")


def test_a_prompt_does_not_end_in_eos():
    """vllm-project/vllm#7491: with add_eos_token the model sees a text that is over."""
    tokenizer = toy.tokenizer()
    both = [("<bos>", toy.ID["<bos>"]), ("<eos>", toy.ID["<eos>"])]
    ends = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=both)
    tokenizer.backend_tokenizer.post_processor = ends
    for template in ("raw", "plain", "1+1={question}"):
        expected = data.encode(data.Problem("a", "1+1", "2"), toy.tokenizer(), template)
        assert data.encode(data.Problem("a", "1+1", "2"), tokenizer, template) == expected
    text = tokenizer.decode(data.encode(data.Problem("a", "1+1", "2"), toy.tokenizer(), "{question}<eos>"))
    assert text == "<bos>1+1<eos>"  # asked for


def test_python_without_asserts_loses_nothing():
    """dpkp/kafka-python#1348, NVIDIA-NeMo/RL#4018: under python -O vLLM would have kept the cache of the old weights."""
    for path in [path for path in ROOT.glob("*.py") if not path.name.startswith("test_")]:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, path


def test_tokens_beyond_a_gap_in_the_ids_can_be_sampled(tmp_path, monkeypatch):
    """huggingface/tokenizers#900: len(tokenizer) counts tokens; the largest id, often that of a stop token, may be beyond."""
    backend = Tokenizer(models.WordLevel(toy.ID | {"}": 60}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "m")
    toy.model(32, 2, seed=0).config.save_pretrained(tmp_path / "m")
    asked = []

    def make_sampler(cfg, path, model, tokenizer, vocab, stops, max_len):
        asked.append(vocab)
        raise ValueError("enough")

    monkeypatch.setattr(rollout, "make_sampler", make_sampler)
    options = [
        "--model",
        tmp_path / "m",
        "--data",
        "toy",
        "--limit",
        "1",
        "--template",
        "raw",
        "--out",
        tmp_path / "ev",
    ]
    with pytest.raises(SystemExit, match="enough"):
        evaluate.main(parse(EvalConfig, list(map(str, options))))
    assert asked == [61]


# -----------------------------------------------------------------------------
# runs lost


def test_a_template_that_names_the_date_gives_the_same_prompt_every_day():
    """sgl-project/sglang#3296, oobabooga/textgen#6692. A run that went on after midnight was refused: other prompts."""
    tokenizer = chat_tokenizer("{{ strftime_now('%Y%m%d') }}{{ messages[0]['content'] }}")
    chat = data.Problem("a", [{"role": "user", "content": "1+1"}], "2")
    assert tokenizer.decode(data.encode(chat, tokenizer)) == "202501011+1"


def test_a_graders_worker_that_is_killed_changes_no_verdict():
    """OpenRLHF/OpenRLHF#1139, joblib/loky#1: by the OOM killer, say, while it is idle or at work."""
    with grade.Grader(workers=1) as grader:
        assert grader.grade([("\\boxed{x+1}", "1+x", True)]) == [("x+1", True, "equal")]
        os.kill(grader.started[0].pid, signal.SIGKILL)
        os.waitid(os.P_PID, grader.started[0].pid, os.WEXITED | os.WNOWAIT)
        assert grader.grade([("\\boxed{x+2}", "2+x", True)]) == [("x+2", True, "equal")]
        pid = grader.started[0].pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        assert grader.grade([("\\boxed{x+3}", "3+x", True)]) == [("x+3", True, "equal")]
        assert len(grader.started) == 1


def test_a_notebooks_matplotlib_backend_does_not_matter():
    """bmaltais/kohya_ss#2521, deeptools/deepTools#1416: !python train.py in a notebook, from another environment."""
    env = ENV | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", "import plot; plot.pyplot()"], cwd=ROOT, env=env, check=True)


def test_a_picture_that_cannot_be_drawn_ends_nothing(pair, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(plot, "draw", fail)
    monkeypatch.setattr(report, "plot_pass_at_k", fail)
    run(pair, tmp_path / "run", steps=1)
    _, _, after = capsys.readouterr().out.partition("warning: no picture: no space left\n")
    assert f"student   {tmp_path}/run/final" in after  # it went on to the table at its end
    options = ["--model", pair[1], "--data", "toy", "--limit", "2", "--k", "1", "--max_tokens", "5"]
    evaluate.main(parse(EvalConfig, [*options, "--out", str(tmp_path / "ev")]))
    assert "samples.jsonl, every completion" in capsys.readouterr().out


def test_output_that_nobody_reads_ends_nothing(pair, tmp_path):
    """pytorch/pytorch#67538: a pipe that was closed, as by | head, or by the end of an SSH session."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, ROOT / "train.py", *flags(pair, tmp_path / "run", sample_every=1)]
    ended = subprocess.run(command, stdout=write_end, stderr=write_end, env=ENV)
    assert ended.returncode == 0 and (tmp_path / "run/final").exists() and len(metrics(tmp_path / "run")) == 2


def test_a_closed_terminal_stops_a_run_as_a_sigterm_does(pair, tmp_path):
    """modelscope/ms-swift#5884, hiyouga/LlamaFactory#3036: torchrun sends its ranks SIGHUP, even under nohup."""
    out, log = tmp_path / "run", tmp_path / "log"
    child = start(flags(pair, out, **SMALL | dict(steps=99, save_every=0)), slow_sampling, log)
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGHUP)
    assert join([child]) == 0 and "stopped by SIGHUP after step" in log.read_text()
    assert checkpoint.latest(out).name == f"step-{len(metrics(out))}"


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = checkpoint.StopSignal()
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    stop.release()
    assert not stop.requested() and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_file_systems_without_locks_and_without_flushing_of_folders(pair, tmp_path, monkeypatch, capsys):
    """tox-dev/filelock#67 (Lustre), rfjakob/gocryptfs#587."""
    fsync = os.fsync

    def no_lock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def no_folder(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(os, "fsync", no_folder)
    run(pair, tmp_path / "run", **SMALL)
    assert "cannot be locked ([Errno 38] Function not implemented): do not start two runs" in capsys.readouterr().out
    monkeypatch.setattr(toy, "train_missing", lambda *_: None)
    assert toy.models(tmp_path / "toy")


def test_a_disk_that_fails_is_still_an_error(tmp_path, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        common.fsync(tmp_path)


def test_a_package_that_a_model_needs_is_named_in_one_line(pair, tmp_path):
    """hiyouga/LlamaFactory#6044, oobabooga/textgen#7007: quantised models (GPTQ, AWQ) need packages that are not here."""
    shutil.copytree(pair[0], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    refused(flags((tmp_path / "m", pair[1]), tmp_path / "run"), "train.py: .*optimum")
    options = ["--model", str(tmp_path / "m"), "--data", "toy", "--limit", "1", "--out", str(tmp_path / "ev")]
    with pytest.raises(SystemExit, match="evaluate.py: .*optimum"):
        evaluate.main(parse(EvalConfig, options))


def test_the_text_part_of_a_model_that_sees_pictures_is_trained(tmp_path):
    """huggingface/transformers#36683, EleutherAI/lm-evaluation-harness#3234: its config has no vocab_size of its own."""
    text = dict(
        vocab_size=42, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, max_position_embeddings=256, attention_dropout=0.5,
    )  # fmt: skip
    picture = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=picture, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    toy.tokenizer().save_pretrained(tmp_path / "m")
    pair = (tmp_path / "m", tmp_path / "m")
    rows, weights = run(pair, tmp_path / "run", grad_ckpt="true", **SMALL | dict(steps=1))
    run(pair, tmp_path / "run", grad_ckpt="true", **SMALL | dict(steps=2, resume="true"))
    assert rows[0]["gap"] == pytest.approx(0, abs=1e-5)  # no dropout
    options = ["--model", tmp_path / "run/step-2", "--data", "toy", "--limit", "1", "--k", "1", "--max_tokens", "5"]
    evaluate.main(parse(EvalConfig, [*map(str, options), "--out", str(tmp_path / "ev")]))
    cfg = parse(TrainConfig, flags(pair, tmp_path / "b", max_prompt=200, max_response=99))
    with pytest.raises(ValueError, match="context of 256"):
        policy.load_tokenizer({"student": str(tmp_path / "m")}, cfg)
