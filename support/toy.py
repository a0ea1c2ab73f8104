"""The built-in toy task: sums of six two-digit numbers, worked out line by line, and its teacher and student, two tiny Qwen3.

    a30+b75+c69+d16+e47+f77=?          prompt
    b75+30:05,10=05                    label, operand + total so far : sum of ones, sum of tens with carry = new total
    ...                                one line for each operand after the first; totals are modulo 100
    \\boxed{14}

The teacher was trained on correct sums. The student is smaller and was trained on sums in which 70 % of the carries are
dropped, so it has learned to drop them, too. It still gives the correct token some probability, which distillation can raise:
the task is easy on purpose. toy_models/made_by.json says how they were made; `python -m study.pretrain_toy SEED` makes others.
"""

from pathlib import Path

import numpy as np

LABELS = "abcdefghijklmnopqrst"
VOCAB = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", *"+:,=?\n", "\\boxed{", "}", *LABELS]
ID = {token: i for i, token in enumerate(VOCAB)}
OPERANDS = 6
HELD_OUT = 2**64 - 1  # the seed of the held-out problems; no run is likely to use it as its own

MODELS = Path(__file__).resolve().parent / "toy_models"
TEACHER, STUDENT = str(MODELS / "teacher"), str(MODELS / "student")


def problems(n: int, seed: int, operands: int = OPERANDS) -> list[tuple[str, str]]:
    """n (question, answer) pairs, the same for the same seed; a longer list begins with the shorter one."""
    rng = np.random.default_rng([seed, operands])
    labels = LABELS[:operands]
    pairs = []
    for numbers in rng.integers(0, 100, (n, operands)).tolist():
        terms = [f"{label}{number:02d}" for label, number in zip(labels, numbers, strict=True)]
        pairs.append(("+".join(terms) + "=?", f"{sum(numbers) % 100:02d}"))
    return pairs


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
