"""Every setting of train.py and evaluate.py: one dataclass per command, the presets, the parser.

A field is a flag: `lr` is `--lr`. Precedence: the default below < the preset < the command line.
"""

import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

BENCHMARKS = "math500,aime24,aime25,amc23"  # the paper's four, in its order

# TrainConfig's defaults are the paper's settings (section Settings); a preset is what differs.
PRESETS = {
    "tiny": dict(
        student="toy", teacher="toy", data="toy", eval_data="toy", eval_problems=128, eval_every=25,
        threads=1, max_prompt=64, max_response=100, prompts=8, top_p=1.0, topk=16, block=16, span_min=8, span_max=32,
        steps=100, minibatches=2, micro_tokens=2048, lr=1e-3, schedule="linear", warmup=4, beta2=0.98, weight_decay=0.0, loss="lsm",
    ),
    "qwen3": dict(
        student="Qwen/Qwen3-1.7B-Base", teacher="Thinking-Space/Qwen3-4B-Base-GRPO", data="dapo",
        eval_data="amc23", eval_every=50, grad_ckpt=True,
    ),
}  # fmt: skip


# What may change when a run goes on: length, reports, and where it computes. The rest makes it another run.
MAY_CHANGE = set(
    "preset steps eval_data eval_every eval_problems k sample_every save_every keep out overwrite resume log device "
    "threads rollout tp vllm_memory teacher_url teacher_offload micro_tokens grad_ckpt diagnostics max_bad_updates trust_remote_code".split()
)


def arg(default, help, **more):
    return field(default=default, metadata={"help": help} | more)


@dataclass
class TrainConfig:
    preset: Literal["", "tiny", "qwen3"] = arg("", "settings to start from; none: qwen3 where CUDA is there, else tiny")
    # models and data
    student: str = arg("toy", "model that learns: hub name, folder, or toy")
    teacher: str = arg("toy", "model that scores: hub name, folder, or toy")
    teacher_url: str = arg("", "score on this vLLM server instead of with --teacher; top-K losses and opd")
    teacher_offload: bool = arg(False, "keep the teacher in host memory between two rollout batches")
    data: str = arg("toy", "training prompts: hub name, .jsonl or .parquet file, or toy")
    template: str = arg(
        "auto",
        "auto: the tokenizer's chat template if it has one, else plain; chat; plain; raw; or a text with {question}",
    )
    max_prompt: int = arg(2048, "tokens; longer prompts are dropped and counted")
    trust_remote_code: bool = arg(False, "let model repositories run their own Python")
    # the gate (paper, Eq. 1)
    gate: Literal["none", "token", "block", "span", "sequence"] = arg("block", "what one drift gate covers")
    block: int = arg(64, "tokens in a block; for span, where a response has no newline")
    tau: float = arg(1.0, "gate = exp(-tau |s|); 0: every gate is 1")
    stat: Literal["mean", "absmean", "rms"] = arg("mean", "a segment's drift s; mean is the paper's, and signed")
    gate_on: Literal["all", "toward", "away"] = arg(
        "all", "drift that the gate sees: all of it (the paper), or that toward or away from the teacher"
    )
    span_min: int = arg(16, "tokens; shorter newline spans are merged with the next")
    span_max: int = arg(128, "tokens; longer newline spans are cut evenly")
    # the loss
    loss: Literal["opd", "lsm", "fkl_topk", "tail_topk", "rkl", "fkl", "jsd"] = arg("opd", "position loss; see README")
    clip_low: float = arg(0.2, "opd: ratio kept above 1 - clip_low; 0: off")
    clip_high: float = arg(0.2, "opd: ratio kept below 1 + clip_high; 0: off")
    dual_clip: float = arg(3.0, "opd: loss at most dual_clip * -advantage where the advantage is negative; 0: off")
    topk: int = arg(32, "top-K losses: size of the teacher's support")
    log_ratio_clamp: float = arg(0.0, "lsm, fkl_topk: log-ratio kept within +- this, in nats; 0: off")
    beta: float = arg(0.5, "jsd: beta KL(teacher||m) + (1 - beta) KL(student||m)")
    add_sampled: bool = arg(False, "lsm, fkl_topk: the sampled token joins the support where it is outside")
    renormalise: bool = arg(True, "lsm, fkl_topk: softmax both sides on the support; off: the true probabilities")
    # rollouts
    rollout: Literal["auto", "vllm", "hf"] = arg("auto", "sampler; auto: vllm where it can run, else hf")
    prompts: int = arg(4, "prompts a step, all ranks together")
    group: int = arg(8, "responses a prompt")
    temperature: float = arg(1.0, "of sampling, and of every distribution in the loss")
    top_p: float = arg(0.9, "nucleus sampling, in (0, 1]")
    sample_top_k: int = arg(0, "sample among this many most likely tokens; 0: all")
    max_response: int = arg(16384, "tokens")
    drop_truncated: bool = arg(False, "do not train on responses cut at --max_response")
    tp: int = arg(1, "vllm: neighbouring ranks that share one engine, for students too large for one GPU")
    vllm_memory: float = arg(0.4, "share of a GPU's memory that vLLM may take")
    # optimisation
    steps: int = arg(200, "rollout batches")
    epochs: int = arg(2, "passes over each rollout batch")
    minibatches: int = arg(1, "optimizer updates an epoch")
    micro_tokens: int = arg(16384, "tokens in a micro-batch, padding counted")
    lr: float = arg(2e-6, "AdamW, peak")
    schedule: Literal["constant", "linear"] = arg("constant", "after warm-up; linear falls to lr / 10")
    warmup: int = arg(0, "steps of linear warm-up")
    beta2: float = arg(0.999, "AdamW")
    weight_decay: float = arg(0.01, "AdamW")
    grad_clip: float = arg(1.0, "largest gradient norm; 0: off")
    grad_ckpt: bool = arg(False, "recompute activations in the backward pass")
    max_bad_updates: int = arg(10, "stop after so many updates in a row whose loss or gradient is not finite; 0: never")
    diagnostics: bool = arg(True, "log drift and support mass also where an ungated top-k loss does not need them")
    # evaluation in the loop
    eval_data: str = arg("toy", "held-out problems: names or files, comma-separated; empty: none")
    eval_every: int = arg(50, "steps; also before the first and after the last; 0: never")
    eval_problems: int = arg(0, "how many of each set; 0: all")
    k: int = arg(8, "pass@k, from k responses a problem")
    # the run
    sample_every: int = arg(10, "print one sampled response every so many steps; 0: never")
    save_every: int = arg(50, "steps between checkpoints; 0: only the last")
    keep: int = arg(2, "newest checkpoints kept")
    out: str = arg("", "folder of the run; default out/PRESET")
    overwrite: bool = arg(False, "delete the run that --out holds and start again")
    resume: str = arg(
        "false",
        "go on from the newest checkpoint in --out; auto: where there is one, else start",
        nargs="?",
        const="true",
    )
    log: Literal["none", "wandb", "tensorboard"] = arg("none", "also log there")
    seed: int = arg(0, "of everything random")
    device: str = arg("", "cpu or cuda; default cuda where it is")
    threads: int = arg(0, "CPU threads; 0: torch's choice")


