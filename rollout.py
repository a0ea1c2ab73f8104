"""Responses sampled from the student: vLLM, or transformers' generate where vLLM cannot run.

    sampler = make_sampler(cfg, "folder of the student", student, tokenizer, vocab, print)
    sampler.sync((name, tensor) for name, tensor in student.state_dict().items())
    rollouts = sampler.sample(prompts, seeds, max_tokens=100, temperature=1.0, top_p=0.9, top_k=0)
    sampler.sleep()

A rollout is a function of the weights, its prompt and its seed: not of what else is in the batch, of earlier
calls or of the trainer's random state. Only rounding differs with the batch, and may turn a near tie.

sampler.should_stop() is asked at every token. Once it says True, sample returns what there is, for the caller to drop.
"""

import hashlib
import importlib.util
import os
import random
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

VLLM_ENV = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # unless the user set them
CPU_KV_CACHE = 1 << 30  # bytes; vLLM fills it with zeros, so all of it is taken at once


@dataclass
class Rollout:
    prompt: list[int]
    response: list[int]  # with the stop token, where it stopped
    logprobs: list[float]  # the sampler's, at temperature 1 and before top-p and top-k
    finish: str  # "stop" or "length"; "stopped" where the caller wanted no more


def seed_for(*parts) -> int:
    """63 bits that depend on the parts alone, say (seed, step, problem id, sample)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def stops_of(path, tokenizer) -> list[int]:
    """stop_ids of a model's folder or hub name; not every model comes with a generation_config.json."""
    from transformers import GenerationConfig

    try:
        return stop_ids(tokenizer, GenerationConfig.from_pretrained(path))
    except OSError:
        return stop_ids(tokenizer)


def stop_ids(tokenizer, generation_config=None) -> list[int]:
    """EOS ids of both, and the end of turn of the chat template, which a base model's files often name nowhere else."""
    found = turn_ends(tokenizer)
    for owner in (tokenizer, generation_config):
        ids = getattr(owner, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} - {None}
    return sorted(found)


def turn_ends(tokenizer):
    """The first special token that the chat template puts behind an answer, as a set; empty where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    chat = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "It is 2."}]
    _, answer, end = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("It is 2.")
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if answer else []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return set([i for i in ids if i in special][:1])


# -----------------------------------------------------------------------------
# transformers. B rows, V vocabulary


class Draw:
    """A logits processor that samples by inverse CDF and leaves generate() only the token it drew.

    u: [B, max_tokens], a uniform number for each token. Ids from `vocab` on are never drawn.
    """

    def __init__(self, u, width, vocab, warpers):
        self.u, self.width, self.vocab, self.warpers = u, width, vocab, warpers
        self.logprobs = []  # [B] for each token so far

    def __call__(self, ids, logits):
        raw = scores = logits[:, : self.vocab]  # [B, V], fp32 already
        for warp in self.warpers:
            scores = warp(ids, scores)
        # In fp32 a token less likely than 6e-8 would vanish in the sum. One of probability 0 leaves it as it was,
        # and right=True never stops there.
        cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        u = self.u[:, ids.shape[1] - self.width, None]
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
        self.logprobs.append((raw.gather(1, token) - raw.logsumexp(-1, keepdim=True))[:, 0])
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)


class HFSampler:
    """generate() in batches of at most `budget` tokens. own: sync writes into `model`; else the trainer does already."""

    def __init__(self, model, stops, pad, vocab, *, own=False, budget=1 << 17):
        self.model, self.stops, self.pad, self.vocab = model, stops, pad, vocab
        self.own, self.budget = own, budget
        self.should_stop = lambda: False

    @torch.no_grad()
    def sync(self, weights):
        if self.own:
            missing = self.model.state_dict()
            for name, weight in weights:
                missing.pop(name).copy_(weight)
            assert not missing, f"sync did not get {sorted(missing)}"

    def sleep(self):
        pass

    def sample(self, prompts, seeds, *, max_tokens, temperature, top_p, top_k):
        """A Rollout for each prompt (token ids) and its seed. top_k 0: all."""
        import transformers as hf

        warpers = [hf.TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
        warpers += [hf.TopPLogitsWarper(float(top_p))] if top_p < 1 else []
        config = hf.GenerationConfig(max_new_tokens=max_tokens, do_sample=False)
        config.eos_token_id, config.pad_token_id = self.stops or None, self.pad
        todo = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        done, model, training = {}, self.model, self.model.training
        # What our config leaves open, generate() takes from the model's: repetition penalties and the like.
        theirs, model.generation_config = model.generation_config, hf.GenerationConfig()
        model.eval()  # in train mode, gradient checkpointing switches the KV cache off
        try:
            while todo:
                rows = max(1, self.budget // (len(prompts[todo[0]]) + max_tokens))
                batch, todo = todo[:rows], todo[rows:]
                pairs = [prompts[i] for i in batch], [seeds[i] for i in batch]
                done |= zip(batch, self.generate(*pairs, config, warpers), strict=True)
        finally:
            model.train(training)
            model.generation_config = theirs
        return [done[i] for i in range(len(prompts))]

    def generate(self, prompts, seeds, config, warpers):
        device, width = self.model.device, len(prompts[0])  # the longest comes first
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        # NumPy's generator, since torch's on the CPU reads 32 bits of its seed
        u = [np.random.default_rng(seed).random(config.max_new_tokens) for seed in seeds]
        draw = Draw(torch.from_numpy(np.stack(u)).to(device), width, self.vocab, warpers)
        # fp32 master weights on a GPU: computed in bf16, as the trainer does
        half = device.type == "cuda" and self.model.dtype == torch.float32
        end = lambda ids, *_, **__: torch.full((len(ids),), self.should_stop(), device=device)  # noqa: E731
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            kwargs = dict(generation_config=config, logits_processor=[draw], stopping_criteria=[end])
            out = self.model.generate(ids, attention_mask=mask, **kwargs)
        rollouts = []
        logprobs = torch.stack(draw.logprobs, 1).tolist()
        for prompt, row, logp in zip(prompts, out[:, width:].tolist(), logprobs, strict=True):
            n = next((i + 1 for i, token in enumerate(row) if token in self.stops), 0)
            finish, n = ("stop", n) if n else ("length", len(row))
            rollouts.append(Rollout(prompt, row[:n], logp[:n], finish))
        return rollouts


# -----------------------------------------------------------------------------
# vLLM


@contextmanager
def spared_rng():
    """vLLM seeds the global generators of Python, NumPy and torch for itself; the trainer gets its own back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def vllm_device():
    """The device type that the installed vLLM runs on: "cpu", "cuda", or "" for none that is here."""
    for name, value in VLLM_ENV.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # sync hands over tensors of this process
    from vllm.platforms import current_platform

    return current_platform.device_type


