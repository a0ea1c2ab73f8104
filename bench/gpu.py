"""What only a GPU can tell of --preset qwen3: the time and memory of a step, faster layers, the head, sampling with vLLM.

    python -m bench.gpu              # all parts; needs torch and transformers (vLLM for sampling), and fetches nothing
    python -m bench.gpu layers       # one part: head, steps, layers or sampling
    python -m bench.gpu --tiny       # the same code on a CPU, with tiny models

The models have the shapes of Qwen3-1.7B and Qwen3-4B and random weights. Memory on CUDA is the allocator's count. On a
CPU it is the sum of what torch allocates in a phase; what there was before is not known, and counts as 0.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

import data
import losses
import train
from bench.losses import MiB, interleaved, peak, sync, table
from configs import TrainConfig, parse
from policy import (
    Policy,
    choose_attention_kernels,
    compute_dtype,
    decoder_blocks,
    full_weights,
    shard,
    teacher_targets,
    token_logprobs,
)
from rollout import HFSampler, Rollout, VLLMSampler, sampling_options, vllm_device
from support.common import init_device, versions
from support.models import patch_with_liger
from support.vocabulary import Vocabulary

STUDENT = dict(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
)  # fmt: skip
TEACHER = STUDENT | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)
TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, vocab_size=512,
)  # fmt: skip

# -----------------------------------------------------------------------------
# models and rollouts


def make_policy(shape, vocabulary, device, trainable, compiled=False):
    """As policy.load_policy makes it for --preset qwen3, from a config instead of files."""
    dtype = torch.float32 if trainable else compute_dtype(device)
    with device:
        lm = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=dtype).requires_grad_(trainable)
    if trainable:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    if compiled:
        for block in decoder_blocks(lm):
            block.compile(dynamic=True)
    policy = Policy(lm, vocabulary)
    if dist.is_initialized():
        shard(policy, init_device_mesh(device.type, (1,)), device)
    return policy


class Setting:
    """A student, a teacher and an optimizer, as train.setup makes them."""

    def __init__(self, device, tiny, compiled=False):
        self.device, self.tiny = device, tiny
        torch.manual_seed(0)
        self.shape, teacher = (STUDENT | TINY, TEACHER | TINY) if tiny else (STUDENT, TEACHER)
        size, stops = (500, [498, 499]) if tiny else (151669, [151643, 151645])  # as in Qwen3's tokenizer
        self.vocabulary = Vocabulary(size, {198}, stops, stops)
        self.student = make_policy(self.shape, self.vocabulary, device, trainable=True, compiled=compiled)
        self.teacher = make_policy(teacher, self.vocabulary, device, trainable=False, compiled=compiled)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 2e-6, fused=device.type == "cuda")

    def sampler(self):
        """transformers' generate(), with a copy of the student in the dtype that it computes in."""
        with self.device:
            lm = AutoModelForCausalLM.from_config(Qwen3Config(**self.shape), dtype=compute_dtype(self.device))
        sampler = HFSampler(lm.eval(), self.vocabulary, owns_model=True)
        sampler.sync(full_weights(self.student))
        return sampler

    def config(self, loss, max_response):
        flags = ["--preset", "qwen3", "--loss", loss, "--max_response", str(max_response)]
        return parse(TrainConfig, flags + ["--topk", "8", "--micro_tokens", "256"] * self.tiny)

    def prompts(self, n):
        """Of 25 to 32 random tokens."""
        tokens = torch.randint(0, 490, (n, 32), generator=torch.Generator().manual_seed(0)).tolist()
        return [ids[: 32 - i % 8] for i, ids in enumerate(tokens)]

    def sampled(self, cfg, n):
        """n rollouts of the student's own. It is random: hardly any of them ends before max_response."""
        return self.sampler().sample(self.prompts(n), range(n), **sampling_options(cfg))

    def made_up(self, cfg, n):
        """n rollouts of random tokens, for lengths that transformers' generate would need an hour for."""
        tokens = torch.randint(0, 490, (n, cfg.max_response)).tolist()
        return [Rollout(p, t, [-1.0] * len(t), "length") for p, t in zip(self.prompts(n), tokens, strict=True)]

    def scored(self, cfg, rollouts):
        """Micro-batches with the teacher's targets and old log-probs."""
        (minibatch,) = data.make_minibatches(rollouts, cfg, 0, self.vocabulary, self.device)
        for batch in minibatch:
            batch.teacher = teacher_targets(self.teacher, batch, cfg)
        self.set_old_logprobs(minibatch, cfg)
        return minibatch

    @torch.no_grad()
    def set_old_logprobs(self, minibatch, cfg):
        for batch in minibatch:
            train.student_outputs(self.student, batch, cfg)


