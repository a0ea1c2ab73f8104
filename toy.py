"""The embedded default: sums of six two-digit numbers, carried out line by line, and two tiny Qwen3 models.

    a30+b75+c69+d16+e47+f77=?          prompt
    b75+30:05,10=05                    label, operand + running total : ones sum, tens sum + carry = new total
    ...                                one line for each operand after the first, all modulo 100
    \\boxed{14}

The teacher has learnt it from right sums. The student is smaller and has learnt a bad habit: in its training
data most carries are dropped. It still gives the right token some weight there, and that is what a teacher can
bring out: an easy case for distillation, on purpose. Both are trained on first use (about 100 s on two cores) and kept.

    python toy.py                      trains the pair if need be, and says where it is
"""

import fcntl
import hashlib
import json
import math
import multiprocessing
import sys
from pathlib import Path

import numpy as np

LABELS = "abcdefghijklmnopqrst"
VOCAB = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", *"+:,=?\n", "\\boxed{", "}", *LABELS]
ID = {token: i for i, token in enumerate(VOCAB)}
OPERANDS = 6
HELD_OUT = 999  # the seed of held-out problems; training prompts and pre-training use other streams

RECIPE = {
    "teacher": dict(hidden=128, heads=4, steps=540, lr=3e-3, drop=0.0, seed=7),
    "student": dict(hidden=64, heads=2, steps=500, lr=4e-3, drop=0.6, seed=7),
}


def problems(n: int, seed: int, operands: int = OPERANDS) -> list[tuple[str, str]]:
    """n (question, answer) pairs, the same for the same seed; a longer list begins with the shorter one."""
    numbers = np.random.default_rng([seed, operands]).integers(0, 100, (n, operands))
    questions = ["+".join(f"{label}{x:02d}" for label, x in zip(LABELS, row, strict=False)) + "=?" for row in numbers]
    return [(q, f"{sum(row) % 100:02d}") for q, row in zip(questions, numbers.tolist(), strict=True)]


def traces(numbers: np.ndarray, drop: float = 0.0, rng=None) -> tuple[np.ndarray, int]:
    """Token ids [B, L] of <bos>, prompt, worked answer and <eos>, and the prompt's length.

    numbers [B, n] in 0..99. drop: each carry is forgotten with this probability, and the error is carried on.
    """
    B, n = numbers.shape
    const = lambda text: np.full((B, 1), ID[text])  # noqa: E731
    digits = lambda x: np.stack([x // 10, x % 10], 1) + ID["0"]  # noqa: E731
    columns = [const("<bos>")]
    for i in range(n):
        columns += [const("+")] * (i > 0) + [const(LABELS[i]), digits(numbers[:, i])]
    columns += [const("="), const("?"), const("\n")]
    prompt, total = sum(c.shape[1] for c in columns), numbers[:, 0]
    for i in range(1, n):
        ones = numbers[:, i] % 10 + total % 10
        carry = ones // 10
        if drop:
            carry = carry * (rng.random(B) >= drop)
        tens = numbers[:, i] // 10 + total // 10 + carry
        new = tens % 10 * 10 + ones % 10
        columns += [const(LABELS[i]), digits(numbers[:, i]), const("+"), digits(total), const(":"), digits(ones)]
        columns += [const(","), digits(tens), const("="), digits(new), const("\n")]
        total = new
    columns += [const("\\boxed{"), digits(total), const("}"), const("<eos>")]
    return np.concatenate(columns, 1), prompt


def tokenizer():
    """One token a character, `\\boxed{` one token; its chat template is the question and a newline."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ID["<bos>"])])
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    out = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    out.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return out


def model(hidden: int, heads: int, seed: int):
    """A random Qwen3 of three layers, tied embeddings, two key-value heads of size 32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCAB), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=ID["<pad>"], bos_token_id=ID["<bos>"], eos_token_id=ID["<eos>"],
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def train(folder: str, hidden: int, heads: int, steps: int, lr: float, drop: float, seed: int, row: int = 0):
    """Pre-trains one model on one thread and writes it to `folder`, complete or not at all.

    Curriculum: 2 to 4 operands for the first 40 % of the steps, then 6 mixed with 2 to 6; without it the
    tiny models do not get there. About 1,800 tokens a step.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    torch.set_num_threads(1)
    lm, rng = model(hidden, heads, seed), np.random.default_rng([seed, 10**6])
    optimizer = torch.optim.AdamW(lm.parameters(), lr, (0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc=f"pre-training the toy {Path(folder).name}", position=row, unit="step")
    for step in bar:
        n = rng.integers(2, 5) if step < 0.4 * steps else rng.choice([OPERANDS, rng.integers(2, OPERANDS + 1)])
        width = 20 * n - 8
        ids, prompt = traces(rng.integers(0, 100, (1792 // width, n)), drop, rng)
        ids = torch.from_numpy(ids)
        warm, done = min(1.0, (step + 1) / 50), step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        hidden_states = lm.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, prompt - 1 :]
        loss = cross_entropy(lm.lm_head(hidden_states).flatten(0, 1), ids[:, prompt:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    lm.save_pretrained(folder + ".tmp")
    tokenizer().save_pretrained(folder + ".tmp")
    Path(folder + ".tmp").rename(folder)


def models(root="out/toy", recipe=RECIPE) -> tuple[str, str]:
    """Folders of (teacher, student), trained on first use, both at once; a second process waits for the first."""
    key = hashlib.sha256(json.dumps([recipe, VOCAB]).encode()).hexdigest()[:8]
    root = Path(root) / key
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as lock:  # released by the system if this process dies
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [role for role in recipe if not (root / role).exists()]
        context = multiprocessing.get_context("spawn")
        jobs = []
        for i, role in enumerate(missing):
            jobs.append(context.Process(target=train, args=(str(root / role),), kwargs=recipe[role] | {"row": i}))
            jobs[-1].start()
        for job in jobs:
            job.join()
        if any(job.exitcode for job in jobs):
            raise RuntimeError(f"training the toy models failed, exit codes {[job.exitcode for job in jobs]}")
    return str(root / "teacher"), str(root / "student")


if __name__ == "__main__":
    teacher, student = models()
    (question, answer), *_ = problems(1, HELD_OUT)
    sys.stdout.write(f"teacher: {teacher}\nstudent: {student}\na problem: {question}  answer: {answer}\n")
