"""Problems, their prompts, and batches of rollouts.

problems = load("math500")                     # [Problem(id, prompt, answer), ...]: hub, file, or toy
ids = encode(problems[0], tokenizer, "auto")   # prompt token ids; the template is applied here, once
minibatches = make_batches(rollouts, ...)      # [minibatch][micro-batch] of Batch, for this rank
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# name: (hub repository, configuration, split)
HUB = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("MathArena/aime_2025", None, "train"),
    "amc23": ("math-ai/amc23", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "gsm8k-train": ("openai/gsm8k", "main", "train"),
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"),
}
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "expected_answer", "ground_truth")  # else reward_model.ground_truth (DAPO)

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN = "Question: {question}\n" + INSTRUCTION + "\nAnswer:"
MOST = 100_000  # rows taken of a larger dataset: DAPO's file repeats each problem about 100 times


@dataclass
class Problem:
    id: str
    prompt: str | list[dict]  # the question, or chat messages
    answer: str


def load(name: str, *, seed: int | None = None, limit: int = 0) -> list[Problem]:
    """Problems of a benchmark's name, a hub dataset, a .jsonl or .parquet file, or "toy".

    seed: shuffle (None: the dataset's own order; for toy, the held-out problems). Repeated prompts are
    dropped. limit: at most this many, 0 for all. ValueError where a dataset is empty or has no known columns.
    """
    if name == "toy":
        import toy

        stream = toy.HELD_OUT if seed is None else seed
        pairs = toy.problems(limit or (256 if seed is None else 4096), stream)
        return [Problem(f"toy-{i}", [{"role": "user", "content": q}], a) for i, (q, a) in enumerate(pairs)]
    import datasets

    suffix = Path(name).suffix
    if suffix in (".jsonl", ".json", ".parquet"):
        if not Path(name).is_file():
            raise ValueError(f"no such file: {name}")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"{name} is empty")
        kind = "parquet" if suffix == ".parquet" else "json"
        try:
            rows = datasets.Dataset.from_parquet(name) if kind == "parquet" else read_json(name)
        except (datasets.exceptions.DatasetGenerationError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not a readable {kind} file: {error.__cause__ or error}") from error
    else:
        path, config, split = HUB.get(name, (name, None, "train"))
        rows = datasets.load_dataset(path, config, split=split)
    order = range(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows)).tolist()
    if len(rows) == 0:
        raise ValueError(f"{name} is empty")
    names = dict.fromkeys(c for row in rows for c in row) if isinstance(rows, list) else rows.column_names
    columns = {c.lower(): c for c in names}
    prompt = next((columns[c] for c in PROMPT_COLUMNS if c in columns), None)
    answer = next((columns[c] for c in ANSWER_COLUMNS if c in columns), "reward_model")
    if prompt is None or (answer not in names and seed is None):  # training needs no answers
        known = f"{', '.join(PROMPT_COLUMNS)} and {', '.join(ANSWER_COLUMNS)}"
        raise ValueError(f"{name} has columns {list(names)}; a prompt and an answer are called {known}")
    stem, problems, seen = Path(name).stem, [], set()
    for i in order[:MOST]:
        row = rows[i]
        text, gold = row.get(prompt), row.get(answer) if answer in names else ""
        gold = gold.get("ground_truth") if isinstance(gold, dict) else gold
        chat = (
            isinstance(text, list)
            and text
            and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in text)
        )
        if not (isinstance(text, str) and text.strip() or chat and all(isinstance(m["content"], str) for m in text)):
            raise ValueError(f"{name}, row {i + 1}: {prompt} {text!r} is neither a text nor a list of chat messages")
        if gold is None or isinstance(gold, (dict, list)):
            raise ValueError(f"{name}, row {i + 1}: {answer} {gold!r} is not an answer")
        key = str(text)
        if key not in seen:
            seen.add(key)
            id = str(row.get(columns.get("id"), f"{stem}-{i}"))
            problems.append(Problem(id, text, str(gold).split("####")[-1].strip()))  # GSM8K: reasoning #### answer
    return problems[:limit] if limit else problems


def read_json(path) -> list[dict]:
    """Rows of a .jsonl file, or a .json file with a list. pyarrow's reader segfaults on some malformed files."""
    text = Path(path).read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    if odd := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{str(odd[0])[:80]!r} is a row, and no object")
    return rows


def encode(problem: Problem, tokenizer, template: str = "auto") -> list[int]:
    """Prompt token ids. template: auto | chat | plain | raw | a text with {question}.

    auto is the tokenizer's chat template where it has one, else plain. Chat messages are passed as they are;
    a bare question gets the instruction to reason and to box the answer. raw adds nothing but BOS.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "plain"
    text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    if template == "chat":
        messages = problem.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": f"{text}\n{INSTRUCTION}"}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if template != "raw":
        pattern = PLAIN if template == "plain" else template.replace("\\n", "\n")
        text = pattern.replace("{question}", text)
    return tokenizer(text)["input_ids"]


class PromptStream:
    """Endless prompts in an order fixed by the seed; `state` is all that a checkpoint must keep."""

    def __init__(self, problems: list[Problem], tokenizer, template: str, max_prompt: int, seed: int):
        self.problems, self.tokenizer, self.template = problems, tokenizer, template
        self.max_prompt, self.seed = max_prompt, seed
        self.position, self.dropped, self.shuffled = 0, 0, None

    @property
    def state(self) -> dict:
        return {"position": self.position, "dropped": self.dropped}

    def restore(self, state: dict):
        self.position, self.dropped = state["position"], state["dropped"]

    def peek(self) -> list[int]:
        """The next prompt, without taking it."""
        state = self.state
        _, ids = self.next()
        self.restore(state)
        return ids

    def next(self) -> tuple[Problem, list[int]]:
        for _ in range(len(self.problems)):
            passes, i = divmod(self.position, len(self.problems))
            if self.shuffled != passes:
                self.order = list(range(len(self.problems)))
                random.Random(f"{self.seed} {passes}").shuffle(self.order)
                self.shuffled = passes
            self.position += 1
            problem = self.problems[self.order[i]]
            ids = encode(problem, self.tokenizer, self.template)
            if 0 < len(ids) <= self.max_prompt:
                return problem, ids
            self.dropped += 1
        raise ValueError(
            f"every one of {len(self.problems)} prompts is longer than --max_prompt {self.max_prompt} tokens"
        )


def shared_vocab(student, teacher) -> int:
    """V such that ids below it mean the same to both tokenizers; ValueError where a token's ids differ.

    Compares the maps, not the sizes: models of one family pad their embeddings differently.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differ = [t for t in ours.keys() & theirs.keys() if ours[t] != theirs[t]]
    shared = min(max(ours.values()), max(theirs.values())) + 1
    lone = [t for a, b in ((ours, theirs), (theirs, ours)) for t in a.keys() - b.keys() if a[t] < shared]
    if differ or lone:
        example = (differ + lone)[0]
        raise ValueError(
            f"teacher and student have different tokenizers: {len(differ) + len(lone)} tokens differ, for example "
            f"{example!r} is id {ours.get(example)} for the student and {theirs.get(example)} for the teacher"
        )
    return shared


def newline_tokens(tokenizer, vocab: int) -> Tensor:
    """[vocab] True for ids whose decoded text contains a newline: in BPE many besides "\\n", such as ".\\n\\n"."""
    texts = tokenizer.batch_decode([[i] for i in range(vocab)])
    return torch.tensor(["\n" in text for text in texts])


@dataclass
class Batch:
    """One micro-batch: B rollouts, right-padded, so that causal attention needs no mask. N response tokens."""

    ids: Tensor  # [B, L] prompt and response
    mask: Tensor  # [B, T] True at response tokens, left-aligned
    rows: Tensor  # [N] where the hidden state that predicts a response token stands in ids
    cols: Tensor  # [N]
    tokens: Tensor  # [N] the response tokens
    where: Tensor  # [N] position in the response, in (0, 1)
    newline: Tensor  # [B, T] True where a response token contains a newline
    sampler_logp: Tensor  # [N] the sampler's own log-probs: a diagnostic
    targets: dict = field(default_factory=dict)  # the teacher's, on the CPU
    old: Tensor | None = None  # [N] log-probs before the first update

    def spread(self, x):
        """[N] to [B, T], zeros at padding."""
        return x.new_zeros(self.mask.shape).masked_scatter(self.mask, x)

    def sequences(self, rows=None):
        """[(prompt and response, where the response starts), ...] of these rows; else of all with response tokens."""
        found = []
        for row in (self.rows if rows is None else rows).unique().tolist():
            start = int(self.cols[self.rows == row][0]) + 1
            found.append((self.ids[row, : start + int(self.mask[row].sum())].tolist(), start))
        return found

    def keep_old(self, logp):
        """The first log-probs [N] that the trainer computes on this batch are its old ones."""
        if self.old is None and logp is not None:
            self.old = logp.detach()


def collate(rollouts, newlines: Tensor, device, empty=False) -> Batch:
    """empty: no response token counts; a rank with fewer micro-batches takes part in the collectives with one."""
    seqs = [torch.tensor(r.prompt + r.response) for r in rollouts]
    ids = nn.utils.rnn.pad_sequence(seqs, batch_first=True)
    lengths = torch.tensor([0 if empty else len(r.response) for r in rollouts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rows, step = mask.nonzero(as_tuple=True)
    start = torch.tensor([len(r.prompt) for r in rollouts])
    cols = start[rows] + step - 1
    tokens = ids[rows, cols + 1]
    logp = torch.tensor([x for r in rollouts for x in r.logprobs][: len(rows)])
    newline = torch.zeros_like(mask).masked_scatter(mask, newlines[tokens])
    where = (step + 0.5) / lengths[rows]
    return Batch(*(x.to(device) for x in (ids, mask, rows, cols, tokens, where, newline, logp)))


def pack(rollouts, budget):
    """Micro-batches of at most `budget` tokens with padding (or one rollout), longest first."""
    groups, width = [], 0
    for r in sorted(rollouts, key=lambda r: -len(r.prompt) - len(r.response)):
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = len(r.prompt) + len(r.response)
        groups[-1].append(r)
    return groups


def make_batches(rollouts, cfg, step, rank, world, newlines, device):
    """This rank's [minibatch][micro-batch] of Batch. Every rank computes the same split of all rollouts."""
    rollouts = [r for r in rollouts if r.response]
    random.Random(f"{cfg.seed} {step}").shuffle(rollouts)
    minibatches = []
    for m in range(min(cfg.minibatches, len(rollouts))):
        shares = [[] for _ in range(world)]
        for r in sorted(rollouts[m :: cfg.minibatches], key=lambda r: -len(r.response)):
            min(shares, key=lambda s: sum(len(x.response) for x in s)).append(r)
        packed = [pack(share, cfg.micro_tokens) for share in shares]
        batches = [collate(group, newlines, device) for group in packed[rank]]
        short = max(map(len, packed)) - len(batches)
        shortest = min(rollouts, key=lambda r: len(r.prompt) + len(r.response))
        batches += [collate([shortest], newlines, device, empty=True) for _ in range(short)]
        minibatches.append(batches)
    return minibatches