def now():
    sync()  # kernels run behind the Python that starts them
    return time.perf_counter()


def timed(run):
    start = now()
    out = run()
    return now() - start, out


def allocated(device):
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


# -----------------------------------------------------------------------------
# the head


def head_pass(hidden, weight, ids, columns=128, fused=False):
    losses.CUDA_COLUMNS, losses.FUSED = columns, fused
    hidden.grad = weight.grad = None
    z, lse = losses.head_logits(hidden, weight, None, ids)
    (z[:, 0] - lse).sum().backward()


def matmuls(hidden, weight):
    """The products of a forward and a backward pass over all logits, 6NHV FLOPs, in pieces of 8,192 columns."""
    h, total = hidden.detach(), torch.zeros_like(hidden, dtype=torch.float32)
    for piece in weight.detach().split(8192):
        logits = h @ piece.T
        total += logits @ piece
        logits.T @ h


def head(device, tiny):
    """OPD's head: chunks in multiples of 128 columns or of any width, its elementwise passes plain or compiled into one."""
    # 2^27 // 12001 is odd; 2^27 // 16384 is a multiple of 128, and the two widths should take the same time.
    sizes, H, V = ([61, 64], 32, 512) if tiny else ([12001, 16384], 2048, 151669)
    variants = {"multiples of 128": {}, "any width": {"columns": 1}, "fused": {"fused": True}}
    rows = []
    for N in sizes:
        g = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(N, H, generator=g, device=device).bfloat16().requires_grad_()
        weight = torch.randn(V, H, generator=g, device=device).mul_(H**-0.5).bfloat16().requires_grad_()
        ids = torch.randint(0, V, (N, 1), generator=g, device=device)
        fns = {name: partial(head_pass, hidden, weight, ids, **options) for name, options in variants.items()}
        times = interleaved(fns | {"matmuls": partial(matmuls, hidden, weight)}, 5)
        cells = [f"{times[name] * 1e3:.1f} ({times[name] / times['matmuls']:.2f})" for name in variants]
        rows.append([f"{N:,}", f"{times['matmuls'] * 1e3:.1f}", *cells])
    losses.CUDA_COLUMNS, losses.FUSED = 128, False
    title = "Head, OPD, forward and backward in bf16, ms, and as a multiple of the plain products (6NHV)"
    table(title, ["N", "products", *variants], rows)


# -----------------------------------------------------------------------------
# steps


