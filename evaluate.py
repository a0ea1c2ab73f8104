"""pass@k on the paper's benchmarks, with error bars, every completion kept, nothing sampled twice.

    python evaluate.py --k 8                                   # the newest trained model
    python evaluate.py --k 8 --model Qwen/Qwen3-1.7B-Base --data aime24,my.jsonl --n 32
    torchrun --nproc_per_node 8 evaluate.py --k 8              # each rank answers its share of the problems
    python evaluate.py --compare out/eval/base/toy block=out/eval/seed0/toy,out/eval/seed1/toy
    python evaluate.py --regrade out/eval/base/toy             # no model

--out then holds samples.jsonl, a row a completion; results.json, the numbers with settings and versions; and
pass_at_k.png. A killed evaluation goes on where it stopped when the same command is given again.

pass@k is unbiased, from n >= k samples; mean@n is pass@1. Intervals are 95 % and over problems: what other
problems of the kind would give. A response that its token limit cut off counts only what it has boxed.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import report
import rollout
from configs import BENCHMARKS, EvalConfig, parse
from grade import Grader

# what does not change a sample, so that a folder may be used with another value
FREE = "k out overwrite paper regrade compare device threads vllm_memory".split()


# -----------------------------------------------------------------------------
# sampling


def respond(sampler, tokenizer, jobs, grader, *, seed, template, **sampling):
    """The rows of jobs, [(benchmark, Problem, sample index)]: what was sampled, and whether it is right."""
    prompts = [data.encode(problem, tokenizer, template) for _, problem, _ in jobs]
    seeds = [rollout.seed_for("eval", seed, problem.id, i) for _, problem, i in jobs]
    rollouts = sampler.sample(prompts, seeds, **sampling)
    rows = []
    for (name, problem, i), s, r in zip(jobs, seeds, rollouts, strict=True):
        row = dict(data=name, problem=problem.id, sample=i, seed=s, tokens=len(r.response))
        text = tokenizer.decode(r.response, skip_special_tokens=True)
        rows.append(row | dict(finish=r.finish, gold=problem.answer, text=text))
    return graded(rows, grader)


def graded(rows, grader):
    found = grader.grade([(row["text"], row["gold"], row["finish"] != "length") for row in rows])
    names = ("answer", "correct", "reason")
    return [row | dict(zip(names, of, strict=True)) for row, of in zip(rows, found, strict=True)]


def cut(problems, n, batch):
    """This rank's jobs in parts of about `batch` responses, the same wherever an earlier run was killed."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, step = problems[rank::world], max(1, batch // n)
    for start in range(0, len(problems[::world]), step):  # as many parts on every rank, the last may be empty
        yield [(s, problem, i) for s, problem in mine[start : start + step] for i in range(n)]


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts


def evaluate(sampler, tokenizer, problems, *, k, n=0, seed=0, template="auto", batch=1024, **sampling):
    """(metrics, rows) of Problems, for a training loop; the same on every rank, each having sampled its share.

    metrics: pass@k, mean@n, truncated, length, no_answer. sampling: what sampler.sample takes.
    """
    rows = []
    with Grader() as grader:
        for jobs in cut([("", problem) for problem in problems], n or k, batch):
            rows += respond(sampler, tokenizer, jobs, grader, seed=seed, template=template, **sampling)
    rows = [row for part in gather(rows) for row in part]
    return report.metrics(rows, k), rows


# -----------------------------------------------------------------------------
# files


def claim(folder: Path, identity: dict):
    """Makes the folder this evaluation's; ValueError where it holds the samples of another."""
    path = folder / "identity.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        report.write(path, json.dumps(identity, indent=1) + "\n")
    theirs = json.loads(path.read_text())
    for name in identity | theirs:
        old, new = theirs.get(name), identity.get(name)
        if old != new:
            say = f"{folder} holds another evaluation, with {name} {old!r}, not {new!r}"
            raise ValueError(f"{say}: --overwrite deletes it, --out names another folder")


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def weights_digest(path, revision):
    """Of a folder's model files: names, sizes, a MiB at either end of each; of a hub model: its commit."""
    parts = []
    for file in sorted(Path(path).glob("*")) if Path(path).is_dir() else []:
        if file.suffix in (".safetensors", ".bin", ".json"):
            with open(file, "rb") as f:
                ends = f.read(1 << 20)
                f.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
                parts.append([file.name, file.stat().st_size, hashlib.sha256(ends + f.read()).hexdigest()])
    return digest(*parts) if parts else revision


