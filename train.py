"""On-policy distillation with policy-drift gating (arXiv 2606.24084), in one loop:

    sample responses -> the teacher scores them, once -> epochs x minibatches of (loss, gate, step) -> log, evaluate, save

Suggested reading order: main, update (the paper's Eq. 1), position_loss; then gating.gate and losses.lsm_loss.

A *step* samples one rollout batch: cfg.prompts x cfg.group responses. The batch is split into cfg.minibatches minibatches,
and each of them gets one optimizer *update* per epoch. A minibatch is processed in micro-batches that fit in memory.

Two choices that the paper leaves open:
1. The old log-probs, from which drift is measured, come from the trainer's own forward pass before the first update, never
   from the sampler: a different engine, precision or top-p would show up as drift.
2. The sums of Eq. 1 run over the whole minibatch, on all ranks, so the result does not depend on how it was split.

Ranks: every rank holds all rollouts, in the same order, and computes the same split of them into minibatches; it trains on its
share of each. All ranks must call the following equally often, because the ranks communicate there: every forward and
backward pass (weights are sharded), full_weights, on_all_ranks, sample_on_all_ranks, stop.requested, and the functions of
metrics and evaluate. So a condition around such a call must be equal on every rank: has_evaluation, for example, broadcasts
rank 0's answer. `skipped` must be equal, too, or the ranks' weights would differ.

    python train.py                                        # a toy run on a CPU; the paper's setting on a GPU
    python train.py --gate block --block 64
    torchrun --nproc_per_node 8 train.py --preset qwen3    # FSDP2, and one sampler per rank
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import checkpoint
import data
import evaluate
import metrics
import plot
import rollout
from common import (
    errors_in_one_line,
    hide_progress_bars,
    init_device,
    keep_tracebacks_in,
    on_all_ranks,
    outlive_terminal,
    rank,
    say,
    try_to,
    world_size,
)
from configs import TOPK_LOSSES, TrainConfig, command_line, parse
from gating import drift, gate
from losses import head_kl, head_logits, lsm_loss, opd_loss, tail_loss
from policy import (
    Policy,
    choose_attention_kernels,
    full_tensor,
    full_weights,
    load_policy,
    load_tokenizer,
    model_paths,
    token_logprobs,
)
from teacher import load_teacher

# -----------------------------------------------------------------------------
# The base loss at each of the N response tokens of a micro-batch. The fields of a MicroBatch (made by data.collate):
#   ids [B, L]           prompts and responses, padded on the right
#   rows, cols [N]       hidden[rows, cols] predicts a response token: cols is the position before it
#   tokens [N]           the response tokens y_t. Student and teacher may end an answer with different tokens: with --merge_stops
#                        all of them count as one outcome of the distribution, and are replaced by the first of them
#   segments [N]         index of the segment that each token is in, for --gate and --block (gating.segment_lengths)
#   position [N]         relative position in its response, in (0, 1); for plots
#   logp_sampler [N]     log-probs that the sampler reported, at temperature 1; for metrics only
#   logp_old [N]         log pi_old(y_t); None until main() or update() sets it, before the first update
#   teacher              the teacher's targets, set by main(), at cfg.temperature like logp_old:
#                          "logq_sampled" [N]: log q(y_t)
#                          "topk_ids", "topk_logq" [N, K]: its most likely tokens. head_topk returns at least one, so
#                            losses that do not use them have K = 1
#                          "hidden" [N, H_t]: its hidden states, for full-vocabulary losses only
#                        They stay on the host, because they are reused in every epoch and would fill the GPU.
#
# To add a loss: its name in configs.py (and in TOPK_LOSSES or FULL_VOCABULARY_LOSSES, from which teacher.py knows which
# targets to make) and its branch here. Each function makes one forward pass of the student and returns
#   logp [N]             log pi(y_t) under the current student, without gradient
#   loss [N]             the loss at each token, with gradient; for an empty micro-batch (N = 0) too, so that backward runs
#   info {name: [N]}     diagnostics, logged as loss/NAME
# `on_hidden` is called inside the forward pass with the head's weights; policy.py says why.


def position_loss(policy, batch, cfg, teacher_head):
    if cfg.loss == "opd":
        return sampled_token_loss(policy, batch, cfg)
    if cfg.loss in TOPK_LOSSES:
        return topk_loss(policy, batch, cfg)
    return full_vocabulary_loss(policy, batch, cfg, teacher_head)


def sampled_token_loss(policy, batch, cfg):
    """OPD: the teacher's log-ratio on the sampled token as PPO's advantage."""
    logp = token_logprobs(policy, batch, cfg.temperature)
    # logp_old is None only before the first update of a step, when the current student is still the old one.
    logp_old = logp.detach() if batch.logp_old is None else batch.logp_old
    logq = batch.teacher["logq_sampled"].to(logp.device)
    loss, info = opd_loss(logp, logp_old, logq, cfg.clip_low, cfg.clip_high, cfg.dual_clip, cfg.advantage)
    return logp.detach(), loss, info


def topk_loss(policy, batch, cfg):
    """LSM and its relatives: student against teacher on the teacher's K most likely tokens."""
    targets = {name: x.to(batch.ids.device) for name, x in batch.teacher.items()}
    sampled = batch.tokens[:, None]  # [N, 1]
    ids = torch.cat([sampled, targets["topk_ids"]], 1)  # [N, 1 + K]
    # Renormalised on the support, the loss does not depend on lse, the logsumexp over the vocabulary. The gate needs lse, for
    # log pi(y_t), but without gradient. head_logits recomputes all logits in its backward pass only if lse gets a gradient;
    # the detach makes sure that it gets none, and the backward pass reads only 1 + K rows of the head per token.
    loss_needs_lse = cfg.loss == "tail_topk" or not cfg.renormalise

    def on_hidden(hidden, weight, bias):
        z, lse = head_logits(hidden, weight, ids, bias, **policy.head_options(cfg.temperature))
        if not loss_needs_lse:
            lse = lse.detach()
        return z, lse

    z, lse = policy(batch.ids, batch.rows, batch.cols, on_hidden)  # logits [N, 1 + K], logsumexp [N]
    logp = (z - lse[:, None]).detach()

    # A teacher's server may return fewer than K tokens: an unfilled slot holds log-prob -inf, and an id without meaning.
    # NaN counts as filled: it makes the loss NaN, and update() skips.
    is_filled = targets["topk_logq"] != -torch.inf  # [N, K]
    sampled_in_topk = (is_filled & (targets["topk_ids"] == sampled)).any(1)  # [N]
    info = {
        "outside": 1 - sampled_in_topk.float(),
        "teacher_mass": targets["topk_logq"].exp().sum(1),
        "student_mass": logp[:, 1:].exp().masked_fill(~is_filled, 0.0).sum(1),
    }
    if cfg.loss == "tail_topk":  # takes none of the options below
        logp_topk = (z[:, 1:] - lse[:, None]).masked_fill(~is_filled, -torch.inf)
        return logp[:, 0], tail_loss(logp_topk, targets["topk_logq"]), info
    # Column 0, the sampled token, joins the support only with --add_sampled, and only if it is not in the top-K.
    add_sampled = ~sampled_in_topk if cfg.add_sampled else torch.zeros_like(sampled_in_topk)
    support = torch.cat([add_sampled[:, None], is_filled], 1)  # [N, 1 + K]
    logq = torch.cat([targets["logq_sampled"][:, None], targets["topk_logq"]], 1)  # [N, 1 + K]
    options = {
        "renormalise": cfg.renormalise,
        "log_ratio_clamp": cfg.log_ratio_clamp,
        "forward": cfg.loss == "fkl_topk",
    }
    return logp[:, 0], lsm_loss(z, logq, support, lse=lse, **options), info


