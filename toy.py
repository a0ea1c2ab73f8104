"""The embedded default: sums of six two-digit numbers, worked line by line, and two tiny Qwen3 models.

    a30+b75+c69+d16+e47+f77=?          prompt
    b75+30:05,10=05                    label, operand + running total : ones, tens with the carry = new total
    ...                                one line for each operand after the first, all modulo 100
    \\boxed{14}

The teacher has learnt it from right sums. The student is smaller and has learnt a bad habit: in its training
data most carries are dropped. It still gives the right token some weight there, and that is what a teacher can
bring out: an easy case for distillation, on purpose. Both are trained on first use and kept in out/toy/.

    python toy.py                      trains the pair if need be, and says where it is
"""

import fcntl
import hashlib
import json
import math
import multiprocessing
import shutil
import tempfile
from pathlib import Path

import numpy as np

LABELS = "abcdefghijklmnopqrst"
VOCAB = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", *"+:,=?\n", "\\boxed{", "}", *LABELS]
ID = {token: i for i, token in enumerate(VOCAB)}
OPERANDS = 6
HELD_OUT = 2**64 - 1  # the seed of held-out problems: no run's seed is likely to be it

VERSION = 1  # part of the cache's key: raise it when traces(), batches(), model() or train() change
RECIPE = {
    "teacher": dict(hidden=128, heads=4, layers=2, steps=800, lr=3e-3, drop=0.0, seed=7),
    "student": dict(hidden=64, heads=2, layers=3, steps=500, lr=4e-3, drop=0.7, seed=7),
}


def problems(n: int, seed: int, operands: int = OPERANDS) -> list[tuple[str, str]]:
    """n (question, answer) pairs, the same for the same seed; a longer list begins with the shorter one."""
    pairs, labels = [], LABELS[:operands]
    for row in np.random.default_rng([seed, operands]).integers(0, 100, (n, operands)).tolist():
        question = "+".join(f"{label}{x:02d}" for label, x in zip(labels, row, strict=True)) + "=?"
        pairs.append((question, f"{sum(row) % 100:02d}"))
    return pairs


def traces(numbers: np.ndarray, drop: float = 0.0, rng=None) -> tuple[np.ndarray, int]:
    """Token ids [B, L] of <bos>, prompt, worked answer and <eos>, and the prompt's length.

    numbers [B, n] in 0..99. drop: each carry is forgotten with this probability, and the error is carried on.
    """

    def digits(x):  # [B] -> [B, 2]
        return np.stack([x // 10, x % 10], 1) + ID["0"]

    B, n = numbers.shape
    columns = [ID["<bos>"]]  # a token id is a column of B equal ones
    for i in range(n):
        columns += [ID["+"]] * (i > 0) + [ID[LABELS[i]], digits(numbers[:, i])]
    columns += [ID["="], ID["?"], ID["\n"]]
    prompt, total = len(columns) + n, numbers[:, 0]  # an operand is one entry and two tokens
    for i in range(1, n):
        ones = numbers[:, i] % 10 + total % 10
        carry = ones // 10
        if drop:
            carry = carry * (rng.random(B) >= drop)
        tens = numbers[:, i] // 10 + total // 10 + carry
        columns += [ID[LABELS[i]], digits(numbers[:, i]), ID["+"], digits(total), ID[":"]]
        total = tens % 10 * 10 + ones % 10
        columns += [digits(ones), ID[","], digits(tens), ID["="], digits(total), ID["\n"]]
    columns += [ID["\\boxed{"], digits(total), ID["}"], ID["<eos>"]]
    columns = [np.full((B, 1), c) if isinstance(c, int) else c for c in columns]
    return np.concatenate(columns, 1), prompt


def batches(steps: int, drop: float, seed: int):
    """Yields (ids, prompt length), about 1,800 tokens a step, from a stream that no seed of problems() gives.

    Curriculum: 2 to 4 operands for 40 % of the steps, then 6 mixed with 2 to 6. At full length throughout,
    models of this size end the same steps at a mean accuracy of .08, not .68 (8 operands, one seed each).
    """
    rng = np.random.default_rng([seed, 10**6])
    for step in range(steps):
        early = step < 0.4 * steps
        n = rng.integers(2, 5) if early else rng.choice([OPERANDS, rng.integers(2, OPERANDS + 1)])
        yield traces(rng.integers(0, 100, (1792 // (20 * n - 8), n)), drop, rng)


def tokenizer():
    """One token a character, `\\boxed{` one token; its chat template is the question and a newline."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()  # without it, decoding puts a space between tokens
    bos = ("<bos>", ID["<bos>"])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    out = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    out.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return out


def model(hidden: int, heads: int, seed: int, layers: int = 3):
    """A random Qwen3 with tied embeddings and two key-value heads of size 32."""
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
    """Pre-trains one model on one thread and writes it to `folder`; row: its progress bar's line."""
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    torch.set_num_threads(1)
    lm, parent = model(hidden, heads, seed, layers), multiprocessing.parent_process()
    optimizer = torch.optim.AdamW(lm.parameters(), lr, (0.9, 0.98), weight_decay=0.01)
    name = f"pre-training the toy {Path(folder).name}"
    bar = tqdm(batches(steps, drop, seed), name, steps, unit="step", position=row, mininterval=1)
    for step, (ids, prompt) in enumerate(bar):
        if parent and not parent.is_alive():
            return  # killed outright: nobody is left to collect the model
        ids, cosine = torch.from_numpy(ids), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * cosine)
        # rows of one length need no mask, and only the answer's positions go through the head
        states = lm.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, prompt - 1 :]
        loss = cross_entropy(lm.lm_head(states).flatten(0, 1), ids[:, prompt:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    lm.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def models(root="out/toy", recipe=RECIPE) -> tuple[str, str]:
    """Folders of (teacher, student). The first call trains both side by side; other processes wait for it.

    A model is written beside its place and moved there whole, by the holder of a lock that the system
    releases when its process dies. So a call killed at any moment leaves nothing that the next one trusts.
    """
    root = Path(root) / hashlib.sha256(json.dumps([VERSION, recipe, VOCAB]).encode()).hexdigest()[:8]
    pair = {role: root / role for role in ("teacher", "student")}
    if not all(place.exists() for place in pair.values()):
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            train_missing(root, {role: recipe[role] for role, place in pair.items() if not place.exists()})
    return str(pair["teacher"]), str(pair["student"])


def train_missing(root: Path, recipe: dict):
    """Each role of the recipe in a process of its own; the caller holds root's lock."""
    for left in root.glob("tmp-*"):  # by a killed call
        shutil.rmtree(left)
    work, jobs = Path(tempfile.mkdtemp(prefix="tmp-", dir=root)), {}
    spawn = multiprocessing.get_context("spawn").Process  # a fork would inherit torch's threads
    for row, (role, options) in enumerate(recipe.items()):
        jobs[role] = spawn(target=train, args=(work / role,), kwargs=options | {"row": row}, daemon=True)
        jobs[role].start()
    for job in jobs.values():
        job.join()
    for role, job in jobs.items():
        if job.exitcode:
            raise RuntimeError(f"training the toy {role} failed, exit code {job.exitcode}")
        (work / role).rename(root / role)
    work.rmdir()


if __name__ == "__main__":
    teacher, student = models()
    (question, answer), *_ = problems(1, HELD_OUT)
    print(f"teacher: {teacher}\nstudent: {student}\na problem: {question}  answer: {answer}")
