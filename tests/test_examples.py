"""python -m pytest tests/test_examples.py      examples/ against train.update; needs TRL, or verl (.ci/run installs both)"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import reference
import torch
from helpers import ENV, ROOT, flags, join, start_ranks
from packaging.version import Version
from scenes import toy_vocabulary
from test_reference import Recorder, distance, random_model
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

import data
import policy
import train
from configs import TrainConfig, parse
from policy import teacher_targets
from rollout import Rollout
from support import toy

CPU = torch.device("cpu")


def has(package, version):
    try:
        return Version(importlib.metadata.version(package)) >= Version(version)
    except importlib.metadata.PackageNotFoundError:
        return False


HAS_TRL, HAS_VERL = has("trl", "1.16"), has("verl", "0.9.1")
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="needs TRL: pip install 'trl>=1.16'")
needs_verl = pytest.mark.skipif(not HAS_VERL, reason="needs verl 0.9.1; .ci/run installs what it needs on a CPU")
if HAS_TRL:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is experimental
    import trl
    from accelerate.state import AcceleratorState
    from datasets import Dataset

    from examples.trl_opd_gate import REQUIRED, OPDTrainer
if HAS_VERL:
    from tensordict import TensorDict
    from verl.utils.tensordict_utils import assign_non_tensor
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    import examples.verl_policy_loss  # noqa: F401  it registers the loss


# -----------------------------------------------------------------------------
# one scene for all: eight rollouts, the student that made them, the student now, and a teacher

LENGTHS = {"equal": [12] * 8, "ragged": [1, 3, 30, 17, 24, 2, 9, 12]}


def rollouts_of(lengths):
    g = torch.Generator().manual_seed(0)
    rollouts = []
    for i, n in enumerate(lengths):
        tokens = torch.randint(4, 42, (n,), generator=g).tolist()
        rollouts.append(Rollout([1, 5, 6, 7][: 1 + i % 4], tokens, [-1.0] * n, "stop"))
    return rollouts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders {old: the student that sampled, new: the student now, teacher}."""
    folder = tmp_path_factory.mktemp("models")
    student = random_model(3, is_tied=True)
    student.save_pretrained(folder / "old")
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn_like(p)
    student.save_pretrained(folder / "new")
    random_model(4, is_tied=True).save_pretrained(folder / "teacher")
    return {role: str(folder / role) for role in ("old", "new", "teacher")}


def our_gradient(models, rollouts, now="new", **options):
    """{parameter: its gradient} of train.update on these rollouts, for the student `now`."""
    options = dict(loss="opd", gate="block", block=4, temperature=0.9, grad_clip=0) | options
    cfg = parse(TrainConfig, flags((models["teacher"], models["new"]), "unused", minibatches=1, **options))
    vocabulary = toy_vocabulary()
    old, now, teacher = (
        policy.load_policy(models[role], cfg, vocabulary, CPU, trainable=role == now)
        for role in ("old", now, "teacher")
    )
    (batches,) = data.make_minibatches(rollouts, cfg, 0, vocabulary, CPU)
    for batch in batches:
        batch.teacher = teacher_targets(teacher, batch, cfg)
        with torch.no_grad():
            batch.logp_old = policy.token_logprobs(old, batch, cfg.temperature)
    recorder = Recorder(now)
    train.update(now, recorder, batches, cfg)
    return recorder.gradient


# -----------------------------------------------------------------------------
# TRL


class Optimizer(torch.optim.SGD):
    """Keeps the gradient of every update; instead of a step, the student takes the weights `now`."""

    def __init__(self, student, now):
        super().__init__(student.parameters(), lr=0.0)
        self.student, self.now, self.gradients = student, now, []

    def step(self, closure=None):
        self.gradients.append({name: p.grad.clone() for name, p in self.student.named_parameters()})
        self.student.load_state_dict(self.now)


def watched(trainer_class):
    """The class, with a list `seen` of the rollouts of every micro-batch."""

    class Watched(trainer_class):
        def _compute_loss(self, model, inputs):
            if model.training:
                self.seen.append(rollouts_in(inputs))
            return super()._compute_loss(model, inputs)

    return Watched


