"""Time and memory of whole training steps: ours beside TRL's DistillationTrainer; samplers, one rank and two.

python -m bench.step trl                               # ours and TRL's (pip install trl): the toy, and V 151,936
python -m bench.step trl --teacher T --student S       # and a pair of your own
python -m bench.step engines                           # hf and vLLM, one rank and two, in turns (vLLM: requirements-vllm.txt)

In `trl` each run is a process of its own, on one CPU thread. A step samples responses, scores them with the teacher and
takes one optimizer step, on all of them at once. Times are process CPU time, which other processes stretch less.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import data
from bench.losses import table
from support import toy

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
LEARNING_RATE = 1e-5
VOCAB = 151936  # of the random pair, as in Qwen3

# -----------------------------------------------------------------------------
# ours and TRL's


def our_steps(job):
    """[(seconds, response tokens)] of job["steps"] steps of ours: LSM on the teacher's 16 most likely tokens."""
    import policy
    import rollout
    import train
    from configs import TrainConfig, parse
    from support.common import seed_for
    from support.vocabulary import load_tokenizer

    flags = {
        "preset": "tiny", "loss": "lsm", "topk": 16, "rollout": "hf", "device": "cpu", "epochs": 1, "minibatches": 1,
        "teacher": job["teacher"], "student": job["student"], "max_response": job["max_response"],
        "micro_tokens": 1 << 30, "lr": LEARNING_RATE,
    }  # fmt: skip
    cfg = parse(TrainConfig, [word for name, value in flags.items() for word in (f"--{name}", str(value))])
    device = torch.device("cpu")
    paths = policy.model_paths(cfg)
    tokenizer, vocabulary = load_tokenizer(paths, merge_stops=cfg.merge_stops)
    student = policy.load_policy(paths["student"], cfg, vocabulary, device, trainable=True)
    teacher = policy.load_policy(paths["teacher"], cfg, vocabulary, device, trainable=False)
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr)
    sampler = rollout.make_sampler(cfg, paths["student"], student.lm, vocabulary)
    prompts = [data.encode(problem, tokenizer) for problem in problems(job)]
    steps = []
    for n in range(job["steps"]):
        start = time.process_time()
        sampler.sync(policy.full_weights(student))
        jobs = [(prompt, seed_for(job["seed"], n, i)) for i, prompt in enumerate(prompts)]
        rollouts = rollout.sample_on_all_ranks(sampler, jobs, rollout.sampling_options(cfg))
        (batches,) = data.make_minibatches(rollouts, cfg, n, vocabulary, device)
        for batch in batches:
            batch.teacher = policy.teacher_targets(teacher, batch, cfg)
        train.update(student, optimizer, batches, cfg)
        steps.append((time.process_time() - start, sum(len(r.response) for r in rollouts)))
    return steps


def trl_steps(job):
    """The same of TRL's trainer: its default loss, the reverse KL over the whole vocabulary."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    prompts, steps = problems(job), []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            seconds = time.process_time() - self.start
            mean_length = trainer._metrics["train"]["completions/mean_length"][-1]
            steps.append((seconds, mean_length * len(prompts)))

    student = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=torch.float32)
    rows = Dataset.from_list([{"prompt": p.prompt} for p in prompts] * job["steps"])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DistillationConfig(
            folder, per_device_train_batch_size=len(prompts), gradient_accumulation_steps=1, max_steps=job["steps"],
            max_completion_length=job["max_response"], learning_rate=LEARNING_RATE, shuffle_dataset=False, seed=job["seed"],
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = trl.DistillationTrainer(
            student,
            teacher,
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(job["student"]),
            callbacks=[Timer()],
        )
        trainer.train()
    return steps


SYSTEMS = {"ours": our_steps, "trl": trl_steps}


def problems(job):
    """job["responses"] of them: up to 8 different ones, repeated."""
    questions = data.load("toy", limit=min(8, job["responses"]))
    return questions * (job["responses"] // len(questions))


def run_one(job):
    """Prints a line of JSON: tokens_per_s of all steps but the first, and peak_gb, of the whole process."""
    torch.set_num_threads(1)
    seconds, tokens = zip(*SYSTEMS[job["system"]](job)[1:], strict=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    result = {"tokens_per_s": sum(tokens) / sum(seconds), "peak_gb": peak * unit / 1e9}
    print(json.dumps(result))


def run_in_child(job):
    """What run_one(job) prints, run in a process of its own."""
    command = [sys.executable, "-m", "bench.step", "one", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_random_pair(root, vocab, hidden):
    """Saves a teacher and a student with random weights, and the toy's tokenizer with tokens added up to `vocab`."""
    from tokenizers.models import WordLevel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = toy.tokenizer()
    ids = toy.ID | {f"<{i}>": i for i in range(len(toy.ID), vocab)}
    tokenizer.backend_tokenizer.model = WordLevel(ids, unk_token="<unk>")
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4, head_dim=64,
        num_attention_heads=max(1, hidden // 64), num_key_value_heads=1, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=toy.ID["<pad>"], eos_token_id=toy.ID["<eos>"],
    )  # fmt: skip
    for seed, role in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)


