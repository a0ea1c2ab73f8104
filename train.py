"""On-policy distillation with policy-drift gating (Zheng and Jiang, arXiv 2606.24084), in one loop:

    sample -> the teacher scores -> old log-probs -> epochs x minibatches of Eq. 1 -> metrics -> save -> evaluate

    python train.py --preset tiny                                    # a toy on a CPU, in minutes
    python train.py --preset tiny --gate span --loss opd             # every setting is a flag; see --help
    torchrun --nproc_per_node 8 train.py --preset qwen3              # the paper's setting: FSDP2, a vLLM engine on each rank

A *step* samples one batch of rollouts and makes several optimizer *updates* on it. What matters, with the paper's values:

    --loss opd|lsm             what the student minimises at each token: sampled-token OPD, or local support matching
      --topk 32                  LSM: on so many of the teacher's most likely tokens
    --gate block --block 64    over which tokens drift is averaged (none: no gate; span: between newlines)
      --tau 1                    gate = exp(-tau |mean drift|)
    --prompts 4 --group 8      rollouts in a step: prompts x responses to each
    --epochs 2                 passes over them: rollout reuse
      --minibatches 1            updates in each pass (our choice: the paper does not say)
    --lr 2e-6 --steps 200      AdamW, constant
    --max_response 16384 --temperature 1 --top_p 0.9             sampling

Read main() and train() for the loop, update() for the paper's Eq. 1, student_outputs() and base_loss() for the losses; then
gating.gate and losses.lsm_loss. Two choices that the paper leaves open:
1. Drift is measured from the trainer's own log-probs before the first update, never from the sampler's: a different engine,
   precision or top-p would show up as drift.
2. The sums of Eq. 1 run over the whole minibatch, on all ranks, so the result does not depend on how it was split.

Ranks: every rank holds all rollouts, in the same order, and computes the same split of them into minibatches; it trains on its
share of each. The weights are sharded, so all ranks must make the same forward and backward passes, and call the same
functions that communicate (full_weights, on_all_ranks, stop.requested, metrics, ...) equally often.
"""

from configs import FULL_VOCABULARY_LOSSES, TOPK_LOSSES, TrainConfig, command_line, parse

if __name__ == "__main__":
    cfg = parse(TrainConfig)  # before the imports below, which take seconds: --help and a wrong flag answer at once

import math
import random
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import evaluate
import losses
import rollout
from gating import drift, gate
from losses import head_kl, head_logits, lsm_loss, opd_loss, tail_loss
from policy import (
    LocalTeacher,
    Policy,
    choose_attention_kernels,
    full_tensor,
    full_weights,
    load_policy,
    model_paths,
    token_logprobs,
    uses_compile,
)
from support import checkpoint, metrics, plot, report, trace
from support.common import (
    StopSignal,
    gather,
    hide_progress_bars,
    ignore_output_errors,
    init_device,
    leave_process_group,
    print0,
    rank,
    seed_for,
    world_size,
)
from support.errors import abort, draw_or_warn, errors_in_one_line, keep_tracebacks_in, on_all_ranks
from support.files import EVALUATIONS, METRICS, TRACE, check_is_shared
from support.models import check_positions, context_of
from support.ranks import data_and_tokenizer, same_on_all_ranks, settings_and_code
from support.server_teacher import ServerTeacher
from support.statistics import metrics as evaluation_metrics
from support.statistics import summary
from support.vocabulary import Vocabulary, decode, load_tokenizer

# A sampler this far from the trainer holds other weights: mean |difference| of log-probs on sampled tokens, in nats.
OUT_OF_STEP = {"cpu": 1e-3, "cuda": 0.1}  # fp32; bf16

# -----------------------------------------------------------------------------
# The base loss at each of the N response tokens of a micro-batch. The fields of a data.MicroBatch:
#   ids [B, L]           prompts and responses, padded on the right
#   rows, cols [N]       where the response tokens are predicted: cols is one position before the token itself
#   tokens [N]           the response tokens y_t (--merge_stops counts the models' different stop tokens as one outcome, which has
#                        the id of the first of them)
#   segments [N]         index of the gate's segment that each token is in
#   position [N]         where in its response each token is, in (0, 1); for plots
#   logp_sampler [N]     log-probs that the sampler reported, at temperature 1; for metrics and OUT_OF_STEP, never for loss or gate
#   logp_old [N]         log pi_old(y_t) of the student before the first update on these rollouts; student_outputs sets it
#   teacher              what the teacher says, at cfg.temperature like logp_old; in host memory, to leave the GPU's to the update:
#                          "logq_sampled" [N]: log q(y_t)
#                          "topk_ids", "topk_logq" [N, K]: its most likely tokens (for losses without use for them, one)
#                          "hidden" [N, H_t]: its hidden states, for full-vocabulary losses only
#
# To add a loss, put its name into TrainConfig.loss in configs.py. What else depends on what it needs of the teacher:
#   log q(y_t)              a branch in base_loss, like opd's
#   its top-K tokens        the name into TOPK_LOSSES, and a branch before the last line of base_loss
#   its whole distribution  the name into FULL_VOCABULARY_LOSSES, and a branch in student_outputs with your own losses.head_kl


