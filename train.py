"""On-policy distillation with policy-drift gating (arXiv 2606.24084), in one loop:

    sample responses -> the teacher scores them, once -> epochs x minibatches of (loss, gate, step) -> log, evaluate, save

The order to read it in: main, update (the paper's Eq. 1), position_loss; then gating.gate and losses.lsm_loss.

Where the paper leaves room:
1. The old log-probs, from which drift is measured, come from the trainer's own forward pass before the first update,
   never from the sampler: another engine, another precision or top-p would read as drift.
2. Gate and loss share one denominator, the sum of the gates over the whole minibatch, over all micro-batches and ranks.
   So the result does not depend on how a minibatch is split.

    python train.py                                        # a toy run on a CPU; the paper's setting on a GPU
    python train.py --gate block --block 64
    torchrun --nproc_per_node 8 train.py --preset qwen3    # FSDP2, and one sampler per rank
"""

import json
import math
import random
from dataclasses import asdict, dataclass, replace
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
from common import init_device, on_all_ranks, rank, say, world_size
from configs import TOPK_LOSSES, TrainConfig, command, parse
from gating import drift, gate
from losses import head_kl, head_logits, lsm_loss, opd_loss, tail_loss
from policy import Policy, describe_prompt, full_tensor, full_weights, load_policy, load_tokenizer, model_paths, score
from teacher import load_teacher

# -----------------------------------------------------------------------------
# The base loss at every response token. Each function makes one forward pass of the student and returns
#   logp  [N]          log pi(y_t) of the sampled tokens under the current student, without gradient
#   loss  [N]          the loss at each of them, with gradient
#   info  {name: [N]}  diagnostics, logged as loss/NAME
# N is the number of response tokens in the micro-batch. A Batch (data.py) holds, for each of them and on this rank's
# device: tokens (their ids), segments (of the gate), position, logp_sampler and, once it is known, logp_old. The
# teacher's targets in batch.teacher (teacher.py) wait on the host: they serve every epoch, and would fill a GPU.


def position_loss(policy, batch, cfg, teacher_head):
    if cfg.loss == "opd":
        return sampled_token_loss(policy, batch, cfg)
    if cfg.loss in TOPK_LOSSES:
        return topk_loss(policy, batch, cfg)
    return full_vocabulary_loss(policy, batch, cfg, teacher_head)


