"""Responses sampled from the student: with vLLM, or with transformers' generate() where vLLM cannot run.

    sampler = make_sampler(cfg, "folder of the student", student, vocabulary)
    sampler.sync((name, tensor) for name, tensor in student.state_dict().items())     # after every update
    rollouts = sampler.sample(prompts, seeds, max_tokens=100, temperature=1.0, top_p=0.9, top_k=0)
    sampler.sleep()                                                                    # frees a GPU's memory

A rollout is a function of the weights, its prompt and its seed: not of what else is in the batch, of earlier calls, or of
the trainer's random state. Only rounding differs with the batch, and may decide a near tie otherwise.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from support.common import gather, print0, rank, world_size
from support.errors import explain
from support.models import context_of, load_lm

VLLM_ENV = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # unless the user has set them
CPU_KV_CACHE = 1 << 30  # bytes; vLLM fills it with zeros, so all of it is taken at once


@dataclass
class Rollout:
    prompt: list[int]
    response: list[int]  # with the stop token, or the first words of another question (Vocabulary), if it ended in them
    logprobs: list[float]  # the sampler's, at temperature 1 and before top-p and top-k
    finish: str  # "stop" or "length"; "stopped" if should_stop() ended it


def sampling_options(cfg) -> dict:
    """What sampler.sample() takes besides prompts and seeds, from either config."""
    return dict(max_tokens=cfg.max_response, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.sample_top_k)


def sample_on_all_ranks(sampler, jobs, options) -> list[Rollout]:
    """A rollout for each job (prompt ids, seed), in order and on every rank; each rank samples its share."""
    mine = jobs[rank() :: world_size()]
    parts = gather(sampler.sample([ids for ids, _ in mine], [seed for _, seed in mine], **options))
    return [parts[i % world_size()][i // world_size()] for i in range(len(jobs))]


# -----------------------------------------------------------------------------
# transformers. B rows, V vocabulary


class Draw:
    """A logits processor that samples by inverse CDF, and leaves generate() only the token that it drew.

    u [B, max_tokens]: a uniform number for each token. Ids from `vocab` on are never drawn.
    """

    def __init__(self, u, prompt_width, vocab, warpers):
        self.u, self.prompt_width, self.vocab, self.warpers = u, prompt_width, vocab, warpers
        self.logprobs = []  # [B] for each token so far

    def __call__(self, ids, logits):
        raw = logits[:, : self.vocab]  # [B, V], already fp32
        warped = raw
        for warp in self.warpers:  # temperature, top-k, top-p
            warped = warp(ids, warped)
        # In fp32 a token less likely than 6e-8 would vanish in the sum. A token of probability 0 leaves the sum as it was,
        # and right=True never stops there.
        cdf = warped.softmax(-1).cumsum(-1, dtype=torch.float64)
        u = self.u[:, ids.shape[1] - self.prompt_width, None]
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
        self.logprobs.append((raw.gather(1, token) - raw.logsumexp(-1, keepdim=True))[:, 0])
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)


PAD = 0  # padding is masked, so any id will do that the embedding has; a tokenizer's own pad token may lie beyond it


class HFSampler:
    """generate() in batches of at most `budget` tokens.

    owns_model: `model` is the sampler's own copy, and sync() writes into it; otherwise it is the trainer's. max_len: tokens of
    prompt and response; 0: no limit.
    """

    def __init__(self, model, vocabulary, *, owns_model=False, max_len=0, budget=1 << 17, should_stop=lambda: False):
        self.model, self.vocabulary = model, vocabulary
        self.owns_model, self.max_len, self.budget, self.should_stop = owns_model, max_len, budget, should_stop

    @torch.no_grad()
    def sync(self, weights):
        if self.owns_model:
            missing = self.model.state_dict()
            for name, weight in weights:
                missing.pop(name).copy_(weight)
            missing = missing.keys() - self.model.all_tied_weights_keys.keys()  # tied weights come once
            if missing:
                raise RuntimeError(f"sync did not get {sorted(missing)}")

    def sleep(self):
        pass

    def sample(self, prompts, seeds, *, max_tokens, temperature, top_p, top_k):
        """A Rollout for each prompt (token ids) and its seed. top_k 0: all."""
        import transformers as hf

        warpers = [hf.TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
        warpers += [hf.TopPLogitsWarper(float(top_p))] if top_p < 1 else []
        model = self.model
        was_training, models_own_config = model.training, model.generation_config
        model.eval()  # in training mode, gradient checkpointing switches the KV cache off
        # What the config below leaves open, generate() takes from the model's own: repetition penalties and the like.
        model.generation_config = hf.GenerationConfig()
        config = hf.GenerationConfig(do_sample=False)
        config.eos_token_id, config.pad_token_id = self.vocabulary.stop_ids or None, PAD
        rollouts = {}
        todo = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        limits = [min(max_tokens, self.max_len - len(p)) if self.max_len else max_tokens for p in prompts]
        try:
            while todo:
                config.max_new_tokens = limits[todo[0]]  # one limit for a batch: those that max_len cuts come first
                rows = max(1, self.budget // (len(prompts[todo[0]]) + config.max_new_tokens))
                batch = [i for i in todo[:rows] if limits[i] == config.max_new_tokens]
                todo = todo[len(batch) :]
                found = self.generate([prompts[i] for i in batch], [seeds[i] for i in batch], config, warpers)
                rollouts.update(zip(batch, found, strict=True))
        finally:
            model.train(was_training)
            model.generation_config = models_own_config
        return [rollouts[i] for i in range(len(prompts))]

    def generate(self, prompts, seeds, config, warpers):
        """One batch of rollouts; the longest prompt comes first."""
        device, width, n_last = self.model.device, len(prompts[0]), len(self.vocabulary.next_question) + 1
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        # NumPy's generator: torch's reads only 32 bits of its seed on a CPU.
        u = np.stack([np.random.default_rng(seed).random(config.max_new_tokens) for seed in seeds])
        draw = Draw(torch.from_numpy(u).to(device), width, self.vocabulary.size, warpers)

        def is_over(ids, *_, **__):
            over = torch.full((len(ids),), self.should_stop(), device=device)
            if self.vocabulary.next_question:
                last = ids[:, max(width, ids.shape[1] - n_last) :].tolist()
                over |= torch.tensor([self.vocabulary.asks_again(row) for row in last], device=device)
            return over

        options = {"generation_config": config, "logits_processor": [draw], "stopping_criteria": [is_over]}
        out = self.model.generate(ids, attention_mask=mask, **options)
        rollouts = []
        logprobs = torch.stack(draw.logprobs, 1).tolist()
        for prompt, row, logp in zip(prompts, out[:, width:].tolist(), logprobs, strict=True):
            ends = [i + 1 for i, token in enumerate(row) if token in self.vocabulary.stop_ids]
            ends += [i for i in range(1, len(row) + 1) if self.vocabulary.asks_again(row[max(0, i - n_last) : i])]
            n_tokens = min(ends, default=len(row))
            rollouts.append(Rollout(prompt, row[:n_tokens], logp[:n_tokens], "stop" if ends else "length"))
        return rollouts


# -----------------------------------------------------------------------------
# vLLM


def vllm_device():
    """The device type that the installed vLLM runs on: "cpu", "cuda", or "" if it finds none here."""
    for name, value in VLLM_ENV.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, because sync() hands over its tensors
    from vllm.platforms import current_platform

    return current_platform.device_type


def repack_head(worker):
    """vLLM 0.32 on a CPU packs a tied head only when it loads, not when a reload brings a new embedding: do it again."""
    head = getattr(worker.get_model(), "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


class VLLMSampler:
    """A vLLM engine in this process, on this rank's device. All ranks build theirs together.

    max_len: tokens of prompt and response; 0: the model's context. memory: share of the GPU's. tp: so many neighbouring
    ranks share an engine's work, and call sample and sync together. max_num_seqs: responses in flight at once; vLLM's own
    default on a large GPU is 1024, and it sets memory aside for the logits of as many.
    """

    def __init__(
        self,
        path,
        vocabulary,
        *,
        max_len=0,
        memory=0.55,
        tp=1,
        max_num_seqs=256,
        trust=False,
        should_stop=lambda: False,
    ):
        if world_size() % tp:
            raise ValueError(f"--tp is {tp}; it must divide the number of ranks, {world_size()}")
        self.is_cuda = vllm_device() == "cuda"
        self.vocabulary, self.tp, self.should_stop = vocabulary, tp, should_stop
        self.is_asleep = False
        from transformers import AutoConfig
        from vllm import LLM

        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        own, context = getattr(config, "max_position_embeddings", None), context_of(config)
        # With YaRN, vLLM 0.32 takes max_position_embeddings for the extended context, which Qwen's model cards leave as it was.
        overrides = {"max_position_embeddings": context} if own and context > own else {}
        options = dict(
            max_model_len=max_len or None, tensor_parallel_size=tp, trust_remote_code=trust, max_num_seqs=max_num_seqs,
            skip_tokenizer_init=True, use_tqdm_on_load=False,
            logprobs_mode="raw_logprobs",  # before temperature, top-p and top-k
            generation_config="vllm",  # else vLLM would take the temperature and top-p of the model's own
        )  # fmt: skip
        if self.is_cuda:
            options |= dict(dtype="bfloat16", gpu_memory_utilization=memory, enable_sleep_mode=True)
            overrides["head_dtype"] = "float32"  # logits that are not rounded, as the trainer's
        else:
            options |= dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=CPU_KV_CACHE)
            # On a CPU, vLLM 0.32 fails on a seeded request whose prompt it has cut in two.
            options |= dict(enable_chunked_prefill=False)
        if world_size() > 1:
            # Uses the trainer's process group, and the device of LOCAL_RANK. vLLM's default is device 0 on all ranks.
            options |= dict(distributed_executor_backend="external_launcher")
        # On a CPU, vLLM binds threads to cores, changes their number, and makes set_num_threads do nothing.
        set_num_threads, n_threads = torch.set_num_threads, torch.get_num_threads()
        self.llm = LLM(path, hf_overrides=overrides, **options)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(n_threads)
        # Its finaliser destroys every process group there is, the trainer's too, or fails if the trainer came first.
        self.llm.llm_engine.engine_core._finalizer.detach()
        config = self.llm.llm_engine.model_config
        padding = range(vocabulary.size, config.get_vocab_size())
        if self.is_cuda and len(padding) > 1024:
            raise ValueError(f"the embedding has {len(padding)} rows beyond the vocabulary; vLLM 0.32 can ban 1024")
        self.dtype, self.banned = config.dtype, dict.fromkeys(padding, -100.0)

    def sync(self, weights):
        """Loads (name, full tensor) pairs, cast one at a time, and forgets the prefixes cached with the old weights."""
        if self.is_asleep:  # the cache stays out until the load is over
            self.llm.wake_up(["weights"])
        # Never without an iterator: vLLM would load the files again, and sample from the first student forever.
        pairs = ((name, weight.detach().to(self.dtype)) for name, weight in weights)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
        if not self.is_cuda:
            self.llm.collective_rpc(repack_head)
        if self.is_asleep:
            self.llm.wake_up(["kv_cache"])
        self.is_asleep = False
        if not self.llm.reset_prefix_cache():  # no assert: python -O would leave the call out
            raise RuntimeError("vLLM kept its prefix cache, which is of the old weights")

    def sleep(self):
        """Frees the GPU's memory until the next sync or sample.

        Level 1: the weights wait in host memory. Level 2 drops them, and whatever a sync leaves out would be garbage.
        """
        if self.is_cuda and not self.is_asleep:
            self.llm.sleep(level=1)
            self.is_asleep = True

    def sample(self, prompts, seeds, *, max_tokens, temperature, top_p, top_k):
        """A Rollout for each prompt (token ids) and its seed. top_k 0: all."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.is_asleep:
            self.llm.wake_up()
            self.is_asleep = False
        jobs, mine, should_stop = self.share_jobs(list(zip(prompts, seeds, strict=True)))
        params = dict(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop_token_ids=self.vocabulary.stop_ids,
            logprobs=0,  # of the sampled token alone
            logit_bias=self.banned or None, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        if self.vocabulary.next_question:
            params["output_kind"] = RequestOutputKind.CUMULATIVE  # all tokens so far, at every step
        n_last = len(self.vocabulary.next_question) + 1
        engine, outputs = self.llm.llm_engine, {}  # {number of the job: its Rollout}
        for i, (prompt, seed) in enumerate(jobs):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(seed=seed, **params))
        while engine.has_unfinished_requests():
            if should_stop or (self.tp == 1 and self.should_stop()):
                engine.abort_request([str(i) for i in range(len(jobs)) if i not in outputs])
                break
            for request in engine.step():
                i, out = int(request.request_id), request.outputs[0]
                asks_again = self.vocabulary.asks_again(list(out.token_ids[-n_last:]))
                if asks_again and not request.finished:
                    engine.abort_request([request.request_id])
                finish = "stop" if asks_again else out.finish_reason  # None: it goes on
                if finish in ("stop", "length"):
                    outputs[i] = Rollout(jobs[i][0], list(out.token_ids), list(out.logprobs.logprobs), finish)
                elif finish:
                    raise RuntimeError(f"vLLM ended a request with {finish!r}")
        return [outputs.get(i) or Rollout(jobs[i][0], [], [], "stopped") for i in mine]

    def share_jobs(self, jobs):
        """(the engine's jobs, the numbers of this rank's among them, whether to stop). An engine's ranks run the same jobs."""
        if self.tp == 1:
            return jobs, range(len(jobs)), False
        from vllm.distributed import get_tp_group

        group, parts = get_tp_group(), [None] * self.tp
        dist.all_gather_object(parts, (jobs, self.should_stop()), group=group.cpu_group)
        start = sum(len(part) for part, _ in parts[: group.rank_in_group])
        everyones = [job for part, _ in parts for job in part]
        return everyones, range(start, start + len(jobs)), any(stop for _, stop in parts)


