"""Pre-trains pairs of toy models: the one in support/toy_models, and others like it, from other seeds.

    python -m study.pretrain_toy 8 9 10 11 12 --out out/pairs      # out/pairs/8/teacher, out/pairs/8/student, ...

Teacher and student of a pair train side by side, a thread each: about 90 seconds a pair. The same seed gives the same weights
with the same torch on the same kind of processor.
"""

import argparse
import math
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from support import toy


def recipe_of(seed) -> dict:
    """{role: what train() takes} of the pair with this seed: its initial weights and its pre-training data."""
    return {
        "teacher": dict(hidden=128, heads=4, layers=2, steps=800, lr=3e-3, drop=0.0, seed=seed),
        "student": dict(hidden=64, heads=2, layers=3, steps=500, lr=4e-3, drop=0.7, seed=seed),
    }


def traces(numbers: np.ndarray, drop: float = 0.0, rng=None) -> tuple[np.ndarray, int]:
    """Token ids [B, L] of <bos>, prompt, worked-out answer and <eos>; and the length of <bos> and prompt in tokens.

    numbers: the operands [B, n], in 0..99. drop: the probability that a carry is forgotten; later totals then build on
    the wrong one. rng is needed only if drop > 0.
    """

    def digits(values):  # [B] values in 0..99 -> [B, 2] ids of their digits
        return np.stack([values // 10, values % 10], 1) + toy.ID["0"]

    B, n = numbers.shape
    parts = ["<bos>"]  # tokens that all rows share, and [B, 2] ids of the rows' digits
    for i in range(n):
        if i > 0:
            parts.append("+")
        parts += [toy.LABELS[i], digits(numbers[:, i])]
    parts += ["=", "?", "\n"]
    prompt_length = 1 + 3 * n + (n - 1) + 3  # <bos>, labels with two digits, pluses, "=?\n"

    total = numbers[:, 0]
    for i in range(1, n):
        operand = numbers[:, i]
        ones = operand % 10 + total % 10
        carry = ones // 10
        if drop:
            carry = carry * (rng.random(B) >= drop)
        tens = operand // 10 + total // 10 + carry
        new_total = tens % 10 * 10 + ones % 10
        parts += [toy.LABELS[i], digits(operand), "+", digits(total), ":"]
        parts += [digits(ones), ",", digits(tens), "=", digits(new_total), "\n"]
        total = new_total
    parts += ["\\boxed{", digits(total), "}", "<eos>"]
    columns = [np.full((B, 1), toy.ID[part]) if isinstance(part, str) else part for part in parts]
    return np.concatenate(columns, 1), prompt_length


def batches(steps: int, drop: float, seed: int):
    """Yields (ids, prompt length), about 1,800 tokens a step, from a random stream that problems() never uses.

    Curriculum: 2 to 4 operands for 40 % of the steps, then mostly 6 but sometimes fewer. At full length throughout,
    models of this size end with a mean accuracy of .08 instead of .68 (measured with 8 operands, one seed each).
    """
    rng = np.random.default_rng([seed, 10**6])  # problems() has the number of operands in place of 10**6
    for step in range(steps):
        if step < 0.4 * steps:
            n = rng.integers(2, 5)
        else:
            n = rng.choice([toy.OPERANDS, rng.integers(2, toy.OPERANDS + 1)])
        length = 20 * n - 8  # tokens in a trace of n operands
        numbers = rng.integers(0, 100, (1792 // length, n))  # 16 traces of 6 operands, more of fewer
        yield traces(numbers, drop, rng)


def model(hidden: int, heads: int, seed: int, layers: int = 3, context: int = 512):
    """A randomly initialised Qwen3 with tied embeddings and two key-value heads of size 32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(toy.VOCAB), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=context, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=toy.ID["<pad>"], bos_token_id=toy.ID["<bos>"], eos_token_id=toy.ID["<eos>"],
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def train(folder, hidden, heads, layers, steps, lr, drop, seed, row=0):
    """Pre-trains one model on one thread and saves it in `folder`. row: the line of its progress bar."""
    torch.set_num_threads(1)
    lm = model(hidden, heads, seed, layers, context=192)
    optimizer = torch.optim.AdamW(lm.parameters(), lr, (0.9, 0.98), weight_decay=0.01)
    name = f"pre-training the toy {Path(folder).name}"
    bar = tqdm(batches(steps, drop, seed), name, steps, unit="step", position=row, mininterval=1)
    for step, (ids, prompt_length) in enumerate(bar):
        warmup = min(1.0, (step + 1) / 50)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * warmup * (0.05 + 0.95 * cosine)
        # All rows have the same length, so no mask is needed. Only the answer's positions go through the head.
        ids = torch.from_numpy(ids)
        states = lm.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, prompt_length - 1 :]
        loss = cross_entropy(lm.lm_head(states).flatten(0, 1), ids[:, prompt_length:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    lm.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)


def pretrain(folder: Path, recipe: dict):
    """Trains each role of the recipe in its own process, into FOLDER/ROLE, unless that is there."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    processes = {}
    for row, (role, options) in enumerate(recipe.items()):
        if (folder / role).exists():
            continue
        tmp = folder / f"{role}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        processes[role] = context.Process(target=train, args=(tmp,), kwargs=options | {"row": row}, daemon=True)
        processes[role].start()
    for role, process in processes.items():
        process.join()
        if process.exitcode:
            raise RuntimeError(f"training the toy {role} failed with exit code {process.exitcode}; see above")
        (folder / f"{role}.tmp").rename(folder / role)


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m study.pretrain_toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="+", type=int, help="of the pairs")
    parser.add_argument("--out", default="out/pairs", help="folder of the pairs (default: out/pairs)")
    args = parser.parse_args(argv)
    for seed in args.seeds:
        pretrain(Path(args.out, str(seed)), recipe_of(seed))
        print(Path(args.out, str(seed)))


if __name__ == "__main__":
    main()
