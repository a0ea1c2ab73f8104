"""What a step measures, over all ranks, and where it goes: metrics.jsonl, evaluations.jsonl, trace.jsonl, W&B, TensorBoard.

docs/outputs.md explains every column.
"""

import math
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from gating import gate_stats
from support.common import gather, print0, rank
from support.errors import on_all_ranks, one_line
from support.files import EVALUATIONS, METRICS, TRACE, append_jsonl, read_jsonl, write_jsonl


class Logger:
    """Appends rows to the run's files, on rank 0, and sends their numbers to W&B or TensorBoard if asked to.

    A run that goes on from step `start` first drops what it wrote beyond it before it was killed, and a torn last line.
    """

    def __init__(self, cfg, start):
        self.out = Path(cfg.out)
        self.log_to, self.wandb, self.tensorboard = cfg.log, None, None
        if rank() > 0:
            return
        for name in (METRICS, EVALUATIONS, TRACE):
            path = self.out / name
            rows = read_jsonl(path) if path.exists() and start else []
            if name != TRACE or path.exists() or cfg.trace_every:
                write_jsonl(path, [row for row in rows if row["step"] <= start])
        if cfg.log == "wandb":
            self.wandb = start_wandb(cfg, self.out, is_resumed=start > 0)
            if start and self.wandb.offline:
                # `wandb sync` replaces a run by the newest folder with its id, so that one has to hold all rows.
                rows = [row for name in (METRICS, EVALUATIONS) for row in read_jsonl(self.out / name)]
                for row in sorted(rows, key=lambda row: row["step"]):
                    self.send(row)
        if cfg.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.out, purge_step=start + 1 if start else None)

    def log(self, name, row):
        """Appends a row to the file `name`. All ranks call it, rank 0's row is written, and all exit in one line if it cannot be written."""
        on_all_ranks(self.write, name, row)

    def write(self, name, row):
        if rank() > 0 or not row:
            return
        row = {key: x for key, x in row.items() if not isinstance(x, float) or math.isfinite(x)}  # JSON has no NaN
        append_jsonl(self.out / name, [row])
        if name != TRACE:
            self.send(row)

    def send(self, row):
        """Sends a row's numbers to W&B or TensorBoard; if that fails, never again."""
        scalars = {key: x for key, x in row.items() if isinstance(x, (int, float)) and key != "step"}
        try:
            if self.wandb:
                self.wandb.log(scalars, step=row["step"])
            if self.tensorboard:
                for key, x in scalars.items():
                    self.tensorboard.add_scalar(key, x, row["step"])
        except Exception as error:  # of any kind, such as ConnectionResetError where W&B's own process was killed
            print0(f"warning: no more rows for --log {self.log_to}: {one_line(error)}; the run's own files go on")
            self.wandb = self.tensorboard = None

    def has_evaluation(self, step) -> bool:
        """Whether the evaluation after this step is there already: a run can be stopped between saving and evaluating."""
        steps = {row["step"] for row in read_jsonl(self.out / EVALUATIONS)} if rank() == 0 else ()
        return gather(step in steps)[0]


def start_wandb(cfg, out, is_resumed):
    """A W&B run, the same for all parts of a run that is resumed. ValueError if it cannot start."""
    import wandb

    id_file = out / "wandb_id"
    run_id = id_file.read_text().strip() if is_resumed and id_file.exists() else ""
    options = {"project": "opd-gating", "name": out.name, "dir": str(out), "config": asdict(cfg)}
    try:
        run = wandb.init(id=run_id or None, resume="allow", **options)
    except wandb.errors.Error as error:  # such as not being logged in
        raise ValueError(f"--log wandb: {error}") from error
    id_file.write_text(run.id + "\n")
    return run


class Clock:
    """Seconds of each phase of a step, rollout, teacher and update: clock.lap("rollout") ends the phase of that name."""

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

    def metrics(self, rollouts, epochs) -> dict:
        """Seconds of each phase, and response tokens a second; the update sees each token once per epoch."""
        tokens = sum(len(r.response) for r in rollouts)
        seconds = self.seconds
        return {
            "time/rollout": seconds["rollout"],
            "time/teacher": seconds["teacher"],
            "time/update": seconds["update"],
            "tokens_per_s/rollout": tokens / seconds["rollout"],
            "tokens_per_s/teacher": tokens / seconds["teacher"],
            "tokens_per_s/update": tokens * epochs / seconds["update"],
        }


def step_metrics(cfg, vocabulary, rollouts, micro_batches, rescored, updates, clock) -> dict:
    """A row of metrics.jsonl without its step. updates: [(minibatch, result, per-token tensors of each micro-batch)]."""
    return {
        **rollout_metrics(rollouts),
        **clock.metrics(rollouts, cfg.epochs),
        **update_metrics(updates, cfg.epochs),
        **teacher_metrics(micro_batches, vocabulary.stop_ids),
        **sampler_metrics(micro_batches, rescored, vocabulary.merged),
    }


