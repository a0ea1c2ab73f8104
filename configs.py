"""Every setting of train.py and evaluate.py: one dataclass per command, the presets, and the parser.

A field is a flag: `lr` is `--lr`. The command line overrides the preset, and the preset the defaults below. Nothing heavy is
imported here, so that --help and a wrong flag answer at once.
"""

import argparse
import ctypes
import difflib
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
        student="toy", teacher="toy", data="toy", rollout="hf", eval_problems=64, eval_every=20,
        threads=1, max_prompt=64, max_response=100, prompts=8, top_p=1.0, topk=16, block=16, span_min=8, span_max=32,
        steps=40, minibatches=2, micro_tokens=2048, lr=1e-3, schedule="linear", warmup=4, beta2=0.98, weight_decay=0.0, loss="lsm",
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
DATA = "hub name or folder, with :SPLIT if not the usual one, file, or toy. Rows have a question (prompt, problem or question) and an answer (answer, expected_answer, ground_truth or reward_model); files: .jsonl, .json, .csv, .parquet"
TEMPLATE = "how a question becomes a prompt: " + ", ".join(TEMPLATES) + ", or a text with {question}; auto: chat if the tokenizer has a chat template, else plain"


@dataclass
class TrainConfig:
    preset: Literal["", "tiny", "qwen3"] = arg("", "the settings to start from: tiny, a toy for a CPU, or qwen3, the paper's; by default qwen3 on a machine with a GPU, else tiny", may_change=True, section="the run")
    out: str = arg("", "where everything goes: the run's folder; by default out/PRESET", may_change=True)
    resume: str = arg("false", "go on with the run in --out, from its newest checkpoint; auto: if there is one, else start", may_change=True)
    overwrite: bool = arg(False, "delete the run that --out holds, and start again", may_change=True)
    seed: int = arg(0, "another seed gives another run: of prompts, sampling and minibatches", low=0, high=2**63 - 1)

    student: str = arg("toy", "the model that learns: hub name, folder, or toy", section="models and data")
    teacher: str = arg("toy", "the model that scores: hub name, folder, or toy")
    teacher_url: str = arg("", "score on a vLLM server instead of with --teacher, for opd and the top-K losses: http://HOST:8000/v1, served with --max-logprobs of at least --topk. No eval/kl, which needs a local teacher", may_change=True)
    teacher_offload: bool = arg(False, "save GPU memory: keep the teacher in host memory while it is not scoring", may_change=True)
    data: str = arg("toy", "training questions: " + DATA)
    template: str = arg("auto", TEMPLATE)
    template_args: str = arg("{}", """switches of the chat template, as JSON, such as '{"enable_thinking": false}'""")
    max_prompt: int = arg(2048, "leave out questions with longer prompts, in tokens", low=1)
    trust_remote_code: bool = arg(False, "let model repositories run their own Python", may_change=True)

    loss: Literal["opd", "lsm", "fkl_topk", "tail_topk", "rkl", "fkl", "jsd"] = arg("opd", "what the student minimises at each token; formulas in the README", section="the loss")
    advantage: Literal["old", "current"] = arg("old", "opd: whose log-prob the teacher's is compared with: old, log q - log pi_old, fixed (the paper's); current, log q - log pi, recomputed at every update")
    clip_low: float = arg(0.2, "opd: clip the ratio at 1 - clip_low; 0: off", low=0)
    clip_high: float = arg(0.2, "opd: clip the ratio at 1 + clip_high; 0: off", low=0)
    dual_clip: float = arg(3.0, "opd: bound the loss by -dual_clip A where the advantage A is negative; 0: off", low=0)
    topk: int = arg(32, "top-K losses: match the student on this many of the teacher's most likely tokens", low=1)
    beta: float = arg(0.5, "jsd: beta KL(teacher||m) + (1 - beta) KL(student||m), m = beta teacher + (1 - beta) student", low=0, high=1)
    merge_stops: bool = arg(True, "count the stop tokens of student and teacher as one outcome, if there are several")

    gate: Literal["none", "token", "block", "span", "sequence"] = arg("block", "the part of a response that drifts together: the mean drift of each segment gives its tokens one gate", section="the gate (the paper's Eq. 1)")
    block: int = arg(64, "length of a block in tokens; --gate span uses blocks where a response has no newline", low=1)
    tau: float = arg(1.0, "how sharply drift closes a gate: exp(-tau |s|); 0: every gate is 1", low=0)
    stat: Literal["mean", "absmean", "rms"] = arg("mean", "what counts as a segment's drift s: the signed mean (the paper's), in which opposite drifts cancel, the mean of |d|, or the root of the mean of d squared, in which they do not")
    span_min: int = arg(16, "merge a newline span with the next one if it is shorter, in tokens", low=1)
    span_max: int = arg(128, "cut a newline span into equal parts if it is longer, in tokens", low=1)

    prompts: int = arg(4, "questions per step, over all ranks", low=1, section="rollouts")
    group: int = arg(8, "responses to each of them", low=1)
    max_response: int = arg(16384, "cut responses off at this many tokens", low=1)
    temperature: float = arg(1.0, "of sampling, and of every distribution in the loss")
    top_p: float = arg(0.9, "nucleus sampling, in (0, 1]", high=1)
    sample_top_k: int = arg(0, "sample from this many most likely tokens; 0: all", low=0)
    rollout: Literal["auto", "vllm", "hf"] = arg("auto", "what samples: vllm, or hf, transformers' generate(); auto: vllm on a GPU, hf on a CPU", may_change=True)
    tp: int = arg(1, "vllm: let this many neighbouring ranks share one engine, for a student too large for one GPU", low=1, may_change=True)
    vllm_memory: float = arg(0.55, "vllm: the share of a GPU's memory that it may take, in (0, 1]", high=1, may_change=True)

    steps: int = arg(200, "rollout batches to sample", low=1, may_change=True, section="optimisation")
    epochs: int = arg(2, "rollout reuse: passes over each rollout batch", low=1)
    minibatches: int = arg(1, "optimizer updates in each pass: parts into which a rollout batch is split", low=1)
    lr: float = arg(2e-6, "AdamW's learning rate, at its peak", low=0)
    schedule: Literal["constant", "linear"] = arg("constant", "the learning rate after warm-up; linear: down to lr / 10")
    warmup: int = arg(0, "steps of linear warm-up", low=0)
    beta2: float = arg(0.999, "AdamW's beta2, in [0, 1)", low=0)
    weight_decay: float = arg(0.01, "AdamW's weight decay", low=0)
    grad_clip: float = arg(1.0, "scale a gradient with a larger norm down to this one; 0: off", low=0)
    max_bad_updates: int = arg(10, "give up after this many updates in a row with a non-finite loss or gradient; 0: never", low=0, may_change=True)

    eval_data: str = arg("auto", "held-out questions: as --data, comma-separated; empty: none; auto: the toy's for --data toy, else none", may_change=True, section="evaluation in the loop")
    eval_every: int = arg(50, "evaluate every N steps, before the first and after the last; 0: never", low=0, may_change=True)
    eval_problems: int = arg(0, "at most N questions of each set; 0: all", low=0, may_change=True)
    k: int = arg(8, "pass@k, from k responses to each question", low=1, may_change=True)

    save_every: int = arg(50, "save a checkpoint every N steps; 0: only after the last", low=0, may_change=True, section="saving and logging")
    keep: int = arg(2, "keep the N newest checkpoints", low=1, may_change=True)
    log: Literal["none", "wandb", "tensorboard"] = arg("none", "where metrics go besides metrics.jsonl", may_change=True)
    sample_every: int = arg(10, "print a response every N steps; 0: never", low=0, may_change=True)
    trace_every: int = arg(0, "record a response's gates, token by token, every N steps, for support.trace; 0: never", low=0, may_change=True)

    device: Literal["", "cpu", "cuda"] = arg("", "where to compute; by default on CUDA if torch finds it", may_change=True, section="the machine")
    micro_tokens: int = arg(16384, "most tokens in a forward pass, padding included: less takes less memory", low=1, may_change=True)
    grad_ckpt: bool = arg(False, "save memory: recompute activations in the backward pass", may_change=True)
    kernels: Literal["torch", "liger", "compile", "both"] = arg("torch", "faster decoder layers, not yet measured on a GPU: liger, fused RMSNorm, SwiGLU and RoPE (pip install liger-kernel); compile, torch.compile of each layer and of the head's elementwise passes", may_change=True)
    threads: int = arg(0, "CPU threads; 0: torch's choice", low=0, may_change=True)


