"""python -m pytest tests/test_data.py"""

import gzip
import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from helpers import SHARED, SMALL, chat_tokenizer, flags, questions, refused, run, write_jsonl
from scenes import toy_vocabulary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import data
import evaluate
import gating
from configs import TEMPLATES, EvalConfig, TrainConfig, parse
from rollout import Rollout
from support import common, toy
from support.vocabulary import (
    Vocabulary,
    end_of_turn,
    load_tokenizer,
    newline_ids,
    next_question,
    shared_size,
    stop_ids,
)

REAL = SHARED / "data"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"the real benchmarks are not at {REAL}")


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE tokenizer with BOS, trained so that newlines hide in longer tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(["So x is 2.\n\nNext, y.\n\n"] * 50 + ["a = b\n"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_newline_tokens_come_from_the_decoded_vocabulary(bpe):
    ids = newline_ids(bpe, len(bpe))
    text = "So x is 2.\n\nNext, y.\n\na = b\n"
    tokens = bpe(text, add_special_tokens=False)["input_ids"]
    assert any(len(bpe.decode([i])) > 1 for i in ids)  # such as ".\n\n"
    assert [i in ids for i in tokens] == ["\n" in bpe.decode([i]) for i in tokens] and ids & set(tokens)


@needs_real
def test_real_benchmarks_load():
    for name, count in dict(math500=500, aime24=30, amc23=40, gsm8k_test=1319).items():
        problems = data.load(str(REAL / f"{name}.jsonl"))
        assert len(problems) == count and len({p.id for p in problems}) == count
        assert all(p.answer and isinstance(p.prompt, str) for p in problems)
    with pytest.raises(ValueError, match=r"aime25.jsonl, row 19: .*x0crac.* has a control character"):
        data.load(str(REAL / "aime25.jsonl"))  # the file that went round on GitHub; the hub's is whole


def dapo_row(question):
    """A row as DAPO-Math-17k has it."""
    content = f"{data.DAPO_BEFORE}{question}{data.DAPO_AFTER}"
    return {"prompt": [{"role": "user", "content": content}], "reward_model": {"ground_truth": "34", "style": "rule"}}


@needs_real
def test_a_question_is_asked_alike_in_training_and_evaluation_with_the_real_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(REAL / "qwen3_tokenizer")
    benchmark = data.load(str(REAL / "math500.jsonl"))[:50]
    rows = [dapo_row(problem.prompt) for problem in benchmark]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = data.load(str(tmp_path / "train.jsonl"), seed=0)
    assert {p.prompt for p in train} == {p.prompt for p in benchmark}
    for template in TEMPLATES:
        prompts = [{tuple(data.encode(p, tokenizer, template)) for p in problems} for problems in (train, benchmark)]
        assert prompts[0] == prompts[1]
    question = benchmark[0].prompt
    text = {name: tokenizer.decode(data.encode(benchmark[0], tokenizer, name)) for name in TEMPLATES}
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert text["auto"] == text["chat"] == turn.format(f"{question}\n{data.INSTRUCTION}")
    assert text["dapo"] == turn.format(rows[0]["prompt"][0]["content"])
    assert "<think>" in text["think"] and "\\boxed{}" in text["think"]
    assert text["solution"] == f"{question}\n\nSolution:" and text["raw"] == question
    lengths = [len(data.encode(p, tokenizer)) for p in data.load(str(REAL / "math500.jsonl"))]
    assert max(lengths) < 1024  # --max_prompt 2048 leaves none out


@needs_real
def test_stops_and_newlines_of_the_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REAL / "qwen3_tokenizer")
    assert end_of_turn(tokenizer) == [151645]
    base = GenerationConfig(eos_token_id=151643)  # what Qwen3-1.7B-Base's file says
    assert stop_ids(tokenizer, base) == [151643, 151645]
    newlines = newline_ids(tokenizer, len(tokenizer))
    text = "So x = 2.\n\nThen y = 3,\n so z."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i in newlines for i in ids] == ["\n" in tokenizer.decode([i]) for i in ids]
    assert sum(i in newlines for i in ids) == 2 and len(newlines) > 1000


