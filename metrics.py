"""What a step measures, over all ranks, and where it goes: metrics.jsonl, trace.jsonl, W&B, TensorBoard."""

import json
import math
import os
import re
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

import rollout
from common import exit_all, gather, on_all_ranks, rank, read_jsonl, say, versions, world_size, write_file
from configs import TOPK_LOSSES, command_line
from gating import gate_stats
from report import format_columns, percent

# A sampler this far from the trainer holds other weights: mean |difference| of log-probs on sampled tokens, in nats.
OUT_OF_STEP = {"cpu": 1e-3, "cuda": 0.1}  # fp32; bf16


class Logger:
    """On rank 0, log(row) appends to metrics.jsonl, and to W&B or TensorBoard if asked for; log_trace(row) to trace.jsonl.

    A run that goes on from step `start` first drops what it wrote beyond it before it was killed, and a torn last line.
    """

    def __init__(self, cfg, start):
        self.path = Path(cfg.out) / "metrics.jsonl"
        self.trace_path = Path(cfg.out) / "trace.jsonl"
        self.wandb = self.tensorboard = None
        if rank() > 0:
            return
        cut(self.path, start)
        if self.trace_path.exists():
            cut(self.trace_path, start)
        if cfg.log == "wandb":
            self.wandb = start_wandb(cfg, self.path.parent, is_resumed=start > 0)
        if cfg.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.path.parent, purge_step=start + 1 if start else None)

    def log(self, row):
        """All ranks call it with the same row, and exit in one line if it cannot be written."""
        on_all_ranks(self.write, row)

    def write(self, row):
        if rank() > 0:
            return
        row = {name: x for name, x in row.items() if isinstance(x, list) or math.isfinite(x)}  # JSON has no NaN
        append(self.path, row)
        scalars = {name: x for name, x in row.items() if not isinstance(x, list)}
        if self.wandb:
            self.wandb.log(scalars, step=row["step"])
        if self.tensorboard:
            for name, x in scalars.items():
                self.tensorboard.add_scalar(name, x, row["step"])

    def log_trace(self, row):
        """All ranks call it with what plot.trace() returned; rank 0 writes its own."""
        on_all_ranks(self.write_trace, row)

    def write_trace(self, row):
        if rank() == 0 and row:
            append(self.trace_path, row)

    def has_evaluation(self, step):
        """Whether the evaluation after this step is there already: a run can be stopped between saving and evaluating."""
        found = False
        if rank() == 0:
            rows = [row for row in read_jsonl(self.path) if row["step"] == step]
            found = any(name.startswith("eval") for row in rows for name in row)
        return gather(found)[0]


def cut(path, start):
    """Drops the rows beyond step `start`, or all of them if it is 0, and makes the file if it is not there."""
    rows = read_jsonl(path) if path.exists() and start else []
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= start))


def append(path, row):
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())
        os.fsync(file.fileno())


def start_wandb(cfg, out, is_resumed):
    """The wandb module, logging to one W&B run for all parts of a run that is resumed. ValueError if it cannot start."""
    import wandb

    id_file = out / "wandb_id"
    run_id = id_file.read_text().strip() if is_resumed and id_file.exists() else wandb.util.generate_id()
    id_file.write_text(run_id + "\n")
    try:
        wandb.init(project="opd-gating", name=out.name, id=run_id, resume="allow", dir=str(out), config=asdict(cfg))
    except wandb.errors.Error as error:  # such as not being logged in
        raise ValueError(f"--log wandb: {error}") from error
    return wandb


# -----------------------------------------------------------------------------
# what a run says of itself: a table at its start, one at its end, and the student's model card


