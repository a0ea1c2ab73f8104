"""python -m pytest tests/test_rollout.py      (the hf sampler and the choice; test_vllm.py has the other)"""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import join, start_ranks
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import rollout
from rollout import HFSampler, Rollout, choose, make_sampler
from support import toy
from support.common import init_device, seed_for
from support.vocabulary import Vocabulary, stop_ids, stop_ids_of

V, STOPS = 32, [1, 2]
PLAIN = dict(max_tokens=12, temperature=1.0, top_p=1.0, top_k=0)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7], [20, 21]]
SEEDS = [11, 12, 13, 14, 15]


def tiny(seed=0, spread=0.3, vocab=V):
    """A random Qwen3; the larger `spread`, the further its distributions are from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=spread, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def sampler(model, stops=STOPS, vocab=V, **options):
    return HFSampler(model, Vocabulary(vocab, set(), list(stops), []), **options)


@torch.no_grad()
def scored(model, r, vocab=V):
    """Log-probs [T, vocab] of the model's own forward pass over the rollout, alone and unpadded."""
    logits = model(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1, :vocab]
    return logits.log_softmax(-1)


def same(a: Rollout, b: Rollout):
    close = np.allclose(a.logprobs, b.logprobs, atol=1e-5)
    return (a.prompt, a.response, a.finish) == (b.prompt, b.response, b.finish) and close


def test_seeds_depend_on_every_part_and_fit_a_float64():
    parts = [(0, 1, "a", 2), (1, 1, "a", 2), (0, 2, "a", 2), (0, 1, "b", 2), (0, 1, "a", 3), (0, 11, "a", "")]
    seeds = [seed_for(*p) for p in parts]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**53 for s in seeds)
    assert seed_for(1, 23) != seed_for(12, 3)
    assert seed_for(0, 1, "a", 2) == 382221860576677  # the same in every process, for ever


def test_stop_ids_are_the_union_of_both():
    ids = lambda x: SimpleNamespace(eos_token_id=x)  # noqa: E731
    assert stop_ids(ids(5), ids([7, 3])) == [3, 5, 7]
    assert stop_ids(ids(5), ids(5)) == stop_ids(ids(5)) == stop_ids(ids(None), ids(5)) == [5]
    assert stop_ids(ids(None), ids(None)) == []


def test_the_chat_templates_end_of_turn_is_a_stop():
    """Qwen's base models name <|endoftext|> alone, and end their turns with <|im_end|>."""
    tokenizer = toy.tokenizer()
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    turn = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    assert stop_ids(tokenizer) == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_rollout_depends_on_its_seed_and_prompt_alone(model):
    whole = sampler(model).sample(PROMPTS, SEEDS, **PLAIN)
    assert [r.prompt for r in whole] == PROMPTS  # the caller's order
    alone = [sampler(model).sample([p], [s], **PLAIN)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    turned = sampler(model).sample(PROMPTS[::-1], SEEDS[::-1], **PLAIN)[::-1]
    cut = sampler(model, budget=30).sample(PROMPTS, SEEDS, **PLAIN)
    for other in (alone, turned, cut):
        assert all(map(same, whole, other))
    longer = sampler(model).sample(PROMPTS, SEEDS, **PLAIN | {"max_tokens": 20})
    assert all(b.response[: len(a.response)] == a.response for a, b in zip(whole, longer, strict=True))


def test_other_seeds_give_other_rollouts(model):
    seeds = list(range(20)) + [2**40, 2**62]  # 2**40: torch's CPU generator would take it for 0
    found = sampler(model, stops=[]).sample([[5, 6]] * 22, seeds, **PLAIN)
    assert len({tuple(r.response) for r in found}) == 22


@pytest.mark.parametrize(
    "change", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 1.5, "top_p": 0.6, "top_k": 9}]
)  # fmt: skip
def test_tokens_come_as_often_as_the_distribution_says(model, change):
    n, options = 4000, PLAIN | {"max_tokens": 1} | change
    found = sampler(model).sample([[5, 6, 7]] * n, range(n), **options)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1] / options["temperature"]
    if options["top_k"]:
        logits[logits < logits.topk(options["top_k"]).values[-1]] = -torch.inf
    p, order = logits.softmax(-1).sort(descending=True)
    p[p.cumsum(0) - p >= options["top_p"]] = 0  # the smallest set that holds top_p
    p = torch.zeros(V).scatter_(0, order, p / p.sum())
    count = torch.bincount(torch.tensor([r.response[0] for r in found]), minlength=V)
    assert count[p == 0].sum() == 0
    assert (count - n * p).abs().le(4.5 * (n * p * (1 - p)).sqrt() + 1e-9).all()
    raw = scored(model, found[0])[0]  # the log-prob stays that of the unchanged distribution
    assert all(abs(r.logprobs[0] - raw[r.response[0]]) < 1e-5 for r in found[:50])


