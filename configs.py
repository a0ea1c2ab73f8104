"""Every setting of train.py and evaluate.py: one dataclass per command, the presets, and the parser.

A field is a flag: `lr` is `--lr`. The command line overrides the preset, and the preset the defaults below.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

BENCHMARKS = "math500,aime24,aime25,amc23"  # the paper's four, in its order
TOPK_LOSSES = ("lsm", "fkl_topk", "tail_topk")
FULL_VOCABULARY_LOSSES = ("rkl", "fkl", "jsd")
TEMPLATES = ("auto", "chat", "think", "dapo", "plain", "solution", "raw")  # data.py has their texts

# TrainConfig's defaults are the paper's settings. A preset is what differs from them.
PRESETS = {
    "tiny": dict(
        student="toy", teacher="toy", data="toy", rollout="hf", eval_problems=128, eval_every=25,
        threads=1, max_prompt=64, max_response=100, prompts=8, top_p=1.0, topk=16, block=16, span_min=8, span_max=32,
        steps=100, minibatches=2, micro_tokens=2048, lr=1e-3, schedule="linear", warmup=4, beta2=0.98, weight_decay=0.0, loss="lsm",
    ),
    "qwen3": dict(
        student="Qwen/Qwen3-1.7B-Base", teacher="Thinking-Space/Qwen3-4B-Base-GRPO", data="dapo",
        eval_data="amc23", eval_every=50, grad_ckpt=True,
    ),
}  # fmt: skip


def arg(default, help, *, low=None, high=2**31 - 1, may_change=False, section=None):
    """A flag with its range. may_change: a resumed run may have another value. section: the heading in --help from here on."""
    metadata = {"help": help, "low": low, "high": high, "may_change": may_change, "section": section}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


# fmt: off
@dataclass
class TrainConfig:
    preset: Literal["", "tiny", "qwen3"] = arg("", "settings to start from; by default qwen3 on CUDA, else tiny", may_change=True, section="models and data")
    student: str = arg("toy", "the model that learns: hub name, folder, or toy")
    teacher: str = arg("toy", "the model that scores: hub name, folder, or toy")
    teacher_url: str = arg("", "score on this vLLM server instead of with --teacher; for opd and the top-K losses", may_change=True)
    teacher_offload: bool = arg(False, "keep the teacher in host memory while it is not scoring", may_change=True)
    data: str = arg("toy", "training prompts: hub name, .jsonl or .parquet file, or toy")
    template: str = arg("auto", ", ".join(TEMPLATES) + ", or a text with {question}; auto: chat if the tokenizer has a chat template, else plain")
    template_args: str = arg("{}", """JSON with the chat template's own switches, such as '{"enable_thinking": false}'""")
    max_prompt: int = arg(2048, "tokens; problems with longer prompts are left out", low=1)
    trust_remote_code: bool = arg(False, "let model repositories run their own Python", may_change=True)

    gate: Literal["none", "token", "block", "span", "sequence"] = arg("block", "the segment of a response over which drift is averaged, and one gate applies", section="the gate (the paper's Eq. 1)")
    block: int = arg(64, "tokens in a block; --gate span uses blocks where a response has no newline", low=1)
    tau: float = arg(1.0, "gate = exp(-tau |s|); 0: every gate is 1", low=0)
    stat: Literal["mean", "absmean", "rms"] = arg("mean", "a segment's drift s; the paper's is mean, which is signed")
    span_min: int = arg(16, "tokens; shorter newline spans are merged with the next", low=1)
    span_max: int = arg(128, "tokens; longer newline spans are cut into equal parts", low=1)

    loss: Literal["opd", "lsm", "fkl_topk", "tail_topk", "rkl", "fkl", "jsd"] = arg("opd", "the base loss; formulas in the README", section="the loss")
    advantage: Literal["old", "current"] = arg("old", "opd: old is log q - log pi_old, fixed (the paper's); current is log q - log pi, recomputed at every update")
    clip_low: float = arg(0.2, "opd: the ratio is clipped at 1 - clip_low; 0: off", low=0)
    clip_high: float = arg(0.2, "opd: the ratio is clipped at 1 + clip_high; 0: off", low=0)
    dual_clip: float = arg(3.0, "opd: where the advantage A is negative, the loss is at most -dual_clip A; 0: off", low=0)
    topk: int = arg(32, "top-K losses: how many of the teacher's most likely tokens", low=1)
    log_ratio_clamp: float = arg(0.0, "lsm, fkl_topk: keep each log-ratio within +- this, in nats; 0: off", low=0)
    merge_stops: bool = arg(True, "count the stop tokens of student and teacher as one outcome, if there are several")
    add_sampled: bool = arg(False, "lsm, fkl_topk: add the sampled token to the support if it is outside")
    renormalise: bool = arg(True, "lsm, fkl_topk: softmax over the support on both sides; false: the true probabilities")
    beta: float = arg(0.5, "jsd: beta KL(teacher||m) + (1 - beta) KL(student||m), m = beta teacher + (1 - beta) student", low=0, high=1)

    rollout: Literal["auto", "vllm", "hf"] = arg("auto", "sampler; auto: vllm on a GPU, hf on a CPU", may_change=True, section="rollouts")
    prompts: int = arg(4, "prompts per step, over all ranks", low=1)
    group: int = arg(8, "responses per prompt", low=1)
    temperature: float = arg(1.0, "temperature of sampling, and of every distribution in the loss")
    top_p: float = arg(0.9, "nucleus sampling, in (0, 1]", high=1)
    sample_top_k: int = arg(0, "sample from this many most likely tokens; 0: all", low=0)
    max_response: int = arg(16384, "tokens", low=1)
    tp: int = arg(1, "vllm: neighbouring ranks that share one engine, for a student too large for one GPU", low=1, may_change=True)
    vllm_memory: float = arg(0.55, "share of a GPU's memory that vLLM may take, in (0, 1]", high=1, may_change=True)

    steps: int = arg(200, "rollout batches", low=1, may_change=True, section="optimisation")
    epochs: int = arg(2, "passes over each rollout batch", low=1)
    minibatches: int = arg(1, "minibatches, and so optimizer updates, per epoch", low=1)
    micro_tokens: int = arg(16384, "maximum number of tokens in a micro-batch, padding included", low=1, may_change=True)
    lr: float = arg(2e-6, "peak learning rate of AdamW", low=0)
    schedule: Literal["constant", "linear"] = arg("constant", "after warm-up; linear falls to lr / 10")
    warmup: int = arg(0, "steps of linear warm-up", low=0)
    beta2: float = arg(0.999, "AdamW's beta2, in [0, 1)", low=0)
    weight_decay: float = arg(0.01, "AdamW's weight decay", low=0)
    grad_clip: float = arg(1.0, "largest gradient norm; 0: off", low=0)
    grad_ckpt: bool = arg(False, "recompute activations in the backward pass, to save memory", may_change=True)
    max_bad_updates: int = arg(10, "stop after this many updates in a row with a non-finite loss or gradient; 0: never", low=0, may_change=True)

    eval_data: str = arg("auto", "held-out problems: names or files, comma-separated; empty: none; auto: the toy's for --data toy, else none", may_change=True, section="evaluation in the loop")
    eval_every: int = arg(50, "steps; also before the first and after the last; 0: never", low=0, may_change=True)
    eval_problems: int = arg(0, "maximum number of problems of each set; 0: all", low=0, may_change=True)
    k: int = arg(8, "pass@k, from k responses to each problem", low=1, may_change=True)

    out: str = arg("", "folder of the run; default: out/PRESET", may_change=True, section="the run")
    resume: str = arg("false", "go on from the newest checkpoint in --out; auto: if there is one, else start", may_change=True)
    overwrite: bool = arg(False, "delete the run that --out holds, and start again", may_change=True)
    save_every: int = arg(50, "steps between checkpoints; 0: only the last", low=0, may_change=True)
    keep: int = arg(2, "newest checkpoints to keep", low=1, may_change=True)
    sample_every: int = arg(10, "print a response at this interval, in steps; 0: never", low=0, may_change=True)
    trace_every: int = arg(0, "record the gates of one response, token by token, at this interval, in steps (plot.py --tokens); 0: never", low=0, may_change=True)
    push: str = arg("", "upload the final student to this repository of the Hugging Face hub", may_change=True)
    log: Literal["none", "wandb", "tensorboard"] = arg("none", "where to log besides metrics.jsonl", may_change=True)
    seed: int = arg(0, "seed of training and sampling (the toy models have their own: toy.py)", low=0, high=2**63 - 1)
    device: Literal["", "cpu", "cuda"] = arg("", "default: cuda if there is one", may_change=True)
    threads: int = arg(0, "CPU threads; 0: torch's choice", low=0, may_change=True)