def start_table(cfg, start, device, tokenizer, vocabulary, train_prompts, held_out) -> str:
    """What matters of a run's settings, a line each. OUT/config.json has all of them."""
    n, n_dropped = len(train_prompts.prompts), train_prompts.n_dropped
    dropped = f"; {n_dropped} of {n + n_dropped} training prompts are longer than --max_prompt, and left out"
    sizes = {"block": f", {cfg.block} tokens", "span": f", {cfg.span_min} to {cfg.span_max} tokens"}
    tau = "" if cfg.gate == "none" else f", tau {cfg.tau:g}"
    sampler, why = rollout.choose(cfg.rollout, device.type)
    stops = " and ".join(f"{tokenizer.decode([i])!r} ({i})" for i in vocabulary.stop_ids)
    _, prompt = train_prompts.prompts[0]
    lines = {
        "preset": cfg.preset,
        "student": cfg.student,
        "teacher": cfg.teacher_url or cfg.teacher,
        "data": f"{cfg.data}, {n} problems" + (dropped if n_dropped else ""),
        "held out": "; ".join(f"{name}, {len(problems)} problems" for name, problems in held_out.items()) or "none",
        "stops": (stops or "none") + (", counted as one outcome (--merge_stops)" if vocabulary.merged else ""),
        "loss": cfg.loss + (f", teacher's top {cfg.topk}" if cfg.loss in TOPK_LOSSES else ""),
        "gate": cfg.gate + sizes.get(cfg.gate, "") + tau,
        "rollouts": f"{cfg.steps} steps x {cfg.prompts} prompts x {cfg.group} responses, up to {cfg.max_response} tokens",
        "reuse": f"{cfg.epochs} epochs x {cfg.minibatches} minibatches = {cfg.epochs * cfg.minibatches} updates in a step",
        "sampler": f"{sampler}: {why}",
        "device": str(device) + (f", {world_size()} ranks" if world_size() > 1 else ""),
        "out": cfg.out + (f", resumed from step {start}" if start else ""),
        "a prompt": f"{len(prompt)} tokens: {tokenizer.decode(prompt)!r}",
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def first_and_last(cfg) -> dict:
    """{metric: (its first value, its last)} of OUT/metrics.jsonl. A metric need not be in every row."""
    first, last = {}, {}
    for row in read_jsonl(Path(cfg.out) / "metrics.jsonl"):
        first = row | first
        last |= row
    return {name: (first[name], last[name]) for name in last}


def end_table(cfg) -> str:
    """The first and the last value of the metrics that a run is judged by, and where its results are."""
    body = []
    for name, values in first_and_last(cfg).items():
        if re.fullmatch("eval/.*(pass|mean)@.*", name):
            body.append([name, *(f"{percent(x)} %" for x in values)])
        elif re.fullmatch("eval/.*(kl|gap)|gap|gate/drift_abs", name):
            body.append([name, *(f"{x:.3f} nats" for x in values)])
    places = {"student": "final", "metrics": "metrics.jsonl", "curves": "curves.png"}
    lines = [f"{name:<10}{cfg.out}/{file}" for name, file in places.items()]
    return "\n".join(["", format_columns(["", "before", "after"], body), "", *lines])


def write_model_card(cfg):
    """OUT/final/README.md, in the hub's form: what the student was made of, with its evaluation, command and commit."""
    from huggingface_hub import ModelCardData

    evaluated = {name: values for name, values in first_and_last(cfg).items() if name.startswith("eval")}
    table = "It was not evaluated during training."
    if evaluated:
        lines = ["| held-out problems | before | after |", "|---|---|---|"]
        for name, (before, after) in evaluated.items():
            title = name.replace("interval", f"pass@{cfg.k}, 95 % interval over problems")
            lines.append(f"| {title} | {decimals(before)} | {decimals(after)} |")
        table = "\n".join(lines)
    models = [cfg.student] if cfg.teacher_url else [cfg.student, cfg.teacher]
    hub_names = [name for name in models if "/" in name and not Path(name).exists()]
    tags = ["on-policy-distillation", "policy-drift-gating"]
    data = ModelCardData(
        base_model=hub_names or None, library_name="transformers", pipeline_tag="text-generation", tags=tags
    )
    command = command_line(cfg).split(" && ")[1]  # without the working directory
    text = f"""---
{data.to_yaml()}
---
# {Path(cfg.out).name}

{cfg.student}, distilled on policy from {cfg.teacher_url or cfg.teacher} on the prompts of {cfg.data}: {cfg.steps} steps of
{cfg.prompts} x {cfg.group} responses, {cfg.epochs} epochs on each batch, loss {cfg.loss}, gate {cfg.gate}
([arXiv 2606.24084](https://arxiv.org/abs/2606.24084)).

{table}

    {command}

Code: commit {versions()["commit"] or "unknown"}; torch {versions()["torch"]}, transformers {versions()["transformers"]}.
"""
    write_file(Path(cfg.out) / "final" / "README.md", text)


def decimals(x) -> str:
    return " to ".join(f"{y:.3f}" for y in x) if isinstance(x, list) else f"{x:.3f}"


class Clock:
    """Seconds of each phase of a step: clock.lap("rollout") ends the phase of that name."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.last = self.now()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # kernels run behind the Python that starts them
        return time.perf_counter()

    def lap(self, phase):
        now = self.now()
        self.seconds[phase] = now - self.last
        self.last = now

    def metrics(self, rollouts, epochs):
        """time/PHASE in seconds, and tokens_per_s/PHASE in response tokens; the update sees each token once per epoch."""
        tokens = sum(len(r.response) for r in rollouts)
        found = {}
        for phase, seconds in self.seconds.items():
            found[f"time/{phase}"] = seconds
            found[f"tokens_per_s/{phase}"] = tokens * (epochs if phase == "update" else 1) / seconds
        return found


def of_rollouts(rollouts) -> dict:
    """Of a step's rollouts, which every rank has: lengths in tokens, shares of them, and a checksum."""
    n = len(rollouts)
    tokens = sum(len(r.response) for r in rollouts)
    texts = [(tuple(r.prompt), tuple(r.response)) for r in rollouts]
    return {
        "rollout/tokens": tokens,
        "rollout/length": tokens / n,
        "rollout/truncated": sum(r.finish == "length" for r in rollouts) / n,
        "rollout/empty": sum(not r.response for r in rollouts) / n,
        "rollout/distinct": len(set(texts)) / n,
        "rollout/checksum": zlib.crc32(repr(texts).encode()),  # two runs that agree in it had the same rollouts
    }


def of_updates(updates, batches, epochs) -> dict:
    """Of a step's updates [(minibatch, result, per-token tensors of each micro-batch)]; {} if there were none.

    Loss and gradient norm are means over all updates that were not skipped. The per-token metrics are of the last epoch,
    where drift is largest. gap: mean of log pi_old - log q, which estimates the reverse KL of student to teacher.
    """
    if not updates:
        return {}
    good = [result for _, result, _ in updates if not result["skipped"]]
    row = {name: sum(result[name] for result in good) / len(good) for name in ("loss", "grad_norm") if good}
    row["skipped"] = len(updates) - len(good)

    last_epoch = updates[-(len(updates) // epochs) :]
    parts = [tensors for _, _, per_token in last_epoch for tensors in per_token]  # one dictionary per micro-batch
    tokens = {name: all_tokens([part[name] for part in parts]) for name in parts[0] if name != "loss"}
    g, s, d, position = (tokens.pop(name) for name in ("g", "s", "d", "position"))
    row |= {f"gate/{name}": x.item() for name, x in gate_stats(g, s, d).items()}
    row["gate/by_position"] = by_position(g, position)
    row |= {f"loss/{name}": x.mean().item() for name, x in tokens.items()}
    row["gap"] = all_tokens([teacher_gap(batch) for batch in batches]).mean().item()
    return row


def teacher_gap(batch):
    """[N] log pi_old - log q of the sampled tokens, in nats."""
    return batch.logp_old - batch.teacher["logq_sampled"].to(batch.logp_old.device)


def sampler_mismatch(batches, rescored, merged) -> dict:
    """|log-prob of the trainer - log-prob of the sampler| on the sampled tokens, in nats: mean and largest.

    merged: stop ids that are one outcome for the trainer; the sampler reports each of them alone, so they do not count.
    rescored: the trainer's log-probs at temperature 1 of the first micro-batch, or None if all old log-probs are at 1.
    """
    logprobs = [batch.logp_old for batch in batches] if rescored is None else rescored
    differences = []
    for logp, batch in zip(logprobs, batches, strict=False):
        is_merged = torch.isin(batch.tokens, torch.tensor(merged, dtype=torch.long, device=logp.device))
        counts = ~is_merged & logp.isfinite()  # count_bad_updates reports a trainer that gives NaN
        differences.append((logp - batch.logp_sampler)[counts])
    off = all_tokens(differences).abs()
    if not len(off):
        return {}
    return {"rollout/out_of_step": off.mean().item(), "rollout/out_of_step_max": off.max().item()}


def stop_gap(batches, stop_ids) -> dict:
    """log q(stop) - log pi_old(stop), in nats, where the student has stopped: below 0, the teacher would have gone on."""
    gaps = []
    for batch in batches:
        is_stop = torch.isin(batch.tokens, torch.tensor(stop_ids, dtype=torch.long, device=batch.tokens.device))
        gaps.append(-teacher_gap(batch)[is_stop])
    gap = all_tokens(gaps)
    return {"rollout/stop_gap": gap.mean().item()} if len(gap) else {}


def check_sampler(row, device):
    """Stops a run whose sampler holds other weights than the trainer."""
    off, bound = row.get("rollout/out_of_step", 0), OUT_OF_STEP[device.type]
    if not off <= bound:  # NaN, too
        exit_all(
            f"the sampler is out of step with the trainer: their log-probs of the sampled tokens differ by "
            f"{off:.2g} nats on average, over the bound of {bound:g}, at step {row['step']}"
        )


def count_bad_updates(n_before, result, per_token, batches, problem_ids, cfg):
    """Updates in a row, this one included, whose loss or gradient was not finite. After cfg.max_bad_updates, all exit.

    Each is reported with its problems: those with a loss that is not finite or, if only the gradient is not, all of them.
    """
    if not result["skipped"]:
        return 0
    n = n_before + 1
    every = {tuple(r.prompt) for batch in batches for r in batch.rollouts}
    bad = set()
    for batch, tensors in zip(batches, per_token, strict=True):
        bad |= {tuple(batch.rollouts[row].prompt) for row in batch.rows[~tensors["loss"].isfinite()].tolist()}
    prompts = set().union(*gather(bad)) or set().union(*gather(every))
    names = ", ".join(sorted(problem_ids[prompt] for prompt in prompts))
    say(f"update skipped, {n} in a row: its loss or gradient is not finite. Problems: {names}")
    if cfg.max_bad_updates and n >= cfg.max_bad_updates:
        exit_all(f"{n} updates in a row were not finite (--max_bad_updates); the checkpoints hold none of them")
    return n


def all_tokens(parts):
    """Tensors [n] of this rank's micro-batches, to one tensor over all ranks, on the host."""
    mine = torch.cat(parts).float().cpu() if parts else torch.zeros(0)
    return torch.cat(gather(mine))


def by_position(x, position) -> list:
    """Means of x [N] over twentieths of the responses; None where no token is. position [N] in (0, 1)."""
    total = torch.zeros(2, 20, device=x.device)
    total.index_add_(1, (position * 20).long().clamp(max=19), torch.stack([x, torch.ones_like(x)]))
    return [mean if n else None for mean, n in zip((total[0] / total[1]).tolist(), total[1].tolist(), strict=True)]
