"""Problems, their prompts, and micro-batches of rollouts.

problems = load("math500")                         # [Problem(id, prompt, answer), ...]: hub, file, or toy
ids = encode(problems[0], tokenizer, "auto")       # prompt token ids; the template is applied here, and only here
minibatches = make_minibatches(rollouts, ...)      # [minibatch][micro-batch] of MicroBatch, for this rank
"""

import csv
import datetime
import functools
import gzip
import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import seed_for
from gating import segment_lengths

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
ANSWER_COLUMNS = ("answer", "expected_answer", "ground_truth")  # or reward_model.ground_truth, as in DAPO
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # also .jsonl.gz, .json.gz and .csv.gz

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
# What surrounds the question in DAPO-Math-17k's messages. load() takes it off, so that training and evaluation, whose
# benchmarks are bare questions, ask in the same way.
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
# --template: how a bare question is asked. docs/recipe.md says what is known about them.
CHAT_TEMPLATES = {  # a user's message in the tokenizer's chat template
    "chat": "{question}\n" + INSTRUCTION,
    "think": "{question}\nReason step by step within <think> </think> tags, then put your final answer within \\boxed{}.",
    "dapo": DAPO_BEFORE + "{question}" + DAPO_AFTER,
}
TEXT_TEMPLATES = {
    "plain": "Question: {question}\n" + INSTRUCTION + "\nAnswer:",
    "solution": "{question}\n\nSolution:",
    "raw": "{question}",
}
DATE = datetime.date(2025, 1, 1)  # today to chat templates that name the date: a run must not change at midnight
MAX_PROBLEMS = 100_000  # of a training set; all of them are tokenized before the first step

# -----------------------------------------------------------------------------
# problems


@dataclass
class Problem:
    id: str
    prompt: str | list[dict]  # the question, or chat messages
    answer: str


def load(name: str, *, seed: int | None = None, limit: int = 0) -> list[Problem]:
    """Problems of a benchmark's name, a hub dataset, a file (SUFFIXES), or "toy".

    seed: for training: shuffle with it; answers may be missing. None: for evaluation: keep the order, and insist on an
    answer and an id of its own for every problem; for the toy, the held-out problems. A problem without an id gets its
    row's number. Repeated prompts are dropped. limit: at most this many; 0 for all. ValueError if a dataset is empty or
    unreadable, has no columns that we know, or has a row that is not a problem.
    """
    if name == "toy":
        return toy_problems(seed, limit)
    is_training = seed is not None
    rows, columns = read_rows(name)
    by_lower_name = {column.lower(): column for column in columns}
    prompt_column = next((by_lower_name[c] for c in PROMPT_COLUMNS if c in by_lower_name), None)
    answer_column = next((by_lower_name[c] for c in ANSWER_COLUMNS if c in by_lower_name), "reward_model")
    if prompt_column is None or (answer_column not in columns and not is_training):
        known = f"{', '.join(PROMPT_COLUMNS)} and {', '.join(ANSWER_COLUMNS)}"
        raise ValueError(f"{name} has the columns {list(columns)}; a prompt and an answer are called {known}")

    problems, seen_prompts, row_of_id = [], set(), {}
    for number, row in enumerate(rows, 1):
        prompt = row.get(prompt_column)
        if not (is_text(prompt) or is_chat(prompt)):
            raise ValueError(f"{name}, row {number}: {prompt_column} {prompt!r} is neither text nor chat messages")
        prompt = bare_question(prompt)
        answer = row.get(answer_column) if answer_column in columns else ""
        if isinstance(answer, dict):
            answer = answer.get("ground_truth")
        if answer is None or isinstance(answer, (dict, list)):
            raise ValueError(f"{name}, row {number}: {answer_column} {answer!r} is not an answer")
        answer = str(answer).split("####")[-1].strip()  # GSM8K's answers are: reasoning #### answer
        if not answer and not is_training:
            raise ValueError(f"{name}, row {number}: {answer_column} is empty; evaluation needs an answer")
        if str(prompt) in seen_prompts:
            continue
        seen_prompts.add(str(prompt))
        id = row.get(by_lower_name.get("id"))
        id = f"{Path(name).stem}-{number - 1}" if id is None or str(id).strip() == "" else str(id)
        if id in row_of_id:
            if not is_training:
                other = row_of_id[id]
                raise ValueError(f"{name}, rows {other} and {number}, have the id {id!r}; every problem needs its own")
            id = f"{id}-{number - 1}"
        row_of_id[id] = number
        problems.append(Problem(id, prompt, answer))
    if not problems:
        raise ValueError(f"{name} is empty")
    if is_training:
        order = np.random.default_rng(seed).permutation(len(problems)).tolist()
        problems = [problems[i] for i in order[:MAX_PROBLEMS]]
    return problems[:limit] if limit else problems