@dataclass
class EvalConfig:
    model: str = arg("", "hub name, folder, toy or toy-teacher; default: the newest out/*/final")
    data: str = arg("", "names or files, comma-separated; default: toy for the toy's models, else the paper's four")
    template: str = arg("auto", "as in training: auto, chat, plain, raw, or a text with {question}")
    limit: int = arg(0, "problems of each set; 0: all")
    trust_remote_code: bool = arg(False, "let model repositories run their own Python")
    k: int = arg(8, "pass@k")
    n: int = arg(0, "responses a problem, at least k; 0: k. More make pass@k more exact")
    # sampling
    temperature: float = arg(1.0, "of sampling")
    top_p: float = arg(0.9, "nucleus sampling, in (0, 1]")
    sample_top_k: int = arg(0, "sample among this many most likely tokens; 0: all")
    max_tokens: int = arg(16384, "tokens of a response; less where the model's context is shorter")
    rollout: Literal["auto", "vllm", "hf"] = arg("auto", "sampler; auto: vllm where it can run, else hf")
    vllm_memory: float = arg(0.9, "share of a GPU's memory that vLLM may take")
    batch: int = arg(
        1024, "responses between two writes to disk, on each rank; fewer lose less to a kill, more go faster"
    )
    seed: int = arg(0, "of the samples")
    device: str = arg("", "cpu or cuda; default cuda where it is")
    threads: int = arg(0, "CPU threads; 0: torch's choice")
    # results
    out: str = arg("", "folder of the results; default out/eval/MODEL/DATA. What it holds is not sampled again")
    overwrite: bool = arg(False, "delete what --out holds and start again")
    paper: bool = arg(False, "print the paper's table beside ours")
    regrade: str = arg("", "grade this samples.jsonl (or its folder) again; needs no model")
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of finished evaluations; the first is the baseline. NAME=A,B,C: seeds of one variant"
        },
    )


def parse(cls, argv=None):
    """The config from the command line (argv: a list for tests); one line and exit code 2 where it is wrong."""
    from transformers import HfArgumentParser

    prog = {TrainConfig: "train.py"}.get(cls, "evaluate.py")
    usage = f"python {prog} [--flag value ...]     ({prog} --help: every flag)"
    parser = HfArgumentParser(cls, prog=prog, usage=usage, allow_abbrev=False)
    parser.error = lambda message: (print(f"{prog}: {message}", file=sys.stderr), sys.exit(2))
    argv = sys.argv[1:] if argv is None else argv
    cfg = cls(**vars(parser.parse_args(argv)))
    if cls is TrainConfig:
        preset = cfg.preset or _default_preset(cfg.device)
        parser.set_defaults(**PRESETS[preset] | {"preset": preset})
        cfg = cls(**vars(parser.parse_args(argv)))
        cfg.out, cfg.resume = cfg.out or f"out/{preset}", cfg.resume.lower()
    for problem in problems(cfg):
        parser.error(problem)
    return cfg