def student_outputs(policy, batch, cfg, teacher_head=None) -> dict:
    """One forward pass of the student, and what the loss needs of it, with gradient:

    "logp" [N]: log pi(y_t), for every loss, because the gate reads it. The first pass over a batch also sets its logp_old
    "z" [N, K], "lse" [N]: logits of the teacher's top-K tokens, and the logsumexp of all logits, for the top-K losses
    "kl" [N]: the divergence itself, for full-vocabulary losses. teacher_head: (weight, bias), for these only. Their logp and the
        lse that it comes from have no gradient
    """
    hidden = policy(batch)  # [N, H]
    options = policy.vocabulary.head_options(cfg.temperature)
    sampled = batch.tokens[:, None]  # [N, 1]
    if cfg.loss in TOPK_LOSSES:
        ids = torch.cat([sampled, batch.teacher["topk_ids"].to(sampled.device)], 1)  # [N, 1 + K]
        z, lse = head_logits(hidden, *policy.head(), ids, **options)
        outputs = {"z": z[:, 1:], "lse": lse}
    elif cfg.loss in FULL_VOCABULARY_LOSSES:
        beta = {"rkl": 1.0, "fkl": 0.0, "jsd": cfg.beta}[cfg.loss]  # as head_kl defines it
        hidden_t = batch.teacher["hidden"].to(hidden.device)  # [N, H_t]
        kl, lse = head_kl(hidden, *policy.head(), hidden_t, *teacher_head, beta=beta, **options)
        with torch.no_grad():  # only for the gate
            z, _ = head_logits(hidden, *policy.head(), sampled, want_lse=False, **options)
        outputs = {"kl": kl}
    else:
        z, lse = head_logits(hidden, *policy.head(), sampled, **options)
        outputs = {}
    outputs["logp"] = z[:, 0] - lse
    if batch.logp_old is None:
        batch.logp_old = outputs["logp"].detach()
    return outputs


def base_loss(outputs, batch, cfg):
    """(loss [N] with gradient, diagnostics {name: [N]}) from student_outputs(), at each response token."""
    if cfg.loss == "opd":
        logq = batch.teacher["logq_sampled"].to(outputs["logp"].device)
        clips = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high, "dual_clip": cfg.dual_clip}
        loss, info = opd_loss(outputs["logp"], batch.logp_old, logq, advantage_of=cfg.advantage, **clips)
        return loss, {"loss/clipped": info["clipped"], "loss/advantage": info["advantage"]}
    if cfg.loss in FULL_VOCABULARY_LOSSES:
        return outputs["kl"], {}

    z, lse = outputs["z"], outputs["lse"]
    ids, logq = (batch.teacher[name].to(z.device) for name in ("topk_ids", "topk_logq"))
    # A teacher's server may return fewer than K tokens: an unfilled slot holds log-prob -inf, and an id without meaning.
    # NaN counts as filled: it makes the loss NaN, and update() skips.
    is_filled = logq != -torch.inf  # [N, K]
    logp = z - lse[:, None]  # [N, K]
    info = {
        "loss/outside": 1 - (is_filled & (ids == batch.tokens[:, None])).any(1).float(),
        "loss/teacher_mass": logq.exp().sum(1),
        "loss/student_mass": logp.detach().exp().masked_fill(~is_filled, 0.0).sum(1),
    }
    if cfg.loss == "tail_topk":
        return tail_loss(logp.masked_fill(~is_filled, -torch.inf), logq), info
    # A softmax over the support does not depend on lse. So no gradient reaches lse, and head_logits' backward pass reads only
    # 1 + K rows of the head per token, instead of computing all logits again.
    return lsm_loss(z, logq, is_filled, forward=cfg.loss == "fkl_topk"), info


# -----------------------------------------------------------------------------
# one update