def rollout_metrics(rollouts) -> dict:
    """Lengths in tokens, shares of the rollouts, and a checksum: two runs that agree in it had the same rollouts."""
    n = len(rollouts)
    tokens = sum(len(r.response) for r in rollouts)
    texts = [(tuple(r.prompt), tuple(r.response)) for r in rollouts]
    return {
        "rollout/tokens": tokens,
        "rollout/length": tokens / n,
        "rollout/truncated": sum(r.finish == "length" for r in rollouts) / n,
        "rollout/empty": sum(not r.response for r in rollouts) / n,
        "rollout/distinct": len(set(texts)) / n,
        "rollout/checksum": f"{zlib.crc32(repr(texts).encode()):08x}",
    }


def update_metrics(updates, epochs) -> dict:
    """Loss and gradient norm are means over all updates that were not skipped; the rest is of the tokens of the last epoch.

    That is where drift is largest. {} if there were no updates.
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
    row |= {name: x.item() for name, x in gate_stats(g, s, d).items()}
    row["gate/by_position"] = by_position(g, position)
    row |= {name: x.mean().item() for name, x in tokens.items()}  # the loss's own diagnostics, such as loss/clipped
    return row


def teacher_metrics(batches, stop_ids) -> dict:
    """What the teacher thinks of the rollouts: A = log q - log pi_old, in nats, of all sampled tokens and of those that stopped.

    kl_sampled, the mean of -A, estimates the reverse KL of student to teacher, with a bias if --top_p is below 1.
    rollout/stop_advantage below 0: the teacher would have gone on.
    """
    advantages, at_stops = [], []
    for batch in batches:
        advantage = batch.teacher["logq_sampled"].to(batch.logp_old.device) - batch.logp_old
        is_stop = torch.isin(batch.tokens, torch.tensor(stop_ids, dtype=torch.long, device=batch.tokens.device))
        advantages.append(advantage)
        at_stops.append(advantage[is_stop])
    advantage, at_stop = all_tokens(advantages), all_tokens(at_stops)
    row = {"kl_sampled": -advantage.mean().item()} if len(advantage) else {}
    return row | ({"rollout/stop_advantage": at_stop.mean().item()} if len(at_stop) else {})


def sampler_metrics(batches, rescored, merged) -> dict:
    """|log-prob of the trainer - log-prob of the sampler| on the sampled tokens, in nats: mean and largest.

    merged: stop ids that are one outcome for the trainer; the sampler reports each of them alone, so they do not count.
    rescored: the trainer's log-probs at temperature 1 of the first micro-batch, or None if all old log-probs are at 1.
    """
    logprobs = [batch.logp_old for batch in batches] if rescored is None else rescored
    differences = []
    for logp, batch in zip(logprobs, batches, strict=False):
        is_merged = torch.isin(batch.tokens, torch.tensor(merged, dtype=torch.long, device=logp.device))
        counts = ~is_merged & logp.isfinite()  # train.py reports a trainer that gives NaN as a bad update
        differences.append((logp - batch.logp_sampler)[counts])
    off = all_tokens(differences).abs()
    if not len(off):
        return {}
    return {"rollout/out_of_step": off.mean().item(), "rollout/out_of_step_max": off.max().item()}


def problems_of(minibatch, per_token, problem_ids) -> str:
    """The problems behind an update that was not finite, comma-separated.

    Those with a loss that is not finite or, if only the gradient is not, all of the minibatch. A collective.
    """
    every = {tuple(r.prompt) for batch in minibatch for r in batch.rollouts}
    bad = set()
    for batch, tensors in zip(minibatch, per_token, strict=True):
        bad |= {tuple(batch.rollouts[row].prompt) for row in batch.rows[~tensors["loss"].isfinite()].tolist()}
    prompts = set().union(*gather(bad)) or set().union(*gather(every))
    return ", ".join(sorted(problem_ids[prompt] for prompt in prompts))


def mean_on_all_ranks(parts) -> float:
    """The mean over all elements of the tensors [n] that all ranks hold."""
    n_and_sum = torch.tensor([[part.numel(), part.double().sum()] for part in parts], dtype=torch.float64).sum(0)
    n, total = sum(gather(n_and_sum))
    return (total / n).item()


def all_tokens(parts):
    """Tensors [n] of this rank's micro-batches, to one tensor over all ranks, on the host."""
    mine = torch.cat(parts).float().cpu() if parts else torch.zeros(0)
    return torch.cat(gather(mine))


def by_position(x, position) -> list:
    """Means of x [N] over twentieths of the responses; None where no token is. position [N] in (0, 1)."""
    total = torch.zeros(2, 20, device=x.device)
    total.index_add_(1, (position * 20).long().clamp(max=19), torch.stack([x, torch.ones_like(x)]))
    return [mean if n else None for mean, n in zip((total[0] / total[1]).tolist(), total[1].tolist(), strict=True)]