def repack_head(worker):
    """vLLM 0.32 on a CPU packs a tied head when it loads, and not when a reload brings the embedding: logits stay old."""
    head = getattr(worker.get_model(), "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


class VLLMSampler:
    """A vLLM engine in this process, on this rank's device. All ranks build theirs together.

    max_len: prompt and response, tokens; 0: the model's context. memory: share of the GPU. tp: so many
    neighbouring ranks share an engine's work, and call sample and sync together.
    """

    def __init__(self, path, stops, vocab, *, max_len=0, memory=0.4, tp=1, trust=False):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % tp:
            raise ValueError(f"--tp is {tp}; it must divide the number of ranks, {world}")
        self.cuda, self.stops, self.tp, self.asleep = vllm_device() == "cuda", stops, tp, False
        self.should_stop = lambda: False
        from vllm import LLM

        # On a CPU, vLLM 0.32 fails on a seeded request whose prompt it has cut in two.
        options = dict(dtype="float32", enforce_eager=True, enable_chunked_prefill=False)
        options |= dict(kv_cache_memory_bytes=CPU_KV_CACHE)
        if self.cuda:
            options = dict(dtype="bfloat16", gpu_memory_utilization=memory, enable_sleep_mode=True)
            options |= dict(hf_overrides={"head_dtype": "float32"})  # logits that are not rounded, as the trainer's
        if world > 1:
            # Uses the trainer's process group, and the device of LOCAL_RANK; vLLM's default is device 0 on all ranks.
            options |= dict(distributed_executor_backend="external_launcher")
        # generation_config: without this, vLLM would take the temperature and top-p of the model's own.
        options |= dict(generation_config="vllm", logprobs_mode="raw_logprobs")
        options |= dict(tensor_parallel_size=tp, max_model_len=max_len or None)
        options |= dict(skip_tokenizer_init=True, trust_remote_code=trust, use_tqdm_on_load=False)
        set_num_threads = torch.set_num_threads  # a no-op once vLLM has started on a CPU
        with spared_rng():
            self.llm = LLM(path, **options)
        torch.set_num_threads = set_num_threads
        # Its finaliser destroys every process group there is, the trainer's too, or fails where the trainer came first.
        self.llm.llm_engine.engine_core._finalizer.detach()
        config = self.llm.llm_engine.model_config
        padding = range(vocab, config.get_vocab_size())
        if self.cuda and len(padding) > 1024:
            raise ValueError(f"the embedding has {len(padding)} rows beyond the vocabulary; vLLM 0.32 can ban 1024")
        self.dtype, self.banned = config.dtype, dict.fromkeys(padding, -100.0)

    def sync(self, weights):
        """Loads (name, full tensor) pairs, cast one at a time, and forgets the prefixes cached with the old ones."""
        if self.asleep:  # the cache stays out until the load is over
            self.llm.wake_up(["weights"])
        # Never without an iterator: vLLM would load the files again, and sample from the first student for ever.
        pairs = ((name, weight.detach().to(self.dtype)) for name, weight in weights)
        with spared_rng():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            if not self.cuda:
                self.llm.collective_rpc(repack_head)
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
        self.asleep = False
        assert self.llm.reset_prefix_cache(), "vLLM kept its prefix cache"

    def sleep(self):
        """Frees the GPU's memory until the next sync or sample.

        Level 1: the weights wait in host memory. Level 2 drops them, and whatever a sync leaves out would
        then be sampled from as garbage.
        """
        if self.cuda and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def sample(self, prompts, seeds, *, max_tokens, temperature, top_p, top_k):
        """A Rollout for each prompt (token ids) and its seed. top_k 0: all."""
        from vllm import SamplingParams
        from vllm.distributed import get_tp_group
        from vllm.sampling_params import RequestOutputKind

        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
        jobs, mine = list(zip(prompts, seeds, strict=True)), slice(None)
        if self.tp > 1:  # an engine's ranks must all run the same requests
            group, parts = get_tp_group(), [None] * self.tp
            dist.all_gather_object(parts, jobs, group=group.cpu_group)
            start = sum(map(len, parts[: group.rank_in_group]))
            jobs, mine = sum(parts, []), slice(start, start + len(jobs))
        if not jobs:
            return []
        params = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        params |= dict(stop_token_ids=self.stops, logit_bias=self.banned or None, detokenize=False)
        params |= dict(logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)
        engine, found = self.llm.llm_engine, {}
        with spared_rng():
            for i, (prompt, seed) in enumerate(jobs):
                engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(seed=seed, **params))
            while engine.has_unfinished_requests():
                if self.tp == 1 and self.should_stop():
                    engine.abort_request([str(i) for i in range(len(jobs)) if i not in found])
                    found = {i: None for i in range(len(jobs))} | found
                    break
                found |= {int(out.request_id): out.outputs[0] for out in engine.step() if out.finished}
        rollouts = []
        for i, (prompt, _) in list(enumerate(jobs))[mine]:
            if (out := found[i]) is None:
                rollouts.append(Rollout(prompt, [], [], "stopped"))
            elif out.finish_reason in ("stop", "length"):
                rollouts.append(Rollout(prompt, list(out.token_ids), list(out.logprobs.logprobs), out.finish_reason))
            else:
                raise RuntimeError(f"vLLM ended a request with {out.finish_reason!r}")
        return rollouts