def update(policy, optimizer, micro_batches, cfg, teacher_head=None):
    """One optimizer step on a minibatch, given as this rank's micro-batches: the gradient of the paper's Eq. 1,

        L = sum_t g_t loss_t / sum_t g_t      over the response tokens t of the whole minibatch, on all ranks

    Every rank must run the same number of forward and backward passes, or FSDP hangs: data.make_minibatches pads the shorter
    ranks with empty micro-batches (N = 0), which add nothing to the sums. Returns {loss, grad_norm, skipped}, and for each
    micro-batch a dictionary of tensors [N].
    """
    sums = torch.zeros(2, device=micro_batches[0].ids.device)  # sum_t g_t loss_t, sum_t g_t
    per_token = []
    for batch in micro_batches:
        outputs = student_outputs(policy, batch, cfg, teacher_head)
        loss, info = base_loss(outputs, batch, cfg)
        # Drift d of each token, its signed mean s over each segment, and the gate g = exp(-tau |s|), all without gradient.
        d = drift(outputs["logp"].detach(), batch.logp_old)
        g, s = gate(d, batch.segments, cfg.gate, tau=cfg.tau, stat=cfg.stat)
        # The numerator. Gradients add up over the micro-batches.
        weighted_loss = (g * loss).sum()
        weighted_loss.backward()
        sums += torch.stack([weighted_loss.detach(), g.sum()])
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
    vocabulary: Vocabulary  # that student and teacher share
    train_prompts: data.TrainingPrompts
    held_out: dict  # {name: [(problem, prompt ids)]}
    policy: Policy  # the student
    teacher: object  # a model in this process, or a server
    optimizer: torch.optim.Optimizer
    sampler: object
    logger: metrics.Logger
    stop: StopSignal  # SIGTERM or Ctrl-C; requested() is a collective, requested_here() is local
    lock: object  # of --out, on rank 0
    model_files: dict  # the student's files besides its weights, for checkpoints
    bar: tqdm
    step: int  # steps done: 0, or those of the checkpoint that it resumes from
    saved: int | None  # the step of the newest checkpoint
    is_whole: bool = True  # the weights are those after `step` steps: False while a step's updates are made


@errors_in_one_line("train.py")
def main(cfg):
    run = setup(cfg)
    try:
        train(run, cfg)
    except (Exception, SystemExit) as error:
        # SystemExit: every rank knows of the error, such as a teacher's server that is gone, so all can save together. Any other
        # error may be this rank's alone: the others wait in a collective until torchrun ends them.
        if run.is_whole and (isinstance(error, SystemExit) or world_size() == 1):
            with suppress(Exception, SystemExit):  # of the two errors, the first one is reported
                save(run, cfg)
        raise
    finally:
        run.bar.close()
    finish(run, cfg)


