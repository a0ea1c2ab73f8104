"""pass@k on the paper's benchmarks, with intervals. Every completion is kept; finished ones are reused.

    python evaluate.py --k 8                                   # the newest trained model
    python evaluate.py --k 8 --model Qwen/Qwen3-1.7B-Base --data aime24,my.jsonl --n 32
    torchrun --nproc_per_node 8 evaluate.py --k 8              # each rank answers its share of the problems
    python evaluate.py --compare out/eval/base/toy block=out/eval/seed0/toy,out/eval/seed1/toy
    python evaluate.py --regrade out/eval/base/toy             # needs no model

Writes to --out: samples.jsonl, a row for every completion; results.json, the numbers with settings and versions; and
pass_at_k.png. If an evaluation is killed, the same command continues it.

pass@k is unbiased, from n >= k samples; mean@n is pass@1. The 95 % intervals account for the choice of problems, not of
training seeds. In a response that was cut off by its token limit, only a boxed answer counts.
"""

from configs import BENCHMARKS, EvalConfig, parse

if __name__ == "__main__":
    cfg = parse(EvalConfig)  # before the imports below, which take seconds: --help and a wrong flag answer at once

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

import data
import rollout
from policy import choose_attention_kernels
from support import checkpoint, report, toy
from support.common import (
    digest,
    gather,
    hide_progress_bars,
    ignore_output_errors,
    init_device,
    leave_process_group,
    print0,
    rank,
    seed_for,
    versions,
    world_size,
)
from support.errors import draw_or_warn, errors_in_one_line, keep_tracebacks_in, on_all_ranks
from support.files import append_jsonl, check_is_shared, claim_folder, write_file, write_jsonl
from support.grade import VERSION, Grader
from support.models import context_of
from support.plot import plot_pass_at_k
from support.ranks import digest_of_problems, same_on_all_ranks
from support.statistics import read_rows, summary
from support.vocabulary import decode, load_tokenizer, pretrained

