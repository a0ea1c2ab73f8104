"""Time of whole training steps on the toy pair: ours and TRL's DistillationTrainer, samplers, one rank and two.

python -m bench.step trl          # ours and TRL's trainer in turns (pip install trl)
python -m bench.step engines      # hf and vLLM, one rank and two, in turns (vLLM: requirements-vllm.txt)
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.losses import found, table

ROOT = Path(__file__).resolve().parent.parent


def our_trainer(prompts):
    """(step, paths, tokenizer, lr): step() takes one step on a rollout per prompt, and returns its response tokens."""
    import data
    import policy
    import rollout
    import train
    from common import seed_for
    from configs import TrainConfig, parse
    from teacher import teacher_targets

    flags = "--preset tiny --epochs 1 --minibatches 1 --rollout hf --device cpu --out out/bench"
    cfg, device = parse(TrainConfig, flags.split()), torch.device("cpu")
    paths = policy.model_paths(cfg)
    tokenizer, vocabulary = policy.load_tokenizer(paths, cfg)
    student = policy.load_policy(paths["student"], cfg, vocabulary, device, trainable=True)
    teacher = policy.load_policy(paths["teacher"], cfg, vocabulary, device, trainable=False)
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr)
    stops = vocabulary.stop_ids
    sampler = rollout.make_sampler(cfg, paths["student"], student.lm, tokenizer, vocabulary.size, stops)
    ids, steps = [data.encode(p, tokenizer) for p in prompts], itertools.count()

    def step():
        n = next(steps)
        sampler.sync(policy.full_weights(student))
        jobs = [(prompt, seed_for(n, i)) for i, prompt in enumerate(ids)]
        rollouts = rollout.sample_on_all_ranks(sampler, jobs, rollout.sampling_options(cfg))
        (batches,) = data.make_minibatches(rollouts, cfg, n, vocabulary, device)
        for batch in batches:
            batch.teacher = teacher_targets(teacher, batch, cfg)
        train.update(student, optimizer, batches, cfg)
        return sum(len(r.response) for r in rollouts)

    return step, paths, tokenizer, cfg.lr


def trl_turns(trl, prompts, steps, paths, tokenizer, lr, between):
    """[(seconds, response tokens)] of TRL's steps on the same prompts; between() runs after each."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    turns = []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            mean = trainer._metrics["train"]["completions/mean_length"][-1]
            turns.append((time.perf_counter() - self.start, mean * len(prompts)))
            between()

    student, teacher = map(AutoModelForCausalLM.from_pretrained, (paths["student"], paths["teacher"]))
    rows = Dataset.from_list([{"prompt": p.prompt} for p in prompts] * steps)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DistillationConfig(
            folder, per_device_train_batch_size=len(prompts), gradient_accumulation_steps=1,
            max_completion_length=100, max_steps=steps, learning_rate=lr, shuffle_dataset=False,
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        kwargs = dict(processing_class=tokenizer, callbacks=[Turns()], args=config)
        trainer = trl.DistillationTrainer(student, teacher, train_dataset=rows, **kwargs)
        trainer.train()
    return turns


def measure(runs, trl):
    """Rows of text: name, median seconds, response tokens, tokens a second. trl: the module, or None.

    A step samples 64 rollouts of up to 100 tokens on one set of prompts, scores them with the teacher and
    takes one optimizer step; the first of each does not count. Both train their own copy of the student.
    """
    import data

    prompts = [p for p in data.load("toy", limit=8) for _ in range(8)]
    step, *same = our_trainer(prompts)
    ours, theirs = [], []

    def our_turn():
        start = time.perf_counter()
        tokens = step()
        ours.append((time.perf_counter() - start, tokens))

    if trl:
        theirs = trl_turns(trl, prompts, runs + 1, *same, our_turn)
    while len(ours) < runs + 1:
        our_turn()
    rows = []
    for name, turns in (("**ours**", ours), ("TRL's DistillationTrainer", theirs)):
        if turns:
            t, n, rate = map(statistics.median, zip(*((t, n, n / t) for t, n in turns[1:]), strict=True))
            rows.append([name, f"{t:.2f}", f"{n:.0f}", f"{rate:,.0f}"])
        else:
            rows.append([name, "not installed", "", ""])
    return rows


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
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, *launch, "train.py", *flags.split()]
            subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["trl", "engines"])
    parser.add_argument("--runs", type=int, default=5, help="of each row")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.what == "trl":
        title = f"A step on 64 rollouts of the toy pair. CPU, {args.threads} thread(s), {args.runs} runs"
        table(title, ["", "s", "response tokens", "response tokens / s"], measure(args.runs, found("trl")))
    else:
        title = f"A step on 64 rollouts of the toy pair, seconds per phase. One thread per rank, {args.runs} runs of 3 steps"
        table(title, ["", *PHASES, "all", "rollout tokens / s"], engines(args.runs))


if __name__ == "__main__":
    main()