def test_a_rare_token_is_drawn_and_an_impossible_one_never():
    """At u next to 1 and next to 0, where a sum in fp32 would round."""
    logits = torch.tensor([[-torch.inf, 20.0, 0.0, -torch.inf], [-torch.inf, 0.0, 20.0, -torch.inf]])
    for u, tokens in ((1 - 2**-53, [2, 2]), (0.0, [1, 1]), (1e-9, [1, 1]), (1 - 1e-9, [2, 2])):
        draw = rollout.Draw(torch.full((2, 1), u, dtype=torch.float64), 3, 4, [])
        assert draw(torch.zeros(2, 3), logits).argmax(-1).tolist() == tokens


def test_log_probs_are_the_models_own(model):
    for r in sampler(model).sample(PROMPTS, SEEDS, **PLAIN | {"temperature": 0.8, "top_p": 0.9}):
        own = scored(model, r).gather(1, torch.tensor(r.response)[:, None])[:, 0]
        assert len(r.logprobs) == len(r.response)
        torch.testing.assert_close(torch.tensor(r.logprobs), own, atol=1e-5, rtol=0)


def test_it_stops_at_any_stop_id_and_keeps_it(model):
    found = sampler(model).sample([[5, 6]] * 200, range(200), **PLAIN)
    stopped = [r for r in found if r.finish == "stop"]
    cut = [r for r in found if r.finish == "length"]
    assert len(stopped) + len(cut) == 200 and cut
    assert {r.response[-1] for r in stopped} == set(STOPS)
    assert not any(set(r.response[:-1]) & set(STOPS) for r in stopped)
    assert all(len(r.response) == 12 and not set(r.response) & set(STOPS) for r in cut)


def test_a_stop_id_that_is_also_the_pad_id_is_counted_once(model):
    PAD = rollout.PAD
    found = sampler(model, stops=[PAD]).sample([[5, 6]] * 100, range(100), **PLAIN)
    stopped = [r for r in found if r.finish == "stop"]
    assert stopped and all(r.response.count(PAD) == 1 == (r.response[-1] == PAD) for r in stopped)


def test_it_stops_where_the_next_question_begins(model):
    """Other tokens of the batch go on, and the same words that follow no newline end nothing."""
    asks, newlines = [9, 10], set(range(3, 24))
    vocabulary = Vocabulary(V, newlines, [], [])
    jobs, options = ([[5, 6, 9]] * 300, range(300)), PLAIN | {"temperature": 3.0, "max_tokens": 40}
    whole = HFSampler(model, vocabulary).sample(*jobs, **options)
    vocabulary.next_question = asks
    n_cut = 0
    for long, short in zip(whole, HFSampler(model, vocabulary).sample(*jobs, **options), strict=True):
        row = long.response
        ends = [i for i in range(3, len(row) + 1) if row[i - 2 : i] == asks and row[i - 3] in newlines]
        end = min(ends, default=len(row))
        assert short.response == row[:end] and short.logprobs == pytest.approx(long.logprobs[:end], abs=1e-4)
        assert short.finish == ("stop" if ends else long.finish)
        n_cut += end < len(row)
    assert n_cut > 3


def test_ids_beyond_the_vocabulary_are_never_drawn():
    big = tiny(vocab=64)
    found = sampler(big, vocab=V).sample([[5, 6]] * 100, range(100), **PLAIN)
    assert max(t for r in found for t in r.response) < V
    own = scored(big, found[0]).gather(1, torch.tensor(found[0].response)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found[0].logprobs), own, atol=1e-5, rtol=0)


def test_the_models_own_generation_config_changes_nothing(model):
    want = sampler(model).sample(PROMPTS, SEEDS, **PLAIN)
    theirs = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=9.0, no_repeat_ngram_size=1,
        suppress_tokens=list(range(3, 20)), min_new_tokens=9, max_length=5, eos_token_id=3,
    )  # fmt: skip
    other = tiny()
    other.generation_config = theirs
    assert all(map(same, want, sampler(other).sample(PROMPTS, SEEDS, **PLAIN)))
    assert other.generation_config is theirs


def test_no_global_random_state_moves(model):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    sampler(model).sample(PROMPTS, SEEDS, **PLAIN)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])


def test_sync_changes_the_samplers_own_copy_and_leaves_a_shared_model(model):
    other = tiny(seed=1)
    weights = other.state_dict()
    mine, shared = (sampler(copy.deepcopy(model), owns_model=True), sampler(model))
    old, new = mine.sample(PROMPTS, SEEDS, **PLAIN), sampler(other).sample(PROMPTS, SEEDS, **PLAIN)
    storage = [p.data_ptr() for p in mine.model.parameters()]
    mine.sync(weights.items())
    assert all(map(same, mine.sample(PROMPTS, SEEDS, **PLAIN), new)) and not all(map(same, old, new))
    assert storage == [p.data_ptr() for p in mine.model.parameters()]
    shared.sync(weights.items())
    assert all(map(same, shared.sample(PROMPTS, SEEDS, **PLAIN), old)) and shared.model is model