def test_known_columns(tmp_path):
    """Chat messages with reward_model.ground_truth as in DAPO, its repeated rows, and GSM8K's #### answers."""
    chat = [{"role": "user", "content": "What is 1+1?"}]
    rows = [{"prompt": chat, "reward_model": {"ground_truth": "2", "style": "rule"}}] * 3
    Dataset.from_list(rows).to_parquet(tmp_path / "dapo.parquet")
    assert data.load(str(tmp_path / "dapo.parquet")) == [data.Problem("dapo-0", chat, "2")]
    row = {"question": "How many?", "answer": "Three.\n#### 3"}
    (tmp_path / "gsm.jsonl").write_text(json.dumps(row) + "\n")
    assert data.load(str(tmp_path / "gsm.jsonl")) == [data.Problem("gsm-0", "How many?", "3")]
    row = {"Problem": "Odd case", "Answer": 7, "ID": "x1"}
    (tmp_path / "aime.jsonl").write_text(json.dumps(row) + "\n")
    assert data.load(str(tmp_path / "aime.jsonl")) == [data.Problem("x1", "Odd case", "7")]


def test_shuffle_and_limit_are_functions_of_the_seed(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"problem": f"q{i}", "answer": "1"}) + "\n" for i in range(50))
    )
    load = lambda **kw: [p.prompt for p in data.load(str(tmp_path / "a.jsonl"), **kw)]  # noqa: E731
    assert load() == [f"q{i}" for i in range(50)]
    assert load(seed=1) == load(seed=1) != load(seed=2) and sorted(load(seed=1)) == sorted(load())
    assert load(limit=5) == load()[:5]
    assert [p.prompt for p in data.load("toy", limit=9)] == [p.prompt for p in data.load("toy", limit=20)][:9]


def test_templates(bpe):
    tok, question = toy.tokenizer(), data.Problem("a", "1+1", "2")
    chat = data.Problem("a", [{"role": "user", "content": "1+1=?"}], "2")
    assert tok.decode(data.encode(chat, tok)) == "<bos>1+1=?\n"
    assert tok.decode(data.encode(question, tok, "raw")) == "<bos>1+1"
    assert tok.decode(data.encode(question, tok, "{question}=?\\n")) == "<bos>1+1=?\n"
    plain = bpe.decode(data.encode(question, bpe))  # no chat template: question, instruction, answer
    assert plain == data.TEXT_TEMPLATES["plain"].replace("{question}", "1+1") and "\\boxed{}" in plain
    bpe.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert bpe.decode(data.encode(question, bpe)) == f"[1+1\n{data.INSTRUCTION}]>"
    assert bpe.decode(data.encode(chat, bpe)) == "[1+1=?]>"
    bpe.chat_template = None


def test_the_next_question_of_the_plain_template_is_known_by_its_tokens(bpe, pair):
    newlines = newline_ids(bpe, len(bpe))
    vocabulary = Vocabulary(len(bpe), newlines, [], [], next_question(bpe, newlines))
    again = "\n" + data.TEXT_TEMPLATES["plain"].partition(" {question}")[0]
    ids = bpe(f"y is 2.{again}", add_special_tokens=False)["input_ids"]
    assert [vocabulary.asks_again(ids[:n]) for n in range(len(ids) + 1)] == [False] * len(ids) + [True]
    assert not vocabulary.asks_again(bpe("y? Question:", add_special_tokens=False)["input_ids"])
    found = {name: load_tokenizer({"student": pair[1]}, template=name)[1].next_question for name in TEMPLATES}
    assert [name for name, ids in found.items() if ids] == ["plain"]  # the pair's tokenizer has a chat template


def test_prompts_are_a_function_of_the_seed_and_the_step():
    """Every pass over the problems has each of them once, in an order of its own."""
    problems = data.load("toy", limit=7)
    encoded = [(problem, data.encode(problem, toy.tokenizer())) for problem in problems]
    prompts = data.TrainingPrompts(encoded, 64, seed=3)
    steps = [prompts.of_step(step, 2) for step in range(10)]
    order = [problem.id for step in steps for problem, _ in step]
    assert sorted(order[:7]) == sorted(order[7:14]) == sorted(p.id for p in problems) and order[:7] != order[7:14]
    again = data.TrainingPrompts(encoded, 64, seed=3)
    assert again.of_step(6, 2) == steps[6]
    other = data.TrainingPrompts(encoded, 64, seed=4)
    assert [other.of_step(step, 2) for step in range(10)] != steps


def test_overlong_prompts_are_left_out_and_counted():
    encoded = [(data.Problem(str(n), "1" * n, "1"), [5] * n) for n in (3, 30, 5)]
    prompts = data.TrainingPrompts(encoded, 10, seed=0)
    assert {problem.id for problem, _ in prompts.of_step(0, 40)} == {"3", "5"} and prompts.n_dropped == 1
    with pytest.raises(ValueError, match="all 3 training prompts are longer than --max_prompt 2"):
        data.TrainingPrompts(encoded, 2, seed=0)