def make_sizes(folder, teacher, student):
    """{name: job} of every size to be measured. The random pair is made in folder."""
    # In a process of its own, because on Linux a child's peak memory begins with its parent's.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(make_random_pair, folder, VOCAB, hidden=256).result()
    sizes = {"toy": {"teacher": toy.TEACHER, "student": toy.STUDENT, "responses": 64, "max_response": 100, "steps": 13}}
    if teacher:
        pair = {"teacher": teacher, "student": student, "responses": 8, "max_response": 32, "steps": 3}
        sizes["--teacher, --student"] = pair
    random_pair = {"teacher": f"{folder}/teacher", "student": f"{folder}/student", "max_response": 128, "steps": 3}
    for responses in (8, 32):
        name = f"random Qwen3, V {VOCAB:,}, {responses * 128:,} tokens"
        sizes[name] = random_pair | {"responses": responses}
    return sizes


def compare(sizes, runs):
    """Rows of text: size, then ours, TRL's and their ratio, of tokens a second and of peak memory; medians of runs."""
    systems = [name for name in SYSTEMS if name == "ours" or importlib.util.find_spec(name)]
    results = {}  # {(size, system): [what run_one prints]}
    for seed, size, system in itertools.product(range(runs), sizes, systems):
        result = run_in_child(sizes[size] | {"system": system, "seed": seed})
        print(f"{size}, {system}: {result}", file=sys.stderr)
        results.setdefault((size, system), []).append(result)
    rows = []
    for size in sizes:
        row = [size]
        for key, form in (("tokens_per_s", "{:,.0f}"), ("peak_gb", "{:.2f}")):
            medians = [statistics.median(run[key] for run in results[size, system]) for system in systems]
            row += [form.format(x) for x in medians]
            row += [f"{medians[0] / medians[1]:.2f}"] if len(systems) > 1 else ["not installed", ""]
        rows.append(row)
    return rows


# -----------------------------------------------------------------------------
# samplers

PHASES = ("rollout", "teacher", "update")


def engines(runs):
    """Rows of text: sampler and ranks, median seconds of each phase and of all, rollout tokens a second.

    Each turn is a run of train.py, tiny preset, whose first two steps of five do not count.
    """
    found, kinds = {}, ["hf"] + ["vllm"] * bool(importlib.util.find_spec("vllm"))
    for kind, ranks in list(itertools.product(kinds, (1, 2))) * runs:
        launch = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split() if ranks > 1 else []
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--preset tiny --steps 5 --eval_every 0 --save_every 0 --rollout {kind} --out {folder}/run"
            command = [sys.executable, *launch, "train.py", *flags.split()]
            subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True)
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        found.setdefault((kind, ranks), []).extend(map(json.loads, lines[2:]))
    rows = []
    for (kind, ranks), steps in found.items():
        times = [statistics.median(row[f"time/{phase}"] for row in steps) for phase in PHASES]
        total = statistics.median(sum(row[f"time/{phase}"] for phase in PHASES) for row in steps)
        rate = statistics.median(row["tokens_per_s/rollout"] for row in steps)
        rows.append([f"{kind}, {ranks} rank(s)", *(f"{t:.2f}" for t in (*times, total)), f"{rate:,.0f}"])
    return rows if len(kinds) > 1 else rows + [["vllm", "not installed", "", "", "", ""]]


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["trl", "engines", "one"])
    parser.add_argument("job", nargs="?", help="of `one`, a single process of `trl`: JSON")
    parser.add_argument("--runs", type=int, default=3, help="of each row")
    parser.add_argument("--teacher", default="", help="trl: hub name or folder of a pair to measure besides")
    parser.add_argument("--student", default="", help="trl: its student")
    args = parser.parse_args(argv)
    if bool(args.teacher) != bool(args.student):
        parser.error("--teacher and --student go together; give both or neither")
    if args.what == "one":
        run_one(json.loads(args.job))
    elif args.what == "trl":
        with tempfile.TemporaryDirectory() as folder:
            sizes = make_sizes(Path(folder), args.teacher, args.student)
            rows = compare(sizes, args.runs)
        title = f"A step. CPU, one thread; medians of {args.runs} processes each"
        head = ["", "ours, tokens / s", "TRL's", "ratio", "ours, peak GB", "TRL's", "ratio"]
        table(title, head, rows)
    else:
        title = f"A step on 64 rollouts of the toy pair, seconds per phase. One thread per rank, {args.runs} runs of 3 steps"
        table(title, ["", *PHASES, "all", "rollout tokens / s"], engines(args.runs))


if __name__ == "__main__":
    main()