@dataclass
class EvalConfig:
    model: str = arg("", "what to evaluate: hub name, folder, toy or toy-teacher; by default the student of the run in out/ that finished last", section="model and data")
    data: str = arg("", "questions with answers: as for train.py, comma-separated; by default the paper's four benchmarks, or toy for the toy's models")
    eval_problems: int = arg(0, "at most N questions of each set; 0: all", low=0)
    template: str = arg("auto", TEMPLATE + ". Use the one of training")
    template_args: str = arg("{}", "switches of the chat template, as JSON, as in training")
    trust_remote_code: bool = arg(False, "let model repositories run their own Python")
    k: int = arg(8, "pass@k", low=1)
    n: int = arg(0, "responses to each question, at least k; 0: k. More reduce the variance of pass@k", low=0)

    max_response: int = arg(16384, "cut responses off at this many tokens, or where the model's context ends", low=1, section="sampling")
    temperature: float = arg(1.0, "of sampling; 0: greedy decoding, one response to each question")
    top_p: float = arg(0.9, "nucleus sampling, in (0, 1]", high=1)
    sample_top_k: int = arg(0, "sample from this many most likely tokens; 0: all", low=0)
    seed: int = arg(0, "another seed gives other responses", low=0, high=2**63 - 1)
    rollout: Literal["auto", "vllm", "hf"] = arg("auto", "what samples: vllm, or hf, transformers' generate(); auto: vllm on a GPU, hf on a CPU")
    tp: int = arg(1, "vllm: let this many neighbouring ranks share one engine, for a model too large for one GPU", low=1)
    vllm_memory: float = arg(0.9, "vllm: the share of a GPU's memory that it may take, in (0, 1]", high=1)
    batch: int = arg(1024, "responses per rank between writes to disk; smaller loses less work if killed, larger is faster", low=1)

    out: str = arg("", "where everything goes; by default out/eval/MODEL/DATA. Samples that it holds are reused", section="results")
    overwrite: bool = arg(False, "delete what --out holds, and start again")
    paper: bool = arg(False, "print the paper's table beside ours")
    regrade: str = arg("", "grade this samples.jsonl (or its folder) again; needs no model")
    compare: list[str] = arg([], "compare finished evaluations, by folder; the first is the baseline. NAME=A,B,C: seeds of one variant")

    device: Literal["", "cpu", "cuda"] = arg("", "where to compute; by default on CUDA if torch finds it", section="the machine")
    threads: int = arg(0, "CPU threads; 0: torch's choice", low=0)