def test_shared_vocab_compares_maps_not_sizes():
    small, padded, other = toy.tokenizer(), toy.tokenizer(), toy.tokenizer()
    padded.add_tokens(["<pad-1>", "<pad-2>"])
    assert shared_size(small, padded) == shared_size(padded, small) == len(toy.VOCAB)
    vocab = {**toy.ID, "a": toy.ID["b"], "b": toy.ID["a"]}
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")))
    with pytest.raises(ValueError, match="2 tokens differ"):
        shared_size(other, swapped)


def rollouts(n=11):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (n,), generator=g).tolist()
    return [Rollout([1] * (1 + i % 3), [4 + i] * x, [-float(i)] * x, "stop") for i, x in enumerate(lengths)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rollout_is_in_one_micro_batch_of_one_rank(world):
    """Minibatches, shares of the ranks and micro-batches: nothing lost, nothing twice, equal counts."""
    cfg = TrainConfig(minibatches=2, micro_tokens=90)
    parts = [data.make_minibatches(rollouts(), cfg, 5, toy_vocabulary(), "cpu", rank, world) for rank in range(world)]
    for m in range(2):
        assert len({len(part[m]) for part in parts}) == 1  # no rank waits for another
    batches = [batch for part in parts for minibatch in part for batch in minibatch]
    found = sorted(int(t[0]) for b in batches for t in [b.tokens[b.rows == r] for r in range(len(b.ids))] if len(t))
    assert found == [4 + i for i in range(11)]
    for batch in batches:
        assert batch.ids.numel() <= 90 or len(batch.ids) == 1
        assert torch.equal(batch.ids[batch.rows, batch.cols + 1], batch.tokens)
        assert batch.tokens.tolist() == [token for r in batch.rollouts for token in r.response]
        assert torch.equal(batch.logp_sampler, -(batch.tokens - 4).float())
    shares = [sum(len(b.tokens) for minibatch in part for b in minibatch) for part in parts]
    assert max(shares) - min(shares) <= 2 * 40


@pytest.mark.parametrize("gate", gating.KINDS)
def test_a_batch_knows_the_segments_of_its_tokens(gate):
    """Those that gating.segment_index makes of padded masks."""
    cfg = TrainConfig(gate=gate, block=7, span_min=3, span_max=9)
    newlines = {5, 9, 10}
    responses = [[4 + (3 * i + t) % 8 for t in range(n)] for i, n in enumerate((1, 30, 12, 19))]
    vocabulary = data.Vocabulary(42, newlines, stop_ids=[2], merged=[])
    batch = data.collate([Rollout([1], r, [0.0] * len(r), "stop") for r in responses], cfg, vocabulary, "cpu")
    mask = torch.arange(30) < torch.tensor([[len(r)] for r in responses])
    newline = torch.tensor([[token in newlines for token in r] + [False] * (30 - len(r)) for r in responses])
    options = dict(block=7, newline=newline, span_min=3, span_max=9)
    assert torch.equal(batch.segments, gating.segment_index(mask, gate, **options))
    assert batch.position[0] == 0.5 and batch.position.min() > 0 and batch.position.max() < 1


def test_packing_keeps_to_the_budget_longest_first():
    groups = data.pack(rollouts(30), 100)
    widths = [max(len(r.prompt) + len(r.response) for r in group) for group in groups]
    assert (
        all(width * len(group) <= 100 for width, group in zip(widths, groups, strict=True))
        and widths == sorted(widths)[::-1]
    )
    assert [len(group) for group in data.pack(rollouts(3), 1)] == [1, 1, 1]


def test_overlong_prompts_are_left_out_before_the_first_step(pair, tmp_path, capsys):
    """1 of 4 prompts fits. Two steps need it six times."""
    rows = [{"problem": "1" * n, "answer": "1"} for n in (5, 90, 91, 92)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    rows, _ = run(pair, tmp_path / "run", data=file, template="raw", max_prompt=64)
    assert (
        len(rows) == 2
        and "3 of 4 training prompts are longer than --max_prompt, and left out" in capsys.readouterr().out
    )


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


def test_a_home_that_cannot_be_written_names_the_variable_to_set(tmp_path, monkeypatch):
    import datasets

    datasets.Dataset.from_list([{"problem": "1", "answer": "1"}]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match="a.parquet: .*set HF_HOME to a folder that can be written to"):
        data.load(str(tmp_path / "a.parquet"))


def test_a_file_that_was_replaced_is_read_anew_even_if_its_time_was_kept(tmp_path):
    """huggingface/datasets#2956: its cache knows a file by its path and time; rsync -t and container images keep times."""
    import pandas

    file = tmp_path / "a.parquet"
    for question in ("old", "new"):
        pandas.DataFrame({"problem": [question], "answer": ["1"]}).to_parquet(file)
        os.utime(file, (1, 1))
        assert data.load(str(file))[0].prompt == question


@pytest.mark.parametrize(
    "files, message",
    [
        ({"set.py": "x = 1"}, "Dataset scripts are no longer supported"),
        ({"a.jsonl": '{"problem": "1"}\n', "b.jsonl": '{"question": "1"}\n'}, "column names don.t match"),
    ],
)
def test_a_dataset_that_datasets_refuses_is_one_line(pair, tmp_path, files, message):
    """huggingface/datasets#7693 (RuntimeError); DatasetGenerationError, whose cause says what is wrong."""
    (tmp_path / "set").mkdir()
    for name, text in files.items():
        (tmp_path / "set" / name).write_text(text)
    refused(flags(pair, tmp_path / "out", data=tmp_path / "set"), f"train.py: .*set is no file .*{message}")


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


def test_sets_are_called_what_their_files_are():
    assert data.named_sets("aime24,/a/b/c.jsonl") == {"aime24": "aime24", "c": "/a/b/c.jsonl"}
    for names in ("a/x.csv,b/x.jsonl", "aime24,,toy"):
        with pytest.raises(ValueError, match="two sets have the same name, or one has none"):
            data.named_sets(names)


def test_a_corrupt_line_is_named_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1", "answer": "1"}\n\n{"problem": \n')
    with pytest.raises(
        ValueError, match="a.jsonl is not a readable JSON file .a list of objects, or one object a line.: line 3: "
    ):
        data.load(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("null", "row 1, is 'None'; it must be an object"),
        ('[NaN, {"problem": "1"}]', "row 1, is 'nan'; it must be an object"),
        ('[{"problem": "1"}, [2]]', r"row 2, is '\[2\]'; it must be an object"),
        ('[{"problem": "1"}', "is not a readable JSON file .a list of objects, or one object a line.: Expecting"),
    ],
)
def test_json_that_holds_no_rows_is_one_line(tmp_path, content, message):
    """pyarrow ends the process with a segmentation fault for the first two."""
    (tmp_path / "a.json").write_text(content)
    for name in (tmp_path / "a.json", tmp_path):  # a folder is read by datasets, and so by pyarrow
        with pytest.raises(ValueError, match=message):
            data.load(str(name))


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


def test_the_toys_problems_are_held_out_only_if_it_trains_on_them(tmp_path):
    tokenizer = toy.tokenizer()
    cfg = parse(
        TrainConfig, ["--preset", "tiny", "--max_prompt", "200", "--data", str(questions(tmp_path / "q.jsonl", 2))]
    )
    assert data.load_problems(cfg, tokenizer, 42)[1] == {}
    cfg = parse(TrainConfig, ["--preset", "tiny", "--eval_problems", "3"])
    assert [len(prompts) for prompts in data.load_problems(cfg, tokenizer, 42)[1].values()] == [3]


def test_repeated_rows_cost_no_problem_its_place(tmp_path, monkeypatch):
    """A cap on problems, not on rows: DAPO's file repeats each about 100 times."""
    monkeypatch.setattr(data, "MAX_PROBLEMS", 9)
    rows = [{"problem": str(i % 9), "answer": "1"} for i in range(900)]
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    assert sorted(p.prompt for p in data.load(file, seed=1)) == [str(i) for i in range(9)]
    monkeypatch.setattr(data, "MAX_PROBLEMS", 4)
    assert len(data.load(file, seed=1)) == 4


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


def test_a_template_that_names_the_date_gives_the_same_prompt_every_day():
    """sgl-project/sglang#3296, oobabooga/textgen#6692. A run that went on after midnight was refused: other prompts."""
    tokenizer = chat_tokenizer("{{ strftime_now('%Y%m%d') }}{{ messages[0]['content'] }}")
    chat = data.Problem("a", [{"role": "user", "content": "1+1"}], "2")
    assert tokenizer.decode(data.encode(chat, tokenizer)) == "202501011+1"


def loaded(path, rows, **options):
    return [(p.prompt, p.answer) for p in data.load(str(write_jsonl(path, rows)), **options)]


OPTIONS = {"question": "Which is prime?", "options": ["4", "6", "7"]}


def test_parts_of_a_question_in_other_columns_are_joined(tmp_path):
    """SVAMP's two problems asked the same, and one of them was dropped; the options of MMLU were never shown."""
    path = tmp_path / "a.jsonl"
    body = [{"Body": f"A pen costs {i} dollars.", "Question": "How much?", "Answer": i} for i in (1, 2)]
    assert loaded(path, body) == [(f"A pen costs {i} dollars.\nHow much?", str(i)) for i in (1, 2)]
    asked = "Which is prime?\nA. 4\nB. 6\nC. 7"
    for answer in ("C", "(C)", "7", 2, "2"):  # letter, text, or MMLU's index
        assert loaded(path, [OPTIONS | {"answer": answer}]) == [(asked, "C")]
    for options in ({"A": "4", "B": "6", "C": "7", "D": None}, "['4', '6', '7']"):  # MedQA's, MMMU's
        assert loaded(path, [{"question": "Which is prime?", "choices": options, "answer": "C"}]) == [(asked, "C")]
    whole = {
        "problem": "1+1?",
        "answer": "2",
        "images": [],
        "context": None,
        "options": [],
        "num_images": 0,
        "url": "x",
    }
    assert loaded(path, [whole | {"prompt": "1+1?\nThink.", "question": "1+1?"}]) == [("1+1?\nThink.", "2")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"problem": "<image>Area?", "images": ["a.png"]}, "row 1: column images cannot go into a prompt"),
        ({"problem": "Area?", "decoded_image": {"bytes": "x"}}, "column decoded_image cannot"), ({"problem": "Area?", "image_1": "a.png"}, "image_1"),
        ({"problem": "Why?", "context": {"title": "x"}}, "column context cannot"), ({"prompt": "math", "question": "1+1?"}, "column question cannot"),
        ({"problem": "Which?", "options": "a ) 38 , b ) 27"}, "column options cannot"), ({"prompt": [{"role": "user", "content": "Which?"}], "choices": ["1", "3"]}, "choices"),
        (OPTIONS | {"answer": "8"}, "row 1: the answer '8' matches none of the options"), ({"problem": "Which?", "options": [2, 0, 1], "answer": 2}, "'2' matches two of"),
    ],
)  # fmt: skip
def test_parts_of_a_question_that_cannot_be_joined_are_refused_by_their_column(tmp_path, row, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"answer": "1"} | row])
    for options in ({}, {"seed": 0}):
        with pytest.raises(ValueError, match=message):
            data.load(str(path), **options)


