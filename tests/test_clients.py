"""What others read of final/: python -m pytest tests/test_clients.py

lm-evaluation-harness (pip install lm-eval==0.4.13), and transformers 4.57 with a tokenizer that it wrote. PYTHON_457 may name a
Python that has transformers 4.57.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ENV, run, write_jsonl

import evaluate
import rollout
from configs import EvalConfig, parse
from support import toy
from support.vocabulary import Vocabulary

needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="needs lm-evaluation-harness: pip install lm-eval==0.4.13"
)


@needs_lm_eval
def test_lm_evaluation_harness_gives_our_mean(tmp_path, monkeypatch):
    """At temperature 2 and top-p .9 the toy's teacher is right in four of five responses, at 1.5 in all: both must sample alike."""
    import lm_eval

    n_problems, n, sampling = 40, 8, {"temperature": 2.0, "top_p": 0.9}
    run((toy.TEACHER, toy.TEACHER), tmp_path / "run", steps=1, lr=1e-5, max_response=100)
    final = tmp_path / "run/final"
    argv = f"--model {final} --data toy --eval_problems {n_problems} --k 1 --n {n} --max_response 100 --out {tmp_path}/ours"
    evaluate.main(parse(EvalConfig, [*argv.split(), *(str(x) for k, v in sampling.items() for x in (f"--{k}", v))]))
    (ours,) = json.loads((tmp_path / "ours/results.json").read_text())["metrics"]

    problems = toy.problems(n_problems, toy.HELD_OUT)
    rows = [{"question": question, "answer": answer} for question, answer in problems for _ in range(n)]
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(write_jsonl(tmp_path / "toy.jsonl", rows))},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": True, "top_k": 0, "max_gen_toks": 100} | sampling,
        "filter_list": [{"name": "box", "filter": [{"function": "regex", "regex_pattern": r"\\boxed\{(\d+)\}"},
                                                   {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    options = {"model_args": {"pretrained": str(final), "dtype": "float32"}, "device": "cpu", "batch_size": 160}
    found = lm_eval.simple_evaluate("hf", tasks=[task], apply_chat_template=True, bootstrap_iters=0, **options)
    theirs = found["results"]["toy"]["exact_match,box"]
    print(f"lm-eval {theirs:.3f}, evaluate.py {ours[f'mean@{n}']:.3f} [{ours['low'][0]:.3f}, {ours['high'][0]:.3f}]")
    assert ours["low"][0] < theirs < ours["high"][0]


# -----------------------------------------------------------------------------
# transformers 4.57. tests/qwen2_457 has what it wrote: a byte-level tokenizer, and the config of a tiny Qwen2

RECORDED = Path(__file__).parent / "qwen2_457"
STOPS = {
    "student": 259,
    "teacher": 258,
}  # <|endoftext|> and <|im_end|>, as those of Qwen's base models and of their chat models
PROMPT = [{"role": "user", "content": "10+2=?"}]
LENGTH, N = 200, 128  # tokens, so many that most responses stop; responses
# Prints how many of N responses stopped, and how many went on after one of the ids in STOPS.
GENERATE = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.manual_seed(0)
prompt = tokenizer.apply_chat_template({PROMPT}, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
ids = prompt.repeat({N}, 1)
out = model.generate(
    ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens={LENGTH}
)
stopped = went_on = 0
for row in out[:, ids.shape[1]:].tolist():
    ends = [i for i, token in enumerate(row) if token in {list(STOPS.values())}]
    stopped += bool(ends)
    went_on += bool(ends) and any(token != model.generation_config.pad_token_id for token in row[ends[0] + 1:])
print(stopped, went_on)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the student, final of a run with it, how many of N responses training's sampler ends)."""
    root = tmp_path_factory.mktemp("qwen2")
    for role, eos in STOPS.items():
        shutil.copytree(RECORDED, root / role)
        torch.manual_seed(eos)
        lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(root / role))
        lm.model.embed_tokens.weight.data *= 8  # far from uniform
        lm.save_pretrained(root / "new")
        shutil.copy(root / "new/model.safetensors", root / role)
        generation_config = {"eos_token_id": eos, "pad_token_id": STOPS["student"]}
        (root / role / "generation_config.json").write_text(json.dumps(generation_config))
    out = root / "run"
    run((str(root / "teacher"), str(root / "student")), out, steps=1, max_prompt=128, template="raw", lr=1e-5)
    lm = transformers.AutoModelForCausalLM.from_pretrained(out / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "final")
    sampler = rollout.HFSampler(lm, Vocabulary(len(tokenizer), set(), sorted(STOPS.values()), []))
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    rollouts = sampler.sample([ids] * N, range(N), max_tokens=LENGTH, temperature=1.0, top_p=1.0, top_k=0)
    return root / "student", out / "final", sum(r.finish == "stop" for r in rollouts)


def test_final_has_the_files_that_the_base_came_with(trained):
    """Saved anew by transformers 5, a tokenizer does not load in 4.57: "TokenizersBackend does not exist"."""
    student, final, _ = trained
    names = {file.name for file in RECORDED.iterdir()} - {"generation_config.json"}
    assert {name for name in names if (student / name).read_bytes() != (final / name).read_bytes()} == set()
    assert json.loads((final / "generation_config.json").read_text())["eos_token_id"] == sorted(STOPS.values())


def check_stops(printed, expected):
    stopped, went_on = map(int, printed.split())
    assert went_on == 0 and abs(stopped - expected) < 4 * (N / 2) ** 0.5, (stopped, expected)  # 4 standard errors


def test_generate_stops_where_trainings_sampler_did(trained, monkeypatch, capsys):
    """A student that learnt the teacher's stop token went on in 63 of 64 responses."""
    _, final, expected = trained
    monkeypatch.setattr(sys, "argv", ["", str(final)])
    exec(GENERATE, {})
    check_stops(capsys.readouterr().out, expected)


@pytest.mark.skipif("PYTHON_457" not in os.environ, reason="needs a Python with transformers 4.57, named by PYTHON_457")
def test_final_loads_and_stops_in_the_transformers_that_wrote_its_base(trained):
    _, final, expected = trained
    command = [os.environ["PYTHON_457"], "-c", GENERATE, final]
    check_stops(subprocess.run(command, env=ENV, check=True, capture_output=True, text=True).stdout, expected)
