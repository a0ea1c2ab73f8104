"""On-policy distillation with policy-drift gating: the loop of arXiv 2606.24084, in one file.

    sample responses -> teacher scores them once -> epochs x minibatches of (loss, gate, step) -> log, eval, save

Where the paper leaves room: old log-probs come from the trainer, never from the sampler, and the first
minibatch's own forward pass gives them; gate and loss have one denominator over the whole minibatch, all
micro-batches and ranks, which divides the summed gradient once.

    python train.py                                        # tiny preset on a CPU, qwen3 on a GPU
    python train.py --gate block --block 64
    torchrun --nproc_per_node 8 train.py --preset qwen3    # FSDP2, one sampler a rank
"""

import importlib.util
import json
import math
import os
import random
import time
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
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
from configs import TrainConfig, command, parse
from gating import drift, gate, one_side
from policy import full_tensor, full_weights, load_policy, position_loss, score
from teacher import load_teacher


def init_device(cfg):
    """(rank, world, device). RANK shards the data, LOCAL_RANK picks the device and nothing else."""
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if name == "cuda" and not torch.cuda.is_available():
        checkpoint.stop("--device cuda: torch finds none here")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        # hours, because ranks wait for the slowest rollout; a dead rank is torchrun's to find
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=4))
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    return rank, world, torch.device(name, torch.cuda.current_device() if name == "cuda" else None)


def prepare(cfg, device):
    """All that can be wrong before a model loads: the output folder, tokenizers, lengths, data. Raises ValueError, OSError."""
    from transformers import AutoConfig, AutoTokenizer

    found = checkpoint.to_resume(cfg)
    if cfg.log != "none" and not importlib.util.find_spec(cfg.log):
        raise ValueError(f"--log {cfg.log}: pip install {cfg.log}")
    rollout.choose(cfg.rollout, device.type)  # raises where vLLM is asked for and cannot run
    paths = {"student": cfg.student} if cfg.teacher_url else {"teacher": cfg.teacher, "student": cfg.student}
    if "toy" in paths.values():
        import toy

        folders = dict(zip(("teacher", "student"), toy.models(), strict=True))
        paths = {role: folders[role] if path == "toy" else path for role, path in paths.items()}
    code = dict(trust_remote_code=cfg.trust_remote_code)
    tokenizers = {role: AutoTokenizer.from_pretrained(path, **code) for role, path in paths.items()}
    vocab = data.shared_vocab(tokenizers["student"], tokenizers.get("teacher", tokenizers["student"]))
    for role, path in paths.items():
        model = AutoConfig.from_pretrained(path, **code)
        vocab = min(vocab, model.vocab_size)
        context = getattr(model, "max_position_embeddings", None)
        if context and cfg.max_prompt + cfg.max_response > context:
            wanted = f"--max_prompt {cfg.max_prompt} + --max_response {cfg.max_response}"
            raise ValueError(f"{wanted} tokens do not fit the {role}'s context of {context}")
    if cfg.topk > vocab:
        raise ValueError(f"--topk {cfg.topk} is more than the shared vocabulary of {vocab}")
    tokenizer = tokenizers["student"]
    problems = data.load(cfg.data, seed=cfg.seed)
    stream = data.PromptStream(problems, tokenizer, cfg.template, cfg.max_prompt, cfg.seed)
    stream.peek()  # says where every prompt is too long
    names = [name for name in cfg.eval_data.split(",") if name and cfg.eval_every]
    held_out = {name: data.load(name, limit=cfg.eval_problems) for name in names}
    for problem in (problem for name in held_out for problem in held_out[name]):
        if (n := len(data.encode(problem, tokenizer, cfg.template))) > cfg.max_prompt:
            raise ValueError(f"held-out problem {problem.id} has {n} tokens, more than --max_prompt {cfg.max_prompt}")
    return found, paths, tokenizer, vocab, stream, held_out


def sampling_options(cfg):
    names = dict(temperature="temperature", top_p="top_p", top_k="sample_top_k", max_tokens="max_response")
    return {name: getattr(cfg, field) for name, field in names.items()}


