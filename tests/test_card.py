"""python -m pytest tests/test_card.py      (the final student's model card)"""

import json
import re
from pathlib import Path

import torch
from helpers import evaluations, flags, run
from huggingface_hub import ModelCard

from configs import TrainConfig, parse
from support import report, toy

OPTIONS = dict(steps=2, eval_every=2, eval_problems=4, k=2, schedule="constant")


def card_of(cfg, rows=(), prompt="1+1="):
    """The card that a run with these evaluations would leave, as the hub's own reader reads it."""
    out = Path(cfg.out)
    (out / "final").mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    (out / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_model_card(cfg, prompt)
    return ModelCard.load(out / "final" / "README.md")


def test_the_final_student_says_what_it_was_made_of(pair, tmp_path):
    run(pair, tmp_path, **OPTIONS)
    card = ModelCard.load(tmp_path / "final" / "README.md")
    assert card.data.library_name == "transformers" and "policy-drift-gating" in card.data.tags
    assert card.data.base_model is None  # both models are folders on this machine, which mean nothing to others
    first, last = evaluations(tmp_path)
    low, high = (100 * last[f"eval/pass@2_{bound}"] for bound in ("low", "high"))
    before, after = (100 * row["eval/pass@2"] for row in (first, last))
    assert low <= after <= high and re.search(
        rf"\| pass@2 \| {before:.1f} \[.*\] % \| {after:.1f} \[{low:.1f}, {high:.1f}\] % \|", card.text
    )
    assert f"| {100 * first['eval/mean@2']:.1f} % | {100 * last['eval/mean@2']:.1f} % |" in card.text
    assert (
        "A student student distilled on policy from teacher on its toy problems: 2 steps of 3 x 2 responses"
        in card.text
    )
    assert "python train.py --preset tiny" in card.text and "--eval_problems 4" in card.text
    assert "commit" in card.text and f"torch {torch.__version__}" in card.text
    local = [line for line in card.text.splitlines() if str(tmp_path.parent) in line]
    assert all(line.startswith("python train.py") for line in local)  # no path of this machine but in the command


def test_the_snippet_of_the_card_runs(tmp_path, capsys):
    run((toy.TEACHER, toy.STUDENT), tmp_path, steps=1, max_response=100, lr=1e-6)
    text = (tmp_path / "final" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace('"PATH"', repr(str(tmp_path / "final")))
    capsys.readouterr()
    exec(code, {})
    assert "boxed{" in capsys.readouterr().out
    assert "{'role': 'user', 'content': 'a" in code and "max_new_tokens=100" in code  # a toy question, in a message


def test_hub_models_are_named_as_base_models(tmp_path):
    card = card_of(parse(TrainConfig, ["--preset", "qwen3", "--out", str(tmp_path)]))
    assert card.data.base_model == ["Qwen/Qwen3-1.7B-Base", "Thinking-Space/Qwen3-4B-Base-GRPO"]
    assert "not evaluated" in card.text
    assert "A Qwen3-1.7B-Base student distilled on policy from Qwen3-4B-Base-GRPO on the questions of dapo" in card.text


def test_a_metric_that_the_first_evaluation_lacks_does_not_end_the_run(pair, tmp_path):
    """--k and --eval_data may change on resume, and a value that is not finite is not written."""
    rows = [{"step": 0, "eval/pass@2": 0.25}, {"step": 2, "eval/pass@2": 0.5, "eval/kl": 0.125}]
    text = card_of(parse(TrainConfig, flags(pair, tmp_path, **OPTIONS)), rows).text
    assert "| pass@2 | 25.0 % | 50.0 % |" in text
    assert "| KL to the teacher | 0.125 nats per token | 0.125 nats per token |" in text


def test_the_models_behind_a_teachers_server_are_not_guessed(tmp_path):
    cfg = parse(TrainConfig, ["--preset", "qwen3", "--out", str(tmp_path), "--teacher_url", "http://x"])
    text = card_of(cfg).text
    assert "Thinking-Space" not in text and "distilled on policy from a model on a server" in text
