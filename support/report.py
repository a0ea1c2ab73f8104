"""What evaluations and runs say of themselves: tables of pass@k and of comparisons, a run's first and last words, its card."""

import glob
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from configs import BENCHMARKS, OLD_NAMES, TOPK_LOSSES, command_line
from support.common import versions, world_size
from support.files import EVALUATIONS, FINAL, METRICS, read_jsonl, write_file
from support.plot import plot_pass_at_k
from support.statistics import MEAN, curves_of_runs, paired, read_rows, rows_by_benchmark, shared_benchmarks, summary

PAPER = {  # arXiv 2606.24084: pass@8 in %, on BENCHMARKS in this order; one seed each
    "base student": (77.2, 13.3, 10.0, 60.0),
    "OPD": (85.8, 20.0, 13.3, 80.0),
    "OPD + Block64": (86.4, 20.0, 20.0, 80.0),
    "OPD + NewlineSpan": (86.0, 26.7, 16.7, 75.0),
    "LSM": (86.0, 23.3, 20.0, 70.0),
    "LSM + Block64": (86.4, 20.0, 26.7, 80.0),
    "LSM + NewlineSpan": (86.2, 20.0, 26.7, 80.0),
    "teacher (4B)": (90.8, 46.7, 33.3, 90.0),
}

# -----------------------------------------------------------------------------
# evaluations


def percent(share, bounds=None) -> str:
    """0.123 as "12.3", or as "12.3 [10.1, 14.5]" with bounds (0.101, 0.145)."""
    text = f"{100 * share:.1f}"
    return text if bounds is None else f"{text} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def format_columns(header, body) -> str:
    """Lines of text cells as aligned columns, the first flush left and the others flush right."""
    columns = []
    for i, column in enumerate(zip(header, *body, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if i else cell.ljust(width) for cell in column])
    first_line, *lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    return "\n".join([first_line, "-" * len(first_line), *lines])


def summary_table(entries: dict, k: int, n_cut=None) -> str:
    """What summary() returns as a table, in percent and with 95 % intervals.

    n_cut: {benchmark: how many of its problems the model's context leaves less than --max_response tokens}.
    """
    first_entry = next(iter(entries.values()))
    mean_at_n = next(name for name in first_entry if name.startswith("mean@"))
    body = []
    for benchmark, entry in entries.items():
        bounds = list(zip(entry["low"], entry["high"], strict=True))  # of pass@1, ..., pass@n; pass@1 is mean@n
        cells = [percent(entry[f"pass@{k}"], bounds[k - 1]), percent(entry[mean_at_n], bounds[0])]
        cells += [percent(entry["truncated"]), f"{entry['length']:.0f}", percent(entry["no_answer"])]
        body.append([benchmark, str(entry["problems"]), *cells])
    header = ["", "problems", f"pass@{k} %", f"{mean_at_n} %", "cut off %", "tokens", "no answer %"]
    if any((n_cut or {}).values()):
        header.append("context < max_response")
        for line in body:
            line.append(str(n_cut.get(line[0], sum(n_cut.values()))))  # that of the mean is the sum, as for problems
    return format_columns(header, body)


def paper_table(summaries: dict, k: int) -> str:
    """The paper's table, with our summaries {name: what summary() returns} under it; "-": not evaluated."""
    benchmarks = BENCHMARKS.split(",")
    body = [[name, *map(str, scores), f"{np.mean(scores):.1f}"] for name, scores in PAPER.items()]
    for name, entries in summaries.items():
        scores = [entries[benchmark][f"pass@{k}"] if benchmark in entries else math.nan for benchmark in benchmarks]
        cells = ["-" if math.isnan(score) else percent(score) for score in [*scores, np.mean(scores)]]
        body.append([f"ours: {name}", *cells])
    return format_columns([f"paper: pass@8 %, ours: pass@{k} %", *benchmarks, MEAN], body)


