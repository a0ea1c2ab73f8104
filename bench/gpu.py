"""Steps of the size of --preset qwen3 on one GPU of 80 GB: time and memory by phase, attention kernels, aligned chunks.

    python -m bench.gpu              # minutes; needs torch and transformers, and fetches nothing
    python -m bench.gpu --tiny       # the same code on a CPU, with tiny models

The models have the shapes of Qwen3-1.7B and Qwen3-4B and random weights. Memory on CUDA is the allocator's count. On a
CPU it is the sum of what torch allocates in a phase; what there was before is not known, and counts as 0.
"""

import argparse
import time
from functools import partial

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import data
import losses
import train
from bench.losses import MiB, interleaved, peak, sync, table
from common import versions
from configs import TrainConfig, parse
from policy import Policy
from rollout import HFSampler, Rollout, sampling_options
from teacher import teacher_targets

STUDENT = dict(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
)  # fmt: skip
TEACHER = STUDENT | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)
TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, vocab_size=512,
)  # fmt: skip


def make_policy(shape, vocabulary, device, trainable):
    """As policy.load_policy makes it for --preset qwen3, from a config instead of files."""
    dtype = torch.bfloat16 if device.type == "cuda" and not trainable else torch.float32
    with device:
        lm = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=dtype).requires_grad_(trainable)
    if trainable:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    return Policy(lm, vocabulary).to(device)


class Setting:
    """A student, a teacher, an optimizer and a sampler, as train.setup makes them."""

    def __init__(self, device, tiny):
        self.device, self.tiny = device, tiny
        torch.manual_seed(0)
        student, teacher = (STUDENT | TINY, TEACHER | TINY) if tiny else (STUDENT, TEACHER)
        size, stops = (500, [498, 499]) if tiny else (151669, [151643, 151645])  # as in Qwen3's tokenizer
        self.vocabulary = data.Vocabulary(size, {198}, stops, stops)
        self.student = make_policy(student, self.vocabulary, device, trainable=True)
        self.teacher = make_policy(teacher, self.vocabulary, device, trainable=False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 2e-6)
        self.sampler = HFSampler(self.student.lm, stops, 0, size)

    def config(self, loss, max_response):
        flags = ["--preset", "qwen3", "--loss", loss, "--max_response", str(max_response)]
        return parse(TrainConfig, flags + ["--topk", "8", "--micro_tokens", "256"] * self.tiny)

    def prompts(self, n):
        """Of 25 to 32 random tokens."""
        tokens = torch.randint(0, 490, (n, 32), generator=torch.Generator().manual_seed(0)).tolist()
        return [ids[: 32 - i % 8] for i, ids in enumerate(tokens)]

    def sampled(self, cfg, n):
        """n rollouts of the student's own. It is random: hardly any of them ends before max_response."""
        return self.sampler.sample(self.prompts(n), range(n), **sampling_options(cfg))

    def made_up(self, cfg, n):
        """n rollouts of random tokens, for lengths that transformers' generate would need an hour for."""
        tokens = torch.randint(0, 490, (n, cfg.max_response)).tolist()
        return [Rollout(p, t, [-1.0] * len(t), "length") for p, t in zip(self.prompts(n), tokens, strict=True)]


def step(setting, loss, make_rollouts, n, max_response):
    """One step of train.main, printed: seconds of each phase, MiB allocated before it, and the most MiB in it."""
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
    for epoch in range(1, cfg.epochs + 1):
        run = partial(train.update, setting.student, setting.optimizer, minibatch, cfg)
        result, _ = phase(f"update {epoch}", run)
        rows[-1][-1] = f"{result['loss']:.6f}"
    tokens = sum(len(batch.tokens) for batch in minibatch)
    kind = make_rollouts.__name__.replace("_", " ")
    title = f"A step, {loss}: {n} rollouts, {kind}, {tokens:,} response tokens in {len(minibatch)} micro-batch(es)"
    table(title, ["", "s", "MiB before", "MiB at the peak", "loss"], rows)


def now():
    sync()  # kernels run behind the Python that starts them
    return time.perf_counter()


def allocated(device):
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def steps(setting):
    short, long = (8, 32) if setting.tiny else (256, 16384)
    step(setting, "opd", setting.sampled, 2, 4)  # does not count: it loads kernels, and makes AdamW's state
    for make_rollouts, n, length in ((setting.sampled, 32, short), (setting.made_up, 4, long)):
        for loss in ("opd", "lsm"):
            step(setting, loss, make_rollouts, n, length)
    if setting.device.type == "cuda":
        print(f"\nThe allocator holds {torch.cuda.memory_reserved() / MiB:,.0f} MiB at the end")


def attention(setting):
    """The kernels that scaled_dot_product_attention chose, and how often."""
    cfg = setting.config("opd", 16)
    (minibatch,) = data.make_minibatches(setting.made_up(cfg, 2), cfg, 0, setting.vocabulary, setting.device)
    batch = minibatch[0]
    batch.teacher = teacher_targets(setting.teacher, batch, cfg)

    def train_once():
        train.position_loss(setting.student, batch, cfg, None)[1].sum().backward()
        setting.optimizer.zero_grad()

    rows = []
    for name, run in (("a training pass", train_once), ("generate()", lambda: setting.sampled(cfg, 2))):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        calls = [e for e in profile.key_averages() if e.key.startswith("aten::_scaled_dot_product")]
        rows += [[name, e.key.removeprefix("aten::"), e.count] for e in calls]
    table("Attention kernels", ["", "kernel", "calls"], rows)


def head_pass(hidden, weight, ids, columns):
    losses.CUDA_COLUMNS = columns
    hidden.grad = weight.grad = None
    z, lse = losses.head_logits(hidden, weight, ids)
    (z[:, 0] - lse).sum().backward()


def alignment(device, tiny):
    """OPD's head with chunks in multiples of 128 columns, as losses.py has them on CUDA, and of any width."""
    # 2^27 // 12001 is odd; 2^27 // 16384 is a multiple of 128, and the two should take the same time.
    sizes, H, V = ([61, 64], 32, 512) if tiny else ([12001, 16384], 2048, 151669)
    rows = []
    for N in sizes:
        g = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(N, H, generator=g, device=device).bfloat16().requires_grad_()
        weight = torch.randn(V, H, generator=g, device=device).mul_(H**-0.5).bfloat16().requires_grad_()
        ids = torch.randint(0, V, (N, 1), generator=g, device=device)
        times = interleaved({c: partial(head_pass, hidden, weight, ids, c) for c in (128, 1)}, 5)
        rows.append([f"{N:,}", f"{times[128] * 1e3:.1f}", f"{times[1] * 1e3:.1f}"])
    losses.CUDA_COLUMNS = 128
    table("Head, OPD, forward and backward in bf16, ms", ["N", "multiples of 128", "any width"], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU")
    tiny = parser.parse_args(argv).tiny
    if not tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --tiny runs on a CPU")
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    where = "a CPU" if tiny else f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    print(", ".join(f"{name} {versions()[name]}" for name in ("torch", "transformers", "commit")), f"on {where}")
    alignment(device, tiny)
    setting = Setting(device, tiny)
    attention(setting)
    steps(setting)


if __name__ == "__main__":
    main()