# Flags that change no sample, so that a folder may be used again with another value
NOT_IN_IDENTITY = "k out overwrite paper regrade compare device threads vllm_memory batch tp".split()
FORMAT = 3  # of samples.jsonl and identity.json

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
    """The text of a rollout's response without special tokens, but with the <think> tags that tell the grader what to skip.

    Some tokenizers count the tags as special tokens; some chat templates open the reasoning at the end of the prompt.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special and token.content.strip() not in ("<think>", "</think>")}
    text = decode(tokenizer, [i for i in r.response if i not in special])
    is_opened = tokenizer.decode(r.prompt[-8:]).rstrip().endswith("<think>")
    return "<think>" + text if is_opened else text


def graded(rows, grader):
    """The rows with answer, correct and reason."""
    verdicts = grader.grade([(row["text"], row["gold"], row["finish"] != "length") for row in rows])
    return [
        row | {"answer": answer, "correct": correct, "reason": reason}
        for row, (answer, correct, reason) in zip(rows, verdicts, strict=True)
    ]


def answer_all(sampler, tokenizer, jobs, grader, *, batch, **sampling):
    """Yields lists of rows, about `batch` for each rank at a time: together those of all jobs, in order, on every rank.

    jobs: {(benchmark, problem's id): jobs of that problem, as in answer()}. Each rank samples its share of the problems.
    """
    problems = list(jobs.values())
    most = max(map(len, problems), default=1)
    size = max(1, batch // most) * world_size()
    for start in range(0, len(problems), size):
        part = problems[start : start + size]
        mine = [job for jobs_of_problem in part[rank() :: world_size()] for job in jobs_of_problem]
        rows = answer(sampler, tokenizer, mine, grader, **sampling)
        found = {}
        for row in [row for rows_of_rank in gather(rows) for row in rows_of_rank]:
            found.setdefault((row["data"], row["problem"]), []).append(row)
        yield [row for jobs_of_problem in part for row in found[jobs_of_problem[0][0], jobs_of_problem[0][1].id]]


def jobs_of(prompts, n, done=()) -> dict:
    """{(benchmark, problem's id): its jobs}: n samples of each of prompts [(benchmark, Problem, ids)] that are not in `done`."""
    jobs = {}
    for name, problem, ids in prompts:
        missing = [(name, problem, ids, i) for i in range(n) if (name, problem.id, i) not in done]
        if missing:
            jobs[name, problem.id] = missing
    return jobs


def evaluate(sampler, tokenizer, prompts, *, k, n=0, seed=0, batch=1024, **sampling):
    """Rows of prompts [(Problem, prompt ids)], the same on every rank. sampling: what sampler.sample takes."""
    jobs = jobs_of([("", *prompt) for prompt in prompts], n or k)
    with Grader() as grader:
        return sum(answer_all(sampler, tokenizer, jobs, grader, seed=seed, batch=batch, **sampling), [])


# -----------------------------------------------------------------------------
# files


def claim(folder: Path, identity: dict, overwrite: bool):
    """On rank 0, makes the folder this evaluation's, and returns its lock; ValueError if it holds the samples of another."""
    if rank() > 0:
        return None
    lock = claim_folder(folder, "identity.json", overwrite)
    path = folder / "identity.json"
    if not path.exists():
        write_file(path, json.dumps(identity, indent=1) + "\n")
    saved = json.loads(path.read_text())
    for name in identity | saved:
        old, new = saved.get(name), identity.get(name)
        if name == "format" and old != new:
            raise ValueError(
                f"{folder} was written by another version of this code, and only that version can continue it: choose another --out"
            )
        if old != new:
            raise ValueError(
                f"{folder} holds another evaluation, with {name} {old!r}, not {new!r}: --overwrite deletes it, "
                f"--out names another folder"
            )
    return lock


def kept_rows(path, prompts, n, grader) -> dict:
    """{(benchmark, problem's id, number): row} of the samples that are there already. Cuts off a torn last line.

    They are graded again: another version of the grader may have graded them.
    """
    rows = read_rows(path) if path.exists() else []
    wanted = {(name, problem.id, i) for name, problem, _ in prompts for i in range(n)}
    kept = {(row["data"], row["problem"], row["sample"]): row for row in rows}
    kept = {key: row for key, row in kept.items() if key in wanted}
    if rank() == 0:
        write_jsonl(path, graded(kept.values(), grader))
    return kept


def files_digest(model, config) -> str | None:
    """Tells whether a model has changed: a digest of its folder's files, about 0.5 s for a GB; of a hub model, its commit."""
    files = sorted(file for file in Path(model).glob("*") if file.suffix in (".safetensors", ".bin", ".json"))
    if not files:
        return getattr(config, "_commit_hash", None)
    return digest([[path.name, checkpoint.size_and_digest(path)[1]] for path in files])


# -----------------------------------------------------------------------------
# commands


def newest_student() -> str:
    """The student of the run in out/ that finished last."""
    finished = [path.parent for path in Path("out").glob("*/final/config.json")]
    if not finished:
        raise ValueError("no finished run in out/: give --model, or train with python train.py")
    # The folder's time, not the file's: config.json is a copy, with the time at which the run began.
    return str(max(finished, key=lambda folder: folder.stat().st_mtime))


def choose_model(name):
    """(folder or hub name, what to call it)."""
    name = os.path.normpath(name or newest_student())  # out/a/final/ is out/a/final; hub names stay as they are
    label = "-".join([part for part in Path(name).parts if part not in ("/", "..", "out", "final")][-2:])
    if name in ("toy", "toy-teacher"):
        return toy.STUDENT if name == "toy" else toy.TEACHER, label
    if name.count("/") > 1 and not Path(name).is_dir():
        raise ValueError(f"--model: there is no folder {name}")
    if (Path(name) / "metrics.jsonl").exists():
        raise ValueError(f"--model: {name} is a run; name its student, {name}/final, or a checkpoint, {name}/step-N")
    return name, label


def prepare(cfg, model, label, device):
    """(cfg with its gaps filled, tokenizer, Vocabulary, [(benchmark, Problem, prompt ids)], identity, max_len). ValueError if wrong.

    The identity says what the samples depend on: a folder with another one is not used. max_len: of a prompt and its response.
    """
    from transformers import AutoConfig

    options = {"trust_remote_code": cfg.trust_remote_code, "template": cfg.template}
    tokenizer, vocabulary = load_tokenizer({"student": model}, **options)
    config = pretrained(AutoConfig, model, trust_remote_code=cfg.trust_remote_code)
    names = cfg.data or ("toy" if tokenizer.get_vocab() == toy.ID else BENCHMARKS)
    paths = data.named_sets(names)
    prompts, identity, n_cut = [], {"format": FORMAT}, {}
    context = context_of(config) or 1 << 30
    for name, path in paths.items():
        problems = data.load(path, limit=cfg.eval_problems)
        encoded = data.encode_all(problems, tokenizer, cfg, vocabulary.size)
        identity[f"problems of {name}"] = digest_of_problems(encoded)
        prompts += [(name, problem, ids) for problem, ids in encoded]
        n_cut[name] = sum(len(ids) + cfg.max_response > context for _, ids in encoded)
    longest = max(len(ids) for _, _, ids in prompts)
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens does not fit a context of {context}")
    out = cfg.out or str(Path("out/eval", label, "+".join(paths)))
    k = 1 if cfg.temperature == 0 else cfg.k
    cfg = replace(cfg, model=model, data=names, k=k, n=cfg.n or k, out=out)
    identity |= {name: x for name, x in asdict(cfg).items() if name not in NOT_IN_IDENTITY}
    identity |= {"rollout": rollout.choose(cfg.rollout, device.type)[0], "device": device.type, "cut by context": n_cut}
    identity["weights"] = files_digest(model, config)
    return cfg, tokenizer, vocabulary, prompts, identity, min(context, longest + cfg.max_response)


def run(cfg):
    # As in train.setup: on_all_ranks(f, ...) calls f on every rank, and all ranks end if it fails on one.
    device = on_all_ranks(init_device, cfg)
    hide_progress_bars()
    model, label = on_all_ranks(choose_model, cfg.model)
    on_all_ranks(checkpoint.check, model)
    cfg, tokenizer, vocabulary, prompts, identity, max_len = on_all_ranks(prepare, cfg, model, label, device)
    n_cut = sum(identity["cut by context"].values())
    cut = f", for {n_cut} problems only until the context of {max_len} is full" if n_cut else ""
    samples = f"{cfg.n} samples of" if cfg.temperature else "the most likely answer to each of"
    print0(f"{cfg.model}: {samples} {len(prompts)} problems, {cfg.max_response} tokens at most{cut}")
    print0(f"first prompt: {tokenizer.decode(prompts[0][2])!r}")
    out = Path(cfg.out)
    same_on_all_ranks(identity)
    on_all_ranks(check_is_shared, out)
    lock = on_all_ranks(claim, out, identity, cfg.overwrite)
    keep_tracebacks_in(out)

    path = out / "samples.jsonl"
    with Grader() as grader:
        on_all_ranks(grader.check)
        jobs = jobs_of(prompts, cfg.n, on_all_ranks(kept_rows, path, prompts, cfg.n, grader))
        if jobs:
            print0("sampling with {}: {}".format(*rollout.choose(cfg.rollout, device.type)))
            sampler = on_all_ranks(rollout.make_sampler, cfg, cfg.model, None, vocabulary, max_len=max_len)
            choose_attention_kernels(device)
            sampling = rollout.sampling_options(cfg) | {"seed": cfg.seed, "batch": cfg.batch}
            if cfg.temperature == 0:
                sampling |= {"temperature": 1.0, "top_p": 1.0, "top_k": 1}  # greedy: the most likely token alone
            bar = tqdm(total=sum(map(len, jobs.values())), unit="response", disable=rank() > 0)
            for fresh in answer_all(sampler, tokenizer, jobs, grader, **sampling):
                if rank() == 0:
                    append_jsonl(path, fresh)
                bar.update(len(fresh))
            bar.close()
    if rank() == 0:
        finish(cfg, read_rows(path), out, label, identity)
        lock.release()
    leave_process_group()


def finish(cfg, rows, out, label, identity):
    """Writes and prints what the rows say."""
    entries = summary([rows], cfg.k)
    records = [{"benchmark": benchmark} | entry for benchmark, entry in entries.items()]
    # A short context matters if it, or --max_response, has cut a response off.
    n_cut = identity["cut by context"] if any(entry["truncated"] for entry in entries.values()) else None
    identity = identity | {"grader": "{} with math-verify {math-verify}, sympy {sympy}".format(VERSION, **versions())}
    results = {"config": asdict(cfg), "identity": identity, "versions": versions(), "metrics": records}
    write_file(out / "results.json", json.dumps(results, indent=1) + "\n")
    draw_or_warn(plot_pass_at_k, {label: entries}, out / "pass_at_k.png")
    print(f"\n{report.summary_table(entries, cfg.k, n_cut)}\n")
    if cfg.paper:
        print(f"{report.paper_table({label: entries}, cfg.k)}\n")
    print(f"{out}: samples.jsonl, every completion; results.json, the numbers; pass_at_k.png")


def regrade(cfg):
    """Grades kept completions again, into the folder --out, or `regraded` beside them."""
    source = Path(cfg.regrade)
    rows = read_rows(source / "samples.jsonl" if source.is_dir() else source)
    summary([rows], cfg.k)  # before anything is written: ValueError if there are fewer than k samples
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
    write_jsonl(out / "samples.jsonl", fresh)
    finish(cfg, fresh, out, folder.name, report.read_identity(source) | {"regraded": str(source)})


@errors_in_one_line("evaluate.py")
def main(cfg):
    if cfg.compare:
        report.compare(cfg)
    elif cfg.regrade:
        regrade(cfg)
    else:
        run(cfg)


if __name__ == "__main__":
    ignore_output_errors()
    main(cfg)