# -----------------------------------------------------------------------------
# the choice


def choose(kind, device):
    """("vllm" or "hf", why) for auto, vllm or hf on "cpu" or "cuda". ValueError where vllm is asked for and cannot run."""
    if kind == "hf":
        return "hf", "as asked"
    if importlib.util.find_spec("vllm") is None:
        why = "vLLM is not installed (requirements-vllm.txt)"
    elif kind == "auto" and device == "cpu":
        # On one thread the toy's 64 x 100 tokens take 0.36 s here and 0.45 s there, after 8 s to start; at 0.1B vLLM halves them.
        return "hf", "on a CPU, vLLM pays off for larger models only (--rollout vllm)"
    elif (built := vllm_device()) != device:
        why = f"the vLLM installed here runs on {built or 'no device found'}, not on {device}"
    else:
        return "vllm", "as asked" if kind == "vllm" else f"it is installed, and runs on {device}"
    if kind == "vllm":
        raise ValueError(f"--rollout vllm: {why}")
    return "hf", why


def make_sampler(cfg, path, model, tokenizer, vocab, say=print):
    """The sampler that cfg.rollout names. model: the trainer's; None or sharded: hf loads a copy from `path`.

    vocab: ids that may be sampled; the embedding's rows from there on only pad.
    """
    import transformers as hf

    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, why = choose(cfg.rollout, device)
    say(f"sampling with {kind}: {why}")
    stops, trust = stops_of(path, tokenizer), cfg.trust_remote_code
    if kind == "vllm":
        max_len = cfg.max_prompt + cfg.max_response if hasattr(cfg, "max_prompt") else 0
        options = dict(max_len=max_len, memory=cfg.vllm_memory, tp=getattr(cfg, "tp", 1))
        return VLLMSampler(path, stops, vocab, trust=trust, **options)
    own = model is None or any(hasattr(p, "full_tensor") for p in model.parameters())
    if own:
        kwargs = dict(dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        model = hf.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust, **kwargs)
        model = model.to(torch.device(device))
    return HFSampler(model, stops, tokenizer.pad_token_id or 0, vocab, own=own)