def train(run, cfg):
    """The loop. It ends after cfg.steps steps, or earlier if a signal asks for it, updates fail, or the sampler is out of step."""
    policy, teacher, sampler, optimizer = run.policy, run.teacher, run.sampler, run.optimizer
    n_bad = 0  # updates in a row that were skipped
    run.stop.listen()
    while True:
        step = run.step  # so many are done

        # ---- Evaluate, before the first step, after the last, and every --eval_every
        is_due = cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps)
        if run.held_out and is_due and not run.logger.has_evaluation(step):
            row = evaluate_student(run, cfg)
            if run.stop.requested():  # its responses were cut short: a resumed run evaluates again
                break
            run.logger.log(EVALUATIONS, {"step": step, **row})
            print0(report.evaluation_line(step, row))
        if step >= cfg.steps:
            break

        # ---- Sample at cfg.temperature and cfg.top_p (pi_old is the distribution before top-p). A response depends only on
        # the weights, its prompt and its seed, so a resumed run reproduces it.
        clock = metrics.Clock(run.device)
        jobs = run.train_prompts.jobs_of_step(step, cfg.prompts, cfg.group)  # (prompt ids, seed)
        sampler.sync(full_weights(policy))
        rollouts = rollout.sample_on_all_ranks(sampler, jobs, rollout.sampling_options(cfg))
        sampler.sleep()  # leaves the GPU's memory to the teacher and the update
        if run.stop.requested():  # on any rank: the rollouts are unfinished, and dropped
            break
        clock.lap("rollout")

        # ---- The teacher scores, once for all epochs. Each rank gets its share of every minibatch, in equally many micro-batches.
        minibatches = data.make_minibatches(rollouts, cfg, step, run.vocabulary, run.device, rank(), world_size())
        micro_batches = [batch for minibatch in minibatches for batch in minibatch]
        for batch, batch_targets in zip(micro_batches, teacher.targets(micro_batches), strict=True):
            batch.teacher = batch_targets
        clock.lap("teacher")

        # ---- Old log-probs: the student's own, before any update. student_outputs sets them, so they come from the code that the
        # update runs, and drift is exactly 0 until the weights change. The first minibatch gets them in its own update.
        with torch.set_grad_enabled(uses_compile(cfg)):  # without gradient, torch.compile would run another graph
            for batch in [batch for minibatch in minibatches[1:] for batch in minibatch]:
                student_outputs(policy, batch, cfg, teacher.head)
        with torch.no_grad():
            # The sampler reports log-probs at temperature 1, whatever it samples at. If training uses another temperature,
            # one micro-batch is scored at 1, for metrics.sampler_metrics to compare.
            rescored = None
            if cfg.temperature != 1:
                rescored = [token_logprobs(policy, batch, 1.0) for batch in micro_batches[:1]]

        # ---- Update: epochs x minibatches of Eq. 1. From the second update on, the student has drifted.
        run.is_whole = False
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        updates = []
        for epoch in range(cfg.epochs):
            if epoch > 0:
                random.Random(f"{cfg.seed} {step} {epoch}").shuffle(minibatches)
            for minibatch in minibatches:
                result, per_token = update(policy, optimizer, minibatch, cfg, teacher.head)
                updates.append((minibatch, result, per_token))
                n_bad = n_bad + 1 if result["skipped"] else 0
                if n_bad:
                    problems = metrics.problems_of(minibatch, per_token, run.train_prompts.problem_ids)
                    print0(f"update skipped, {n_bad} in a row: loss or gradient not finite. Problems: {problems}")
                if n_bad and n_bad == cfg.max_bad_updates:
                    abort(f"{n_bad} updates in a row were not finite (--max_bad_updates); none of them was made")
        clock.lap("update")
        step += 1  # from here on, the number of the step that was just made

        # ---- Metrics
        row = {"step": step, "lr": learning_rate(cfg, step - 1)}
        row |= metrics.step_metrics(cfg, run.vocabulary, rollouts, micro_batches, rescored, updates, clock)
        out_of_step, bound = row.get("rollout/out_of_step", 0), OUT_OF_STEP[run.device.type]
        if not out_of_step <= bound:  # NaN, too
            abort(
                f"the sampler is out of step with the trainer: their log-probs of the sampled tokens differ by "
                f"{out_of_step:.2g} nats on average, above the limit of {bound:g}, at step {step}"
            )
        run.logger.log(METRICS, row)
        if cfg.trace_every and (step - 1) % cfg.trace_every == 0:
            run.logger.log(TRACE, trace.trace_row(step, updates, micro_batches, run.tokenizer, cfg))
        if cfg.sample_every and (step - 1) % cfg.sample_every == 0:
            text = decode(run.tokenizer, rollouts[0].response)
            print0(f"--- step {step}, a response ({rollouts[0].finish}): {text!r}")
        shown = {name: row[name] for name in ("loss", "kl_sampled", "gate/ess") if name in row}
        run.bar.set_postfix({name: f"{x:.3g}" for name, x in shown.items()}, refresh=False)
        run.bar.update()

        # ---- Save
        run.step, run.is_whole = step, True
        if step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
            save(run, cfg)