def comparison(variants: dict, k: int) -> str:
    """A table of each later variant against the first, on the benchmarks that all runs have.

    variants: {name: [rows of each run]}. ValueError if runs answer different problems, or have under k samples of each.
    """
    runs = {name: [rows_by_benchmark(rows) for rows in variant] for name, variant in variants.items()}
    all_runs = [(name, run) for name, variant in runs.items() for run in variant]
    baseline, first_run = all_runs[0]
    benchmarks = shared_benchmarks([run for _, run in all_runs])
    if not benchmarks:
        available = ", ".join(f"{name} has {' and '.join(run)}" for name, run in all_runs)
        raise ValueError(f"--compare: no benchmark in common: {available}")
    for benchmark in benchmarks:
        expected = {(row["problem"], row["gold"]) for row in first_run[benchmark]}
        for name, run in all_runs:
            differing = expected ^ {(row["problem"], row["gold"]) for row in run[benchmark]}
            if differing:
                example = f"{len(differing)} differ, for example (id, gold) = {min(differing)}"
                raise ValueError(f"{baseline} and {name} do not answer the same problems of {benchmark}: {example}")

    def scores(name, members, column):
        """[R, P] for each of these benchmarks."""
        return [curves_of_runs([run[benchmark] for run in runs[name]], k)[..., column] for benchmark in members]

    groups = {benchmark: [benchmark] for benchmark in benchmarks}
    if len(benchmarks) > 1:
        groups[MEAN] = benchmarks
    body = []
    for name in list(variants)[1:]:
        for metric, column in ((f"pass@{k}", k - 1), ("mean@n", 0)):
            for label, members in groups.items():
                ours, base = scores(name, members, column), scores(baseline, members, column)
                means = [percent(np.mean([x.mean() for x in side])) for side in (ours, base)]
                difference, bounds, p_value = paired(ours, base)
                body.append([name, label, metric, *means, percent(difference, bounds), f"{p_value:.4f}"])
    return format_columns(["variant", "", "%", "variant", baseline, "difference", "p"], body)


def read_identity(path: Path) -> dict:
    """What an evaluation's samples depend on, and what graded them: {setting: value}; empty if nothing beside them says so."""
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in ("identity.json", "results.json")]
    identity, results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return {OLD_NAMES.get(name, name): x for name, x in (identity | results.get("identity", {})).items()}


def differing_settings(identities: dict) -> list[str]:
    """Warnings for what differs besides the models. identities: {variant: what read_identity says of each run}.

    ValueError if runs of one variant differ in a setting, or if different graders gave the verdicts.
    """
    warnings = []
    for name, runs in identities.items():
        weights = [identity["weights"] for identity in runs if identity.get("weights")]
        if len(set(weights)) < len(weights):
            warnings.append(f"warning: runs of {name} have the same weights, and count as different training seeds")
    for setting in ("grader", "max_response", "temperature", "top_p", "sample_top_k", "n", "template", "template_args"):
        found = {name: {str(run.get(setting)) for run in runs if run} for name, runs in identities.items()}
        text = f"{setting} " + ", ".join(f"{' and '.join(sorted(values))} ({name})" for name, values in found.items())
        if max(map(len, found.values())) > 1:
            raise ValueError(f"--compare: runs of one variant have different settings: {text}")
        if len(set().union(*found.values())) > 1:
            if setting == "grader":
                raise ValueError(f"--compare: {text}: evaluate.py --regrade FOLDER grades an evaluation with this one")
            warnings.append(f"warning: they differ in more than the model: {text}")
    return warnings