@pytest.mark.parametrize(
    "text, message",
    [
        (r'{"problem": "$\frac{1}{4}$?", "answer": "1"}', "row 3: .*x0crac.* has a control character"),
        (r'{"problem": "1/4?", "answer": "\frac{1}{4}"}', "row 3: .*x0crac.* has a control character"),
        (r'{"problem": "$2 \times 3$?", "answer": "6"}', "row 3: .*imes"), (r'{"problem": "is $2 \neq 3$?", "answer": "6"}', "row 3: .*eq 3"),
        (r'{"problem": "$\right)$", "answer": "6"}', "row 3: .*ight"), ('{"problem": "1?", "answer": NaN}', "row 3: NaN"),
        (r'{"problem": "2?", "answer": "1"}', "row 3: the question is that of row 1, but the answer is '1', not '2'"),
    ],
)  # fmt: skip
def test_garbled_and_contradictory_rows_are_refused_with_their_line(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "2?", "answer": "2"}\n\n' + text)
    for options in ({}, {"seed": 0}):
        with pytest.raises(ValueError, match=message):
            data.load(str(path), **options)
    path.write_text(r'{"problem": "1:\ta\n\tarea, eq.", "answer": "1\n"}')
    assert [p.answer for p in data.load(str(path))] == ["1"]