def setup(cfg) -> Run:
    # on_all_ranks(f, ...) calls f on every rank. If it fails on one, all ranks exit (SystemExit) with that error in one line.
    device = on_all_ranks(init_device, cfg)
    same_on_all_ranks(settings_and_code(cfg))
    on_all_ranks(check_is_shared, Path(cfg.out))

    # Fail early: check everything before a model loads or a file is written.
    resume_from = on_all_ranks(checkpoint.find, cfg)  # a checkpoint's folder, or None
    # Fails if vLLM was requested but cannot run.
    chosen_sampler = on_all_ranks(rollout.choose, cfg.rollout, device.type)
    hide_progress_bars()
    paths = model_paths(cfg)
    if resume_from:
        paths["student"] = str(resume_from)
    for path in paths.values():
        on_all_ranks(checkpoint.check, path)
    options = {"trust_remote_code": cfg.trust_remote_code, "merge_stops": cfg.merge_stops, "template": cfg.template}
    tokenizer, vocabulary = on_all_ranks(load_tokenizer, paths, **options)
    on_all_ranks(check_sizes, cfg, paths, vocabulary)
    train_prompts, held_out = on_all_ranks(data.load_problems, cfg, tokenizer, vocabulary.size)
    model_files = on_all_ranks(checkpoint.model_files, paths["student"], vocabulary.stop_ids)
    same_on_all_ranks(data_and_tokenizer(train_prompts, held_out, model_files, vocabulary))
    on_all_ranks(checkpoint.check_data, resume_from, train_prompts.digest)
    lock = on_all_ranks(checkpoint.claim, cfg)  # from here on, --out belongs to this run
    keep_tracebacks_in(Path(cfg.out))
    start = checkpoint.number(resume_from) if resume_from else 0
    logger = on_all_ranks(metrics.Logger, cfg, start)
    print0(report.start_table(cfg, start, device, chosen_sampler, tokenizer, vocabulary, train_prompts, held_out))

    losses.FUSED = uses_compile(cfg)  # the head's passes are compiled, too
    teacher = load_teacher(cfg, paths, tokenizer, vocabulary, device, train_prompts)
    on_all_ranks(checkpoint.check_teacher, resume_from, cfg, teacher.digest)
    policy = on_all_ranks(load_policy, paths["student"], cfg, vocabulary, device, trainable=True)
    # FSDP gives each rank a part of what that rank has loaded. If the ranks' files differed, the model would be of two revisions.
    loaded = {"the weights of --student": policy.digest, "the weights of --teacher": teacher.digest}
    same_on_all_ranks(loaded | {"the config of --teacher": teacher.config})
    adamw = {"lr": cfg.lr, "betas": (0.9, cfg.beta2), "weight_decay": cfg.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(policy.parameters(), **adamw)
    if resume_from:
        checkpoint.restore_optimizer(resume_from, policy, optimizer)
    stop = StopSignal()
    # cfg.tp ranks share an engine, which samples this many responses of a step.
    engine_responses = math.ceil(cfg.prompts * cfg.group * cfg.tp / world_size())
    sizes = {"max_len": cfg.max_prompt + cfg.max_response, "max_num_seqs": max(64, engine_responses)}
    sampler_args = cfg, paths["student"], policy.lm, vocabulary, stop.requested_here
    sampler = on_all_ranks(rollout.make_sampler, *sampler_args, **sizes)
    choose_attention_kernels(device)  # now that vLLM, which has its own choice, is imported
    bar = tqdm(initial=start, total=cfg.steps, disable=rank() > 0, unit="step")
    return Run(
        device, tokenizer, vocabulary, train_prompts, held_out, policy, teacher, optimizer, sampler, logger, stop, lock,
        model_files, bar, step=start, saved=start if resume_from else None,
    )  # fmt: skip


def check_sizes(cfg, paths, vocabulary):
    """ValueError if a context is too short, or the vocabulary smaller than --topk."""
    from transformers import AutoConfig

    for role, path in paths.items():
        config = AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code)
        check_positions(config, path, cfg.max_prompt + cfg.max_response)
        context = context_of(config)
        if context and cfg.max_prompt + cfg.max_response > context:
            raise ValueError(
                f"--max_prompt {cfg.max_prompt} + --max_response {cfg.max_response} tokens do not fit "
                f"the {role}'s context of {context}"
            )
    if cfg.topk > vocabulary.size:
        raise ValueError(f"--topk {cfg.topk} is more than the shared vocabulary of {vocabulary.size}")


def load_teacher(cfg, paths, tokenizer, vocabulary, device, train_prompts):
    def local_teacher(path):
        return LocalTeacher(load_policy(path, cfg, vocabulary, device, trainable=False), cfg, device)

    if not cfg.teacher_url:
        return on_all_ranks(local_teacher, paths["teacher"])
    server = on_all_ranks(ServerTeacher, cfg.teacher_url, cfg, tokenizer, vocabulary)
    problem, prompt = train_prompts.prompts[0]
    answer = tokenizer(f"\\boxed{{{problem.answer}}}", add_special_tokens=False)["input_ids"] + vocabulary.stop_ids[:1]
    answer = answer[: cfg.max_response]
    on_all_ranks(server.check_scores, prompt + answer)
    if all(gather(Path(cfg.teacher).is_dir())):
        local = on_all_ranks(local_teacher, cfg.teacher)
        example = data.collate([rollout.Rollout(prompt, answer, [0.0] * len(answer), "stop")], cfg, vocabulary, device)
        compare_teachers(server, local, example, cfg)
    return server