# -----------------------------------------------------------------------------
# the choice


def choose(kind, device):
    """("vllm" or "hf", why) for auto, vllm or hf on "cpu" or "cuda". ValueError if vLLM is needed and cannot run."""
    if kind == "hf":
        return "hf", "as asked"
    is_installed = importlib.util.find_spec("vllm") is not None
    why = "vLLM is not installed (pip install -r requirements-vllm.txt)"
    if kind == "auto" and device == "cpu":
        # On one thread the toy's 64 x 100 tokens take 0.36 s with hf and 0.45 s with vLLM, after 8 s to start; at 0.1B
        # parameters vLLM takes half of hf's time.
        return "hf", "on a CPU, vLLM pays off for larger models only (--rollout vllm)" if is_installed else why
    if is_installed:
        built_for = vllm_device()
        if built_for == device:
            return "vllm", "as asked" if kind == "vllm" else f"it is installed, and runs on {device}"
        why = f"the vLLM installed here runs on {built_for or 'no device found'}, not on {device}"
    # On a GPU there is no silent fallback: at 16k tokens generate() would take the better part of an hour per step.
    raise ValueError(f"--rollout {kind}: {why}. --rollout hf samples without it, many times slower on a GPU")


def make_sampler(cfg, path, model, vocabulary, should_stop=lambda: False, **engine_options):
    """The sampler that cfg.rollout names.

    model: the trainer's. If it is None or sharded, the hf sampler loads a copy from `path`. should_stop() is asked at every
    token: once it is True, sample returns what there is, and the caller has to drop it. engine_options: max_len, where a response
    ends though it may have more tokens, and VLLMSampler's max_num_seqs.
    """
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _ = choose(cfg.rollout, device)
    trust = cfg.trust_remote_code
    if kind == "vllm":
        engine_options |= {"memory": cfg.vllm_memory, "tp": cfg.tp, "trust": trust, "should_stop": should_stop}
        return start_engine(path, vocabulary, **engine_options)
    needs_copy = model is None or any(hasattr(p, "full_tensor") for p in model.parameters())
    if needs_copy:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = load_lm(path, trust_remote_code=trust, dtype=dtype)
        model = model.to(torch.device(device))
    budget = token_budget(model.config, torch.cuda.mem_get_info()[0] if device == "cuda" else None)
    max_len = engine_options.get("max_len", 0)
    options = {"owns_model": needs_copy, "max_len": max_len, "budget": budget, "should_stop": should_stop}
    return HFSampler(model, vocabulary, **options)


def start_engine(path, vocabulary, **options):
    """A VLLMSampler. If it fails on one of several ranks, that rank's process ends at once, and torchrun ends the others.

    They are waiting for it inside vLLM's own collectives, where the error cannot be passed on to them.
    """
    print0("starting vLLM; compiling takes minutes the first time")
    try:
        return VLLMSampler(path, vocabulary, **options)
    except Exception as error:
        if world_size() == 1:
            raise
        print(f"error: vLLM failed on rank {rank()}: {explain(error)}", file=sys.stderr, flush=True)
        os._exit(1)


def token_budget(config, free_bytes=None) -> int:
    """Tokens that generate() may work on at once: 2^17, or what fits into half of the GPU's free memory."""
    if free_bytes is None:
        return 1 << 17
    config = config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * 2 * config.num_hidden_layers * kv_heads * head_dim  # keys and values in bf16
    return min(1 << 17, free_bytes // 2 // bytes_per_token)