def compare(cfg):
    """evaluate.py --compare: prints the tables, and writes pass_at_k.png into --out."""
    variants, identities, seen = {}, {}, []
    for argument in cfg.compare:  # NAME=A,B,C or A,B,C: runs of one variant, each a folder, a file or a glob pattern
        name, equals, paths = argument.partition("=")
        if not equals or "/" in name:  # a path may have an = of its own
            name, paths = "", argument
        files = []
        for path in paths.split(","):
            files += sorted(glob.glob(path)) or [path]  # if nothing matches, read_rows names the path in its error
        name = name or paths
        samples = [(Path(file) / "samples.jsonl" if Path(file).is_dir() else Path(file)).resolve() for file in files]
        if name in variants or len({*seen, *samples}) < len(seen) + len(samples):
            raise ValueError(f"--compare: the name {name} or one of its runs is given twice: {argument}")
        seen += samples
        variants[name] = [read_rows(Path(file)) for file in files]
        identities[name] = [read_identity(Path(file)) for file in files]
    if len(variants) < 2:
        raise ValueError("--compare needs two evaluations or more, with different names: --compare A=FOLDER B=FOLDER")
    print("\n".join(["", comparison(variants, cfg.k), *differing_settings(identities), ""]))
    summaries = {name: summary(runs, cfg.k) for name, runs in variants.items()}
    if cfg.paper:
        print(f"{paper_table(summaries, cfg.k)}\n")
    out = Path(cfg.out or "out/eval")
    out.mkdir(parents=True, exist_ok=True)
    plot_pass_at_k(summaries, out / "pass_at_k.png")
    print(f"the curves are in {out}/pass_at_k.png")


# -----------------------------------------------------------------------------
# what a run says of itself: a table at its start, one at its end, and the student's model card


def start_table(cfg, start, device, sampler, tokenizer, vocabulary, train_prompts, held_out) -> str:
    """What matters of a run's settings, a line each. OUT/config.json has all of them. sampler: what rollout.choose returned."""
    n, n_dropped = len(train_prompts.prompts), train_prompts.n_dropped
    dropped = f"; {n_dropped} of {n + n_dropped} training prompts are longer than --max_prompt, and left out"
    sizes = {"block": f", {cfg.block} tokens", "span": f", {cfg.span_min} to {cfg.span_max} tokens"}
    tau = "" if cfg.gate == "none" else f", tau {cfg.tau:g}"
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
        "sampler": "{}: {}".format(*sampler),
        "device": str(device) + (f", {world_size()} ranks" if world_size() > 1 else ""),
        "out": cfg.out + (f", resumed from step {start}" if start else ""),
        "a prompt": f"{len(prompt)} tokens: {tokenizer.decode(prompt)!r}",
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def first_and_last(cfg) -> dict:
    """{metric: (its first value, its last)} of the run's files. A metric need not be in every row."""
    first, last = {}, {}
    for row in read_jsonl(Path(cfg.out) / METRICS) + read_jsonl(Path(cfg.out) / EVALUATIONS):
        first = row | first
        last |= row
    return {name: (first[name], last[name]) for name in last}


def evaluation_line(step, row) -> str:
    """What an evaluation in the loop prints: shares in percent, KLs in nats."""
    shares = [f"{name} {percent(x)}%" for name, x in row.items() if re.fullmatch(r"eval/.*(pass|mean)@\d+", name)]
    kls = [f"{name} {x:.3f}" for name, x in row.items() if name.endswith("/kl")]
    return f"step {step}: " + ", ".join(shares + kls)


def end_table(cfg) -> str:
    """The first and the last value of the metrics that a run is judged by, and where its results are."""
    body = []
    for name, values in first_and_last(cfg).items():
        if re.fullmatch(r"eval/.*(pass|mean)@\d+", name):
            body.append([name, *(f"{percent(x)} %" for x in values)])
        elif re.fullmatch("eval/(.*/)?(kl|kl_sampled)|kl_sampled|gate/drift_abs", name):
            body.append([name, *(f"{x:.3f} nats" for x in values)])
    places = {"student": FINAL, "metrics": METRICS, "curves": "curves.png"}
    lines = [f"{name:<10}{cfg.out}/{file}" for name, file in places.items()]
    return "\n".join(["", format_columns(["", "before", "after"], body), "", *lines])


