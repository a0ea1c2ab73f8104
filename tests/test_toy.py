"""python -m pytest tests/test_toy.py"""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from study import pretrain_toy
from support import toy

RECIPE = pretrain_toy.recipe_of(7)


def read(text):
    """A slow reader of a worked answer, which takes nothing from toy.py: (final answer, [carry due], [carry made]).

    Fails where a line is wrong in anything but its carry.
    """
    question, *lines, boxed, end = text.removeprefix("<bos>").replace("<eos>", "\n").split("\n")
    operands = [(x[0], int(x[1:])) for x in question.removesuffix("=?").split("+")]
    total, due, made = operands[0][1], [], []
    for (label, x), line in zip(operands[1:], lines, strict=True):
        numbers = re.fullmatch(rf"{label}(\d\d)\+(\d\d):(\d\d),(\d\d)=(\d\d)", line).groups()
        a, b, ones, tens, new = map(int, numbers)
        assert (a, b, ones) == (x, total, x % 10 + total % 10)
        due.append(ones // 10)
        made.append(tens - x // 10 - total // 10)
        assert new == (10 * tens + ones % 10) % 100
        total = new
    assert boxed == f"\\boxed{{{total:02d}}}" and end == ""
    return total, due, made


def decode(ids):
    return [toy.tokenizer().decode(row) for row in ids]


def test_problems_are_a_function_of_the_seed():
    assert toy.problems(50, 3) == toy.problems(200, 3)[:50]
    for question, answer in toy.problems(50, 3):
        assert sum(map(int, re.findall(r"\d\d", question))) % 100 == int(answer)
    assert len(toy.problems(1, 3, operands=4)[0][0]) == 4 * 4 + 1
    with pytest.raises(ValueError):
        toy.problems(1, 0, operands=len(toy.LABELS) + 1)


def test_held_out_problems_are_in_no_run_and_in_no_pretraining():
    held_out = {question for question, _ in toy.problems(4096, toy.HELD_OUT)}
    assert len(held_out) == 4096
    for seed in range(5):
        assert not held_out & {question for question, _ in toy.problems(4096, seed)}
    names = np.array(toy.VOCAB)
    for recipe in RECIPE.values():
        stream = pretrain_toy.batches(recipe["steps"], recipe["drop"], recipe["seed"])
        full = [ids[:, 1 : prompt - 1] for ids, prompt in stream if prompt == 27]
        seen = {"".join(names[row]) for ids in full for row in ids}
        assert len(seen) > 3000 and not held_out & seen


def test_the_teacher_reads_right_sums():
    rng = np.random.default_rng(0)
    for n in (2, 6, 9):
        numbers = rng.integers(0, 100, (100, n))
        ids, prompt = pretrain_toy.traces(numbers)
        assert ids.shape == (100, 20 * n - 8) and prompt == 4 * n + 3
        for row, text in zip(numbers, decode(ids), strict=True):
            answer, due, made = read(text)
            assert answer == sum(row) % 100 and made == due


def test_the_student_reads_sums_that_are_wrong_at_carries_only():
    """Where no carry is due none is made; of those due, the share asked for is forgotten."""
    rng = np.random.default_rng(0)
    ids, _ = pretrain_toy.traces(rng.integers(0, 100, (400, 6)), drop=0.7, rng=rng)
    due, made = (np.array(x) for x in list(zip(*map(read, decode(ids)), strict=True))[1:])
    assert set(made[due == 0]) == {0} and set(made[due == 1]) == {0, 1}
    assert abs(made[due == 1].mean() - 0.3) < 4 * (0.3 * 0.7 / due.sum()) ** 0.5


def test_the_tokenizer_gives_every_text_back(tmp_path):
    toy.tokenizer().save_pretrained(tmp_path)
    for tok in (toy.tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tok) == len(toy.VOCAB) == 42
        special = tok.pad_token_id, tok.bos_token_id, tok.eos_token_id, tok.unk_token_id
        assert special == (0, 1, 2, 3)
        for ids in np.random.default_rng(0).integers(4, 42, (100, 40)).tolist():
            assert tok(tok.decode(ids), add_special_tokens=False)["input_ids"] == ids
        text = "b75+30:05,10=05\n\\boxed{14}"
        ids = tok(text)["input_ids"]
        assert tok.decode(ids, skip_special_tokens=True) == text
        assert tok.convert_ids_to_tokens(ids)[-5:] == ["\n", "\\boxed{", "1", "4", "}"]


def test_the_chat_template_gives_the_prompt_of_pretraining():
    question, _ = toy.problems(1, 0)[0]
    numbers = np.array([[int(x) for x in re.findall(r"\d\d", question)]])
    ids, prompt = pretrain_toy.traces(numbers)
    chat = [{"role": "user", "content": question}]
    encoded = toy.tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encoded == ids[0, :prompt].tolist()


def test_training_is_deterministic_and_its_folder_loads(tmp_path):
    weights = []
    for name in "ab":
        pretrain_toy.train(tmp_path / name, **RECIPE["student"] | {"steps": 2})
        lm, tok = (x.from_pretrained(tmp_path / name) for x in (AutoModelForCausalLM, AutoTokenizer))
        assert lm.config.vocab_size == len(tok) and tok.chat_template
        assert lm.generation_config.eos_token_id == tok.eos_token_id
        weights.append(lm.state_dict())
    start = pretrain_toy.model(64, 2, RECIPE["student"]["seed"], layers=3).state_dict()
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name]) and not torch.equal(x, start[name])


@pytest.mark.slow
def test_a_pair_is_trained_once_and_a_killed_call_leaves_no_half_of_a_model(tmp_path, monkeypatch, capsys):
    recipe = {role: options | {"steps": 2} for role, options in RECIPE.items()}
    monkeypatch.setattr(pretrain_toy, "recipe_of", lambda seed: recipe)
    (tmp_path / "8" / "teacher.tmp").mkdir(parents=True)  # as a kill leaves it
    pretrain_toy.main(["8", "--out", str(tmp_path)])
    assert {path.name for path in (tmp_path / "8").iterdir()} == {"teacher", "student"}
    written = (tmp_path / "8/student/model.safetensors").stat().st_mtime_ns
    pretrain_toy.main(["8", "--out", str(tmp_path)])
    assert (tmp_path / "8/student/model.safetensors").stat().st_mtime_ns == written


def test_the_shipped_pair_says_how_it_was_made_and_its_teacher_is_right():
    made_by = json.loads((toy.MODELS / "made_by.json").read_text())
    assert made_by["command"] == f"python -m study.pretrain_toy {made_by['seed']}" and made_by["commit"]
    for role, folder in (("teacher", toy.TEACHER), ("student", toy.STUDENT)):
        lm, recipe = AutoModelForCausalLM.from_pretrained(folder), pretrain_toy.recipe_of(made_by["seed"])[role]
        assert (lm.config.hidden_size, lm.config.num_hidden_layers) == (recipe["hidden"], recipe["layers"])
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == toy.ID
    # The teacher writes out a sum that it has not seen, carries and all.
    numbers = np.array([[45, 41, 51, 21, 97, 72]])
    ids, prompt = pretrain_toy.traces(numbers)
    teacher = AutoModelForCausalLM.from_pretrained(toy.TEACHER)
    out = teacher.generate(torch.tensor(ids[:, :prompt]), max_new_tokens=100, do_sample=False)
    assert out[0].tolist() == ids[0].tolist()