def rollouts_in(inputs):
    rows = zip(*(inputs[f"{part}_{x}"] for part in ("prompt", "completion") for x in ("ids", "mask")), strict=True)
    parts = [(p[p_mask.bool()].tolist(), c[c_mask.bool()].tolist()) for p, p_mask, c, c_mask in rows]
    return [Rollout(prompt, response, [-1.0] * len(response), "stop") for prompt, response in parts]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_trainer(models, folder, rollouts, trainer_class=None, settings=None, student=None, **options):
    """A trainer whose generation returns these rollouts, with wrong log-probs of a sampler."""

    def generate(prompts, trainer):
        assert len(prompts) == len(rollouts)
        ids = {"prompt_ids": [r.prompt for r in rollouts], "completion_ids": [r.response for r in rollouts]}
        return ids | {"logprobs": [r.logprobs for r in rollouts]}

    values = REQUIRED | dict(
        num_iterations=2, per_device_train_batch_size=8, num_generations=2, max_steps=2, temperature=0.9,
        max_grad_norm=0, output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    args = trl.GRPOConfig(**(values | (settings or {})))
    student = load(models["old"]) if student is None else student
    optimizer = Optimizer(student, load(models["new"]).state_dict())
    trainer = watched(trainer_class or OPDTrainer)(
        student, args=args, train_dataset=Dataset.from_list([{"prompt": "1"}] * 16), rollout_func=generate,
        processing_class=toy.tokenizer(), optimizers=(optimizer, None), **options,
    )  # fmt: skip
    trainer.seen, trainer.gradients = [], optimizer.gradients
    return trainer


SPLITS = {
    "one micro-batch": dict(),
    "four": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "two updates of two": dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=4
    ),
}


@needs_trl
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("split", SPLITS)
def test_trl_computes_our_gradient(models, tmp_path, split, lengths):
    """Before drift and after it, on the rollouts of each update; an evaluation in between must not count."""
    rollouts = rollouts_of(LENGTHS[lengths])
    options = dict(teacher=load(models["teacher"]), block=4, eval_dataset=Dataset.from_list([{"prompt": "1"}] * 8))
    trainer = make_trainer(models, tmp_path, rollouts, settings=SPLITS[split], **options)
    trainer.evaluate()
    trainer.train()
    n_micro = len(trainer.seen) // len(trainer.gradients)
    assert n_micro == trainer.args.gradient_accumulation_steps
    assert len(trainer.gradients) == trainer.args.max_steps
    for update, gradient in enumerate(trainer.gradients):
        seen = sum(trainer.seen[update * n_micro : (update + 1) * n_micro], [])
        now = "new" if update else "old"
        assert distance(gradient, our_gradient(models, seen, now)) < 1e-5
        if update:  # the gate matters
            assert distance(gradient, our_gradient(models, seen, now, gate="none")) > 1e-3


@needs_trl
def test_two_ranks_compute_our_gradient(models, tmp_path):
    """Each with half of the rollouts, in two micro-batches, and with another number of tokens."""
    rollouts = rollouts_of(LENGTHS["ragged"])
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo")

    def one_rank(rank):
        AcceleratorState._reset_state(reset_partial_state=True)  # that of the tests before, in one process
        share = rollouts[4 * rank : 4 * rank + 4]
        trainer = make_trainer(models, tmp_path, share, settings=settings, teacher=load(models["teacher"]), block=4)
        trainer.train()
        torch.save(trainer.gradients[1], tmp_path / f"{rank}.pt")

    assert join(start_ranks(one_rank, 2, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    exact = our_gradient(models, rollouts)
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"{rank}.pt"), exact) < 1e-5


class Ungated(trl.GRPOTrainer if HAS_TRL else object):
    """TRL's own loss on OPDTrainer's advantages."""

    def __init__(self, student, advantages, **options):
        super().__init__(student, lambda completions, **_: [0.0] * len(completions), **options)
        self.advantages = advantages

    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(inputs) | {"advantages": self.advantages}


@needs_trl
@pytest.mark.parametrize("split", ["one micro-batch", "four"])
def test_without_drift_it_is_trls_own_loss(models, tmp_path, split):
    rollouts = rollouts_of(LENGTHS["ragged"])
    ours = make_trainer(models, tmp_path, rollouts, settings=SPLITS[split], teacher=load(models["teacher"]))
    advantages = []
    generate = ours._generate_and_score_completions

    def keep_advantages(inputs):
        x = generate(inputs)
        advantages.append(x["advantages"])
        return x

    ours._generate_and_score_completions = keep_advantages
    ours.train()
    theirs = make_trainer(models, tmp_path, rollouts, Ungated, SPLITS[split], advantages=advantages[0])
    theirs.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert distance(ours.gradients[0], theirs.gradients[0]) < 1e-6
    assert distance(ours.gradients[1], theirs.gradients[1]) > 1e-3  # the second update has drifted
    assert [row["gate"] for row in ours.state.log_history[:2]] == [pytest.approx(1), pytest.approx(0.9, abs=0.1)]


REFUSED = {
    "off_policy_mask_threshold": 0.5, "loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1,
    "entropy_coef": 0.1, "use_adaptive_entropy": True, "top_entropy_quantile": 0.5, "disable_dropout": False,
    "vllm_importance_sampling_correction": True, "num_iterations": 1, "steps_per_generation": 3, "delta": None, "epsilon": 0.3,
}  # fmt: skip


@needs_trl
@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_turn_the_gate_off_are_refused(models, tmp_path, name):
    settings = {"gradient_accumulation_steps": 2} if name == "steps_per_generation" else {}
    settings[name] = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{name} is {settings[name]!r}") as error:
        make_trainer(models, tmp_path, [], settings=settings, teacher=load(models["teacher"]))
    assert "\n" not in str(error.value)


