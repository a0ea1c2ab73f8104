"""On-policy distillation with the drift gate in TRL's GRPOTrainer: the update of train.py --loss opd --gate block.

    pip install "trl>=1.16"                              # and gating.py beside this file, or in the folder above

    from trl import GRPOConfig
    from trl_opd_gate import REQUIRED, OPDTrainer

    args = GRPOConfig(**REQUIRED, num_iterations=2, max_completion_length=100)      # and your own: learning_rate, ...
    trainer = OPDTrainer(student, teacher, args, train_dataset=prompts)
    trainer.train()

student and teacher are models, folders or hub names; prompts is a datasets.Dataset with a column "prompt", of texts or of chats.

    python examples/trl_opd_gate.py                      # a demonstration on the toy models, on a CPU; the end of this file
    python examples/trl_opd_gate.py --student Qwen/Qwen3-1.7B-Base --teacher Thinking-Space/Qwen3-4B-Base-GRPO --data dapo \\
        --learning_rate 2e-6 --max_completion_length 8192       # every setting of GRPOConfig is a flag
"""

import sys
from pathlib import Path

import torch
import trl
from transformers import AutoModelForCausalLM

if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 16):
    raise ImportError(f"trl is {trl.__version__}; this example needs 1.16 or newer: pip install 'trl>=1.16'")
from trl.trainer.utils import add_fused_lm_head

sys.path.append(str(Path(__file__).resolve().parent.parent))
from gating import drift, gate, segment_index

# With other settings TRL's loss would not be that of train.py, or parts of it not gated. Dropout changes log-probs, and would
# count as drift. delta is the dual clip.
REQUIRED = dict(
    loss_type="dapo", importance_sampling_level="token", epsilon=0.2, delta=3.0, beta=0.0, entropy_coef=0.0,
    use_adaptive_entropy=False, top_entropy_quantile=1.0, router_aux_loss_coef=0.0, disable_dropout=True,
    vllm_importance_sampling_correction=False,
    off_policy_mask_threshold=None,  # the gate takes the place of this mask
    bf16=torch.cuda.is_available(),  # TRL's default, except on a CPU
)  # fmt: skip


class OPDTrainer(trl.GRPOTrainer):
    """GRPOTrainer with the advantage log q(y) - log pi_old(y), q the teacher, and the drift gate in blocks of tokens.

    student, teacher: a model, a folder or a hub name. args: a GRPOConfig with the settings of REQUIRED; ValueError if others
    disable the gate or change it. train_dataset: a Dataset with a column "prompt".
    """

    def __init__(self, student, teacher, args, tau=1.0, block=64, **options):
        super().__init__(student, no_reward, args, **options)
        check(self, args)
        if not isinstance(teacher, torch.nn.Module):
            teacher = AutoModelForCausalLM.from_pretrained(teacher)
        add_fused_lm_head(teacher, temperature=self.temperature)
        self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False), evaluation_mode=True)
        self.off_policy_mask_threshold = tau  # while this is None, TRL does not call get_off_policy_mask
        self.block, self.gate_sum = block, 0.0

    def _generate_and_score_completions(self, inputs):
        x = super()._generate_and_score_completions(inputs)
        ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
        mask = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
        size = x["completion_ids"].shape[1], self.args.per_device_train_batch_size
        logq, *_ = self._get_per_token_logps_and_entropies(self.teacher, ids, mask, *size)
        x["advantages"] = logq - x["old_per_token_logps"]  # [B, T]
        x.pop("sampling_per_token_logps", None)  # vLLM's; without them the gate gets the trainer's old log-probs
        return x

    def get_off_policy_mask(self, *, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold, **_):
        """The gates [B, T], by which TRL multiplies its loss. They are not normalised here: see training_step."""
        mask = mask.bool()
        segments = segment_index(mask, "block", block=self.block)
        d = drift(per_token_logps[mask], sampling_per_token_logps[mask])
        g, _ = gate(d, segments, tau=off_policy_threshold)
        if self.model.training:
            self.gate_sum += g.sum()
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, g)

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # after the last micro-batch of an update, before clipping
            # TRL has divided by the number of tokens; Eq. 1 divides by the sum of the gates, which is known only now. (Gates
            # normalised in each micro-batch change the gradient by .1 to 11 %, measured with four of them.)
            share = self.current_gradient_accumulation_steps / self.args.steps_per_generation  # of the rollouts
            n_tokens = share * self._buffered_inputs[0]["num_items_in_batch"].clamp(min=1)
            mean_gate = (self.accelerator.reduce(self.gate_sum).clamp(min=1e-30) / n_tokens).item()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= mean_gate
            self._metrics["train"]["gate"].append(mean_gate)
            self.gate_sum = 0.0
        return loss


def no_reward(completions, **_):
    return [0.0] * len(completions)


def check(trainer, args):
    names = [name for name in REQUIRED if name != "bf16"]
    wrong = [
        f"{k} is {getattr(args, k)!r}; the gate needs {REQUIRED[k]!r}" for k in names if getattr(args, k) != REQUIRED[k]
    ]
    n_micro, n_buffered = args.gradient_accumulation_steps, args.steps_per_generation
    if n_buffered % n_micro:
        wrong.append(f"steps_per_generation is {n_buffered}; gradient_accumulation_steps, {n_micro}, must divide it")
    if n_buffered * args.num_iterations == n_micro:
        wrong.append("num_iterations is 1: rollouts serve one update, and nothing drifts; set it to 2 or more")
    for name, value in trainer.model.config.to_dict().items():
        if "drop" in name and isinstance(value, float) and value > 0:  # disable_dropout leaves attention_dropout on
            wrong.append(f"{name} is {value} in the student's config; set it to 0.0")
    if trainer.is_deepspeed_enabled:
        wrong.append("DeepSpeed has no p.grad, which the gate must divide; use DDP or FSDP")
    if wrong:
        raise ValueError(wrong[0])


# -----------------------------------------------------------------------------
# The demonstration. To use the trainer in a script of your own, import it, or copy all above this line.


def main():
    from datasets import Dataset
    from transformers import AutoTokenizer, HfArgumentParser

    import data
    from support import toy
    from support.vocabulary import shared_size

    parser = HfArgumentParser(trl.GRPOConfig)
    for flag in ("--student", "--teacher", "--data"):
        parser.add_argument(flag, default="toy", help="toy, or what train.py takes")
    parser.set_defaults(
        **REQUIRED, num_iterations=2, per_device_train_batch_size=16, gradient_accumulation_steps=4,
        max_completion_length=100, learning_rate=1e-3, max_steps=200, output_dir="out/trl", report_to="none", save_strategy="no",
    )  # fmt: skip
    args, flags = parser.parse_args_into_dataclasses()
    student = toy.STUDENT if flags.student == "toy" else flags.student
    teacher = toy.TEACHER if flags.teacher == "toy" else flags.teacher
    tokenizer = AutoTokenizer.from_pretrained(student)
    shared_size(tokenizer, AutoTokenizer.from_pretrained(teacher))  # ValueError if their tokens differ
    # The prompts of train.py, as text; TRL adds BOS itself.
    ids = [data.encode(problem, tokenizer) for problem in data.load(flags.data, seed=args.seed)]
    texts = [text.removeprefix(tokenizer.bos_token or "") for text in tokenizer.batch_decode(ids)]
    trainer = OPDTrainer(student, teacher, args, train_dataset=Dataset.from_dict({"prompt": texts}))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