def command(cfg):
    """The shortest command line of train.py that gives cfg."""
    defaults = {f.name: f.default for f in fields(cfg)} | PRESETS[cfg.preset]
    given = {name: x for name, x in asdict(cfg).items() if x != defaults[name] or name in ("preset", "out")}
    local, ranks = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = f"--nnodes {ranks // local} --rdzv_backend c10d --rdzv_endpoint HOST:29500 " if ranks > local else ""
    launcher = f"torchrun {nodes}--nproc_per_node {local}" if ranks > 1 else "python"
    return f"{launcher} train.py " + " ".join(f"--{name} {shlex.quote(str(x))}" for name, x in given.items())


def _default_preset(device):
    import torch

    return "qwen3" if torch.cuda.is_available() and device != "cpu" else "tiny"


def problems(cfg):
    """Yields a line for each setting that cannot be, so that nothing loads first."""
    low = dict(block=1, tau=0, span_min=1, prompts=1, group=1, max_prompt=1, max_response=1, steps=1, epochs=1)
    low |= dict(minibatches=1, micro_tokens=1, clip_low=0, clip_high=0, dual_clip=0, log_ratio_clamp=0, sample_top_k=0)
    low |= dict(lr=0, warmup=0, weight_decay=0, grad_clip=0, eval_every=0, eval_problems=0, save_every=0, keep=1)
    low |= dict(k=1, n=0, tp=1, threads=0, sample_every=0, max_bad_updates=0, seed=0, limit=0, max_tokens=1, batch=1)
    for name, least in low.items():
        if not getattr(cfg, name, least) >= least:
            yield f"--{name} is {getattr(cfg, name)}; it must be at least {least}"
    for name, x in asdict(cfg).items():
        most = 2**63 - 1 if name == "seed" else 2**31 - 1
        if isinstance(x, int | float) and not x <= most:  # so that NaN is caught too
            yield f"--{name} is {x}; it must be at most {most}"
    if not 0 < cfg.top_p <= 1:
        yield f"--top_p is {cfg.top_p}; it must lie in (0, 1]"
    if not cfg.temperature > 0:
        yield f"--temperature is {cfg.temperature}; it must be above 0"
    if cfg.template not in ("auto", "chat", "plain", "raw") and "{question}" not in cfg.template:
        yield f"--template is {cfg.template!r}; it is auto, chat, plain, raw, or a text with {{question}}"
    if isinstance(cfg, EvalConfig):
        if 0 < cfg.n < cfg.k:
            yield f"--n {cfg.n} is less than --k {cfg.k}"
        if "" in cfg.data.split(",") and cfg.data:
            yield f"--data {cfg.data!r} has an empty name"
        if len(cfg.compare) == 1:
            yield "--compare needs two folders or more"
        if bool(cfg.compare) + bool(cfg.regrade) + cfg.overwrite > 1:
            yield "--compare, --regrade and --overwrite exclude each other"
    if not 0 < cfg.vllm_memory <= 1:
        yield f"--vllm_memory is {cfg.vllm_memory}; it must lie in (0, 1]"
    if cfg.device not in ("", "cpu", "cuda"):
        yield f"--device is {cfg.device!r}; it is cpu or cuda"
    if isinstance(cfg, TrainConfig):
        if not 0 <= cfg.beta2 < 1:
            yield f"--beta2 is {cfg.beta2}; it must lie in [0, 1)"
        if not 0 <= cfg.beta <= 1:
            yield f"--beta is {cfg.beta}; it must lie in [0, 1]"
        if cfg.topk < 2 and cfg.loss in ("lsm", "fkl_topk") and cfg.renormalise:
            yield f"--topk is {cfg.topk}; it must be at least 2 (renormalised on one token, the loss is always 0)"
        if cfg.teacher_url and cfg.loss not in ("opd", "lsm", "fkl_topk", "tail_topk"):
            yield f"--loss {cfg.loss} needs the teacher's whole distribution, and --teacher_url gives its top-K"
        if cfg.teacher_url and cfg.temperature != 1:
            yield f"--temperature is {cfg.temperature}; the server of --teacher_url scores at 1 only"
        if cfg.span_max < cfg.span_min:
            yield f"--span_max is {cfg.span_max}, below --span_min, {cfg.span_min}"
        if cfg.minibatches > cfg.prompts * cfg.group:
            yield f"--minibatches is {cfg.minibatches}, more than the {cfg.prompts * cfg.group} responses of a step"
        if cfg.resume not in ("auto", "true", "false"):
            yield f"--resume is {cfg.resume}; it is auto, true or false"
        if cfg.resume != "false" and cfg.overwrite:
            yield "--resume and --overwrite exclude each other"