def test_sync_refuses_weights_with_a_gap(model):
    weights = [(name, w) for name, w in model.state_dict().items() if "layers.1" not in name]
    with pytest.raises(RuntimeError, match="layers.1"):
        sampler(copy.deepcopy(model), owns_model=True).sync(weights)


def test_a_model_that_trains_with_gradient_checkpointing_samples_with_its_cache_and_trains_on(model):
    want = sampler(model).sample(PROMPTS, SEEDS, **PLAIN)
    student = copy.deepcopy(model)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    widths = []
    hook = student.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert all(map(same, sampler(student).sample(PROMPTS, SEEDS, **PLAIN), want))
    hook.remove()
    assert set(widths[1:]) == {1}  # one token a step: the cache is in use
    assert student.training and all(m.training for m in student.modules())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    student(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()


def test_training_mode_comes_back_after_an_error(model):
    student = copy.deepcopy(model).train()
    with pytest.raises(IndexError):
        sampler(student).sample([[5, V + 9]], [0], **PLAIN)
    assert student.training and student.generation_config.to_dict() == model.generation_config.to_dict()


def test_a_sampler_that_is_stopped_returns_at_once(model):
    asked = []
    stopping = sampler(model, stops=[], should_stop=lambda: asked.append(1) or len(asked) > 3)
    found = stopping.sample(PROMPTS, SEEDS, **PLAIN)
    assert len(asked) == 4 and all(len(r.response) == 4 for r in found)


def test_no_prompts_give_no_rollouts(model):
    assert sampler(model).sample([], [], **PLAIN) == []


# -----------------------------------------------------------------------------
# the choice


@pytest.fixture
def without_vllm(monkeypatch):
    find = rollout.importlib.util.find_spec
    fake = lambda name, *rest: None if name == "vllm" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(rollout.importlib.util, "find_spec", fake)


def test_auto_says_why_it_takes_hf_on_a_cpu(without_vllm):
    assert choose("hf", "cuda") == ("hf", "as asked")
    kind, why = choose("auto", "cpu")
    assert kind == "hf" and "not installed" in why


@pytest.mark.parametrize("kind, device", [("vllm", "cuda"), ("vllm", "cpu"), ("auto", "cuda")])
def test_vllm_that_cannot_run_is_one_clear_line(without_vllm, kind, device):
    """On a GPU, auto does not fall back to generate(), with which a step at 16k tokens would take most of an hour."""
    with pytest.raises(ValueError, match=f"^--rollout {kind}: vLLM is not installed .pip install .*$"):
        choose(kind, device)


@pytest.mark.parametrize("built, device", [("cuda", "cuda"), ("cpu", "cuda"), ("", "cuda"), ("cpu", "cpu")])
def test_auto_takes_vllm_where_its_build_fits_the_gpu(monkeypatch, built, device):
    monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(rollout, "vllm_device", lambda: built)
    if built != device:
        for kind in ("auto", "vllm"):
            with pytest.raises(ValueError, match=f"not on {device}"):
                choose(kind, device)
    else:
        assert choose("auto", device)[0] == ("vllm" if device == "cuda" else "hf")
        assert choose("vllm", device) == ("vllm", "as asked")


def test_hf_works_on_as_many_tokens_as_fit_the_gpu():
    """Qwen3-1.7B: 28 layers of 8 key-value heads of 128, in bf16: 115 kB for each token."""
    config = Qwen3Config(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    assert rollout.token_budget(config, 20 * 10**9) == 10 * 10**9 // 114688
    assert rollout.token_budget(config, 10**12) == rollout.token_budget(config) == 1 << 17


def test_an_engine_that_fails_on_one_rank_ends_that_rank_with_its_message(tmp_path):
    """And torchrun then ends the others, which wait inside vLLM's own collectives."""

    def start_engine(rank):
        init_device(SimpleNamespace(device="cpu", threads=1, seed=0))

        def engine(*_, **__):
            if rank == 1:
                raise ValueError("No available memory for the cache blocks")
            dist.barrier()

        rollout.VLLMSampler = engine
        rollout.start_engine("path", None)

    first, second = start_ranks(start_engine, 2, tmp_path / "log")
    second.join(60)
    assert second.exitcode == 1
    assert "error: vLLM failed on rank 1: No available memory for the cache blocks" in (tmp_path / "log").read_text()
    join([first])


def test_make_sampler_shares_the_trainers_model_or_loads_its_own(tmp_path, model):
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path)
    cfg = SimpleNamespace(rollout="auto", device="cpu", trust_remote_code=False)
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    assert stop_ids_of(tmp_path, tokenizer) == [1, 2, 9]
    vocabulary = Vocabulary(V, set(), STOPS, [])
    shared = make_sampler(cfg, tmp_path, model, vocabulary)
    assert shared.model is model and not shared.owns_model and shared.vocabulary is vocabulary
    own = make_sampler(cfg, tmp_path, None, vocabulary)
    assert own.model is not model and own.owns_model
    assert all(map(same, *(s.sample(PROMPTS, SEEDS, **PLAIN) for s in (shared, own))))