@dataclass
class EvalConfig:
    model: str = arg("", "hub name, folder, toy or toy-teacher; default: the newest out/*/final", section="model and data")
    data: str = arg("", "names or files, comma-separated; default: the paper's four, or toy for the toy's models")
    template: str = arg("auto", "as in training: " + ", ".join(TEMPLATES) + ", or a text with {question}")
    template_args: str = arg("{}", "as in training: JSON with the chat template's own switches")
    limit: int = arg(0, "maximum number of problems of each set; 0: all", low=0)
    trust_remote_code: bool = arg(False, "let model repositories run their own Python")
    k: int = arg(8, "pass@k", low=1)
    n: int = arg(0, "responses per problem, at least k; 0: k. More reduce the variance of pass@k", low=0)

    temperature: float = arg(1.0, "temperature of sampling", section="sampling")
    top_p: float = arg(0.9, "nucleus sampling, in (0, 1]", high=1)
    sample_top_k: int = arg(0, "sample from this many most likely tokens; 0: all", low=0)
    max_tokens: int = arg(16384, "tokens of a response; less if the model's context is shorter", low=1)
    rollout: Literal["auto", "vllm", "hf"] = arg("auto", "sampler; auto: vllm on a GPU, hf on a CPU")
    vllm_memory: float = arg(0.9, "share of a GPU's memory that vLLM may take, in (0, 1]", high=1)
    batch: int = arg(1024, "responses per rank between writes to disk; smaller loses less work if killed, larger is faster", low=1)
    seed: int = arg(0, "seed of sampling", low=0, high=2**63 - 1)
    device: Literal["", "cpu", "cuda"] = arg("", "default: cuda if there is one")
    threads: int = arg(0, "CPU threads; 0: torch's choice", low=0)

    out: str = arg("", "folder of the results; default: out/eval/MODEL/DATA. Samples that it holds are reused", section="results")
    overwrite: bool = arg(False, "delete what --out holds, and start again")
    paper: bool = arg(False, "print the paper's table beside ours")
    regrade: str = arg("", "grade this samples.jsonl (or its folder) again; needs no model")
    compare: list[str] = arg([], "folders of finished evaluations; the first is the baseline. NAME=A,B,C: seeds of one variant")


