"""pass@k on the paper's benchmarks, with intervals. Every completion is kept; finished ones are reused.

    python evaluate.py --k 8                                   # the newest trained model
    python evaluate.py --k 8 --model Qwen/Qwen3-1.7B-Base --data aime24,my.jsonl --n 32
    torchrun --nproc_per_node 8 evaluate.py --k 8              # each rank answers its share of the problems
    python evaluate.py --compare out/eval/base/toy block=out/eval/seed0/toy,out/eval/seed1/toy
    python evaluate.py --regrade out/eval/base/toy             # needs no model

Writes to --out: samples.jsonl, one row per completion; results.json, the numbers with settings and versions; and
pass_at_k.png. If an evaluation is killed, the same command continues it.

pass@k is unbiased, from n >= k samples; mean@n is pass@1. The 95 % intervals account for the choice of problems, not of
training seeds. In a response that was cut off by its token limit, only a boxed answer counts.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import report
import rollout
from common import (
    barrier,
    errors_in_one_line,
    gather,
    hide_progress_bars,
    init_device,
    keep_tracebacks_in,
    on_all_ranks,
    outlive_terminal,
    rank,
    say,
    seed_for,
    try_to,
    versions,
    world_size,
    write_file,
)
from configs import BENCHMARKS, EvalConfig, parse
from grade import Grader
from policy import choose_attention_kernels, full_weights, pretrained, stop_ids_of, token_logprobs
from teacher import LocalTeacher

# Flags that change no sample, so that a folder may be used again with another value.
NOT_IN_IDENTITY = "k out overwrite paper regrade compare device threads vllm_memory batch".split()

# -----------------------------------------------------------------------------
# sampling and grading


def answer(sampler, tokenizer, jobs, grader, *, seed, **sampling):
    """Rows for jobs [(benchmark, Problem, prompt ids, number of the sample)]: what was sampled, and whether it is right."""
    prompts = [ids for _, _, ids, _ in jobs]
    seeds = [seed_for("eval", seed, problem.id, i) for _, problem, _, i in jobs]
    rollouts = sampler.sample(prompts, seeds, **sampling)
    rows = []
    for (name, problem, _, i), seed, r in zip(jobs, seeds, rollouts, strict=True):
        row = {"data": name, "problem": problem.id, "sample": i, "seed": seed, "tokens": len(r.response)}
        rows.append(row | {"finish": r.finish, "gold": problem.answer, "text": text_of(r, tokenizer)})
    return graded(rows, grader)


def text_of(r, tokenizer):
    """The text of a rollout's response without special tokens, but with the <think> tags that tell grade.py what to skip.

    Some tokenizers count the tags as special tokens; some chat templates open the reasoning at the end of the prompt.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special and token.content.strip() not in ("<think>", "</think>")}
    text = tokenizer.decode([i for i in r.response if i not in special])
    is_opened = tokenizer.decode(r.prompt[-8:]).rstrip().endswith("<think>")
    return "<think>" + text if is_opened else text


def graded(rows, grader):
    """The rows with answer, correct and reason."""
    verdicts = grader.grade([(row["text"], row["gold"], row["finish"] != "length") for row in rows])
    return [
        row | {"answer": answer, "correct": correct, "reason": reason}
        for row, (answer, correct, reason) in zip(rows, verdicts, strict=True)
    ]


