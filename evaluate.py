"""pass@k on the paper's benchmarks, with intervals; every completion is kept, and none is sampled twice.

    python evaluate.py --k 8                                   # the newest trained model
    python evaluate.py --k 8 --model Qwen/Qwen3-1.7B-Base --data aime24,my.jsonl --n 32
    torchrun --nproc_per_node 8 evaluate.py --k 8              # each rank answers its share of the problems
    python evaluate.py --compare out/eval/base/toy block=out/eval/seed0/toy,out/eval/seed1/toy
    python evaluate.py --regrade out/eval/base/toy             # needs no model

--out then holds samples.jsonl, one row per completion; results.json, the numbers with settings and versions; and
pass_at_k.png. If an evaluation is killed, the same command goes on where it stopped.

pass@k is unbiased, from n >= k samples; mean@n is pass@1. Intervals are 95 % and over problems: what other problems of
the kind would give. In a response that was cut off by its token limit, only a boxed answer counts.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import report
import rollout
from common import gather, init_device, one_line, rank, say, versions, world_size, write_file
from configs import BENCHMARKS, EvalConfig, parse
from grade import Grader
from policy import full_weights, token_logprobs

# Flags that change no sample, so that a folder may be used again with another value.
NOT_IN_IDENTITY = "k out overwrite paper regrade compare device threads vllm_memory".split()

# -----------------------------------------------------------------------------
# sampling and grading


def answer(sampler, tokenizer, jobs, grader, *, seed, template, **sampling):
    """Rows for jobs [(benchmark, Problem, number of the sample)]: what was sampled, and whether it is right."""
    prompts = [data.encode(problem, tokenizer, template) for _, problem, _ in jobs]
    seeds = [rollout.seed_for("eval", seed, problem.id, i) for _, problem, i in jobs]
    rows = []
    for (name, problem, i), seed_i, r in zip(jobs, seeds, sampler.sample(prompts, seeds, **sampling), strict=True):
        row = {"data": name, "problem": problem.id, "sample": i, "seed": seed_i, "tokens": len(r.response)}
        row |= {"finish": r.finish, "gold": problem.answer}
        rows.append(row | {"text": tokenizer.decode(r.response, skip_special_tokens=True)})
    return graded(rows, grader)


def graded(rows, grader):
    """The rows with answer, correct and reason."""
    verdicts = grader.grade([(row["text"], row["gold"], row["finish"] != "length") for row in rows])
    names = ("answer", "correct", "reason")
    return [row | dict(zip(names, verdict, strict=True)) for row, verdict in zip(rows, verdicts, strict=True)]


def split_jobs(problems, n, batch):
    """This rank's jobs in parts of about `batch` responses: the same ones wherever an earlier run was killed.

    problems: [(benchmark, Problem), ...]. There are as many parts on every rank; the last one may be empty.
    """
    mine, step = problems[rank() :: world_size()], max(1, batch // n)
    for start in range(0, len(problems[:: world_size()]), step):
        yield [(name, problem, i) for name, problem in mine[start : start + step] for i in range(n)]


def evaluate(sampler, tokenizer, problems, *, k, n=0, seed=0, template="auto", batch=1024, **sampling):
    """(metrics, rows) of Problems: the same on every rank, each having sampled its share.

    metrics: pass@k, mean@n, truncated, length, no_answer. sampling: what sampler.sample takes.
    """
    rows = []
    with Grader() as grader:
        for jobs in split_jobs([("", problem) for problem in problems], n or k, batch):
            rows += answer(sampler, tokenizer, jobs, grader, seed=seed, template=template, **sampling)
    rows = [row for part in gather(rows) for row in part]
    return report.metrics(rows, k), rows


def evaluate_student(run, cfg):
    """{metric: value} of the student in training (train.Run) on the held-out problems.

    eval/gap estimates the reverse KL of student to teacher, in nats per token, on the student's own responses to at most
    64 problems; they are sampled without top-p and top-k, since under a truncated distribution it would not be a KL.
    """
    sampling, row = rollout.sampling_options(cfg), {}
    run.sampler.sync(full_weights(run.policy))
    for name, problems in run.held_out.items():
        scores, _ = evaluate(
            run.sampler, run.tokenizer, problems, k=cfg.k, seed=cfg.seed, template=cfg.template, **sampling
        )
        prompts = [data.encode(problem, run.tokenizer, cfg.template) for problem in problems[:64]]
        jobs = [(ids, rollout.seed_for("gap", cfg.seed, i)) for i, ids in enumerate(prompts)]
        rollouts = rollout.sample_on_all_ranks(run.sampler, jobs, sampling | {"top_p": 1.0, "top_k": 0})
        run.sampler.sleep()
        minibatches = data.make_minibatches(rollouts, cfg, 0, run.newline_ids, run.device, rank(), world_size())
        batches = [batch for minibatch in minibatches for batch in minibatch]
        total = torch.zeros(2)  # sum of log p - log q, number of tokens
        for batch, targets in zip(batches, run.teacher.targets(batches), strict=True):
            with torch.no_grad():
                gap = token_logprobs(run.policy, batch, cfg.temperature).cpu() - targets["logq_sampled"]
            total += torch.tensor([gap.sum(), gap.numel()])
        total = sum(gather(total))
        scores["gap"] = (total[0] / total[1]).item()
        prefix = "eval" if len(run.held_out) == 1 else f"eval/{name}"
        row |= {f"{prefix}/{key}": x for key, x in scores.items()}
    return row


# -----------------------------------------------------------------------------
# files


def claim(folder: Path, identity: dict):
    """Makes the folder this evaluation's; ValueError if it holds the samples of another."""
    path = folder / "identity.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(identity, indent=1) + "\n")
    saved = json.loads(path.read_text())
    for name in identity | saved:
        old, new = saved.get(name), identity.get(name)
        if old != new:
            raise ValueError(
                f"{folder} holds another evaluation, with {name} {old!r}, not {new!r}: --overwrite deletes it, "
                f"--out names another folder"
            )


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def weights_version(path, commit):
    """Changes when a folder's model does: the newest modification time of its files. Of a hub model, its commit."""
    times = [file.stat().st_mtime for file in Path(path).glob("*") if file.is_file()]
    return max(times, default=commit)