def full_vocabulary_loss(policy, batch, cfg, teacher_head):
    """KL(student || teacher), KL(teacher || student), or Jensen-Shannon, over all tokens of the vocabulary."""
    hidden_t = batch.teacher["hidden"].to(batch.ids.device)  # [N, H_t]
    weight_t, bias_t = teacher_head
    beta = {"rkl": 1.0, "fkl": 0.0, "jsd": cfg.beta}[cfg.loss]  # as head_kl defines it

    def on_hidden(hidden, weight, bias):
        options = policy.head_options(cfg.temperature)
        kl, lse = head_kl(hidden, weight, hidden_t, weight_t, bias, bias_t, beta=beta, **options)
        with torch.no_grad():  # log pi(y_t) for the gate
            z, _ = head_logits(hidden, weight, batch.tokens[:, None], bias, lse=False, **options)
        return z[:, 0] - lse, kl

    logp, loss = policy(batch.ids, batch.rows, batch.cols, on_hidden)
    return logp, loss, {}


# -----------------------------------------------------------------------------
# one update


def update(policy, optimizer, micro_batches, cfg, teacher_head=None):
    """One optimizer step on a minibatch, given as this rank's micro-batches: the gradient of the paper's Eq. 1,

        L = sum_t g_t loss_t / sum_t g_t      over the response tokens t of the whole minibatch, on all ranks

    Every rank must run the same number of forward and backward passes, or FSDP hangs: data.make_minibatches pads the shorter
    ranks with empty micro-batches (N = 0), which add nothing to the sums. Returns {loss, grad_norm, skipped}, and for each
    micro-batch a dictionary of tensors [N].
    """
    tau = 0.0 if cfg.gate == "none" else cfg.tau  # exp(0) = 1: no gate, but drift is still measured
    sums = torch.zeros(2, device=micro_batches[0].ids.device)  # sum_t g_t loss_t, sum_t g_t
    per_token = []
    for batch in micro_batches:
        # log pi(y_t) of the current student, and the base loss, at every response token
        logp, loss, info = position_loss(policy, batch, cfg, teacher_head)
        if batch.logp_old is None:  # no update yet on this rollout batch: this is log pi_old(y_t)
            batch.logp_old = logp
        # Drift d_t = log pi(y_t) - log pi_old(y_t); s, its signed mean over each segment; the gate g = exp(-tau |s|).
        g, s = gate(logp, batch.logp_old, batch.segments, tau=tau, stat=cfg.stat)
        # The numerator. g has no gradient: it weights the loss, and is not trained on.
        weighted_loss = (g * loss).sum()
        weighted_loss.backward()  # gradients add up over the micro-batches
        sums += torch.stack([weighted_loss.detach(), g.sum()])
        d = drift(logp, batch.logp_old)
        per_token.append({**info, "loss": loss.detach(), "g": g, "s": s, "d": d, "position": batch.position})

    # The denominator is known only now: it is a sum over all micro-batches and ranks. Dividing each micro-batch by its own sum
    # would give tokens in short micro-batches a larger weight; computing the sum first would take a second forward pass.
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss_sum = sums[0]
    gate_sum = sums[1].clamp(min=1e-30)  # avoids 0 / 0 if every gate underflows; the gradient is then 0
    params = [p for p in policy.parameters() if p.grad is not None]
    for p in params:
        p.grad *= world_size() / gate_sum  # FSDP has averaged the gradients over the ranks; Eq. 1 needs their sum
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(params, cfg.grad_clip or float("inf")))

    result = {"loss": (loss_sum / gate_sum).item(), "grad_norm": grad_norm.item()}
    result["skipped"] = not (math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"]))
    if not result["skipped"]:  # equal on all ranks, so all of them step or none does
        optimizer.step()
    optimizer.zero_grad()
    return result, per_token


def learning_rate(cfg, step):
    """Linear warm-up over cfg.warmup steps, then constant, or linear decay to lr / 10 at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    return cfg.lr * (1 - 0.9 * (step - cfg.warmup) / max(1, cfg.steps - 1 - cfg.warmup))


# -----------------------------------------------------------------------------
# the run


@dataclass
class Run:
    """What setup() has checked, loaded and opened."""

    device: torch.device
    tokenizer: object  # the student's
    train_prompts: data.TrainingPrompts
    held_out: dict  # {name: [(problem, prompt ids)]}
    vocabulary: data.Vocabulary  # that student and teacher share
    policy: Policy  # the student
    teacher: object  # a model in this process, or a server
    optimizer: torch.optim.Optimizer
    sampler: object
    logger: metrics.Logger
    stop: checkpoint.StopSignal  # SIGTERM or Ctrl-C; requested() is a collective, requested_here() is local
    lock: object  # of --out, on rank 0
    start: int  # steps already done in the checkpoint that it resumes from; 0 for a new run
    saved: int | None  # the step of the newest checkpoint


def setup(cfg) -> Run:
    # on_all_ranks(f, ...) calls f on every rank. If it fails on one, all ranks exit (SystemExit) with that error in one line.
    device = on_all_ranks(init_device, cfg)

    # Fail early: check everything before a model loads or a file is written.
    resume_from = on_all_ranks(checkpoint.find, cfg)  # a checkpoint's folder, or None
    on_all_ranks(rollout.choose, cfg.rollout, device.type)  # fails if vLLM was requested but cannot run
    hide_progress_bars()
    on_all_ranks(checkpoint.check_push, cfg)
    paths = on_all_ranks(model_paths, cfg)
    tokenizer, vocabulary = on_all_ranks(load_tokenizer, paths, cfg)
    train_prompts, held_out = on_all_ranks(data.load_problems, cfg, tokenizer, vocabulary.size)
    on_all_ranks(checkpoint.check_data, resume_from, train_prompts.digest)
    lock = on_all_ranks(checkpoint.claim, cfg)  # from here on, --out belongs to this run
    keep_tracebacks_in(Path(cfg.out))
    start = checkpoint.number(resume_from) if resume_from else 0
    logger = on_all_ranks(metrics.Logger, cfg, start)
    say(metrics.start_table(cfg, start, device, tokenizer, vocabulary, train_prompts, held_out))

    teacher = on_all_ranks(load_teacher, cfg, paths.get("teacher"), tokenizer, vocabulary, device)
    policy = on_all_ranks(load_policy, paths["student"], cfg, vocabulary, device, trainable=True)
    adamw = {"lr": cfg.lr, "betas": (0.9, cfg.beta2), "weight_decay": cfg.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(policy.parameters(), **adamw)
    on_all_ranks(checkpoint.save_model_files, Path(cfg.out), policy, paths["student"], tokenizer)
    if resume_from:
        checkpoint.restore(resume_from, policy, optimizer)
    stop = checkpoint.StopSignal()
    # Responses per step for one vLLM engine, which spans cfg.tp ranks (tensor parallelism)
    responses = math.ceil(cfg.prompts * cfg.group * cfg.tp / world_size())
    options = {"max_len": cfg.max_prompt + cfg.max_response, "max_num_seqs": max(64, responses), "tp": cfg.tp}
    sampler_args = cfg, paths["student"], policy.lm, tokenizer, vocabulary.size, vocabulary.stop_ids
    sampler = on_all_ranks(rollout.make_sampler, *sampler_args, **options, should_stop=stop.requested_here)
    choose_attention_kernels(device)  # now that vLLM, which has its own choice, is imported
    return Run(
        device, tokenizer, train_prompts, held_out, vocabulary, policy, teacher, optimizer, sampler, logger, stop, lock,
        start=start, saved=start if resume_from else None,
    )  # fmt: skip


@errors_in_one_line("train.py")
def main(cfg):
    run = setup(cfg)
    policy, teacher, sampler, optimizer = run.policy, run.teacher, run.sampler, run.optimizer

    def save(step):
        if step != run.saved:
            on_all_ranks(checkpoint.save, Path(cfg.out), step, policy, optimizer, cfg, run.train_prompts.digest)
            run.saved = step

    def save_if_it_ends(step, task, *args):
        """task(*args). If it ends the run, as when the teacher's server is gone, the finished steps are saved first."""
        try:
            return task(*args)
        except SystemExit:
            save(step)
            raise

    scores = {}  # pass@k of the newest evaluation, for the bar

    def evaluate_if_due(step):
        if run.held_out and (step % cfg.eval_every == 0 or step == cfg.steps) and not run.logger.has_evaluation(step):
            row = save_if_it_ends(step, evaluate.evaluate_student, run, cfg)
            if not run.stop.requested():  # a stop cuts responses short: drop the row; a resumed run evaluates again
                run.logger.log({"step": step, **row})
                scores.update({name: x for name, x in row.items() if "pass@" in name})

    run.stop.listen()
    evaluate_if_due(run.start)
    done = run.start  # steps
    bad_updates = 0  # in a row
    bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, disable=rank() > 0, unit="step")
    for step in bar:
        # ---- Sample at cfg.temperature and cfg.top_p. (pi_old is the distribution before top-p.) A response depends only on
        # the weights, its prompt and its seed, so a resumed run reproduces it.
        clock = metrics.Clock(run.device)
        jobs = run.train_prompts.jobs_of_step(step, cfg.prompts, cfg.group)  # (prompt ids, seed)
        sampler.sync(full_weights(policy))
        rollouts = rollout.sample_on_all_ranks(sampler, jobs, rollout.sampling_options(cfg))
        sampler.sleep()  # leaves the GPU's memory to the teacher and the update
        if run.stop.requested():  # on any rank: the rollouts are unfinished, and dropped
            break
        clock.lap("rollout")

        # ---- Teacher targets, once for all epochs. Each rank gets its share of every minibatch, in equally many micro-batches.
        minibatches = data.make_minibatches(rollouts, cfg, step, run.vocabulary, run.device, rank(), world_size())
        micro_batches = [batch for minibatch in minibatches for batch in minibatch]
        targets = save_if_it_ends(done, on_all_ranks, teacher.targets, micro_batches)
        for batch, batch_targets in zip(micro_batches, targets, strict=True):
            batch.teacher = batch_targets
        clock.lap("teacher")

        # ---- Old log-probs: the student's own, before the first update. The first minibatch needs no pass for them: its
        # first training pass comes before any update, and update() keeps its log-probs. token_logprobs is the same forward
        # pass in the same precision as position_loss; the functions for the head differ by rounding only.
        with torch.no_grad():
            for batch in [batch for minibatch in minibatches[1:] for batch in minibatch]:
                batch.logp_old = token_logprobs(policy, batch, cfg.temperature)
            # Only for metrics.sampler_mismatch: the sampler reports log-probs at temperature 1, whatever it samples at. If
            # training uses another temperature, rescore one micro-batch at 1 to compare.
            rescored = None
            if cfg.temperature != 1:
                rescored = [token_logprobs(policy, batch, 1.0) for batch in micro_batches[:1]]

        # ---- Update: epochs x minibatches of Eq. 1. From the second update on, the student has drifted.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        updates = []
        for epoch in range(cfg.epochs):
            if epoch > 0:  # the first epoch starts with the minibatch that has no old log-probs yet
                random.Random(f"{cfg.seed} {step} {epoch}").shuffle(minibatches)
            for minibatch in minibatches:
                result, per_token = update(policy, optimizer, minibatch, cfg, teacher.head)
                updates.append((minibatch, result, per_token))
                # Reports an update that was skipped, and ends the run after --max_bad_updates in a row.
                bad_updates = metrics.count_bad_updates(
                    bad_updates, result, per_token, minibatch, run.train_prompts.problem_ids, cfg
                )
        clock.lap("update")

        # ---- Log, save, evaluate.
        done = step + 1
        row = {"step": done, "lr": learning_rate(cfg, step)}
        row |= metrics.of_rollouts(rollouts) | clock.metrics(rollouts, cfg.epochs)
        row |= metrics.of_updates(updates, micro_batches, cfg.epochs)
        row |= metrics.sampler_mismatch(micro_batches, rescored, run.vocabulary.merged)
        row |= metrics.stop_gap(micro_batches, run.vocabulary.stop_ids)
        metrics.check_sampler(row, run.device)
        run.logger.log(row)
        if cfg.trace_every and step % cfg.trace_every == 0:
            run.logger.log_trace(plot.trace(done, updates, micro_batches, run.tokenizer, cfg))
        shown = {name: row[name] for name in ("loss", "gap", "gate/ess") if name in row} | scores
        bar.set_postfix({name: f"{x:.3g}" for name, x in shown.items()})
        if cfg.sample_every and step % cfg.sample_every == 0:
            text = run.tokenizer.decode(rollouts[0].response)
            say(f"--- step {done}, a response ({rollouts[0].finish}): {text!r}")
        if done == cfg.steps or (cfg.save_every and done % cfg.save_every == 0):
            save(done)
        evaluate_if_due(done)

    if run.stop.requested():
        save(done)
    finish(run, cfg, done)


def finish(run, cfg, done):
    """If the run was stopped, prints how to resume it; otherwise writes the student and the pictures."""
    run.stop.release()
    if run.stop.requested():
        again = command_line(replace(cfg, resume="true", overwrite=False))  # --resume takes true, false or auto
        say(f"stopped by {run.stop.reason} after step {done} of {cfg.steps}, and saved. To resume, run:\n{again}")
    else:
        on_all_ranks(checkpoint.save_model, Path(cfg.out), run.policy)
        if rank() == 0:
            metrics.write_model_card(cfg)
            try_to(plot.draw, cfg.out)
            say(metrics.end_table(cfg))
            if cfg.push:
                checkpoint.push(cfg)
    if run.lock:
        run.lock.close()
    if dist.is_initialized():  # also in a single process, once vLLM has made a group of its own
        dist.barrier()  # a rank that leaves while another's gloo thread still cleans up can abort it
        dist.destroy_process_group()


if __name__ == "__main__":
    outlive_terminal()
    main(parse(TrainConfig))