def split_jobs(prompts, n, batch):
    """This rank's jobs in parts of about `batch` responses: the same ones wherever an earlier run was killed.

    prompts: [(benchmark, Problem, prompt ids), ...]. Every rank has as many parts; the last one may be empty.
    """
    mine, step = prompts[rank() :: world_size()], max(1, batch // n)
    for start in range(0, len(prompts[:: world_size()]), step):
        yield [(*prompt, i) for prompt in mine[start : start + step] for i in range(n)]


def evaluate(sampler, tokenizer, prompts, *, k, n=0, seed=0, batch=1024, **sampling):
    """(metrics, rows) of prompts [(Problem, prompt ids)]: the same on every rank, each having sampled its share.

    metrics: pass@k, mean@n, truncated, length, no_answer. sampling: what sampler.sample takes.
    """
    rows = []
    with Grader() as grader:
        for jobs in split_jobs([("", *prompt) for prompt in prompts], n or k, batch):
            rows += answer(sampler, tokenizer, jobs, grader, seed=seed, **sampling)
    rows = [row for part in gather(rows) for row in part]
    return report.metrics(rows, k), rows


def evaluate_student(run, cfg):
    """{metric: value} of the student in training (train.Run) on the held-out problems.

    eval/kl is the exact reverse KL of student to teacher at every position, and eval/gap its estimate from the sampled
    tokens alone, both in nats per token, on the student's own responses to at most 64 problems; these are sampled without
    top-p and top-k, since under a truncated distribution the gap would not estimate a KL. A teacher's server gives no
    whole distribution, and so no eval/kl.
    """
    sampling, row = rollout.sampling_options(cfg), {}
    run.sampler.sync(full_weights(run.policy))
    for name, prompts in run.held_out.items():
        scores, rows = evaluate(run.sampler, run.tokenizer, prompts, k=cfg.k, seed=cfg.seed, **sampling)
        curve = report.summary([rows], cfg.k)[""]
        scores["interval"] = [float(curve["low"][cfg.k - 1]), float(curve["high"][cfg.k - 1])]  # of pass@k
        jobs = [(ids, seed_for("gap", cfg.seed, i)) for i, (_, ids) in enumerate(prompts[:64])]
        rollouts = rollout.sample_on_all_ranks(run.sampler, jobs, sampling | {"top_p": 1.0, "top_k": 0})
        run.sampler.sleep()
        if run.stop.requested():  # the responses are cut short, or there are none
            return {}
        minibatches = data.make_minibatches(rollouts, cfg, 0, run.vocabulary, run.device, rank(), world_size())
        batches = [batch for minibatch in minibatches for batch in minibatch]
        with torch.no_grad():
            logp = [token_logprobs(run.policy, batch, cfg.temperature).cpu() for batch in batches]
        targets = on_all_ranks(run.teacher.targets, batches)
        logq = [batch_targets["logq_sampled"] for batch_targets in targets]
        scores["gap"] = mean_on_all_ranks([p - q for p, q in zip(logp, logq, strict=True)])
        if isinstance(run.teacher, LocalTeacher):
            scores["kl"] = mean_on_all_ranks(run.teacher.reverse_kl(run.policy, batches))
        prefix = "eval" if len(run.held_out) == 1 else f"eval/{name}"
        row |= {f"{prefix}/{key}": x for key, x in scores.items()}
    return row


def mean_on_all_ranks(parts) -> float:
    """The mean over all elements of the tensors [n] that all ranks hold."""
    n_and_sum = torch.tensor([[part.numel(), part.double().sum()] for part in parts], dtype=torch.float64).sum(0)
    n, total = sum(gather(n_and_sum))
    return (total / n).item()


# -----------------------------------------------------------------------------
# files


def claim(folder: Path, identity: dict, overwrite: bool):
    """Makes the folder this evaluation's, and returns its lock; ValueError if it holds the samples of another."""
    lock = checkpoint.claim_folder(folder, "identity.json", overwrite)
    path = folder / "identity.json"
    if not path.exists():
        write_file(path, json.dumps(identity, indent=1) + "\n")
    saved = json.loads(path.read_text())
    for name in identity | saved:
        old, new = saved.get(name), identity.get(name)
        if old != new:
            raise ValueError(
                f"{folder} holds another evaluation, with {name} {old!r}, not {new!r}: --overwrite deletes it, "
                f"--out names another folder"
            )
    return lock


# -----------------------------------------------------------------------------
# commands


def newest_student() -> str:
    """The student of the run in out/ that finished last."""
    finished = [path.parent for path in Path("out").glob("*/final/config.json")]
    if not finished:
        raise ValueError("no finished run in out/: give --model, or train with python train.py")
    # The folder's time, not the file's: config.json is a copy, with the time at which the run began.
    return str(max(finished, key=lambda folder: folder.stat().st_mtime))


def choose_model(name, trust_remote_code=False):
    """(folder or hub name, what to call it)."""
    name = os.path.normpath(name or newest_student())  # out/a/final/ is out/a/final; hub names stay as they are
    label = "-".join([part for part in Path(name).parts if part not in ("/", "..", "out", "final")][-2:])
    if name in ("toy", "toy-teacher"):
        import toy

        teacher, student = toy.models()
        return student if name == "toy" else teacher, label
    if name.count("/") > 1 and not Path(name).is_dir():
        raise ValueError(f"--model: there is no folder {name}")
    if (Path(name) / "metrics.jsonl").exists():
        raise ValueError(f"--model: {name} is a run; name its student, {name}/final, or a checkpoint, {name}/step-N")
    if (Path(name) / "state.json").exists():  # a checkpoint
        if rank() == 0:
            checkpoint.export(Path(name), trust_remote_code)
        barrier()
        name = str(Path(name) / "model")
    return name, label


def prepare(cfg, device):
    """(cfg with its gaps filled, label, tokenizer, [(benchmark, Problem, prompt ids)], identity). ValueError if wrong.

    The identity says what the samples depend on: a folder with another one is not used.
    """
    from transformers import AutoConfig, AutoTokenizer

    model, label = choose_model(cfg.model, cfg.trust_remote_code)
    tokenizer = pretrained(AutoTokenizer, model, trust_remote_code=cfg.trust_remote_code)
    config = pretrained(AutoConfig, model, trust_remote_code=cfg.trust_remote_code)
    text_config = config.get_text_config()
    names = cfg.data
    if not names:
        import toy

        names = "toy" if tokenizer.get_vocab() == toy.tokenizer().get_vocab() else BENCHMARKS
    paths = {Path(name).stem: name for name in names.split(",")}
    if len(paths) < len(names.split(",")):
        raise ValueError(f"--data {names}: two sets have the same name")
    prompts, identity = [], {}
    for name, path in paths.items():
        problems = data.load(path, limit=cfg.limit)
        encoded = data.encode_all(problems, tokenizer, cfg, text_config.vocab_size)
        identity[f"problems of {name}"] = data.digest([[p.id, ids, p.answer] for p, ids in encoded])
        prompts += [(name, problem, ids) for problem, ids in encoded]
    longest = max(len(ids) for _, _, ids in prompts)
    context = getattr(text_config, "max_position_embeddings", None) or 1 << 30
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens does not fit a context of {context}")
    out = cfg.out or str(Path("out/eval", label, "+".join(paths)))
    max_tokens = min(cfg.max_tokens, context - longest)
    cfg = replace(cfg, model=model, data=names, n=cfg.n or cfg.k, max_tokens=max_tokens, out=out)
    identity |= {name: x for name, x in asdict(cfg).items() if name not in NOT_IN_IDENTITY}
    identity |= {"rollout": rollout.choose(cfg.rollout, device.type)[0], "device": device.type}
    # Tells when the weights have changed: a folder by its newest file, a hub model by its commit.
    times = [file.stat().st_mtime for file in Path(model).glob("*") if file.is_file()]
    identity["weights"] = max(times, default=getattr(config, "_commit_hash", None))
    return cfg, label, tokenizer, prompts, identity


def run(cfg):
    device = init_device(cfg)
    hide_progress_bars()
    cfg, label, tokenizer, prompts, identity = prepare(cfg, device)
    say(f"{cfg.model}: {cfg.n} samples of {len(prompts)} problems, {cfg.max_tokens} tokens at most")
    say(f"first prompt: {tokenizer.decode(prompts[0][2])!r}")
    out = Path(cfg.out)
    lock = claim(out, identity, cfg.overwrite) if rank() == 0 else None
    barrier()
    keep_tracebacks_in(out)

    def kept_rows():
        files = [*out.glob("samples.jsonl"), *sorted(out.glob("part-*.jsonl"))]
        rows = [row for file in files for row in report.read_rows(file)]
        return {(row["data"], row["problem"], row["sample"]): row for row in rows}

    sampling = {"max_tokens": cfg.max_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p}
    sampling |= {"top_k": cfg.sample_top_k, "seed": cfg.seed}
    rows = kept_rows()
    parts = list(split_jobs(prompts, cfg.n, cfg.batch))
    is_missing = [any((name, problem.id, i) not in rows for name, problem, _, i in jobs) for jobs in parts]
    if any(gather(any(is_missing))):  # all ranks build their samplers together, or none does
        say("sampling with {}: {}".format(*rollout.choose(cfg.rollout, device.type)))
        vocab = max(tokenizer.get_vocab().values()) + 1  # not len(tokenizer): there may be gaps between its ids
        # vLLM insists on a cache for one sequence of max_len, by default the model's whole context.
        max_len = max(len(ids) for _, _, ids in prompts) + cfg.max_tokens
        stops = stop_ids_of(cfg.model, tokenizer)
        sampler = rollout.make_sampler(cfg, cfg.model, None, tokenizer, vocab, stops, max_len=max_len)
        choose_attention_kernels(device)
    bar = tqdm(total=sum(map(len, parts)), unit="response", disable=rank() > 0)
    with Grader() as grader:
        for i, jobs in enumerate(parts):
            if is_missing[i]:
                fresh = answer(sampler, tokenizer, jobs, grader, **sampling)
                # What part i holds depends on all four numbers: a rerun with others must not replace it.
                report.write_rows(out / f"part-{world_size()}-{cfg.batch}-{rank():03d}-{i:05d}.jsonl", fresh)
            bar.update(len(jobs))
    bar.close()
    barrier()
    if rank() == 0:
        rows = kept_rows()
        rows = [rows[name, problem.id, i] for name, problem, _ in prompts for i in range(cfg.n)]
        report.write_rows(out / "samples.jsonl", rows)
        for file in out.glob("part-*"):
            file.unlink()
        finish(cfg, rows, out, label, identity)
        lock.close()


def finish(cfg, rows, out, label, identity):
    """Writes and prints what the rows say."""
    summary = report.summary([rows], cfg.k)
    results = {"config": asdict(cfg), "identity": identity, "versions": versions(), "metrics": summary}
    write_file(out / "results.json", json.dumps(results, indent=1) + "\n")
    try_to(report.plot_pass_at_k, {label: summary}, out / "pass_at_k.png")
    print(f"\n{report.summary_table(summary, cfg.k)}\n")
    if cfg.paper:
        print(f"{report.paper_table({label: summary}, cfg.k)}\n")
    print(f"{out}: samples.jsonl, every completion; results.json, the numbers; pass_at_k.png")


def regrade(cfg):
    """Grades kept completions again, into the folder --out, or `regraded` beside them."""
    source = Path(cfg.regrade)
    rows = report.read_rows(source)
    report.summary([rows], cfg.k)  # before anything is written: ValueError if there are fewer than k samples
    with Grader() as grader:
        fresh = graded(rows, grader)
    changed = [(old, new) for old, new in zip(rows, fresh, strict=True) if old["correct"] != new["correct"]]
    for old, new in changed[:20]:
        where = f"{old['data']} {old['problem']}"
        print(f"{where}: {new['answer']!r} for {new['gold']!r}: {old['reason']} -> {new['reason']}")
    print(f"{len(changed)} of {len(rows)} verdicts changed")
    folder = source if source.is_dir() else source.parent
    out = Path(cfg.out or folder / "regraded")
    out.mkdir(parents=True, exist_ok=True)
    report.write_rows(out / "samples.jsonl", fresh)
    finish(cfg, fresh, out, folder.name, {"regraded": str(source)})


@errors_in_one_line("evaluate.py")
def main(cfg):
    if cfg.compare:
        report.compare(cfg)
    elif cfg.regrade:
        regrade(cfg)
    else:
        run(cfg)


if __name__ == "__main__":
    outlive_terminal()
    main(parse(EvalConfig))