# fmt: on
def may_change(name) -> bool:
    """Whether a resumed run may have another value for this flag of train.py: for reports, or where it computes."""
    return TrainConfig.__dataclass_fields__[name].metadata["may_change"]


# -----------------------------------------------------------------------------
# the command line


def parse(cls, argv=None):
    """The config from the command line (argv: a list, for tests). A wrong flag is one line on stderr, and exit code 2."""
    argv = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    defaults = preset_defaults(argv) if cls is TrainConfig else {}
    parser = make_parser(cls, defaults)
    cfg = cls(**vars(parser.parse_args(argv)))
    if cls is TrainConfig:
        cfg.preset = cfg.preset or defaults["preset"]  # where they were given as ""
        cfg.out = cfg.out or defaults["out"]
        cfg.resume = cfg.resume.lower()
    errors = check_ranges(cfg) + (check_train(cfg) if cls is TrainConfig else check_eval(cfg))
    if errors:
        parser.error(errors[0])
    return cfg


def preset_defaults(argv) -> dict:
    """What the preset sets: the one that argv names, else the default for the device."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")  # "?": the real parser reports a flag without a value
    parser.add_argument("--device", nargs="?")
    given, _ = parser.parse_known_args(argv)
    preset = given.preset or default_preset(given.device)
    return PRESETS.get(preset, {}) | {"preset": preset, "out": f"out/{preset}"}


def make_parser(cls, defaults):
    """defaults: {field: its default, where it is not the one of cls}."""
    program = "train.py" if cls is TrainConfig else "evaluate.py"
    parser = argparse.ArgumentParser(program, f"python {program} [--flag value ...]", allow_abbrev=False)
    parser.error = lambda message: (print(f"{program}: {message}", file=sys.stderr), sys.exit(2))
    section = parser
    for f in fields(cls):
        if f.metadata["section"]:
            section = parser.add_argument_group(f.metadata["section"])
        default = defaults.get(f.name, [] if f.default is MISSING else f.default)
        options = {"default": default, "help": f.metadata["help"].replace("%", "%%")}
        if get_origin(f.type) is Literal:
            options |= {"choices": get_args(f.type), "metavar": "{" + ",".join(filter(None, get_args(f.type))) + "}"}
        elif f.type is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        elif f.name == "resume":
            options |= {"nargs": "?", "const": "true", "metavar": "true|false|auto"}
        elif f.name == "compare":
            options |= {"nargs": "+", "metavar": "FOLDER"}
        else:
            options |= {"type": f.type, "metavar": {int: "N", float: "X", str: "TEXT"}[f.type]}
        if default not in ("", []):
            options["help"] += f" (default: {str(default).lower() if f.type is bool else default})"
        section.add_argument(f"--{f.name}", **options)
    return parser


def with_underscores(word):
    """--eval-every is --eval_every."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def default_preset(device):
    import torch

    return "qwen3" if torch.cuda.is_available() and device != "cpu" else "tiny"