def test_chat_and_gold_that_are_stored_as_text_are_read(tmp_path):
    """By a CSV file, for example, as JSON or as Python prints it."""
    chat, gold = [{"role": "user", "content": "It's 1+1?"}], {"ground_truth": "2", "style": "rule"}
    for write in (json.dumps, str):
        assert loaded(tmp_path / "a.jsonl", [{"prompt": write(chat), "reward_model": write(gold)}]) == [(chat, "2")]
    for text in ("[1, 2] has how many?", "[1, 2]", '[{"role": "user"}]', "{1, 2} \\cup {3}"):
        assert loaded(tmp_path / "a.jsonl", [{"prompt": text, "answer": "[1, 2]"}]) == [(text, "[1, 2]")]


@pytest.fixture
def folder(tmp_path):
    """A dataset of three splits."""
    (tmp_path / "set").mkdir()
    for split, n in (("train", 6), ("validation", 4), ("test", 3)):
        write_jsonl(tmp_path / "set" / f"{split}.jsonl", [{"problem": f"{split}{i}", "answer": "1"} for i in range(n)])
    return tmp_path / "set"


def test_training_takes_the_train_split_and_evaluation_the_test_split_or_the_one_named(folder, capsys):
    name = str(folder)
    assert len(data.load(name, seed=0)) == 6
    assert "has the splits train, validation, test; training takes train" in capsys.readouterr().out
    assert [(p.id, p.prompt) for p in data.load(name)] == [(f"set-{i}", f"test{i}") for i in range(3)]
    assert "; evaluation takes test" in capsys.readouterr().out
    assert len(data.load(f"{name}:train")) == 6 and len(data.load(f"{name}:validation", seed=0)) == 4
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="has the splits train, validation, test: name one of them, as in .*set:train"):
        data.load(f"{name}:dev")
    with pytest.raises(ValueError, match="no such file: .*a file has no splits"):
        data.load(f"{name}/test.jsonl:test")
    (folder / "test.jsonl").unlink()
    assert len(data.load(name)) == 4  # validation
    (folder / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="has the splits validation: name one of them"):
        data.load(name, seed=0)