CARD = """---
{metadata}
---
# {name}

A {student} student distilled on policy from {teacher} on {data}: {steps} steps of {prompts} x {group} responses, {epochs} epochs
on each batch, loss {loss}, gate {gate} ([arXiv 2606.24084](https://arxiv.org/abs/2606.24084)).

## Use

It was trained on prompts like this one, sampled at temperature {temperature:g} and top-p {top_p:g}:

```python
from transformers import pipeline

generate = pipeline("text-generation", "PATH")  # this folder, or its name on the hub
prompt = {prompt!r}
answer = generate(prompt, max_new_tokens={max_response}, do_sample=True, temperature={temperature:g}, top_p={top_p:g}, top_k=0, return_full_text=False)
print(answer[0]["generated_text"])
```

## Evaluation

{evaluation}

## Training

```
{command}
```

Code: {repository}commit {commit}; torch {torch}, transformers {transformers}.
"""


def write_model_card(cfg, prompt):
    """OUT/final/README.md, in the hub's form. prompt: a training prompt, text or messages, as an example."""
    from huggingface_hub import ModelCardData

    models = [cfg.student] if cfg.teacher_url else [cfg.student, cfg.teacher]
    hub_names = [name for name in models if "/" in name and not Path(name).exists()]
    tags = ["on-policy-distillation", "policy-drift-gating"]
    metadata = ModelCardData(
        base_model=hub_names or None, library_name="transformers", pipeline_tag="text-generation", tags=tags
    )
    settings = asdict(cfg) | {
        "student": short_name(cfg.student),
        "teacher": "a model on a server"
        if cfg.teacher_url
        else short_name(cfg.teacher).replace("toy", "the toy teacher"),
        "data": "its toy problems" if cfg.data == "toy" else f"the questions of {short_name(cfg.data)}",
        "gate": cfg.gate + (f" of {cfg.block} tokens" if cfg.gate == "block" else ""),
    }
    repository = f"{versions()['repository']}, " if versions()["repository"] else ""
    text = CARD.format(
        **settings, name=Path(cfg.out).name, metadata=metadata.to_yaml(), prompt=prompt, evaluation=evaluation_table(cfg),
        command=command_line(cfg).split(" && ")[1],  # without the working directory
        repository=repository, **{key: versions()[key] or "unknown" for key in ("commit", "torch", "transformers")},
    )  # fmt: skip
    write_file(Path(cfg.out) / FINAL / "README.md", text)


def short_name(name) -> str:
    """The last part of a hub name or a path; of a run's student, the run's name."""
    parts = [part for part in Path(name).parts if part != FINAL and not part.startswith("step-")]
    return parts[-1] if parts else name


def evaluation_table(cfg) -> str:
    """Before and after, in Markdown, with the interval of pass@k beside it, and how the responses were sampled."""
    values = {name: x for name, x in first_and_last(cfg).items() if name.startswith("eval")}
    rows = []
    for name, pair in values.items():
        if name.endswith((f"pass@{cfg.k}", "kl")) or "/mean@" in name:
            cells = [f"{x:.3f} nats per token" if name.endswith("kl") else f"{percent(x)} %" for x in pair]
            if f"{name}_low" in values:
                bounds = zip(values[f"{name}_low"], values[f"{name}_high"], strict=True)
                cells = [f"{percent(x, interval)} %" for x, interval in zip(pair, bounds, strict=True)]
            title = name.removeprefix("eval/").replace("kl", "KL to the teacher")
            rows.append("| " + " | ".join([title, *cells]) + " |")
    if not rows:
        return "It was not evaluated during training."
    how = (
        f"On held-out problems, {cfg.k} responses to each, sampled as above with up to {cfg.max_response} tokens. In brackets: "
        "the 95 % interval over problems."
    )
    return "\n".join(["| | before | after |", "|---|---|---|", *rows, "", how])