def toy_problems(seed, limit):
    import toy

    n_problems = limit or (256 if seed is None else 4096)
    pairs = toy.problems(n_problems, toy.HELD_OUT if seed is None else seed)
    return [Problem(f"toy-{i}", [{"role": "user", "content": q}], a) for i, (q, a) in enumerate(pairs)]


def read_rows(name):
    """(rows, names of their columns) of a file or a hub dataset."""
    import datasets

    path = Path(name)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        repository, configuration, split = HUB.get(name, (name, None, "train"))
        rows = datasets.load_dataset(repository, configuration, split=split)
        return rows, rows.column_names
    if not path.is_file():
        raise ValueError(f"no such file: {name}")
    if path.stat().st_size == 0:
        raise ValueError(f"{name} is empty")
    if suffix == ".parquet":
        try:
            rows = datasets.Dataset.from_parquet(name)
        except OSError as error:
            raise ValueError(
                f"{name}: {error}. If that is its cache, set HF_HOME to a folder that can be written to"
            ) from error
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{name} is not a readable parquet file: {error.__cause__ or error}") from error
        return rows, rows.column_names
    try:
        rows = read_text_rows(path, suffix)
    except (ValueError, RecursionError, csv.Error, OSError, EOFError) as error:
        raise ValueError(f"{name} is not a readable {suffix[1:]} file: {error}") from error
    return rows, list(dict.fromkeys(column for row in rows for column in row))


def read_text_rows(path: Path, suffix: str) -> list[dict]:
    """Rows of a .jsonl, .json or .csv file, gzipped or not. (pyarrow's reader crashes on some malformed files.)"""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:  # with or without a byte order mark
        if suffix == ".csv":
            return list(csv.DictReader(file))
        text = file.read()
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"a row is {str(row)[:80]!r}; it must be an object")
    return rows


def bare_question(prompt):
    """The question without DAPO's instruction; any other prompt as it is."""
    text = prompt[0]["content"] if is_chat(prompt) and len(prompt) == 1 else ""
    if text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER):
        return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
    return prompt


def is_text(prompt):
    return isinstance(prompt, str) and bool(prompt.strip())


def is_chat(prompt):
    """Whether it is a list of messages with a role and a text as content."""
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) for m in prompt)
    )


# -----------------------------------------------------------------------------
# prompts


def encode(problem: Problem, tokenizer, template: str = "auto", template_args: str = "{}") -> list[int]:
    """Prompt token ids. template: auto, a name in CHAT_TEMPLATES or TEXT_TEMPLATES, or a text with {question}.

    auto is chat if the tokenizer has a chat template, else plain. A prompt of messages passes through the chat template
    as it is, whose last message is continued if it is an assistant's; templates that are texts take the text of all
    messages. template_args: JSON for the chat template's own switches. ValueError if the chat template refuses the
    messages, or there is none.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "plain"
    is_bare = isinstance(problem.prompt, str)
    if template in CHAT_TEMPLATES:
        messages = problem.prompt
        if is_bare:
            messages = [{"role": "user", "content": CHAT_TEMPLATES[template].replace("{question}", problem.prompt)}]
        return apply_chat_template(problem.id, messages, tokenizer, json.loads(template_args))
    question = problem.prompt if is_bare else "\n\n".join(message["content"] for message in problem.prompt)
    pattern = TEXT_TEMPLATES.get(template) or template.replace("\\n", "\n")
    text = pattern.replace("{question}", question)
    ids = tokenizer(text)["input_ids"]
    if ids[-1:] == [getattr(tokenizer, "eos_token_id", None)] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text with EOS, as for training; nothing would be left to answer
    has_two_bos = len(ids) > 1 and ids[0] == ids[1] == getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if has_two_bos else ids  # the template's text began with BOS, and the tokenizer added another


def apply_chat_template(id, messages, tokenizer, template_args):
    import jinja2

    is_prefilled = messages[-1]["role"] == "assistant"
    template_args = {"strftime_now": DATE.strftime} | template_args
    options = {"add_generation_prompt": not is_prefilled, "continue_final_message": is_prefilled, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(messages, **options, **template_args)
    except (jinja2.exceptions.TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses problem {id} with messages of the roles {roles}: {error}. "
            f"--template plain does without a chat template"
        ) from error


def encode_all(problems, tokenizer, cfg, vocab) -> list[tuple[Problem, list[int]]]:
    """[(problem, prompt ids)]. ValueError if a prompt has an id from vocab on: the model has no embedding for it."""
    prompts = []
    for problem in problems:
        ids = encode(problem, tokenizer, cfg.template, cfg.template_args)
        if max(ids, default=0) >= vocab:
            raise ValueError(
                f"problem {problem.id} has the token {tokenizer.decode([max(ids)])!r} with id {max(ids)}, but the model knows "
                f"{vocab} ids: resize its embeddings (resize_token_embeddings), or use another --template"
            )
        prompts.append((problem, ids))
    return prompts


class TrainingPrompts:
    """The prompts of every step, a function of the seed and the step alone: a resumed run needs no other state.

    prompts: [(problem, prompt ids)]; those over max_prompt tokens are left out.
    """

    def __init__(self, prompts, max_prompt: int, seed: int):
        self.prompts = [(problem, ids) for problem, ids in prompts if 0 < len(ids) <= max_prompt]
        self.n_dropped = len(prompts) - len(self.prompts)
        if not self.prompts:
            raise ValueError(f"all {len(prompts)} training prompts are longer than --max_prompt {max_prompt} tokens")
        self.problem_ids = {tuple(ids): problem.id for problem, ids in self.prompts}
        self.digest = digest([[problem.id, ids] for problem, ids in self.prompts])
        self.seed = seed

    def of_step(self, step: int, n: int) -> list[tuple[Problem, list[int]]]:
        """n prompts: the next ones of an endless list that shuffles the problems anew for every pass over them."""
        prompts = []
        for position in range(step * n, (step + 1) * n):
            n_pass, i = divmod(position, len(self.prompts))
            prompts.append(self.prompts[shuffled(len(self.prompts), f"{self.seed} {n_pass}")[i]])
        return prompts

    def jobs_of_step(self, step: int, n: int, group: int) -> list[tuple[list[int], int]]:
        """[(prompt ids, seed)], `group` responses to each of the step's prompts. Every response has a seed of its own."""
        jobs, n_samples = [], Counter()  # a small dataset can have a problem twice in a step
        for problem, ids in self.of_step(step, n):
            for _ in range(group):
                jobs.append((ids, seed_for(self.seed, step, problem.id, n_samples[problem.id])))
                n_samples[problem.id] += 1
        return jobs