def test_rows_that_are_left_out_are_counted_aloud(tmp_path, capsys, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": str(i % 8), "answer": "1"} for i in range(11)])
    data.load(str(path), limit=5)
    assert "a.jsonl, without 3 rows that repeat a question and 3 problems beyond 5\n" in capsys.readouterr().out
    monkeypatch.setattr(data, "MAX_PROBLEMS", 6)
    data.load(str(path), seed=0)
    assert "without 3 rows that repeat a question and 2 problems beyond 6\n" in capsys.readouterr().out
    data.load(str(questions(path, 4)))
    assert not capsys.readouterr().out


def test_a_hub_dataset_trains_without_its_garbled_rows(folder, capsys):
    """DAPO's users cannot mend it, and training asks for no answer."""
    rows = [{"problem": p, "answer": a} for p, a in (("1", "1"), ("\x0crac", "1"), ("1", "2"), ("2", "1"))]
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    assert sorted(p.prompt for p in data.load(str(folder), seed=0)) == ["1", "2"]
    assert "without 2 rows that are garbled or contradict another" in capsys.readouterr().out
    with pytest.raises(ValueError, match="row 2: .* has a control character"):
        data.load(str(folder))


def test_held_out_problems_that_are_training_problems_are_counted_in_a_warning(tmp_path, capsys):
    train = write_jsonl(tmp_path / "a.jsonl", [{"problem": f"What is {i}?", "answer": "1"} for i in range(5)])
    other = write_jsonl(tmp_path / "b.jsonl", [{"problem": f"what is  {i}?", "answer": "1"} for i in range(3, 9)])
    options = ["--preset", "tiny", "--max_prompt", "200", "--data", str(train), "--eval_data", f"toy,{other}"]
    data.load_problems(parse(TrainConfig, options), toy.tokenizer(), 42)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: 2 of the 6 held-out problems of b are also training problems"]


def test_a_large_dataset_loses_its_repeated_rows_once_and_keeps_what_is_left(tmp_path, monkeypatch, capsys):
    """DAPO's hub file: each prompt a hundred times, six minutes at every start on every rank."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [dapo_row(f"What is {i % 30}?") for i in range(3000)]
    Dataset.from_list(rows).to_parquet(tmp_path / "dapo.parquet")
    small = data.load(str(tmp_path / "dapo.parquet"), seed=0)
    monkeypatch.setattr("support.rows.LARGE", 100)
    assert "2,970 rows that repeat a question" in capsys.readouterr().out
    assert data.load(str(tmp_path / "dapo.parquet"), seed=0) == small and len(small) == 30  # with the same ids
    assert "3,000 rows, of which 2,970 repeat another" in capsys.readouterr().out
    (kept,) = tmp_path.glob("cache/**/cache-*.arrow")
    written = kept.stat().st_mtime_ns
    data.load(str(tmp_path / "dapo.parquet"), seed=0)  # from the cache, as the other ranks do
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("cache/**/cache-*.arrow")] == [written]