def step(setting, loss, make_rollouts, n, max_response):
    """One step of train.train, printed: seconds of each phase, MiB allocated before it, and the most MiB in it."""
    cfg, rows = setting.config(loss, max_response), []

    def phase(name, run):
        start, before = now(), allocated(setting.device)
        most, out = peak(run, setting.device.type)
        rows.append([name, f"{now() - start:.2f}", f"{before / MiB:,.0f}", f"{(before + most) / MiB:,.0f}", ""])
        return out

    def score():
        for batch in minibatch:
            batch.teacher = teacher_targets(setting.teacher, batch, cfg)

    rollouts = phase("rollout", lambda: make_rollouts(cfg, n))
    (minibatch,) = data.make_minibatches(rollouts, cfg, 0, setting.vocabulary, setting.device)
    phase("teacher", score)
    phase("old log-probs", lambda: setting.set_old_logprobs(minibatch, cfg))
    for epoch in range(1, cfg.epochs + 1):
        run = partial(train.update, setting.student, setting.optimizer, minibatch, cfg)
        result, _ = phase(f"update {epoch}", run)
        rows[-1][-1] = f"{result['loss']:.6f}"
    tokens = sum(len(batch.tokens) for batch in minibatch)
    kind = make_rollouts.__name__.replace("_", " ")
    title = f"A step, {loss}: {n} rollouts, {kind}, {tokens:,} response tokens in {len(minibatch)} micro-batch(es)"
    table(title, ["", "s", "MiB before", "MiB at the peak", "loss"], rows)


def steps(device, tiny):
    setting = Setting(device, tiny)
    attention(setting)
    short, long = (8, 32) if tiny else (256, 16384)
    step(setting, "opd", setting.sampled, 2, 4)  # does not count: it loads kernels, and makes AdamW's state
    for make_rollouts, n, length in ((setting.sampled, 32, short), (setting.made_up, 4, long)):
        for loss in ("opd", "lsm"):
            step(setting, loss, make_rollouts, n, length)
    if device.type == "cuda":
        print(f"\nThe allocator holds {torch.cuda.memory_reserved() / MiB:,.0f} MiB at the end")


def attention(setting):
    """The kernels that scaled_dot_product_attention chose, and how often."""
    cfg = setting.config("opd", 16)
    batch = setting.scored(cfg, setting.made_up(cfg, 2))[0]

    def train_once():
        outputs = train.student_outputs(setting.student, batch, cfg)
        train.base_loss(outputs, batch, cfg)[0].sum().backward()
        setting.optimizer.zero_grad()

    rows = []
    for name, run in (("a training pass", train_once), ("generate()", lambda: setting.sampled(cfg, 2))):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        calls = [e for e in profile.key_averages() if e.key.startswith("aten::_scaled_dot_product")]
        rows += [[name, e.key.removeprefix("aten::"), e.count] for e in calls]
    table("Attention kernels", ["", "kernel", "calls"], rows)


# -----------------------------------------------------------------------------
# faster layers


@contextmanager
def liger():
    """Liger's kernels for the models made inside it."""
    plain = dict(vars(modeling_qwen3))
    patch_with_liger("qwen3")
    yield
    vars(modeling_qwen3).update(plain)


def layers(device, tiny):
    """--kernels torch, liger, compile and both on a step of 4 x 16,384 tokens, in turns, each in a new model of the same weights.

    The first pass and update of each do not count. Log-probs are compared with those of the plain layers.
    """
    kinds = ["torch", "compile"]
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        kinds = ["torch", "liger", "compile", "both"]
    found = {kind: {"teacher": [], "update": [], "peak": 0} for kind in kinds}
    plain = None
    for _ in range(1 if tiny else 2):
        for kind in kinds:
            losses.FUSED = kind in ("compile", "both")
            with liger() if kind in ("liger", "both") else nullcontext():
                setting = Setting(device, tiny, compiled=losses.FUSED)
            logp = measure_layers(setting, found[kind])
            plain = logp if plain is None else plain
            found[kind]["difference"] = (logp - plain).abs().max().item()
            del setting
            if device.type == "cuda":
                torch.cuda.empty_cache()
    losses.FUSED = False
    rows = []
    for kind, x in found.items():
        times = [f"{statistics.median(x[phase]):.2f}" for phase in ("teacher", "update")]
        ratio = statistics.median(x["update"]) / statistics.median(found["torch"]["update"])
        rows.append([kind, *times, f"{ratio:.2f}", f"{x['peak'] / MiB:,.0f}", f"{x['difference']:.1e}"])
    title = "Decoder layers (--kernels), an OPD update of 4 full rollouts; medians"
    head = ["", "teacher, s", "update, s", "of torch's", "MiB at the peak", "largest difference of log-probs, nats"]
    table(title, head, rows)