@functools.lru_cache(maxsize=2)
def shuffled(n: int, seed: str) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def digest(parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_problems(cfg, tokenizer, vocab):
    """(TrainingPrompts, {name: [(held-out problem, prompt ids)]}). ValueError if a held-out prompt is over --max_prompt."""
    prompts = encode_all(load(cfg.data, seed=cfg.seed), tokenizer, cfg, vocab)
    train = TrainingPrompts(prompts, cfg.max_prompt, cfg.seed)
    eval_data = cfg.eval_data
    if eval_data == "auto":
        eval_data = "toy" if cfg.data == "toy" else ""
    held_out = {}
    for name in eval_data.split(",") if cfg.eval_every and eval_data else []:
        held_out[name] = encode_all(load(name, limit=cfg.eval_problems), tokenizer, cfg, vocab)
        for problem, ids in held_out[name]:
            if len(ids) > cfg.max_prompt:
                raise ValueError(
                    f"held-out problem {problem.id} has {len(ids)} tokens, more than --max_prompt {cfg.max_prompt}"
                )
    return train, held_out


def shared_vocab(student, teacher) -> int:
    """V such that ids below it mean the same to both tokenizers; ValueError if a token's ids differ.

    Compares the maps, not the sizes: models of one family pad their embeddings differently.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    shared = min(max(ours.values()), max(theirs.values())) + 1
    differ = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    differ += [token for token in ours.keys() - theirs.keys() if ours[token] < shared]
    differ += [token for token in theirs.keys() - ours.keys() if theirs[token] < shared]
    if differ:
        example = differ[0]
        raise ValueError(
            f"teacher and student have different tokenizers: {len(differ)} tokens differ, for example "
            f"{example!r} is id {ours.get(example)} for the student and {theirs.get(example)} for the teacher"
        )
    return shared


@dataclass
class Vocabulary:
    """What the student's and the teacher's tokens have in common."""

    size: int  # ids below it mean the same to both; further rows of the embeddings are padding
    newline_ids: set[int]  # whose text contains a newline: in BPE many besides "\\n", such as ".\\n\\n"
    stop_ids: list[int]  # that end an answer of either
    merged: list[int]  # the stop ids, if there are several and they count as one outcome (--merge_stops); else empty


def newline_token_ids(tokenizer, vocab: int) -> set[int]:
    texts = tokenizer.batch_decode([[i] for i in range(vocab)])
    return {i for i, text in enumerate(texts) if "\n" in text}


# -----------------------------------------------------------------------------
# batches


@dataclass
class MicroBatch:
    """One micro-batch of B rollouts, padded on the right to L tokens; N response tokens, one response after the other.

    Made by `collate`; train.py adds the last two fields before the first update on the rollouts.
    """

    ids: Tensor  # [B, L] prompt and response. Right padding, so that causal attention needs no mask
    rows: Tensor  # [N] and cols: hidden[rows, cols] is the hidden state that predicts a response token,
    cols: Tensor  # [N] one position before the token itself
    tokens: Tensor  # [N] the response tokens, ids[rows, cols + 1]; merged stop tokens all have the id of the first
    segments: Tensor  # [N] index of the gate's segment that each of them is in (gating.py)
    position: Tensor  # [N] where in its response each of them is, in (0, 1); for the pictures
    logp_sampler: Tensor  # [N] the sampler's log-probs at temperature 1; only compared with the trainer's
    rollouts: list  # the B rollouts, on the host; none if the batch only fills up
    teacher: dict = field(default_factory=dict)  # the teacher's targets (teacher.py), on the host, computed once
    logp_old: Tensor | None = None  # [N] the student's log-probs before the first update on these rollouts


def collate(rollouts, cfg, vocabulary: Vocabulary, device, empty=False) -> MicroBatch:
    """A MicroBatch of rollouts. empty: none of their tokens counts (N = 0)."""
    sequences = [torch.tensor(r.prompt + r.response) for r in rollouts]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # [B, L]
    rows, cols, position, segments = [], [], [], []
    n_segments = 0
    counted = [] if empty else rollouts
    for row, r in enumerate(counted):
        n_tokens, start = len(r.response), len(r.prompt)
        rows.append(torch.full((n_tokens,), row))
        cols.append(torch.arange(start - 1, start - 1 + n_tokens))
        position.append((torch.arange(n_tokens) + 0.5) / n_tokens)
        is_newline = [token in vocabulary.newline_ids for token in r.response]
        sizes = {"block": cfg.block, "span_min": cfg.span_min, "span_max": cfg.span_max}
        lengths = torch.tensor(segment_lengths(n_tokens, cfg.gate, is_newline, **sizes))
        segments.append(n_segments + torch.arange(len(lengths)).repeat_interleave(lengths))
        n_segments += len(lengths)
    none = [torch.zeros(0, dtype=torch.long)]
    rows, cols, segments = (torch.cat(none + x) for x in (rows, cols, segments))
    tokens = ids[rows, cols + 1]
    for id in vocabulary.merged[1:]:
        tokens[tokens == id] = vocabulary.merged[0]
    return MicroBatch(
        ids=ids.to(device),
        rows=rows.to(device),
        cols=cols.to(device),
        tokens=tokens.to(device),
        segments=segments.to(device),
        position=torch.cat([torch.zeros(0), *position]).to(device),
        logp_sampler=torch.tensor([x for r in counted for x in r.logprobs], dtype=torch.float32).to(device),
        rollouts=counted,
    )


def pack(rollouts, budget):
    """Micro-batches, longest rollouts first, of at most `budget` tokens with padding, or of one rollout."""
    groups, width = [], 0
    for r in sorted(rollouts, key=lambda r: -len(r.prompt) - len(r.response)):
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = len(r.prompt) + len(r.response)
        groups[-1].append(r)
    return groups


def make_minibatches(rollouts, cfg, step, vocabulary, device, rank=0, world=1) -> list[list[MicroBatch]]:
    """This rank's micro-batches of each minibatch: cfg.minibatches random parts of the rollouts that have tokens.

    Every rank computes the same split. A minibatch's rollouts are dealt to the ranks so that their numbers of response
    tokens are close. A rank with fewer micro-batches than another gets batches without tokens, since FSDP's forward and
    backward passes are collectives that every rank must join.
    """
    rollouts = [r for r in rollouts if r.response]
    random.Random(f"{cfg.seed} {step}").shuffle(rollouts)
    minibatches = []
    for m in range(min(cfg.minibatches, len(rollouts))):
        shares = [[] for _ in range(world)]
        for r in sorted(rollouts[m :: cfg.minibatches], key=lambda r: -len(r.response)):
            smallest = min(shares, key=lambda share: sum(len(x.response) for x in share))
            smallest.append(r)
        packed = [pack(share, cfg.micro_tokens) for share in shares]
        batches = [collate(group, cfg, vocabulary, device) for group in packed[rank]]
        shortest = min(rollouts, key=lambda r: len(r.prompt) + len(r.response))
        while len(batches) < max(map(len, packed)):
            batches.append(collate([shortest], cfg, vocabulary, device, empty=True))
        minibatches.append(batches)
    return minibatches