def sample(sampler, jobs, rank, world, **sampling):
    """Rollouts of all ranks in the order of jobs [(prompt ids, seed)]; each rank samples its share."""
    mine = jobs[rank::world]
    parts = evaluate.gather(sampler.sample([ids for ids, _ in mine], [seed for _, seed in mine], **sampling))
    return [parts[i % world][i // world] for i in range(len(jobs))]


def teach(teacher, batches, steps):
    """Whether the batches have their targets now; not where the run is stopped, as it is when a server fails."""
    if steps.stopped():
        return False
    try:
        for batch, targets in zip(batches, teacher.targets(batches), strict=True):
            batch.targets = targets
    except OSError as error:
        steps.stop(" ".join(str(error).split()))
    return not steps.stopped()


@torch.no_grad()
def held_out_gap(policy, batches, cfg):
    """Reverse KL of student to teacher, nats a token, estimated on the student's own responses (to 64 problems)."""
    total = torch.zeros(2)
    for batch in batches:
        gap = score(policy, batch, cfg.temperature).cpu() - batch.targets["logp"]
        total += torch.tensor([gap.sum(), gap.numel()])
    total = sum(evaluate.gather(total))
    return (total[0] / total[1]).item()


def update(policy, optimizer, batches, cfg, want_logp):
    """One optimizer step on a minibatch: micro-batches add up sum(g * loss), and the gradient is divided by sum(g) once."""
    sums, tracks, losses = torch.zeros(2, device=batches[0].ids.device), [], []
    gate_options = {name: getattr(cfg, name) for name in ("tau", "stat", "block", "span_min", "span_max")}
    for batch in batches:
        logp, loss, info = position_loss(policy, batch, cfg, want_logp)
        g = torch.ones_like(loss)
        if logp is not None:
            now, old = logp.detach(), batch.old
            seen = one_side(now, old, batch.targets["logp"].to(now.device), cfg.gate_on)
            pair = batch.spread(seen), batch.spread(old)
            g, s = (x[batch.mask] for x in gate(*pair, batch.mask, cfg.gate, newline=batch.newline, **gate_options))
            info |= {"g": g, "s": s, "d": drift(now, old, torch.ones_like(now))}
        weighted = (g * loss).sum()
        weighted.backward()
        sums += torch.stack([weighted.detach(), g.sum()])
        tracks.append(info | {"where": batch.where})
        losses.append(loss.detach())
    scale = 1.0
    if dist.is_initialized():
        dist.all_reduce(sums)
        scale = dist.get_world_size()  # FSDP has averaged over the ranks; the denominator is global
    params, tiny = [p for p in policy.parameters() if p.grad is not None], torch.finfo(torch.float32).tiny
    for p in params:
        p.grad *= scale / sums[1].clamp(min=tiny)
    norm = nn.utils.clip_grad_norm_(params, cfg.grad_clip or float("inf"))
    result = {"loss": (sums[0] / sums[1].clamp(min=tiny)).item(), "grad_norm": full_tensor(norm).item()}
    result["skipped"] = not all(map(math.isfinite, result.values()))  # the same on every rank
    if result["skipped"]:
        result["suspects"] = suspects(batches, losses)
    else:
        optimizer.step()
    optimizer.zero_grad()
    return tracks, result


def suspects(batches, losses):
    """Prompts (token ids), of all ranks, whose loss is not finite; all of them where only the gradient is not."""

    def prompts(rows):
        found = [batch.sequences(part) for batch, part in zip(batches, rows, strict=True)]
        return sum(evaluate.gather([tuple(ids[:start]) for part in found for ids, start in part]), [])

    # the first is gathered, and so the same on all ranks: all of them go on to the second, or none
    bad = prompts(batch.rows[~loss.isfinite()] for batch, loss in zip(batches, losses, strict=True))
    return bad or prompts(batch.rows for batch in batches)


def bad_in_a_row(updates, bad, names, cfg, say):
    """Skipped updates in a row, now; each is reported. All ranks exit after cfg.max_bad_updates of them."""
    for _, result in updates:
        bad = bad + 1 if result["skipped"] else 0
        if bad:
            found = ", ".join(sorted({names[prompt] for prompt in result["suspects"]}))
            say(f"update skipped, {bad} in a row: its loss or gradient is not finite. Prompts: {found}")
        if cfg.max_bad_updates and bad == cfg.max_bad_updates:
            checkpoint.stop(
                f"{bad} updates in a row were not finite (--max_bad_updates); the checkpoints hold none of them"
            )
    return bad


def learning_rate(cfg, step):
    """Linear warm-up over cfg.warmup steps, then constant, or linear to a tenth at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    return cfg.lr * (1 - 0.9 * (step - cfg.warmup) / max(1, cfg.steps - 1 - cfg.warmup))


def main(cfg):
    rank, world, device = init_device(cfg)
    say = tqdm.write if rank == 0 else lambda *_: None
    say(f"preset {cfg.preset}, {device}, {world} rank(s)")
    attempt, out = checkpoint.attempt, Path(cfg.out)
    # every rank looks before one writes
    found, paths, tokenizer, vocab, stream, held_out = attempt(prepare, cfg, device)
    attempt(checkpoint.claim, cfg)
    say(json.dumps(asdict(cfg)))
    first = stream.peek()
    ends = {role: rollout.stops_of(path, tokenizer) for role, path in paths.items()}
    if ends.get("teacher", ends["student"]) != ends["student"]:
        say(f"warning: the teacher ends its answers with {ends['teacher']}, the student with {ends['student']}")
    say(f"the first prompt, {len(first)} tokens: {tokenizer.decode(first)!r}")

    teacher = attempt(load_teacher, cfg, paths.get("teacher"), tokenizer, vocab, device)
    policy = attempt(load_policy, paths["student"], cfg, vocab, device, trainable=True)
    policy.teacher_head = teacher.head
    betas = (0.9, cfg.beta2)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, betas, weight_decay=cfg.weight_decay)
    start = checkpoint.restore(found, policy, optimizer, stream) if found else 0
    steps = checkpoint.Steps(start, cfg.steps)
    sampler = attempt(rollout.make_sampler, cfg, paths["student"], policy.lm, tokenizer, vocab, say)
    sampler.should_stop = steps.asked
    newline = data.newline_tokens(tokenizer, vocab)
    log = partial(attempt, attempt(metrics.make_logger, cfg, out, start))
    want_logp = cfg.loss == "opd" or cfg.gate != "none" or cfg.diagnostics

    def run_eval(step):
        """A line of its own in the metrics; none where the run is stopped meanwhile."""
        sampler.sync(full_weights(policy))
        row = {"step": step}
        for name, problems in held_out.items():
            options = dict(k=cfg.k, seed=cfg.seed, template=cfg.template) | sampling_options(cfg)
            scores, _ = evaluate.evaluate(sampler, tokenizer, problems, **options)
            prompts = [data.encode(problem, tokenizer, cfg.template) for problem in problems[:64]]
            jobs = [(ids, rollout.seed_for("gap", cfg.seed, i)) for i, ids in enumerate(prompts)]
            whole = dict(top_p=1.0, top_k=0)  # of a truncated distribution it would be no KL
            rollouts = sample(sampler, jobs, rank, world, **sampling_options(cfg) | whole)
            sampler.sleep()
            batches = sum(data.make_batches(rollouts, cfg, 0, rank, world, newline, device), [])
            if not teach(teacher, batches, steps):
                return
            scores["gap"] = held_out_gap(policy, batches, cfg)
            prefix = "eval" if len(held_out) == 1 else f"eval/{name}"
            row |= {f"{prefix}/{key}": x for key, x in scores.items()}
        say(f"step {step}: " + "  ".join(f"{key} {x:.3f}" for key, x in row.items() if key != "step"))
        log(row)

    def eval_is_due(step):
        return bool(held_out) and (step % cfg.eval_every == 0 or step == cfg.steps)

    if eval_is_due(start) and not evaluate.gather(metrics.has_evaluation(out, start))[0]:
        run_eval(start)

    # ------------------------------------------------------------------------- the loop
    done, saved, bad = start, start if found else None, 0
    bar = tqdm(steps, initial=start, total=cfg.steps, disable=rank > 0, unit="step")
    for step in bar:
        before, clock = stream.state, {"start": clock_now(device)}
        jobs, names = [], {}
        for problem, ids in (stream.next() for _ in range(cfg.prompts)):
            seeds = [rollout.seed_for(cfg.seed, step, problem.id, i) for i in range(cfg.group)]
            jobs += [(ids, seed) for seed in seeds]
            names[tuple(ids)] = problem.id
        sampler.sync(full_weights(policy))
        rollouts = sample(sampler, jobs, rank, world, **sampling_options(cfg))
        sampler.sleep()
        clock["rollout"] = clock_now(device)

        kept = [r for r in rollouts if r.finish != "length" or not cfg.drop_truncated]
        minibatches = data.make_batches(kept, cfg, step, rank, world, newline, device)
        batches = sum(minibatches, [])
        if not teach(teacher, batches, steps):
            stream.restore(before)  # nothing is learnt from this batch: whoever resumes samples it again, the same
            break
        clock["teacher"] = clock_now(device)

        with torch.no_grad():
            if want_logp:  # the first minibatch's own first pass gives its old log-probs
                for batch in sum(minibatches[1:], []):
                    batch.keep_old(score(policy, batch, cfg.temperature))
            # To compare with the sampler's, which are of temperature 1: one micro-batch where old log-probs are not.
            checked = batches[:1] if cfg.temperature != 1 or not want_logp else []
            checked = [(batch, score(policy, batch, 1.0)) for batch in checked]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        updates = []
        for epoch in range(cfg.epochs):
            if epoch > 0:
                random.Random(f"{cfg.seed} {step} {epoch}").shuffle(minibatches)
            updates += [update(policy, optimizer, m, cfg, want_logp) for m in minibatches]
        clock["update"] = clock_now(device)
        bad = bad_in_a_row(updates, bad, names, cfg, say)

        checked = checked or [(batch, batch.old) for batch in batches if batch.old is not None]
        row = {"step": step + 1, "lr": learning_rate(cfg, step)}
        row |= metrics.summary(cfg, policy, rollouts, batches, checked, updates, clock)
        metrics.check_in_step(row, device)
        log(row)
        done = step + 1
        bar.set_postfix({name: f"{row[name]:.3g}" for name in ("loss", "gap", "gate/ess") if name in row})
        if cfg.sample_every and step % cfg.sample_every == 0:
            text = tokenizer.decode(rollouts[0].response)
            say(f"--- step {done}, a response ({rollouts[0].finish}): {text!r}")
        if done == cfg.steps or (cfg.save_every and done % cfg.save_every == 0):
            attempt(checkpoint.save, out, done, policy, optimizer, stream, cfg)
            saved = done
        if eval_is_due(done):
            run_eval(done)

    if steps.stopped():
        if done != saved:
            attempt(checkpoint.save, out, done, policy, optimizer, stream, cfg)
        again = command(replace(cfg, resume="true", overwrite=False))
        steps.release()
        say(f"stopped by {steps.why} after step {done} of {cfg.steps}, and saved; this goes on:\n{again}")
        if steps.why not in ("SIGTERM", "SIGINT"):
            checkpoint.stop(steps.why)
    else:
        steps.release()
        attempt(checkpoint.save_model, out / "final", policy, tokenizer)
        if rank == 0:
            plot.draw(out)
            say(f"done: {out}/final is the student, {out}/metrics.jsonl and {out}/curves.png what happened")
    if dist.is_initialized():  # vLLM makes a group of one process too
        dist.barrier()  # a rank that leaves while a gloo thread still cleans up can abort
        dist.destroy_process_group()


def clock_now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main(parse(TrainConfig))
