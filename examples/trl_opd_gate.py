"""On-policy distillation with the drift gate in TRL's GRPOTrainer: the update of train.py --loss opd --gate block.

    pip install -r requirements.txt "trl>=1.16"
    python examples/trl_opd_gate.py                       # the toy models on a CPU; or real ones:
    python examples/trl_opd_gate.py --student Qwen/Qwen3-1.7B-Base --teacher Thinking-Space/Qwen3-4B-Base-GRPO --data dapo

Prompts that are text reach the student as they are; chat messages get its chat template.
"""

import argparse
import sys
from pathlib import Path

import torch
import trl
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

if Version(trl.__version__) < Version("1.16"):
    sys.exit(f"trl is {trl.__version__}; this example needs 1.16 or newer: pip install 'trl>=1.16'")
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # these three are in the folder above
import data
import toy
from gating import gate, segment_index

# With other values, TRL's loss would be another one, or have terms without a gate. Dropout would read as drift.
REQUIRED = dict(
    loss_type="dapo", importance_sampling_level="token", beta=0.0, entropy_coef=0.0, use_adaptive_entropy=False,
    top_entropy_quantile=1.0, router_aux_loss_coef=0.0, vllm_importance_sampling_correction=False, disable_dropout=True,
)  # fmt: skip


class OPDTrainer(trl.GRPOTrainer):
    """GRPOTrainer with the advantage log q(y) - log pi_old(y), q the teacher, and a drift gate for each block of tokens.

    args: a GRPOConfig with REQUIRED; its off_policy_mask_threshold is tau. ValueError if the gate would not be the paper's.
    """

    def __init__(self, model, teacher, args, block=64, **options):
        super().__init__(model, lambda completions, **_: [0.0] * len(completions), args, **options)  # no reward
        check(self, args)
        add_fused_lm_head(teacher, temperature=self.temperature)
        self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)
        self.block, self.gate_sums = block, []

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        x = super()._generate_and_score_completions(inputs)
        ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
        mask = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
        size = x["completion_ids"].shape[1], self.args.per_device_train_batch_size
        logq = self._get_per_token_logps_and_entropies(self.teacher, ids, mask, *size)[0]
        x["advantages"] = logq - x["old_per_token_logps"]  # [B, T]
        x.pop("sampling_per_token_logps", None)  # vLLM's would read as drift; without them the gate gets the old ones
        return x

    def get_off_policy_mask(self, *, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold, **_):
        """TRL multiplies its loss [B, T] by what this hook returns: here the gates, not normalised."""
        mask = mask.bool()
        segments = segment_index(mask, "block", block=self.block)
        g, _ = gate(per_token_logps[mask], sampling_per_token_logps[mask], segments, tau=off_policy_threshold)
        if self.model.training:
            self.gate_sums.append(g.sum())
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, g)

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # that was an update's last micro-batch; next come clipping and the step
            # TRL has divided by the number of tokens, Eq. 1 divides by the sum of the gates, which is known only now.
            # Gates normalised in each micro-batch would not give Eq. 1: they hide how much that micro-batch has drifted.
            n = self._buffered_inputs[0]["num_items_in_batch"] / self.args.steps_per_generation
            n = n * self.current_gradient_accumulation_steps
            mean_gate = self.accelerator.reduce(torch.stack(self.gate_sums).sum()).clamp(min=1e-30) / n
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= mean_gate.item()
            self._metrics["train"]["gate"].append(mean_gate.item())
            self.gate_sums = []
        return loss


def check(trainer, args):
    n_micro, n_kept = args.gradient_accumulation_steps, args.steps_per_generation
    dropout = [name for name, x in trainer.model.config.to_dict().items() if "drop" in name and isinstance(x, float) and x]
    refusals = [(getattr(args, k) != v, f"{k} is {getattr(args, k)!r}; the gate needs {v!r}") for k, v in REQUIRED.items()]
    refusals += [
        (args.off_policy_mask_threshold is None, "off_policy_mask_threshold is None: no gate; set it to tau, such as 1.0"),
        (n_kept % n_micro, f"steps_per_generation is {n_kept}; it must be a multiple of gradient_accumulation_steps {n_micro}"),
        (n_kept * args.num_iterations == n_micro, "num_iterations is 1: one update per rollout, no drift; set it to 2"),
        (dropout, f"the student's config has {dropout}, which disable_dropout does not turn off; set it to 0.0"),
        (trainer.is_deepspeed_enabled, "DeepSpeed keeps no p.grad, which must be divided; use DDP or FSDP"),
    ]
    for is_wrong, message in refusals:
        if is_wrong:
            raise ValueError(message)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="hub name or folder; by default the toy's")
    parser.add_argument("--teacher", help="hub name or folder; by default the toy's")
    parser.add_argument("--data", default="toy", help="hub name, file with a column prompt, or toy (the default)")
    parser.add_argument("--steps", type=int, default=200, help="updates; two for every batch of rollouts (200)")
    parser.add_argument("--out", default="out/trl", help="the student is saved here (out/trl)")
    flags = parser.parse_args()
    student, teacher = flags.student or toy.models()[1], flags.teacher or toy.models()[0]
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (student, teacher)]
    data.shared_vocab(*tokenizers)  # ValueError if they differ
    prompts = [{"prompt": problem.prompt} for problem in data.load(flags.data, seed=0)]
    size = dict(learning_rate=2e-6, max_completion_length=4096)
    if flags.student is None:
        size = dict(learning_rate=1e-3, max_completion_length=100)
    args = trl.GRPOConfig(
        **REQUIRED, off_policy_mask_threshold=1.0, num_iterations=2, delta=3.0,  # delta: train.py's --dual_clip
        per_device_train_batch_size=8, gradient_accumulation_steps=8, num_generations=8, max_steps=flags.steps,
        output_dir=flags.out, bf16=torch.cuda.is_available(), report_to="none", save_strategy="no", **size,
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_pretrained(teacher)
    trainer = OPDTrainer(student, teacher, args, train_dataset=Dataset.from_list(prompts), processing_class=tokenizers[0])
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