def compare_teachers(server, local, example, cfg):
    """Prints how far the log-probs of --teacher_url and of its local copy, --teacher, are apart on one micro-batch."""
    logq, local_logq = (teacher.targets([example])[0]["logq_sampled"].cpu() for teacher in (server, local))
    apart = (logq - local_logq).abs()
    warning = "warning: " if apart.mean() > OUT_OF_STEP["cuda"] else ""
    sizes = f"{apart.mean():.2g} nats on average and {apart.max():.2g} at most, on {len(apart)} tokens"
    print0(f"{warning}the log-probs of {cfg.teacher_url} and of {cfg.teacher} differ by {sizes}")


def evaluate_student(run, cfg) -> dict:
    """{metric: value} of the student on the held-out problems.

    eval/kl is the exact reverse KL of student to teacher at every position, and eval/kl_sampled its estimate from the sampled
    tokens alone, both in nats per token, on the student's own responses to at most 64 problems; these are sampled without
    top-p and top-k, since under a truncated distribution the estimate would not be one of the KL. A teacher's server gives no
    whole distribution, and so no eval/kl.
    """
    sampling, row = rollout.sampling_options(cfg), {}
    run.sampler.sync(full_weights(run.policy))  # once: a sampler that sleeps keeps its weights, and wakes to sample
    for name, prompts in run.held_out.items():
        prefix = "eval" if len(run.held_out) == 1 else f"eval/{name}"
        rows = evaluate.evaluate(run.sampler, run.tokenizer, prompts, k=cfg.k, seed=cfg.seed, **sampling)
        row |= {f"{prefix}/{key}": x for key, x in evaluation_metrics(rows, cfg.k).items()}
        curve = summary([rows], cfg.k)[""]  # it groups rows by benchmark; these have no name for theirs
        row[f"{prefix}/pass@{cfg.k}_low"] = float(curve["low"][cfg.k - 1])  # of the 95 % interval over problems
        row[f"{prefix}/pass@{cfg.k}_high"] = float(curve["high"][cfg.k - 1])
        jobs = [(ids, seed_for("kl", cfg.seed, i)) for i, (_, ids) in enumerate(prompts[:64])]
        rollouts = rollout.sample_on_all_ranks(run.sampler, jobs, sampling | {"top_p": 1.0, "top_k": 0})
        run.sampler.sleep()
        if run.stop.requested():  # the responses are cut short, or there are none
            return {}
        minibatches = data.make_minibatches(rollouts, cfg, 0, run.vocabulary, run.device, rank(), world_size())
        batches = [batch for minibatch in minibatches for batch in minibatch]
        with torch.no_grad():
            logp = [token_logprobs(run.policy, batch, cfg.temperature).cpu() for batch in batches]
        targets = run.teacher.targets(batches)
        differences = [p - batch_targets["logq_sampled"] for p, batch_targets in zip(logp, targets, strict=True)]
        row[f"{prefix}/kl_sampled"] = metrics.mean_on_all_ranks(differences)
        if isinstance(run.teacher, LocalTeacher):
            row[f"{prefix}/kl"] = metrics.mean_on_all_ranks(run.teacher.reverse_kl(run.policy, batches))
    return row


def save(run, cfg):
    if run.step == run.saved:
        return
    weights = full_weights(run.policy)
    inputs = {"data": run.train_prompts.digest, "teacher": run.teacher.digest}
    checkpoint.save(Path(cfg.out), run.step, weights, run.model_files, run.policy, run.optimizer, cfg, inputs)
    run.saved = run.step


def finish(run, cfg):
    """If the run was stopped, saves, and prints how to resume it; otherwise writes the student and the pictures."""
    run.stop.release()
    if run.step < cfg.steps or run.stop.requested():
        save(run, cfg)
        again = command_line(replace(cfg, resume="true", overwrite=False))  # --resume takes true, false or auto
        print0(
            f"stopped by {run.stop.reason} after step {run.step} of {cfg.steps}, and saved. To resume, run:\n{again}"
        )
    else:
        on_all_ranks(checkpoint.save_final, Path(cfg.out), run.policy.file_dtype, cfg.trust_remote_code)
        if rank() == 0:
            problem, _ = run.train_prompts.prompts[0]
            report.write_model_card(cfg, data.prompt_of(problem, run.tokenizer, cfg.template))
            draw_or_warn(plot.draw, cfg.out)
            print0(report.end_table(cfg))
    if run.lock:
        run.lock.release()
    leave_process_group()


if __name__ == "__main__":
    ignore_output_errors()
    main(cfg)
