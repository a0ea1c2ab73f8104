"""python -m pytest tests/test_models.py      (what users bring: architectures, tokenizers, generation configs)

ZOO=all python -m pytest tests/test_models.py -k zoo: every architecture of the zoo, 3 minutes
"""

import json
import os
import runpy
import shutil
import sys

import pytest
import torch
from helpers import (
    SHARED,
    SMALL,
    evaluate_on_toy,
    far,
    finished,
    flags,
    join,
    questions,
    refused,
    rows_of,
    run,
    start_child,
    start_ranks,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from scenes import toy_vocabulary
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import data
import evaluate
import policy
import rollout
import train
from configs import EvalConfig, TrainConfig, parse
from support import checkpoint, common, toy, trace, vocabulary
from support.models import SMALL_TENSOR, check_head, context_of, load_lm, weights_digest
from support.vocabulary import load_tokenizer, stop_ids_of

ZOO = ["bloom", "gpt2", "gemma2_capped", "cohere_scaled"]


REFUSED = {
    "gemma2_capped": "caps its logits (final_logit_softcapping", "cohere_scaled": "scales or caps its logits",
    "granite_scaled": "scales or caps its logits",
}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The folder that ../shared/tools/zoo.py has filled: ARCHITECTURE/teacher and ARCHITECTURE/student."""
    script = SHARED / "tools" / "zoo.py"
    if not script.exists():
        pytest.skip(f"the zoo of architectures is not at {script}")
    out = tmp_path_factory.mktemp("zoo")
    names = [] if os.environ.get("ZOO") == "all" else ZOO

    def make():
        sys.argv = [str(script), str(out), *names]
        runpy.run_path(str(script), run_name="__main__")

    assert join([start_child(make)]) == 0
    return out


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
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
            argv = ["--model", out / "final", "--data", file, "--k", "2", "--max_response", "8", "--out", f"{out}-ev"]
            cfg = parse(EvalConfig, list(map(str, argv)))
            assert join([start_child(lambda cfg=cfg: evaluate.main(cfg))]) == 0


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


def test_gemma2s_cap_is_refused_by_name(tmp_path):
    config = Gemma2Config(
        vocab_size=42, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=1e-4, final_logit_softcapping=30.0,
    )  # fmt: skip
    lm = Gemma2ForCausalLM(config)  # of logits so small that the cap does not show
    with pytest.raises(ValueError, match="final_logit_softcapping 30"):
        check_head(lm, "m")


def test_a_model_of_nan_is_refused_by_name(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    refused(flags((tmp_path / "teacher", pair[1]), tmp_path / "run"), "teacher gives NaN logits")


def other_names(weights):
    """A wrapper's prefix on one layer, as torch.compile, FSDP and the like leave it."""
    return {("module." + name if "layers.1." in name else name): x for name, x in weights.items()}


FAULTS = {
    "11 weights are missing, such as model.layers.1.input_layernorm.weight; 11 weights in its files are not the model's, "
    "such as module.model.layers.1.input_layernorm.weight": other_names,
    "1 weights are missing, such as model.norm.weight": lambda weights: (
        weights.pop("model.norm.weight") is None or weights
    ),
    "1 weights in its files are not the model's, such as v_head.weight": lambda weights: (
        weights | {"v_head.weight": torch.ones(3)}
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_weights_that_are_missing_or_unknown_are_refused_by_name(pair, tmp_path, message):
    """transformers makes them up, or drops them; the run went on."""
    m = shutil.copytree(pair[0], tmp_path / "m")
    save_file(FAULTS[message](load_file(m / "model.safetensors")), m / "model.safetensors", {"format": "pt"})
    for out, teacher, student in (("a", m, pair[1]), ("b", pair[0], m)):
        refused(flags((teacher, student), tmp_path / out), f"{m}: {message}$")
    with pytest.raises(SystemExit, match=f"{m}: {message}$"):
        evaluate_on_toy(m, tmp_path / "ev")


def test_a_file_of_weights_that_was_cut_off_is_named(pair, tmp_path):
    m = shutil.copytree(pair[0], tmp_path / "m")
    os.truncate(m / "model.safetensors", 5000)
    refused(flags((m, pair[1]), tmp_path / "run"), f"train.py: {m}: a file of weights is damaged")


def test_a_tied_head_and_old_buffers_are_no_weights(tmp_path):
    """GPT-2's files have the causal mask of each layer, and its head is its embedding."""
    GPT2LMHeadModel(GPT2Config(vocab_size=42, n_embd=32, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("lm_head" in name for name in weights)
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(weights | masks, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_lm(tmp_path).num_parameters() > 0


def test_the_digest_of_weights_sees_each_tensor():
    lm = tiny_model(32, 2, seed=0)
    before = weights_digest(lm)
    assert weights_digest(tiny_model(32, 2, seed=0)) == before != weights_digest(tiny_model(32, 2, seed=0).bfloat16())
    for name, x in lm.named_parameters():
        x.data.view(-1)[-1] += 1e-3
        assert weights_digest(lm) != before, name
        x.data.view(-1)[-1] -= 1e-3
        before = weights_digest(lm)
    large = torch.nn.Module()
    large.x, large.dtype = torch.nn.Parameter(torch.zeros(10 * SMALL_TENSOR)), torch.float32
    before = weights_digest(large)
    large.x.data[12345:12600] = 1  # a damaged part of a file
    assert weights_digest(large) != before


ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 96}


def test_a_context_that_yarn_extends_is_the_factor_times_the_original_one():
    """Qwen's model cards add YaRN, and leave max_position_embeddings as it was. Others raise it, too."""
    for written in (96, 384):
        yarn = ROPE | {"rope_type": "yarn"}
        config = Qwen2Config(max_position_embeddings=written, rope_parameters=yarn)
        assert context_of(config) == 384
    assert context_of(Qwen2Config(max_position_embeddings=96)) == 96


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_whose_frequencies_change_with_length_are_refused_by_name(pair, tmp_path, kind):
    """The trainer's depend on the longest text of a batch, the sampler's on each step: "sampler out of step"."""
    m = shutil.copytree(pair[1], tmp_path / "m")
    config = json.loads((m / "config.json").read_text())
    size = config["head_dim"] // 2
    config["rope_parameters"] = ROPE | {"rope_type": kind, "short_factor": [1.0] * size, "long_factor": [4.0] * size}
    (m / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 384 if kind == "longrope" else 96}))
    message = f"{m} has positions of the type {kind}, whose frequencies change beyond 96 tokens"
    refused(flags((pair[0], m), tmp_path / "run", max_prompt=64, max_response=33), message)
    run((pair[0], m), tmp_path / "run", max_prompt=64, max_response=32, steps=1)  # they do not change


def test_a_pad_token_beyond_the_embedding_needs_none(pair, tmp_path):
    m = shutil.copytree(pair[1], tmp_path / "m")
    tokenizer = toy.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(m)
    lm = AutoModelForCausalLM.from_pretrained(m)
    assert tokenizer.pad_token_id == lm.config.vocab_size == 42
    run((pair[0], m), tmp_path / "run", steps=1)
    evaluate_on_toy(m, tmp_path / "ev", eval_problems=2, k=1, max_response=5)


def test_a_model_with_mistral_commons_tokenizer_alone_is_refused_by_name(pair, tmp_path, monkeypatch):
    """Without transformers' own, there is no chat template, and the text of a response cannot be read."""
    m = shutil.copytree(pair[1], tmp_path / "m")
    (m / "tekken.json").write_text("{}")
    run((pair[0], m), tmp_path / "run", steps=1)  # there are both
    (m / "tokenizer.json").unlink()
    monkeypatch.setattr(vocabulary, "pretrained", lambda *_, **__: None)  # it loads, with mistral-common and without
    with pytest.raises(ValueError, match=f"{m} has only mistral-common's tokenizer, tekken.json: add a tokenizer.json"):
        vocabulary.tokenizer_of(str(m))


def test_the_final_student_has_its_own_tokenizer_files_unchanged(pair, tmp_path):
    """Older transformers cannot read what newer ones write."""
    m = shutil.copytree(pair[1], tmp_path / "m")
    content = json.loads((m / "tokenizer_config.json").read_text())
    (m / "tokenizer_config.json").write_text(json.dumps(content | {"extra": 1}, indent=7))
    (m / "vocab.txt").write_text("its own\n")
    run((pair[0], m), tmp_path / "run", steps=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert (tmp_path / "run/final" / name).read_bytes() == (m / name).read_bytes()


def test_a_package_that_a_model_needs_is_named_in_one_line(pair, tmp_path):
    """hiyouga/LlamaFactory#6044, oobabooga/textgen#7007: quantised models (GPTQ, AWQ) need packages that are not here."""
    shutil.copytree(pair[0], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    refused(flags((tmp_path / "m", pair[1]), tmp_path / "run"), "train.py: .*optimum")
    with pytest.raises(SystemExit, match="evaluate.py: .*optimum"):
        evaluate_on_toy(tmp_path / "m", tmp_path / "ev")


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
    assert rows[0]["kl_sampled"] == pytest.approx(0, abs=1e-5)  # no dropout
    evaluate_on_toy(tmp_path / "run/step-2", tmp_path / "ev", k=1, max_response=5)
    cfg = parse(TrainConfig, flags(pair, tmp_path / "b", max_prompt=200, max_response=99))
    paths = {"student": str(tmp_path / "m")}
    with pytest.raises(ValueError, match="context of 256"):
        train.check_sizes(cfg, paths, load_tokenizer(paths)[1])


def test_tokens_beyond_a_gap_in_the_ids_can_be_sampled(tmp_path, monkeypatch):
    """huggingface/tokenizers#900: len(tokenizer) counts tokens; the largest id, often that of a stop token, may be beyond."""
    backend = Tokenizer(models.WordLevel(toy.ID | {"}": 60}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "m")
    config = tiny_model(32, 2, seed=0).config
    config.vocab_size = 64
    config.save_pretrained(tmp_path / "m")
    asked = []

    def make_sampler(cfg, path, model, vocabulary, max_len):
        asked.append(vocabulary.size)
        raise ValueError("enough")

    monkeypatch.setattr(rollout, "make_sampler", make_sampler)
    with pytest.raises(SystemExit, match="enough"):
        evaluate_on_toy(tmp_path / "m", tmp_path / "ev", template="raw")
    assert asked == [61]


class SlowTokenizer(PreTrainedTokenizer):
    """In Python, as many that come with a model's own code; there is no token of id 2."""

    vocab = {"a": 0, "\n": 1, "b": 3}
    vocab_size = 4

    def get_vocab(self):
        return dict(self.vocab)

    def _convert_id_to_token(self, index):
        return {i: token for token, i in self.vocab.items()}.get(index)


def test_a_tokenizer_that_cannot_decode_a_gap_in_its_ids(tmp_path):
    """mosaicml/llm-foundry#841, InternLM/Intern-S1#19: sequence item 0: expected str instance, NoneType found."""
    tokenizer = SlowTokenizer()
    assert vocabulary.newline_ids(tokenizer, 4) == {1}
    response = rollout.Rollout([0], [0, 2, 3], [0.0] * 3, "stop")
    assert evaluate.text_of(response, tokenizer) == "a b"
    assert trace.token_texts(response.response, tokenizer) == ["a", "", "b"]  # train.py --trace_every
    assert vocabulary.decode(tokenizer, response.response) == "a b"  # train.py --sample_every


def test_a_checkpoint_of_a_model_with_its_own_code_can_be_evaluated(tmp_path, monkeypatch):
    source = tmp_path / "student"
    tiny_model(32, 2, seed=0).save_pretrained(source)
    toy.tokenizer().save_pretrained(source)
    (source / "mine.py").write_text(
        "from transformers import Qwen3ForCausalLM\nclass Mine(Qwen3ForCausalLM):\n    pass\n"
    )
    config = json.loads((source / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (source / "config.json").write_text(json.dumps(config))
    argv = flags((source, source), tmp_path / "out", steps=1, trust_remote_code="true")
    assert finished(argv, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "out/step-1/mine.py").exists() and (tmp_path / "out/final/mine.py").exists()
    options = dict(k=1, max_response=5, trust_remote_code="true")
    evaluate_on_toy(tmp_path / "out/step-1", tmp_path / "ev", **options)


def test_each_models_stop_tokens_are_read_with_its_own_tokenizer(tmp_path):
    """A teacher may have neither a generation_config.json nor the student's EOS."""
    paths = {}
    for role, eos in (("student", 2), ("teacher", 3)):
        paths[role] = str(tmp_path / role)
        model = tiny_model(32, 2, seed=0)
        model.config.eos_token_id = eos
        model.save_pretrained(paths[role])
        (tmp_path / role / "generation_config.json").unlink()
        tokenizer = toy.tokenizer()
        tokenizer.eos_token = toy.VOCAB[eos]
        tokenizer.save_pretrained(paths[role])
    assert stop_ids_of(paths["teacher"], AutoTokenizer.from_pretrained(paths["student"])) == [2, 3]  # from config.json
    for role in paths:
        config = json.loads((tmp_path / role / "config.json").read_text())
        (tmp_path / role / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "eos" not in k}))
    _, found = load_tokenizer(paths, merge_stops=True)
    assert found.stop_ids == found.merged == [2, 3]


def test_a_newline_that_ends_the_turn_is_no_stop_token():
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["\n"]})
    newline, end = tokenizer.convert_tokens_to_ids(["\n", "<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n<|im_end|>\n{% endfor %}"
    assert vocabulary.end_of_turn(tokenizer) == [end] and newline not in vocabulary.stop_ids(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert vocabulary.end_of_turn(tokenizer) == []


def test_the_toy_needs_no_vllm_on_a_gpu():
    assert parse(TrainConfig, ["--preset", "tiny", "--device", "cuda"]).rollout == "hf"


def test_nodes_with_unequal_numbers_of_ranks_load_their_models(tmp_path):
    """Local ranks 0 and 1 on one node, 0 on the other."""

    def one_rank(rank):
        os.environ["LOCAL_RANK"] = str([0, 1, 0][rank])
        os.environ["LOCAL_WORLD_SIZE"] = str([2, 2, 1][rank])
        common.init_device(parse(TrainConfig, ["--preset", "tiny"]))
        with common.one_rank_at_a_time():
            pass
        common.barrier()
        torch.distributed.destroy_process_group()

    assert join(start_ranks(one_rank, 3, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def test_a_checkpoint_is_evaluated_like_any_model(pair, tmp_path):
    """evaluate.py --model run/step-2 is evaluate.py --model run/final, for the last step; on two ranks, too."""
    run(pair, tmp_path / "run", **SMALL)
    options = "--data toy --eval_problems 3 --k 2 --max_response 9 --device cpu --model".split()
    rows = []
    for name in ("step-2", "final"):
        evaluate.main(parse(EvalConfig, [*options, str(tmp_path / "run" / name), "--out", str(tmp_path / name)]))
        rows.append((tmp_path / name / "samples.jsonl").read_bytes())
    assert rows[0] == rows[1]
    weights = {}
    for file in (tmp_path / "run/step-2").glob("model-*.safetensors"):
        weights |= load_file(file)
    assert far(weights, load_file(tmp_path / "run/final/model.safetensors")) == 0
    assert checkpoint.latest(tmp_path / "run").name == "step-2"

    argv = [*options, str(tmp_path / "run" / "step-2"), "--out", str(tmp_path / "two")]
    assert join(start_ranks(lambda rank: evaluate.main(parse(EvalConfig, argv)), 2)) == 0
    one, two = (
        {(row["problem"], row["sample"]): row for row in rows_of(tmp_path / x, "samples.jsonl")}
        for x in ("step-2", "two")
    )
    assert one == two
