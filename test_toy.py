"""python -m pytest test_toy.py"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy


def check(text, question_answer=None):
    """A slow reader of a worked answer: (right everywhere, how many lines forget their carry)."""
    question, *lines, boxed = text.removeprefix("<bos>").removesuffix("<eos>").split("\n")
    numbers = [int(x) for x in re.findall(r"\d\d", question)]
    total, right, forgotten = numbers[0], True, 0
    for x, line in zip(numbers[1:], lines, strict=True):
        label, a, b, ones, tens, new = re.fullmatch(r"([a-t])(\d\d)\+(\d\d):(\d\d),(\d\d)=(\d\d)", line).groups()
        assert int(a) == x and int(b) == total and int(ones) == x % 10 + total % 10
        carry = int(tens) - x // 10 - total // 10
        assert carry in (0, int(ones) // 10)
        forgotten += carry != int(ones) // 10
        total = int(tens) % 10 * 10 + int(ones) % 10
        assert int(new) == total
    right = total == sum(numbers) % 100
    assert boxed == f"\\boxed{{{total:02d}}}"
    return right, forgotten


def test_problems_are_a_function_of_the_seed():
    assert toy.problems(50, 3) == toy.problems(200, 3)[:50]
    assert not set(toy.problems(500, 3)) & set(toy.problems(500, toy.HELD_OUT))
    question, answer = toy.problems(1, 0)[0]
    assert sum(map(int, re.findall(r"\d\d", question))) % 100 == int(answer)


@pytest.mark.parametrize("drop", [0.0, 0.6])
def test_worked_answers_are_right_but_for_forgotten_carries(drop):
    rng = np.random.default_rng(0)
    ids, prompt = toy.traces(rng.integers(0, 100, (300, 6)), drop, rng)
    results = [check(toy.tokenizer().decode(row)) for row in ids]
    assert ids.shape == (300, 112) and prompt == 27
    if drop == 0:
        assert all(right and not forgotten for right, forgotten in results)
    else:
        assert all(right for right, forgotten in results if not forgotten)
        assert 0.5 < np.mean([bool(forgotten) for _, forgotten in results]) < 0.95


def test_tokenizer_round_trips_and_knows_the_box():
    tok = toy.tokenizer()
    text = "b75+30:05,10=05\n\\boxed{14}"
    assert tok.decode(tok(text)["input_ids"], skip_special_tokens=True) == text
    assert tok("\\boxed{14}", add_special_tokens=False)["input_ids"][0] == toy.ID["\\boxed{"]
    assert len(tok) == len(toy.VOCAB) and tok.eos_token_id == toy.ID["<eos>"]
    ids, prompt = toy.traces(np.array([[52, 98, 63, 81, 65, 60]]))
    chat = [{"role": "user", "content": toy.problems(1, toy.HELD_OUT)[0][0]}]
    assert tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[0] == toy.ID["<bos>"]
    rendered = tok.apply_chat_template([{"role": "user", "content": "a52+b98+c63+d81+e65+f60=?"}], return_dict=False)
    assert rendered == ids[0, :prompt].tolist()


def test_models_are_trained_once_and_whole(tmp_path):
    """A second call trains nothing, and a folder that a kill left half-written is not taken for a model."""
    recipe = {role: options | {"steps": 1} for role, options in toy.RECIPE.items()}
    teacher, student = toy.models(tmp_path, recipe)
    shutil.rmtree(student)
    (Path(student + ".tmp")).mkdir()
    (Path(student + ".tmp") / "config.json").write_text("{")
    written = (Path(teacher) / "model.safetensors").stat().st_mtime_ns
    assert toy.models(tmp_path, recipe) == (teacher, student)
    assert (Path(teacher) / "model.safetensors").stat().st_mtime_ns == written
    for folder in (teacher, student):
        model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tok) and model.generation_config.eos_token_id == tok.eos_token_id
        assert tok.chat_template


def test_training_is_deterministic_and_learns(tmp_path):
    weights = []
    for name in "ab":
        toy.train(str(tmp_path / name), **toy.RECIPE["student"] | {"steps": 3})
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    start = toy.model(64, 2, toy.RECIPE["student"]["seed"]).state_dict()
    assert any(not torch.equal(x, start[name]) for name, x in weights[0].items())
