"""Time and peak memory of the losses and the gates, beside what one would use instead.

    python -m bench.losses                                               # all tables, at a size for a CPU
    python -m bench.losses losses --N 2048 --H 256 --runs 0              # memory alone
    python -m bench.losses losses --N 16384 --H 2048 --dtype bfloat16    # a GPU
    python -m bench.losses scale --tasks opd lsm teacher                 # as N grows
    python -m bench.losses gates                                         # gates beside the OPD loss

Times are medians of interleaved runs (A B C A B C ...), as multiples of the floor: plain matmuls with the same FLOPs in
the same runs. Memory is the peak beyond inputs and gradients: on CUDA the allocator's count, on a CPU the sum of what
torch allocates (from its profiler; exact, but blind to scratch space inside a matmul).
"""

import argparse
import importlib.util
import math
import os
import statistics
import sys
import time
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from gating import KINDS, drift, gate, segment_index
from losses import head_kl, head_logits, head_topk, lsm_loss, opd_loss

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler, be quiet
MiB = 2**20
CHUNK = 128  # positions, where an alternative is chunked by position
OURS = "**ours**"


# -----------------------------------------------------------------------------
# meters


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(fn):
    """Wall time; on one CPU thread the time it ran, which other processes stretch less."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    sync()
    start = clock()
    fn()
    sync()
    return clock() - start


def peak(fn, device):
    """Bytes that exist at once while fn() runs, beyond those before, and fn's result."""
    if device == "cuda":
        sync()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = fn()
        sync()
        return torch.cuda.max_memory_allocated() - before, out
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = fn()
    now = most = 0
    for event in profile.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most, out


def interleaved(fns, runs):
    """{name: median seconds} of runs taken in turns, after one that does not count."""
    found = {name: [] for name in fns}
    for _ in range(runs + 1):
        for name, fn in fns.items():
            found[name].append(seconds(fn))
    return {name: statistics.median(x[1:]) for name, x in found.items()}