# fmt: on
OLD_NAMES = {"max_tokens": "max_response", "limit": "eval_problems"}  # of evaluate.py's flags


def may_change(name) -> bool:
    """Whether a resumed run may have another value for this flag of train.py: for reports, or where it computes."""
    return TrainConfig.__dataclass_fields__[name].metadata["may_change"]


# -----------------------------------------------------------------------------
# the command line


def parse(cls, argv=None):
    """The config from the command line (argv: a list, for tests). A wrong flag is one line on stderr, and exit code 2."""
    if sys.platform == "win32":
        sys.exit(f"{program_of(cls)}: Linux and macOS only; on Windows, run it in WSL")
    argv = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    if cls is EvalConfig:
        argv = [with_new_name(word) for word in argv]
    defaults = preset_defaults(argv) if cls is TrainConfig else {}
    parser = make_parser(cls, defaults)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(about_unknown(unknown, cls))
    cfg = cls(**vars(given))
    if cls is TrainConfig:
        cfg.preset = cfg.preset or defaults["preset"]  # where they were given as ""
        cfg.out = cfg.out or defaults["out"]
        cfg.resume = cfg.resume.lower()
    errors = check_ranges(cfg) + (check_train(cfg) if cls is TrainConfig else check_eval(cfg))
    if errors:
        parser.error(errors[0])
    return cfg


