"""What does rollout reuse cost, what repairs it, and does a drift gate add to that? Every cell is one train.py command.

    python -m study.run --jobs 2                             # runs the cells that are missing, then reports
    python -m study.run --size real --flags "--student A --teacher B --data C --eval_data D"
    python -m study.run --size paper --launch "torchrun --nproc_per_node 8"
    python -m study.run --report study/study.jsonl           # tables and figures from recorded cells

A cell is PAIR/ARM/REUSE/GATE/SEED. PAIR: a toy pair is pre-trained with that seed. ARM: a base loss. REUSE: how many epochs
each rollout batch serves, and for how many steps. SEED: of training. Cells that differ in the gate alone see the same
prompts and held-out problems. The study may be stopped at any time: a finished cell is a line of OUT/study.jsonl.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from study import report
from study.pretrain_toy import pretrain, recipe_of
from support.files import EVALUATIONS, METRICS, read_jsonl

ARMS = {"opd_old": "--loss opd --advantage old", "opd_current": "--loss opd --advantage current", "lsm": "--loss lsm"}
# Question 1 of the third edition: which loss bears reuse?
LOSSES = ARMS | {name: f"--loss {name}" for name in ("fkl_topk", "tail_topk", "rkl", "fkl", "jsd")}
# The product's gates, and those of the third edition's questions 2 to 4: {name: (program, flags)}.
GATES = {kind: ("train.py", f"--gate {kind}") for kind in ("none", "block", "span", "token", "sequence")}
STUDY_GATES = {
    "placebo": "--gate block --tau 0.001",  # how far a run moves when next to nothing differs
    "tau1": "--gate block --tau 1",
    "tau10": "--gate block --tau 10",
    "tau30": "--gate block --tau 30",
    "tau10_n": "--gate block --tau 10 --denominator n",
    "tau30_n": "--gate block --tau 30 --denominator n",
    "excess": "--study_gate excess --gate block --tau 10",
    "away": "--study_gate away --gate block --tau 10",
    "beyond": "--study_gate beyond --gate block --tau 10",
    "mask": "--study_gate mask --gate block",
}
GATES |= {name: ("-m study.gated_train", flags) for name, flags in STUDY_GATES.items()}
# Dose-response: as many updates and the same learning rate, from fewer and fewer rollout batches.
DOSES = {f"dose_{epochs}": f"--epochs {epochs} --steps {96 // epochs} --lr 1e-3" for epochs in (1, 2, 4, 8, 16)}

TOY = {
    "tiny": {
        "common": "--preset tiny --eval_problems 128 --eval_every 9999 --save_every 0 --sample_every 0",
        "reuse": {"heavy": "--epochs 6 --steps 16 --lr 1e-3", "light": "--epochs 2 --steps 30 --lr 6e-4", **DOSES},
    }
}
SIZES = TOY | {
    "losses": TOY["tiny"],
    "gates": TOY["tiny"],
    "real": {
        "common": (
            "--preset tiny --eval_problems 32 --k 1 --eval_every 9999 --save_every 0 --sample_every 0 --max_prompt 320 "
            "--max_response 96 --prompts 2 --group 2 --minibatches 1 --topk 32 --block 64 --warmup 0 --schedule constant"
        ),
        "reuse": {
            "heavy": "--epochs 6 --steps 8 --lr 1e-4",
            "paper": "--epochs 2 --steps 6 --lr 2e-6",  # the paper's, for leverage alone
        },
    },
    "paper": {
        "common": "--preset qwen3 --eval_data math500,aime24,aime25,amc23 --eval_every 9999",
        "reuse": {"heavy": "--epochs 6 --steps 100 --lr 5e-6", "light": "--epochs 2 --steps 200"},
    },
}


def cells(size, seeds, pairs) -> dict:
    """{PAIR/ARM/REUSE/GATE/SEED: a program and its flags}, the most important first."""
    found = {}

    def add(pairs, arms, reuses, gates, seeds):
        for seed in range(seeds):
            for pair in pairs:
                for reuse in reuses:
                    for gate in gates:
                        for arm in arms:
                            program, gate_flags = GATES[gate]
                            flags = f"{LOSSES[arm]} {gate_flags} --seed {seed}"
                            name = f"{pair}/{arm}/{reuse}/{gate}/{seed}"
                            found[name] = f"{program} {SIZES[size]['common']} {SIZES[size]['reuse'][reuse]} {flags}"

    if size == "losses":
        add(pairs, ("rkl", "opd_current", "lsm"), ("dose_8",), ("none",), 2)
        add(pairs, LOSSES, ("dose_8", "dose_1", "dose_16", "dose_4", "dose_2"), ("none",), 1)
        add(pairs, LOSSES, ("dose_8", "dose_1", "dose_16", "dose_4", "dose_2"), ("none",), 2)
    elif size == "gates":
        add(pairs, ("opd_current", "lsm"), ("heavy",), ("none", *STUDY_GATES), seeds)
        add(pairs[:1], ("opd_old", "opd_current", "lsm"), ("light",), ("tau1",), 1)
    elif size == "tiny":
        add(pairs, ARMS, ("heavy", "light"), ("none", "block"), seeds)
        add(pairs, ("opd_old", "opd_current"), DOSES, ("none", "block"), 1)
        add(pairs, ARMS, ("heavy", "light"), ("span", "token", "sequence"), seeds)
    elif size == "real":
        add(["real"], ARMS, ("heavy",), ("none", "block"), seeds)
        add(["real"], ("opd_old", "lsm"), ("paper",), ("tau1",), 1)
    else:
        add(["qwen3"], ARMS, ("heavy", "light"), ("none", "block", "span"), seeds)
    return found


def pair_flags(name) -> str:
    """--student and --teacher of a toy pair, which is pre-trained on first use; "" for a pair that --flags names."""
    pair = name.split("/")[0]
    if not pair.isdigit():
        return ""
    if pair == "7":  # the one that comes with the code
        return ""
    pretrain(Path("out/pairs", pair), recipe_of(int(pair)))
    return f"--teacher out/pairs/{pair}/teacher --student out/pairs/{pair}/student"


def run_cell(name, flags, args):
    """The line of study.jsonl of one cell, or None if its run did not finish."""
    folder, start = Path(args.out) / name, time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = f"{args.launch} {flags} {pair_flags(name)} {args.flags} --overwrite --out {folder}"
    argv = [sys.executable if word == "python" else word for word in shlex.split(command)]
    with open(f"{folder}.log", "w") as log:
        exit_code = subprocess.run(argv, stdout=log, stderr=log).returncode
    if exit_code or not (folder / "final").exists():  # a run that was stopped exits with 0
        return None
    steps, evaluations = read_jsonl(folder / METRICS), read_jsonl(folder / EVALUATIONS)
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint)
    return {
        "cell": name,
        "command": " ".join(command.split()),
        "start": held_out(evaluations[0]),
        "end": held_out(evaluations[-1]),
        "drift": [round(row["gate/drift_abs"], 4) for row in steps],
        "ess": [round(row["gate/ess"], 4) for row in steps],
        "leverage": leverage(folder / "leverage.jsonl"),
        "checksum": steps[-1]["rollout/checksum"],
        "tokens": sum(row["rollout/tokens"] for row in steps),
        "rollout_seconds": round(sum(row["time/rollout"] for row in steps), 1),
        "update_seconds": round(sum(row["time/update"] for row in steps), 1),
        "seconds": round(time.time() - start, 1),
        "commit": args.commit,
        "hardware": args.hardware,
    }


def leverage(path) -> dict:
    """{name: [its value at each measured update]} of what study.gated_train measures; empty without it."""
    rows = read_jsonl(path) if path.exists() else []
    return {name: [float(f"{row[name]:.7g}") for row in rows] for name in rows[0]} if rows else {}


def held_out(row) -> dict:
    return {name.removeprefix("eval/"): x for name, x in row.items() if name != "step"}


def run(args) -> Path:
    """Runs the cells that OUT/study.jsonl lacks, args.jobs at a time. Returns its path."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.jsonl"
    lines = report.read(path) if path.exists() else {}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))  # without a torn last line
    wanted = cells(args.size, args.seeds, args.pairs)
    todo = [name for name in wanted if name not in lines and re.search(args.only, name)]
    describe = ["git", "describe", "--always", "--dirty"]
    args.commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    args.hardware = f"{gpu}, torch {torch.__version__}, {args.jobs} cell(s) at a time"
    print(f"{len(lines)} cells are in {path}, {len(todo)} to run")

    def one(name):
        line = run_cell(name, wanted[name], args)
        if line is None:
            print(f"{name}: did not finish, see {out}/{name}.log", flush=True)
            return
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: KL {report.score(line, 'kl'):.3f}, {line['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m study.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="the models and settings")
    parser.add_argument("--pairs", type=int, nargs="+", default=[7, 8, 9], help="pre-training seeds of the toy pairs")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds of each cell")
    parser.add_argument("--flags", default="", help="more flags of train.py, for every cell")
    parser.add_argument("--launch", default="python", help="what runs train.py")
    parser.add_argument("--only", default="", help="cells whose name matches this regular expression")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--out", default="", help="default: out/study/SIZE")
    parser.add_argument("--report", default="", help="only report this study.jsonl; the figures go beside it")
    args = parser.parse_args(argv)
    args.out = args.out or f"out/study/{args.size}"
    path = Path(args.report) if args.report else run(args)
    report.report(path)


if __name__ == "__main__":
    main()