# -----------------------------------------------------------------------------
# commands


def choose_model(name):
    """(folder or hub name, what to call it)."""
    if name in ("toy", "toy-teacher"):
        import toy

        teacher, student = toy.models()
        return str(student if name == "toy" else teacher), name
    if name.count("/") > 1 and not Path(name).is_dir():
        raise ValueError(f"--model: there is no folder {name}")
    if not name:
        finished = sorted(Path("out").glob("*/final/config.json"), key=lambda path: path.stat().st_mtime)
        if not finished:
            raise ValueError("no finished run in out/: give --model, or train with python train.py")
        name = str(finished[-1].parent)
    parts = [x for x in Path(name).parts if x not in ("/", "..", "out", "final")]
    return name, "-".join(parts[-2:])


def prepare(cfg, device):
    """(cfg with its gaps filled, label, tokenizer, [(benchmark, Problem)], identity). ValueError if anything is wrong.

    The identity says what the samples depend on: a folder with another one is not used.
    """
    from transformers import AutoConfig, AutoTokenizer

    model, label = choose_model(cfg.model)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=cfg.trust_remote_code)
    config = AutoConfig.from_pretrained(model, trust_remote_code=cfg.trust_remote_code)
    names = cfg.data
    if not names:
        import toy

        names = "toy" if tokenizer.get_vocab() == toy.tokenizer().get_vocab() else BENCHMARKS
    paths = {Path(name).stem: name for name in names.split(",")}
    sets = {name: data.load(path, limit=cfg.limit) for name, path in paths.items()}
    problems = [(name, problem) for name in sets for problem in sets[name]]
    ids = [(name, problem.id) for name, problem in problems]
    if len(paths) < len(names.split(",")) or len(set(ids)) < len(ids):
        raise ValueError(f"--data {names}: two sets, or two problems of one, have the same name")
    prompts = [data.encode(problem, tokenizer, cfg.template) for _, problem in problems]
    longest, context = max(map(len, prompts)), getattr(config, "max_position_embeddings", None) or 1 << 30
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens does not fit a context of {context}")
    out = cfg.out or str(Path("out/eval", label, "+".join(paths)))
    max_tokens = min(cfg.max_tokens, context - longest)
    cfg = replace(cfg, model=model, data=names, n=cfg.n or cfg.k, max_tokens=max_tokens, out=out)
    identity = {name: x for name, x in asdict(cfg).items() if name not in NOT_IN_IDENTITY}
    identity |= {"rollout": rollout.choose(cfg.rollout, device.type)[0], "device": device.type, "world": world_size()}
    identity["weights"] = weights_version(model, getattr(config, "_commit_hash", None))
    for name in sets:
        identity[f"problems of {name}"] = digest(*([p.id, p.prompt, p.answer] for p in sets[name]))
    return cfg, label, tokenizer, problems, identity | {"prompts": digest(*prompts)}