def versions():
    found = {"python": platform.python_version()}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    for name in ("torch", "transformers", "vllm", "math-verify", "sympy"):
        found[name] = installed.get(name)
    git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=12"]
    return found | {"commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()}


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
        finished = sorted(Path("out").glob("*/final/config.json"), key=lambda p: p.stat().st_mtime)
        if not finished:
            raise ValueError("no finished run in out/: give --model, or train with python train.py")
        name = str(finished[-1].parent)
    parts = [x for x in Path(name).parts if x not in ("/", "..", "out", "final")]
    return name, "-".join(parts[-2:])


def prepare(cfg):
    """(label, tokenizer, [(benchmark, Problem)], identity), and cfg's gaps filled: all that can be wrong."""
    from transformers import AutoConfig, AutoTokenizer

    model, label = choose_model(cfg.model)
    code = dict(trust_remote_code=cfg.trust_remote_code)
    tokenizer, lm = (x.from_pretrained(model, **code) for x in (AutoTokenizer, AutoConfig))
    if not cfg.data:
        import toy

        cfg.data = "toy" if tokenizer.get_vocab() == toy.tokenizer().get_vocab() else BENCHMARKS
    cfg.n, cfg.model = cfg.n or cfg.k, model
    names = {Path(name).stem: name for name in cfg.data.split(",")}
    sets = {s: data.load(name, limit=cfg.limit) for s, name in names.items()}
    problems = [(s, p) for s in sets for p in sets[s]]
    ids = [(s, p.id) for s, p in problems]
    if len(names) < len(cfg.data.split(",")) or len(set(ids)) < len(ids):
        raise ValueError(f"--data {cfg.data}: two sets, or two problems of one, have the same name")
    prompts = [data.encode(p, tokenizer, cfg.template) for _, p in problems]
    longest, context = (max(map(len, prompts)), getattr(lm, "max_position_embeddings", None) or 1 << 30)
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens does not fit a context of {context}")
    cfg.max_tokens = min(cfg.max_tokens, context - longest)
    cfg.out = cfg.out or str(Path("out/eval", label, "+".join(names)))

    identity = {name: x for name, x in asdict(cfg).items() if name not in FREE}
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    identity |= dict(rollout=rollout.choose(cfg.rollout, device.type)[0], device=device.type)
    identity["world"] = int(os.environ.get("WORLD_SIZE", 1))
    identity["weights"] = weights_digest(model, getattr(lm, "_commit_hash", None))
    for s in sets:
        identity[f"problems of {s}"] = digest(*([p.id, p.prompt, p.answer] for p in sets[s]))
    return label, tokenizer, problems, identity | {"prompts": digest(*prompts)}


def run(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # gloo and a long timeout: a rank waits for the slowest one
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    say = tqdm.write if rank == 0 else lambda _: None
    label, tokenizer, problems, identity = prepare(cfg)
    say(f"{cfg.model}: {cfg.n} samples of {len(problems)} problems, {cfg.max_tokens} tokens at most")
    say(f"first prompt: {tokenizer.decode(data.encode(problems[0][1], tokenizer, cfg.template))!r}")
    out = Path(cfg.out)
    if rank == 0:
        if cfg.overwrite and (out / "identity.json").exists():  # nothing but an evaluation is ever deleted
            shutil.rmtree(out)
        claim(out, identity)
    if world > 1:
        dist.barrier()

    def kept():
        files = [*out.glob("samples.jsonl"), *sorted(out.glob("part-*.jsonl"))]
        rows = [row for file in files for row in report.read_rows(file)]
        return {(row["data"], row["problem"], row["sample"]): row for row in rows}

    sampling = {name: getattr(cfg, name) for name in ("max_tokens", "temperature", "top_p")}
    sampling |= dict(top_k=cfg.sample_top_k, seed=cfg.seed, template=cfg.template)
    rows = kept()
    parts = list(cut(problems, cfg.n, cfg.batch))
    todo = [any((s, problem.id, i) not in rows for s, problem, i in jobs) for jobs in parts]
    if any(gather(any(todo))):  # all ranks build their samplers together, or none does
        sampler = rollout.make_sampler(cfg, cfg.model, None, tokenizer, len(tokenizer), say)
    bar = tqdm(total=sum(map(len, parts)), unit="response", disable=rank > 0)
    with Grader() as grader:
        for i, jobs in enumerate(parts):
            if todo[i]:
                found = respond(sampler, tokenizer, jobs, grader, **sampling)
                report.write_rows(out / f"part-{rank:03d}-{i:05d}.jsonl", found)
            bar.update(len(jobs))
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        rows = kept()
        rows = [rows[s, problem.id, i] for s, problem in problems for i in range(cfg.n)]
        report.write_rows(out / "samples.jsonl", rows)
        for file in out.glob("part-*"):
            file.unlink()
        finish(cfg, rows, out, label, identity)


def finish(cfg, rows, out, label, identity):
    found = report.summary([rows], cfg.k)
    results = dict(config=asdict(cfg), identity=identity, versions=versions(), metrics=found)
    report.write(out / "results.json", json.dumps(results, indent=1) + "\n")
    report.picture({label: found}, out / "pass_at_k.png")
    print(f"\n{report.table(found, cfg.k)}\n")
    if cfg.paper:
        print(f"{report.paper_table({label: found}, cfg.k)}\n")
    print(f"{out}: samples.jsonl, every completion; results.json, the numbers; pass_at_k.png")


def regrade(cfg):
    """Grades kept completions again, into the folder --out or `regraded` beside them."""
    source = Path(cfg.regrade)
    rows = report.read_rows(source)
    with Grader() as grader:
        fresh = graded(rows, grader)
    changed = [(a, b) for a, b in zip(rows, fresh, strict=True) if a["correct"] != b["correct"]]
    for a, b in changed[:20]:
        was = f"{a['data']} {a['problem']}: {b['answer']!r} for {b['gold']!r}"
        print(f"{was}: {a['reason']} -> {b['reason']}")
    print(f"{len(changed)} of {len(rows)} verdicts changed")
    folder = source if source.is_dir() else source.parent
    out = Path(cfg.out or folder / "regraded")
    out.mkdir(parents=True, exist_ok=True)
    report.write_rows(out / "samples.jsonl", fresh)
    finish(cfg, fresh, out, folder.name, {"regraded": str(source)})


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        (report.compare if cfg.compare else regrade if cfg.regrade else run)(cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(parse(EvalConfig))