def sampled_token_loss(policy, batch, cfg):
    """OPD: the teacher's log-ratio on the sampled token as PPO's advantage."""
    logp = score(policy, batch, cfg.temperature)
    # In the first pass over a rollout batch nothing has been updated yet: the current student is the old one.
    logp_old = logp.detach() if batch.logp_old is None else batch.logp_old
    logp_teacher = batch.teacher["logp"].to(logp.device)
    loss, info = opd_loss(logp, logp_old, logp_teacher, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    return logp.detach(), loss, info


def topk_loss(policy, batch, cfg):
    """LSM and its relatives: student against teacher on the teacher's K most likely tokens."""
    teacher = {name: x.to(batch.ids.device) for name, x in batch.teacher.items()}
    sampled = batch.tokens[:, None]  # [N, 1]
    ids = torch.cat([sampled, teacher["ids"]], 1)  # [N, 1 + K]
    logq = torch.cat([teacher["logp"][:, None], teacher["logq"]], 1)  # [N, 1 + K]
    # Renormalised on the support, the loss does not depend on the logsumexp over the vocabulary. The gate does, through
    # log pi(y_t), but without gradient. So no gradient of vocabulary size arises: this is why LSM's head is cheap.
    needs_lse = cfg.loss == "tail_topk" or not cfg.renormalise

    def head(hidden, weight, bias):
        z, lse = head_logits(hidden, weight, ids, bias, temperature=cfg.temperature, vocab=policy.vocab)
        return z, lse if needs_lse else lse.detach()

    z, lse = policy(batch.ids, batch.rows, batch.cols, head)  # logits [N, 1 + K], logsumexp [N]
    logp = (z - lse[:, None]).detach()

    in_topk = teacher["logq"] > -torch.inf  # a teacher's server may return fewer than K tokens
    is_outside = ~((teacher["ids"] == sampled) & in_topk).any(1)  # [N] the sampled token is not in the support
    info = {
        "outside": is_outside.float(),
        "teacher_mass": teacher["logq"].exp().sum(1),
        "student_mass": logp[:, 1:].masked_fill(~in_topk, -torch.inf).exp().sum(1),
    }
    # Column 0, the sampled token, joins the support only with --add_sampled, and if it is not there already.
    support = torch.cat([(is_outside & cfg.add_sampled)[:, None], in_topk], 1)  # [N, 1 + K]
    if cfg.loss == "tail_topk":
        z_topk = z[:, 1:].masked_fill(~in_topk, -torch.inf)
        loss = tail_loss(z_topk - lse[:, None], teacher["logq"])
    else:
        loss = lsm_loss(
            z.masked_fill(~support, -torch.inf),
            logq,
            support,
            lse=lse,
            renormalise=cfg.renormalise,
            log_ratio_clamp=cfg.log_ratio_clamp,
            forward=cfg.loss == "fkl_topk",
        )
    return logp[:, 0], loss, info


def full_vocabulary_loss(policy, batch, cfg, teacher_head):
    """Reverse KL(student || teacher), forward KL(teacher || student), or JSD, over all tokens of the vocabulary."""
    hidden_t = batch.teacher["hidden"].to(batch.ids.device)  # [N, H_t]
    weight_t, bias_t = teacher_head
    beta = {"rkl": 1.0, "fkl": 0.0, "jsd": cfg.beta}[cfg.loss]

    def head(hidden, weight, bias):
        kl, lse = head_kl(
            hidden, weight, hidden_t, weight_t, bias, bias_t,
            beta=beta, temperature=cfg.temperature, vocab=policy.vocab,
        )  # fmt: skip
        sampled = batch.tokens[:, None]
        z, _ = head_logits(hidden.detach(), weight.detach(), sampled, bias, temperature=cfg.temperature, lse=False)
        return z[:, 0] - lse, kl

    logp, loss = policy(batch.ids, batch.rows, batch.cols, head)
    return logp.detach(), loss, {}


# -----------------------------------------------------------------------------
# one update


def update(policy, optimizer, batches, cfg, teacher_head=None):
    """One optimizer step on a minibatch, given as this rank's micro-batches: the gradient of the paper's Eq. 1,

        L = sum_t g_t loss_t / sum_t g_t      over the response tokens t of the whole minibatch, on all ranks

    Ranks make equally many forward and backward passes, which FSDP needs; a rank with fewer micro-batches has been given
    some without tokens, whose sums are 0. Returns the update's numbers, and for each micro-batch its tensors [N].
    """
    tau = 0.0 if cfg.gate == "none" else cfg.tau  # exp(0) = 1: no gate, while drift is measured all the same
    sums = torch.zeros(2, device=batches[0].ids.device)  # sum_t g_t loss_t, sum_t g_t
    per_token = []
    for batch in batches:
        # log pi(y_t) of the current student, and the base loss, at every response token
        logp, loss, info = position_loss(policy, batch, cfg, teacher_head)
        # The first pass over a rollout batch comes before any update on it: this is pi_old.
        if batch.logp_old is None:
            batch.logp_old = logp
        # Drift d_t = log pi(y_t) - log pi_old(y_t); s, its signed mean over each segment; the gate g = exp(-tau |s|).
        g, s = gate(logp, batch.logp_old, batch.segments, tau=tau, stat=cfg.stat)
        # The numerator. g has no gradient: it weights the loss, and is not trained on.
        weighted_loss = (g * loss).sum()
        weighted_loss.backward()  # gradients add up over the micro-batches
        sums += torch.stack([weighted_loss.detach(), g.sum()])
        d = drift(logp, batch.logp_old)
        per_token.append({**info, "loss": loss.detach(), "g": g, "s": s, "d": d, "position": batch.position})

    # The denominator is only known now: it is a sum over all micro-batches and ranks. Dividing each micro-batch by its own
    # would weight tokens differently in short and long ones, and dividing here costs no second forward pass.
    scale = 1.0
    if dist.is_initialized():
        dist.all_reduce(sums)
        scale = world_size()  # FSDP has averaged the gradients over the ranks; Eq. 1 needs their sum
    loss_sum, gate_sum = sums[0], sums[1].clamp(min=torch.finfo(torch.float32).tiny)  # all gates may underflow to 0
    params = [p for p in policy.parameters() if p.grad is not None]
    for p in params:
        p.grad *= scale / gate_sum
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(params, cfg.grad_clip or float("inf")))

    result = {"loss": (loss_sum / gate_sum).item(), "grad_norm": grad_norm.item()}
    result["skipped"] = not (math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"]))
    if not result["skipped"]:  # equal on all ranks, so all of them step or none does
        optimizer.step()
    optimizer.zero_grad()
    return result, per_token


def learning_rate(cfg, step):
    """Linear warm-up over cfg.warmup steps, then constant, or linear down to a tenth at the last step."""
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
    prompts: data.TrainingPrompts
    held_out: dict  # {name: problems}
    newlines: set  # ids of the tokens that contain a newline
    policy: Policy  # the student
    teacher: object  # a model here, or a server
    optimizer: torch.optim.Optimizer
    sampler: object
    logger: metrics.Logger
    stop: checkpoint.StopSignal  # SIGTERM or Ctrl-C, on any rank
    resumed: bool
    start: int  # steps that the checkpoint has behind it; 0 for a new run


def setup(cfg) -> Run:
    device = on_all_ranks(init_device, cfg)
    say(f"preset {cfg.preset}, {device}, {world_size()} rank(s)")

    # Everything that can be wrong is checked before a model loads or a file is written.
    resume_from = on_all_ranks(checkpoint.find, cfg)  # a checkpoint's folder, or None
    on_all_ranks(rollout.choose, cfg.rollout, device.type)  # vLLM may be asked for and be unable to run
    paths = on_all_ranks(model_paths, cfg)
    tokenizer, vocab = on_all_ranks(load_tokenizer, paths, cfg)
    prompts, held_out = on_all_ranks(data.load_problems, cfg, tokenizer)
    on_all_ranks(checkpoint.claim, cfg)  # from here on, --out is this run's
    start = checkpoint.number(resume_from) if resume_from else 0
    logger = on_all_ranks(metrics.Logger, cfg, start)
    say(json.dumps(asdict(cfg)))
    describe_prompt(prompts.at(start * cfg.prompts)[1], tokenizer, paths)

    teacher = on_all_ranks(load_teacher, cfg, paths.get("teacher"), tokenizer, vocab, device)
    policy = on_all_ranks(load_policy, paths["student"], cfg, vocab, device, trainable=True)
    adamw = {"lr": cfg.lr, "betas": (0.9, cfg.beta2), "weight_decay": cfg.weight_decay}
    optimizer = torch.optim.AdamW(policy.parameters(), **adamw)
    if resume_from:
        checkpoint.restore(resume_from, policy, optimizer)
    stop = checkpoint.StopSignal()
    options = {"max_len": cfg.max_prompt + cfg.max_response, "tp": cfg.tp, "should_stop": stop.requested_here}
    sampler = on_all_ranks(rollout.make_sampler, cfg, paths["student"], policy.lm, tokenizer, vocab, **options)
    newlines = data.newline_tokens(tokenizer, vocab)
    return Run(
        device, tokenizer, prompts, held_out, newlines, policy, teacher, optimizer, sampler, logger, stop,
        resumed=bool(resume_from), start=start,
    )  # fmt: skip


def main(cfg, before_update=None):
    """before_update(run, micro-batches, epoch) is called before each update, for measurements."""
    run = setup(cfg)
    policy, teacher, sampler, optimizer = run.policy, run.teacher, run.sampler, run.optimizer

    def save(step):
        on_all_ranks(checkpoint.save, Path(cfg.out), step, policy, optimizer, cfg)

    def evaluate_if_due(step):
        if run.held_out and (step % cfg.eval_every == 0 or step == cfg.steps) and not run.logger.has_evaluation(step):
            row = evaluate.evaluate_student(run, cfg)
            if not run.stop.requested():  # else its responses are cut short, and a resumed run evaluates again
                say(f"step {step}: " + "  ".join(f"{name} {x:.3f}" for name, x in row.items()))
                run.logger.log({"step": step, **row})

    run.stop.listen()
    evaluate_if_due(run.start)
    done = run.start  # steps
    saved = run.start if run.resumed else None  # the step of the newest checkpoint
    bad_updates = 0  # in a row
    bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, disable=rank() > 0, unit="step")
    for step in bar:
        # ---- Sample. A response depends on the weights, its prompt and its seed alone, so a resumed run samples the same.
        clock = metrics.Clock(run.device)
        jobs = []  # (prompt ids, seed)
        for problem, ids in run.prompts.of_step(step, cfg.prompts):
            jobs += [(ids, rollout.seed_for(cfg.seed, step, problem.id, i)) for i in range(cfg.group)]
        sampler.sync(full_weights(policy))
        rollouts = rollout.sample_on_all_ranks(sampler, jobs, rollout.sampling_options(cfg))
        sampler.sleep()  # leaves the GPU's memory to the teacher and the update
        if run.stop.requested():  # on any rank: the rollouts are unfinished, and dropped
            break
        clock.lap("rollout")

        # ---- Score with the teacher, once for all epochs.
        minibatches = data.make_minibatches(rollouts, cfg, step, run.newlines, run.device, rank(), world_size())
        batches = [batch for minibatch in minibatches for batch in minibatch]
        try:
            all_targets = on_all_ranks(teacher.targets, batches)
        except SystemExit:  # the teacher's server is gone: keep the steps that are done
            if done != saved:
                save(done)
            raise
        for batch, targets in zip(batches, all_targets, strict=True):
            batch.teacher = targets
        clock.lap("teacher")

        # ---- Old log-probs: the student's own, before the first update. The first minibatch needs no pass for them: its
        # first training pass comes before any update, and update() keeps its log-probs.
        with torch.no_grad():
            for batch in [batch for minibatch in minibatches[1:] for batch in minibatch]:
                batch.logp_old = score(policy, batch, cfg.temperature)
            # The sampler's log-probs are at temperature 1. If training uses another, rescore one micro-batch to compare.
            rescored = [score(policy, batch, 1.0) for batch in batches[:1]] if cfg.temperature != 1 else None

        # ---- Update: epochs x minibatches of Eq. 1. From the second update on, the student has drifted.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        updates = []
        for epoch in range(cfg.epochs):
            if epoch > 0:
                random.Random(f"{cfg.seed} {step} {epoch}").shuffle(minibatches)
            for minibatch in minibatches:
                if before_update:
                    before_update(run, minibatch, epoch)
                result, per_token = update(policy, optimizer, minibatch, cfg, teacher.head)
                updates.append((result, per_token))
                bad_updates = metrics.count_bad_updates(
                    bad_updates, result, per_token, minibatch, run.prompts.problem_ids, cfg
                )
        clock.lap("update")

        # ---- Log, save, evaluate.
        done = step + 1
        row = {"step": done, "lr": learning_rate(cfg, step)}
        row |= metrics.of_rollouts(rollouts) | clock.metrics(rollouts, cfg.epochs)
        row |= metrics.of_updates(updates, batches, cfg.epochs) | metrics.sampler_mismatch(batches, rescored)
        metrics.check_sampler(row, run.device)
        run.logger.log(row)
        bar.set_postfix({name: f"{row[name]:.3g}" for name in ("loss", "gap", "gate/ess") if name in row})
        if cfg.sample_every and step % cfg.sample_every == 0:
            text = run.tokenizer.decode(rollouts[0].response)
            say(f"--- step {done}, a response ({rollouts[0].finish}): {text!r}")
        if done == cfg.steps or (cfg.save_every and done % cfg.save_every == 0):
            save(done)
            saved = done
        evaluate_if_due(done)

    if run.stop.requested() and done != saved:
        save(done)
    finish(run, cfg, done)


def finish(run, cfg, done):
    """Prints how to go on if the run was stopped; else writes the student and the pictures."""
    run.stop.release()
    if run.stop.requested():
        again = command(replace(cfg, resume="true", overwrite=False))
        say(f"stopped by {run.stop.reason} after step {done} of {cfg.steps}, and saved; this goes on:\n{again}")
    else:
        on_all_ranks(checkpoint.save_model, Path(cfg.out) / "final", run.policy, run.tokenizer)
        if rank() == 0:
            plot.draw(cfg.out)
        say(f"done: {cfg.out}/final is the student, {cfg.out}/metrics.jsonl and {cfg.out}/curves.png what happened")
    if dist.is_initialized():  # vLLM makes a group of one process, too
        dist.barrier()  # a rank that leaves while another's gloo thread still cleans up can abort it
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse(TrainConfig))