def run(cfg):
    device = init_device(cfg)
    cfg, label, tokenizer, problems, identity = prepare(cfg, device)
    say(f"{cfg.model}: {cfg.n} samples of {len(problems)} problems, {cfg.max_tokens} tokens at most")
    say(f"first prompt: {tokenizer.decode(data.encode(problems[0][1], tokenizer, cfg.template))!r}")
    out = Path(cfg.out)
    if rank() == 0:
        if cfg.overwrite and (out / "identity.json").exists():  # nothing but an evaluation is ever deleted
            shutil.rmtree(out)
        claim(out, identity)
    if dist.is_initialized():
        dist.barrier()

    def kept_rows():
        files = [*out.glob("samples.jsonl"), *sorted(out.glob("part-*.jsonl"))]
        rows = [row for file in files for row in report.read_rows(file)]
        return {(row["data"], row["problem"], row["sample"]): row for row in rows}

    sampling = {"max_tokens": cfg.max_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p}
    sampling |= {"top_k": cfg.sample_top_k, "seed": cfg.seed, "template": cfg.template}
    rows = kept_rows()
    parts = list(split_jobs(problems, cfg.n, cfg.batch))
    is_missing = [any((name, problem.id, i) not in rows for name, problem, i in jobs) for jobs in parts]
    if any(gather(any(is_missing))):  # all ranks build their samplers together, or none does
        sampler = rollout.make_sampler(cfg, cfg.model, None, tokenizer, len(tokenizer))
    bar = tqdm(total=sum(map(len, parts)), unit="response", disable=rank() > 0)
    with Grader() as grader:
        for i, jobs in enumerate(parts):
            if is_missing[i]:
                fresh = answer(sampler, tokenizer, jobs, grader, **sampling)
                report.write_rows(out / f"part-{rank():03d}-{i:05d}.jsonl", fresh)
            bar.update(len(jobs))
    bar.close()
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        rows = kept_rows()
        rows = [rows[name, problem.id, i] for name, problem in problems for i in range(cfg.n)]
        report.write_rows(out / "samples.jsonl", rows)
        for file in out.glob("part-*"):
            file.unlink()
        finish(cfg, rows, out, label, identity)


def finish(cfg, rows, out, label, identity):
    """Writes and prints what the rows say."""
    summary = report.summary([rows], cfg.k)
    results = {"config": asdict(cfg), "identity": identity, "versions": versions(), "metrics": summary}
    write_file(out / "results.json", json.dumps(results, indent=1) + "\n")
    report.plot_pass_at_k({label: summary}, out / "pass_at_k.png")
    print(f"\n{report.summary_table(summary, cfg.k)}\n")
    if cfg.paper:
        print(f"{report.paper_table({label: summary}, cfg.k)}\n")
    print(f"{out}: samples.jsonl, every completion; results.json, the numbers; pass_at_k.png")


def regrade(cfg):
    """Grades kept completions again, into the folder --out, or `regraded` beside them."""
    source = Path(cfg.regrade)
    rows = report.read_rows(source)
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


def main(cfg):
    try:
        if cfg.compare:
            report.compare(cfg)
        elif cfg.regrade:
            regrade(cfg)
        else:
            run(cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {one_line(error)}")


if __name__ == "__main__":
    main(parse(EvalConfig))
