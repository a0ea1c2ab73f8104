"""python -m pytest tests/test_data.py"""

import json

import pytest
import torch
from conftest import toy_vocabulary
from datasets import Dataset
from helpers import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import data
import gating
import toy
from configs import TEMPLATES, TrainConfig
from policy import end_of_turn, stop_ids
from rollout import Rollout

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
    ids = data.newline_token_ids(bpe, len(bpe))
    text = "So x is 2.\n\nNext, y.\n\na = b\n"
    tokens = bpe(text, add_special_tokens=False)["input_ids"]
    assert any(len(bpe.decode([i])) > 1 for i in ids)  # such as ".\n\n"
    assert [i in ids for i in tokens] == ["\n" in bpe.decode([i]) for i in tokens] and ids & set(tokens)


@needs_real
def test_real_benchmarks_load():
    for name, count in dict(math500=500, aime24=30, aime25=30, amc23=40, gsm8k_test=1319).items():
        problems = data.load(str(REAL / f"{name}.jsonl"))
        assert len(problems) == count and len({p.id for p in problems}) == count
        assert all(p.answer and isinstance(p.prompt, str) for p in problems)


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
    newlines = data.newline_token_ids(tokenizer, len(tokenizer))
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
    assert data.shared_vocab(small, padded) == data.shared_vocab(padded, small) == len(toy.VOCAB)
    vocab = {**toy.ID, "a": toy.ID["b"], "b": toy.ID["a"]}
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")))
    with pytest.raises(ValueError, match="2 tokens differ"):
        data.shared_vocab(other, swapped)


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