def measure_layers(setting, found):
    """Adds times and memory to `found`; returns the log-probs of the first micro-batch before any update."""
    cfg = setting.config("opd", 32 if setting.tiny else 16384)
    torch.manual_seed(1)
    minibatch = setting.scored(cfg, setting.made_up(cfg, 4))
    with torch.no_grad():
        logp = token_logprobs(setting.student, minibatch[0], 1.0).cpu()
    train.update(setting.student, setting.optimizer, minibatch, cfg)
    found["teacher"].append(timed(lambda: [teacher_targets(setting.teacher, batch, cfg) for batch in minibatch])[0])
    before = allocated(setting.device)
    run = partial(train.update, setting.student, setting.optimizer, minibatch, cfg)
    found["update"].append(timed(run)[0])
    most, _ = peak(run, setting.device.type)
    found["peak"] = max(found["peak"], before + most)
    return logp


# -----------------------------------------------------------------------------
# sampling with vLLM


def sampling(device, tiny):
    """ms per token of sequences sampled together, with the trainer's models in memory; sync, sleep and wake."""
    if importlib.util.find_spec("vllm") is None or vllm_device() != device.type:
        print(f"\nNo vLLM for {device.type} here: sampling is not measured")
        return
    setting = Setting(device, tiny)
    counts, length = ((2, 4), 8) if tiny else ((32, 128, 512), 1024)
    cfg, rows = setting.config("opd", length), []
    with tempfile.TemporaryDirectory() as folder:
        setting.student.lm.config.save_pretrained(folder)
        with device:
            lm = AutoModelForCausalLM.from_config(Qwen3Config(**setting.shape), dtype=compute_dtype(device))
        lm.save_pretrained(folder)
        del lm
        options = {"max_len": 32 + length, "memory": cfg.vllm_memory, "max_num_seqs": max(counts)}
        start, sampler = timed(lambda: VLLMSampler(folder, setting.vocabulary, **options))
    choose_attention_kernels(device)
    sync_s, _ = timed(lambda: sampler.sync(full_weights(setting.student)))
    for n in counts:
        prompts = [setting.prompts(8)[i % 8] for i in range(n)]
        seconds, rollouts = timed(
            lambda prompts=prompts: sampler.sample(prompts, range(len(prompts)), **sampling_options(cfg))
        )
        tokens, longest = sum(len(r.response) for r in rollouts), max(len(r.response) for r in rollouts)
        rows.append([n, f"{seconds:.1f}", f"{1e3 * seconds / longest:.2f}", f"{tokens / seconds:,.0f}"])
    sleep_s, _ = timed(sampler.sleep)
    again_s, _ = timed(lambda: sampler.sync(full_weights(setting.student)))
    table(
        f"vLLM, up to {length:,} tokens a sequence, the trainer's models in memory",
        ["sequences", "s", "ms per token of the longest", "tokens / s"], rows,
    )  # fmt: skip
    print(f"\nstart {start:.1f} s, sync {sync_s:.2f} s, sleep {sleep_s:.2f} s, wake and sync {again_s:.2f} s")


PARTS = {"head": head, "steps": steps, "layers": layers, "sampling": sampling}


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="by default all")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --tiny runs on a CPU")
    device = init_device(SimpleNamespace(device="cpu" if args.tiny else "cuda", threads=0, seed=0))
    where = "a CPU" if args.tiny else f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    print(
        ", ".join(f"{name} {versions()[name]}" for name in ("torch", "transformers", "vllm", "commit")), f"on {where}"
    )
    choose_attention_kernels(device)
    for name in args.parts or PARTS:
        PARTS[name](device, args.tiny)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