def preset_defaults(argv) -> dict:
    """What the preset sets: the one that argv names, else the default for the machine."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")  # "?": the real parser reports a flag without a value
    parser.add_argument("--device", nargs="?")
    given, _ = parser.parse_known_args(argv)
    preset = given.preset or ("qwen3" if has_gpu() and given.device != "cpu" else "tiny")
    return PRESETS.get(preset, {}) | {"preset": preset, "out": f"out/{preset}"}


def has_gpu() -> bool:
    """Whether NVIDIA's driver finds a GPU that this process may use. (torch would say so too, but takes seconds to import.)"""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    n = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(n)) == 0 and n.value > 0


DESCRIPTIONS = {
    TrainConfig: "Trains a student model on its own answers to questions, with a teacher's scores of every token. The defaults below "
    "are those of --preset {preset}.",
    EvalConfig: "Samples a model's answers to benchmark questions, grades them, and reports pass@k with intervals.",
}


def program_of(cls):
    return "train.py" if cls is TrainConfig else "evaluate.py"


def make_parser(cls, defaults):
    """defaults: {field: its default, where it is not the one of cls}."""
    program = program_of(cls)
    description = DESCRIPTIONS[cls].format(**{"preset": ""} | defaults)
    parser = argparse.ArgumentParser(
        program, f"python {program} [--flag value ...]", description=description, allow_abbrev=False
    )
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


def with_new_name(word):
    """--limit is --eval_problems since train.py and evaluate.py have one name for one thing."""
    name, equals, value = word.partition("=")
    new = OLD_NAMES.get(name.removeprefix("--"))
    if not name.startswith("--") or new is None:
        return word
    print(f"evaluate.py: note: {name} is now --{new}", file=sys.stderr)
    return f"--{new}{equals}{value}"


def about_unknown(words, cls) -> str:
    """What to say of words that are no flags."""
    names = [f"--{f.name}" for f in fields(cls)]
    nearest = difflib.get_close_matches(words[0].partition("=")[0], names, 1)
    return f"there is no {words[0]}" + (f"; did you mean {nearest[0]}?" if nearest else ": see --help")


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


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
        is_greedy = f.name == "temperature" and value == 0 and isinstance(cfg, EvalConfig)
        if f.name in ("temperature", "top_p", "vllm_memory") and not (value > 0 or is_greedy):
            errors.append(f"--{f.name} is {value}; it must be above 0")
        if f.name == "temperature" and 0 < value < 0.01:
            errors.append(f"--temperature is {value}; vLLM would sample at 0.01, the least that it takes above 0")
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
    if cfg.topk < 2 and cfg.loss in ("lsm", "fkl_topk"):
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
    if cfg.kernels in ("liger", "both") and importlib.util.find_spec("liger_kernel") is None:
        errors.append(f"--kernels is {cfg.kernels}, and liger-kernel is not installed: pip install liger-kernel")
    if cfg.resume not in ("auto", "true", "false"):
        errors.append(f"--resume is {cfg.resume}; it is auto, true or false")
    if cfg.resume != "false" and cfg.overwrite:
        errors.append("--resume and --overwrite exclude each other")
    return errors


def check_eval(cfg) -> list[str]:
    errors = []
    if cfg.temperature == 0 and cfg.n > 1:
        errors.append(
            f"--temperature 0 is greedy decoding, and --n is {cfg.n}: all responses to a question would be the same"
        )
    elif 0 < cfg.n < cfg.k and cfg.temperature > 0:
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
