"""The built-in toy task: sums of six two-digit numbers, worked out line by line, and two tiny Qwen3 models.

    a30+b75+c69+d16+e47+f77=?          prompt
    b75+30:05,10=05                    label, operand + total so far : sum of ones, sum of tens with carry = new total
    ...                                one line for each operand after the first; totals are modulo 100
    \\boxed{14}

The teacher is trained on correct sums. The student is smaller and is trained on sums in which 70 % of the carries are
dropped, so it learns to drop them, too. It still gives the correct token some probability, which distillation can raise:
the task is easy on purpose. Both models are trained on first use and kept in out/toy/.

    python toy.py [SEED]               trains the two models if necessary, and prints where they are
"""

import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

LABELS = "abcdefghijklmnopqrst"
VOCAB = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", *"+:,=?\n", "\\boxed{", "}", *LABELS]
ID = {token: i for i, token in enumerate(VOCAB)}
OPERANDS = 6
HELD_OUT = 2**64 - 1  # the seed of the held-out problems; no run is likely to use it as its own

VERSION = 1  # part of the cache's key: raise it when traces(), batches(), model() or train() give something else


def recipe_of(seed) -> dict:
    """{role: what train() takes} of the pair with this seed: its initial weights and its pre-training data."""
    return {
        "teacher": dict(hidden=128, heads=4, layers=2, steps=800, lr=3e-3, drop=0.0, seed=seed),
        "student": dict(hidden=64, heads=2, layers=3, steps=500, lr=4e-3, drop=0.7, seed=seed),
    }


SEED = 7  # of the default pair
RECIPE = recipe_of(SEED)


def problems(n: int, seed: int, operands: int = OPERANDS) -> list[tuple[str, str]]:
    """n (question, answer) pairs, the same for the same seed; a longer list begins with the shorter one."""
    rng = np.random.default_rng([seed, operands])
    labels = LABELS[:operands]
    pairs = []
    for numbers in rng.integers(0, 100, (n, operands)).tolist():
        terms = [f"{label}{number:02d}" for label, number in zip(labels, numbers, strict=True)]
        pairs.append(("+".join(terms) + "=?", f"{sum(numbers) % 100:02d}"))
    return pairs


def traces(numbers: np.ndarray, drop: float = 0.0, rng=None) -> tuple[np.ndarray, int]:
    """Token ids [B, L] of <bos>, prompt, worked-out answer and <eos>; and the length of <bos> and prompt in tokens.

    numbers: the operands [B, n], in 0..99. drop: the probability that a carry is forgotten; later totals then build on
    the wrong one. rng is needed only if drop > 0.
    """

    def digits(values):  # [B] values in 0..99 -> [B, 2] ids of their digits
        return np.stack([values // 10, values % 10], 1) + ID["0"]

    B, n = numbers.shape
    parts = ["<bos>"]  # tokens that all rows share, and [B, 2] ids of the rows' digits
    for i in range(n):
        if i > 0:
            parts.append("+")
        parts += [LABELS[i], digits(numbers[:, i])]
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
        parts += [LABELS[i], digits(operand), "+", digits(total), ":"]
        parts += [digits(ones), ",", digits(tens), "=", digits(new_total), "\n"]
        total = new_total
    parts += ["\\boxed{", digits(total), "}", "<eos>"]
    columns = [np.full((B, 1), ID[part]) if isinstance(part, str) else part for part in parts]
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
            n = rng.choice([OPERANDS, rng.integers(2, OPERANDS + 1)])
        length = 20 * n - 8  # tokens in a trace of n operands
        numbers = rng.integers(0, 100, (1792 // length, n))  # 16 traces of 6 operands, more of fewer
        yield traces(numbers, drop, rng)


def tokenizer():
    """One token per character, but a single one for `\\boxed{`. The chat template is the question and a newline."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()  # without it, decoding puts a space between tokens
    bos = ("<bos>", ID["<bos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    special_tokens = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
    wrapped.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return wrapped


def model(hidden: int, heads: int, seed: int, layers: int = 3):
    """A randomly initialised Qwen3 with tied embeddings and two key-value heads of size 32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCAB), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=ID["<pad>"], bos_token_id=ID["<bos>"], eos_token_id=ID["<eos>"],
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def train(folder, hidden, heads, layers, steps, lr, drop, seed, row=0):
    """Pre-trains one model on one thread and saves it in `folder`. row: the line of its progress bar."""
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    torch.set_num_threads(1)
    lm = model(hidden, heads, seed, layers)
    optimizer = torch.optim.AdamW(lm.parameters(), lr, (0.9, 0.98), weight_decay=0.01)
    parent = multiprocessing.parent_process()
    name = f"pre-training the toy {Path(folder).name}"
    bar = tqdm(batches(steps, drop, seed), name, steps, unit="step", position=row, mininterval=1)
    for step, (ids, prompt_length) in enumerate(bar):
        if parent and not parent.is_alive():
            return  # the caller was killed, and nobody would move the model to its place
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
    tokenizer().save_pretrained(folder)


def models(root="out/toy", recipe=RECIPE) -> tuple[str, str]:
    """Folders of (teacher, student). The first call trains both side by side; calls in other processes wait for it.

    Whoever holds a lock writes a model into a temporary folder, which is renamed when the model is complete. The system
    releases the lock when its holder dies. So a call killed at any moment leaves nothing that the next one would trust.
    """
    key = hashlib.sha256(json.dumps([VERSION, recipe, VOCAB]).encode()).hexdigest()[:8]
    root = Path(root) / key
    folders = {role: root / role for role in ("teacher", "student")}
    if not all(folder.exists() for folder in folders.values()):
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".lock", "w") as lock:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have trained them while this one waited for the lock.
            train_missing(root, {role: recipe[role] for role, folder in folders.items() if not folder.exists()})
    return str(folders["teacher"]), str(folders["student"])


def train_missing(root: Path, recipe: dict):
    """Trains each role of the recipe in its own process. The caller must hold the lock of `root`."""
    for leftover in root.glob("tmp-*"):  # from a call that was killed
        shutil.rmtree(leftover)
    work = Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    processes = {}
    for row, (role, options) in enumerate(recipe.items()):
        processes[role] = context.Process(target=train, args=(work / role,), kwargs=options | {"row": row}, daemon=True)
        processes[role].start()
    for process in processes.values():
        process.join()
    for role, process in processes.items():
        if process.exitcode:
            raise RuntimeError(f"training the toy {role} failed with exit code {process.exitcode}; see above")
        (work / role).rename(root / role)
    work.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", nargs="?", type=int, default=SEED, help=f"of the pair (default: {SEED})")
    teacher, student = models(recipe=recipe_of(parser.parse_args().seed))
    question, answer = problems(1, HELD_OUT)[0]
    print(f"teacher: {teacher}\nstudent: {student}\na problem: {question}  answer: {answer}")