def table(title, head, rows):
    lines = [f"\n{title}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def found(name):
    """The module, or None where its package is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name.split(".")[0]) else None


# -----------------------------------------------------------------------------
# the losses


def make_inputs(args, N=None):
    """Hidden states and heads of student and teacher, ids [N, K + 1] (the sampled one first), gates."""
    g, N = torch.Generator(args.device).manual_seed(0), N or args.N
    x, dtype = argparse.Namespace(**vars(args)), getattr(torch, args.dtype)
    make = partial(torch.randn, generator=g, device=args.device)
    x.h, x.h_t = make(N, x.H).to(dtype).requires_grad_(), make(N, x.Ht).to(dtype)
    x.w = (make(x.V, x.H) * x.H**-0.5).to(dtype).requires_grad_()
    x.w_t = (make(x.V, x.Ht) * x.Ht**-0.5).to(dtype)
    x.ids = torch.randint(0, x.V, (N, x.K + 1), generator=g, device=args.device)
    x.y, x.logq, x.gates = x.ids[:, 0], make(N, x.K + 1).log_softmax(-1), make(N).sigmoid()
    return x


def floor(x, teacher=False, backward=True):
    """The matmuls alone, in blocks; in fp32 on a CPU, which has no fast bf16."""
    pairs = [(x.h.detach(), x.w.detach(), backward)] + [(x.h_t, x.w_t, False)] * teacher
    if x.device == "cpu":
        pairs = [(h.float(), w.float(), back) for h, w, back in pairs]
    width = min(x.V, (1 << (22 if x.device == "cpu" else 27)) // len(x.h))
    buffer = pairs[0][0].new_ones(len(x.h), width)

    def run():
        for h, w, back in pairs:
            for v in w.split(width):
                d = buffer[:, : len(v)]
                if back:
                    d @ v, d.T @ h
                torch.mm(h, v.T, out=d)

    return run


def trained(x, loss):
    """A step: the loss, weighted with the gates and summed, and its gradients. None stays None."""

    def run():
        x.h.grad = x.w.grad = None
        (x.gates * loss()).sum().backward()

    return loss and run


def by_chunk(x, loss, *others):
    """loss(h, w, *others) over CHUNK positions at a time, computed again in the backward pass."""
    parts = zip(x.h.split(CHUNK), *(t.split(CHUNK) for t in others), strict=True)
    return torch.cat([checkpoint(loss, h, x.w, *t, use_reentrant=False) for h, *t in parts])


def opd(x):
    """All give the log-prob of the sampled token, with gradient, to the same loss."""
    liger = found("liger_kernel") and found("liger_kernel.chunked_loss.fused_linear_ppo")
    trl, cce = found("trl") and found("trl.kernels.chunked_logprob"), found("cut_cross_entropy")
    linear_ce = getattr(torch.nn.functional, "linear_cross_entropy", None)
    impl = "cce" if x.h.is_cuda else "torch_compile"
    head = torch.compile(head_logits) if x.compile else None

    def naive(h, w, y):
        return (h @ w.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]

    def ours(head=head_logits):
        z, lse = head(x.h, x.w, None, x.y[:, None])
        return z[:, 0] - lse

    def ce():
        options = torch.nn.LinearCrossEntropyOptions(False, CHUNK, None)
        return -linear_ce(x.h, x.w, x.y, reduction="none", options=options)

    fns = {
        "naive: logits, log_softmax, gather": lambda: naive(x.h, x.w, x.y),
        f"torch.utils.checkpoint, {CHUNK} positions": lambda: by_chunk(x, naive, x.y),
        OURS: ours,
        "ours, torch.compile (--compile)": head and (lambda: ours(head)),
        f"torch's linear_cross_entropy, {CHUNK} positions": linear_ce and ce,
        "Liger, chunked selective log-prob": liger and (lambda:
            liger._ChunkedSelectiveLogProbFunction.apply(x.h, x.w, x.y, None, 1.0, 4096)),
        "TRL, chunked log-prob": trl and (lambda:
            trl.ChunkedLogProbFunction.apply(x.h, x.w, None, x.y, 1.0, 32768, None, 1.0, ())[0]),
        f"cut-cross-entropy, {impl}": cce and (lambda:
            -cce.linear_cross_entropy(x.h, x.w, x.y, reduction="none", impl=impl)),
    }  # fmt: skip
    old, logq = x.logq[:, 0] - 0.1, x.logq[:, 0]

    def loss(logp):
        return logp and (lambda: opd_loss(logp(), old, logq)[0])

    return {name: trained(x, loss(logp)) for name, logp in fns.items()}, floor(x)


def lsm(x, gated=True):
    """Gated: it also computes the sampled token's log-prob, without gradient, as the gate needs it."""

    def naive(h, w, ids, logq):
        return lsm_loss((h @ w.T).float().log_softmax(-1).gather(1, ids)[:, 1:], logq[:, 1:])

    def ours():
        z, lse = head_logits(x.h, x.w, None, x.ids, want_lse=gated)
        return lsm_loss(z[:, 1:], x.logq[:, 1:])

    fns = {
        "naive: logits, log_softmax, gather": lambda: naive(x.h, x.w, x.ids, x.logq),
        f"torch.utils.checkpoint, {CHUNK} positions": lambda: by_chunk(x, naive, x.ids, x.logq),
        OURS: ours,
    }
    return {name: trained(x, loss) for name, loss in fns.items()}, floor(x)


def teacher(x):
    h, w = x.h.detach(), x.w.detach()

    def naive(h):
        return (h @ w.T).float().log_softmax(-1).topk(x.K)

    fns = {
        "naive: log_softmax, topk": lambda: naive(h),
        f"the same, {CHUNK} positions at a time": lambda: [naive(c) for c in h.split(CHUNK)],
        OURS: lambda: head_topk(h, w, None, x.K),
    }
    return fns, floor(x, backward=False)


def full_kl(x, beta):
    """Student's hidden size H, teacher's Ht. Liger gives the mean alone, so its positions cannot be gated."""
    liger = found("liger_kernel") and found("liger_kernel.chunked_loss.jsd_loss")
    trl = found("trl") and found("trl.kernels.chunked_divergence")

    def naive(h, w, h_t):
        logp = (h @ w.T).float().log_softmax(-1)
        logq = (h_t @ x.w_t.T).float().log_softmax(-1)
        if beta == 1:
            return (logp.exp() * (logp - logq)).sum(-1)
        logm = torch.logaddexp(logp, logq) - math.log(2)
        return (logp.exp() * (logp - logm) + logq.exp() * (logq - logm)).sum(-1) / 2

    def fused(compiled):
        rest = x.y, None, None, 0.0, 1.0, beta, -100, 1.0, compiled, 1024
        return liger.LigerFusedLinearJSDFunction.apply(x.h, x.w, x.h_t, x.w_t, *rest)

    def tiled():
        sides = x.h, x.w, None, x.h_t, x.w_t, None
        return trl.ChunkedDivergenceFunction.apply(*sides, beta, 1.0, 1.0, None, 1.0, None)[0]

    fns = {
        "naive": lambda: naive(x.h, x.w, x.h_t),
        f"torch.utils.checkpoint, {CHUNK} positions": lambda: by_chunk(x, naive, x.h_t),
        OURS: lambda: head_kl(x.h, x.w, None, x.h_t, x.w_t, None, beta=beta)[0],
        "Liger, fused, mean only": liger and (lambda: fused(False)),
        "Liger, fused, compiled (--compile)": liger and x.compile and (lambda: fused(True)),
        "TRL, chunked divergence": trl and tiled,
    }
    return {name: trained(x, loss) for name, loss in fns.items()}, floor(x, teacher=True)


TASKS = {
    "opd": ("OPD, sampled token; floor 6NHV", opd),
    "lsm": ("LSM and the gate's log-prob; floor 6NHV", lsm),
    "lsm_free": ("LSM without gate; floor 6NHV", partial(lsm, gated=False)),
    "teacher": ("Teacher's top-K pass; floor 2NHV", teacher),
    "rkl": ("Full-vocabulary reverse KL; floor 6NHV + 2NHtV", partial(full_kl, beta=1.0)),
    "jsd": ("Full-vocabulary JSD(0.5); floor 6NHV + 2NHtV", partial(full_kl, beta=0.5)),
}


def beyond(x, fn):
    """Peak of fn() beyond inputs and gradients, as text in MiB."""
    x.h.grad = x.w.grad = None
    most = peak(fn, x.device)[0] - sum(p.grad.nbytes for p in (x.h, x.w) if p.grad is not None)
    return f"{most / MiB:,.1f}"


def fits(fn):
    """Whether fn() runs without running out of a GPU's memory, as naive code may."""
    try:
        fn()
    except torch.OutOfMemoryError:
        return False
    return True


def losses(args):
    x = make_inputs(args)
    for title, make in (TASKS[task] for task in args.tasks):
        fns, base = make(x)
        too_large = {name for name, fn in fns.items() if fn and args.device == "cuda" and not fits(fn)}
        there = {name: fn for name, fn in fns.items() if fn and name not in too_large}
        times = interleaved({"floor": base} | there, args.runs) if args.runs else {}
        rows = []
        for name, fn in fns.items():
            if name in too_large:
                rows.append([name, "out of memory", "", ""])
                continue
            t = [f"{times[name] / times['floor']:.2f}", f"{times[name] * 1e3:.0f}"] if fn and times else ["", ""]
            memory = beyond(x, fn) if fn and not args.no_memory else ""
            rows.append([name, *t, memory] if fn else [name, "not run" if "--" in name else "not installed", "", ""])
        if times:
            rows.append(["floor: the matmuls alone", "1.00", f"{times['floor'] * 1e3:.0f}", ""])
        table(f"{title}. {sizes(args)}", ["", "time / floor", "ms", "MiB beyond gradients"], rows)


def sizes(a):
    where = "CUDA" if a.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"N {a.N:,}, H {a.H}, Ht {a.Ht}, V {a.V:,}, K {a.K}, {a.dtype}, {where}, {a.runs} runs"


def scale(args):
    """Ours at N, 2N and 4N positions."""
    rows = []
    for task in args.tasks:
        xs = {n: make_inputs(args, n) for n in (args.N, 2 * args.N, 4 * args.N)}
        fns = {n: TASKS[task][1](x)[0][OURS] for n, x in xs.items()}
        times = interleaved(fns, args.runs)
        for n, t in times.items():
            row = [task, n, f"{t * 1e3:.0f}", f"{t / times[args.N]:.2f}", beyond(xs[n], fns[n])]
            rows.append(row)
    head = ["", "N", "ms", "time / first", "MiB beyond gradients"]
    table(f"Ours, as N grows. {sizes(args)}", head, rows)


def drift_and_gate(logp, old, segments):
    return gate(drift(logp, old), segments)


def gates(args):
    """The gates of N positions in 8 responses, and their segments, beside the OPD loss of the same N."""
    shape = 8, args.N // 8
    logp, old = -torch.rand(2, args.N // 8 * 8, device=args.device)
    mask = torch.ones(shape, dtype=torch.bool)
    newline = torch.rand(shape) < 0.03
    fns = {}
    for kind in KINDS:
        fns["segments", kind] = partial(segment_index, mask, kind, newline=newline)
        fns["gate", kind] = partial(
            drift_and_gate, logp, old, segment_index(mask, kind, newline=newline).to(args.device)
        )
    times = interleaved(fns | {OURS: opd(make_inputs(args))[0][OURS]}, args.runs or 5)
    rows = []
    for kind in KINDS:
        gate_time, segment_time = times["gate", kind], times["segments", kind]
        share = (gate_time + segment_time) / times[OURS]
        rows.append([kind, f"{gate_time * 1e3:.2f}", f"{segment_time * 1e3:.2f}", f"{share:.2%}"])
    title = f"Gates of {list(shape)} tokens, beside the OPD loss, {times[OURS] * 1e3:.0f} ms"
    head = ["gate", "gate, ms per update", "segments, ms per batch", "of the loss's time"]
    table(f"{title}. {sizes(args)}", head, rows)


def main(argv=None):
    cuda = torch.cuda.is_available()
    tables = {"losses": losses, "scale": scale, "gates": gates}
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.losses", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", nargs="*", help=f"{', '.join(tables)}; default: all")
    add("--N", type=int, default=16384 if cuda else 1024, help="positions")
    add("--H", type=int, default=2048 if cuda else 512, help="student's hidden size")
    add("--Ht", type=int, default=0, help="teacher's; 0: H")
    add("--V", type=int, default=151936, help="vocabulary")
    add("--K", type=int, default=32, help="teacher's top-K")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--runs", type=int, default=5, help="of each row; 0: memory alone")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of losses and scale")
    add("--compile", action="store_true", help="rows under torch.compile too")
    add("--no_memory", action="store_true", help="time alone")
    args = parser.parse_args(argv)
    args.Ht = args.Ht or args.H
    torch.set_num_threads(args.threads)
    for what in args.what or tables:
        if what not in tables:
            parser.error(f"{what} is none of {', '.join(tables)}")
        tables[what](args)


if __name__ == "__main__":
    main()