@needs_trl
def test_dropout_that_trl_leaves_on_is_refused(models, tmp_path):
    """disable_dropout does not reach the attention's, which the gate would take for drift."""
    student = AutoModelForCausalLM.from_pretrained(models["old"], attention_dropout=0.1, dtype=torch.float32)
    with pytest.raises(ValueError, match="^attention_dropout is 0.1"):
        make_trainer(models, tmp_path, [], student=student, teacher=load(models["teacher"]))


@needs_trl
def test_the_example_runs_on_the_toy_pair(tmp_path):
    """Two updates from the command line."""
    command = [sys.executable, str(ROOT / "examples/trl_opd_gate.py")]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--num_generations", "4", "--logging_steps", "1"]
    done = subprocess.run(command + small, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/trl/model.safetensors").exists()


@needs_trl
def test_the_trainer_can_be_imported_beside_gating_alone(tmp_path):
    """The lines of its docstring, with paths for models; on a CPU, without a further flag."""
    for file in (ROOT / "examples" / "trl_opd_gate.py", ROOT / "gating.py"):
        shutil.copy(file, tmp_path)
    start = "import torch, datasets\ntorch.set_num_threads(1)\n"
    start += f"student, teacher = {toy.STUDENT!r}, {toy.TEACHER!r}\n"
    start += "prompts = datasets.Dataset.from_dict({'prompt': ['a30+b75+c69+d16+e47+f77=?\\n'] * 8})\n"
    usage = (ROOT / "examples" / "trl_opd_gate.py").read_text().split('"""')[1]
    lines = usage[usage.index("    from trl import") : usage.index("student and teacher are")]
    lines = lines.replace("num_iterations=2,", "num_iterations=2, max_steps=2, per_device_train_batch_size=8,")
    (tmp_path / "script.py").write_text(start + textwrap.dedent(lines))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -----------------------------------------------------------------------------
# verl

LONG = [5 * n for n in LENGTHS["ragged"]]  # the example's blocks have 64 tokens


def jagged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def verl_gradient(models, rollouts, n_micro=1, weight=None):
    """{parameter: its gradient} of verl's ppo_loss in n_micro micro-batches. weight: of verl's own, for every token."""
    old, new, teacher = (load(models[role]) for role in ("old", "new", "teacher"))
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="opd_drift_gate"),
    )  # fmt: skip
    n_tokens = sum(len(r.response) for r in rollouts)
    size = len(rollouts) // n_micro
    for start in range(0, len(rollouts), size):
        share = rollouts[start : start + size]
        tokens = [torch.tensor(r.response) for r in share]

        def logprobs(model, share=share, tokens=tokens):
            return [reference.of(reference.logprobs(model, r, 0.9), y) for r, y in zip(share, tokens, strict=True)]

        with torch.no_grad():
            logp_old, logq = logprobs(old), logprobs(teacher)
        fields = {
            "prompts": [torch.tensor(r.prompt) for r in share],
            "responses": tokens,
            "response_mask": [torch.ones(len(y)) for y in tokens],
            "old_log_probs": logp_old,
            "advantages": [q - p for q, p in zip(logq, logp_old, strict=True)],
        }
        if weight is not None:
            fields["rollout_is_weights"] = [torch.full((len(y),), weight) for y in tokens]
        batch = TensorDict({name: jagged(rows) for name, rows in fields.items()}, batch_size=len(share))
        assign_non_tensor(batch, dp_size=1, batch_num_tokens=n_tokens, global_batch_size=len(rollouts))
        # Of prompt and response, a token's at the position before it.
        logp = [pad(x, (len(r.prompt) - 1, 1)) for x, r in zip(logprobs(new), share, strict=True)]
        loss, _ = ppo_loss(config, {"log_probs": jagged(logp)}, batch)
        loss.backward()
    return {name: p.grad for name, p in new.named_parameters()}


@needs_verl
def test_verl_computes_our_gradient(models):
    """In one micro-batch; in four it is an approximation, as the docstring says."""
    rollouts = rollouts_of(LONG)
    exact = our_gradient(models, rollouts, block=64)
    assert distance(verl_gradient(models, rollouts), exact) < 1e-5
    assert 1e-3 < distance(verl_gradient(models, rollouts, n_micro=4), exact) < 0.1
    assert distance(our_gradient(models, rollouts, gate="none"), exact) > 1e-3  # the gate matters


@needs_verl
def test_verls_own_weights_are_kept(models):
    rollouts = rollouts_of(LONG)
    once, twice = (verl_gradient(models, rollouts, weight=weight) for weight in (1.0, 2.0))
    assert distance(twice, {name: 2 * x for name, x in once.items()}) < 1e-6


@needs_verl
def test_verl_loads_the_loss_as_its_docstring_says():
    program = "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; f('opd_drift_gate')"
    env = ENV | {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "VERL_USE_EXTERNAL_MODULES": "verl_policy_loss"}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=120)