def check_ranges(cfg) -> list[str]:
    errors = []
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if f.type not in (int, float):
            continue
        if low is not None and not value >= low:  # written so that NaN is an error, too
            errors.append(f"--{f.name} is {value}; it must be at least {low}")
        if not value <= high:
            errors.append(f"--{f.name} is {value}; it must be at most {high}")
        if f.name in ("temperature", "top_p", "vllm_memory") and not value > 0:
            errors.append(f"--{f.name} is {value}; it must be above 0")
    if cfg.template not in TEMPLATES and "{question}" not in cfg.template:
        errors.append(f"--template is {cfg.template!r}; it is {', '.join(TEMPLATES)}, or a text with {{question}}")
    try:
        if not isinstance(json.loads(cfg.template_args), dict):
            raise ValueError
    except ValueError:
        errors.append(f"--template_args is {cfg.template_args!r}; it must be a JSON object")
    return errors


def check_train(cfg) -> list[str]:
    errors = []
    if cfg.beta2 >= 1:
        errors.append(f"--beta2 is {cfg.beta2}; it must be below 1")
    if cfg.topk < 2 and cfg.loss in ("lsm", "fkl_topk") and cfg.renormalise:
        errors.append(f"--topk is {cfg.topk}; it must be at least 2: renormalised on one token, the loss is always 0")
    if cfg.teacher_url and cfg.loss in FULL_VOCABULARY_LOSSES:
        errors.append(f"--loss {cfg.loss} needs the teacher's whole distribution, and --teacher_url gives its top-K")
    if cfg.teacher_url and cfg.temperature != 1:
        errors.append(f"--temperature is {cfg.temperature}; the server of --teacher_url scores at 1 only")
    if cfg.span_max < cfg.span_min:
        errors.append(f"--span_max is {cfg.span_max}; it must be at least --span_min, {cfg.span_min}")
    if cfg.minibatches > cfg.prompts * cfg.group:
        errors.append(
            f"--minibatches is {cfg.minibatches}; it must be at most the {cfg.prompts * cfg.group} responses of a step"
        )
    if cfg.log != "none" and importlib.util.find_spec(cfg.log) is None:
        errors.append(f"--log is {cfg.log}, which is not installed: pip install {cfg.log}")
    if cfg.resume not in ("auto", "true", "false"):
        errors.append(f"--resume is {cfg.resume}; it is auto, true or false")
    if cfg.resume != "false" and cfg.overwrite:
        errors.append("--resume and --overwrite exclude each other")
    return errors


def check_eval(cfg) -> list[str]:
    errors = []
    if 0 < cfg.n < cfg.k:
        errors.append(f"--n is {cfg.n}; it must be at least --k, {cfg.k}")
    if cfg.data and "" in cfg.data.split(","):
        errors.append(f"--data {cfg.data!r} has an empty name")
    if len(cfg.compare) == 1:
        errors.append("--compare needs two folders or more")
    if bool(cfg.compare) + bool(cfg.regrade) + cfg.overwrite > 1:
        errors.append("--compare, --regrade and --overwrite exclude each other")
    return errors


def command_line(cfg) -> str:
    """The shortest command line of train.py that gives cfg, on as many ranks as this one, from any working directory."""
    defaults = {f.name: f.default for f in fields(cfg)} | PRESETS[cfg.preset]
    given = {name: x for name, x in asdict(cfg).items() if x != defaults[name] or name in ("preset", "out")}
    local_ranks, ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    launcher = "python"
    if ranks > 1:
        launcher = "torchrun "
        if ranks > local_ranks:
            launcher += f"--nnodes {ranks // local_ranks} --rdzv_backend c10d --rdzv_endpoint HOST:29500 "
        launcher += f"--nproc_per_node {local_ranks}"
    script = Path(__file__).resolve().parent / "train.py"
    words = " ".join(f"--{name} {shlex.quote(str(x))}" for name, x in given.items())
    return f"cd {shlex.quote(os.getcwd())} && {launcher} {shlex.quote(os.path.relpath(script))} {words}"
