"""Problems, their prompts, and micro-batches of rollouts.

problems = load("math500")                         # [Problem(id, prompt, answer), ...]: hub, file, or toy
ids = encode(problems[0], tokenizer, "auto")       # prompt token ids; the template is applied here, and only here
minibatches = make_minibatches(rollouts, ...)      # [minibatch][micro-batch] of MicroBatch, for this rank
"""

import datetime
import functools
import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gating import segment_lengths
from support import toy
from support.common import seed_for
from support.errors import one_line
from support.vocabulary import Vocabulary

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
ANSWER_COLUMNS = ("answer", "expected_answer", "ground_truth", "reward_model")  # DAPO's is {"ground_truth": ...}
FILE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}  # also with .gz; names as in datasets

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
    """Problems of a benchmark's name, a hub dataset, a file (SUFFIXES), or "toy", without repeated prompts.

    seed: for training: shuffle with it; answers may be missing. None: for evaluation: keep the order, and insist on an
    answer and an id of its own for every problem. Without an id, a problem gets its row's number. limit: at most this
    many; 0 for all. ValueError if a dataset is empty or unreadable, or has a row that is not a problem.
    """
    is_training = seed is not None
    if name == "toy":
        pairs = toy.problems(limit or (4096 if is_training else 256), seed if is_training else toy.HELD_OUT)
        return [Problem(f"toy-{i}", [{"role": "user", "content": q}], a) for i, (q, a) in enumerate(pairs)]
    problems, seen_prompts, row_of_id = [], set(), {}
    for number, row in enumerate(read_rows(name), 1):
        row = {str(column).lower(): cell for column, cell in row.items()}
        prompt = bare_question(first_cell(row, PROMPT_COLUMNS))
        if prompt is None:
            known = ", ".join(PROMPT_COLUMNS)
            raise ValueError(f"{name}, row {number} has neither text nor chat in the columns {known}: {str(row)[:200]}")
        answer = final_answer(first_cell(row, ANSWER_COLUMNS))
        if not answer and not is_training:
            known = ", ".join(ANSWER_COLUMNS)
            raise ValueError(f"{name}, row {number}: answer is empty; evaluation needs an answer, in {known}")
        if str(prompt) in seen_prompts:
            continue
        seen_prompts.add(str(prompt))
        id = "" if row.get("id") is None else str(row["id"])
        if not id.strip():
            id = f"{Path(name).stem}-{number - 1}"
        if id in row_of_id:
            if not is_training:
                rows = f"{row_of_id[id]} and {number}"
                raise ValueError(f"{name}, rows {rows}, have the id {id!r}; every problem needs its own")
            id = f"{id}-{number - 1}"
        row_of_id[id] = number
        problems.append(Problem(id, prompt, answer))
    if not problems:
        raise ValueError(f"{name} is empty")
    if is_training:
        order = np.random.default_rng(seed).permutation(len(problems)).tolist()
        problems = [problems[i] for i in order[:MAX_PROBLEMS]]
    return problems[:limit] if limit else problems


def read_rows(name):
    """The rows of a hub dataset or a file, as dictionaries."""
    import datasets
    import pandas

    path = Path(name)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in FILE_FORMATS:
        repository, configuration, split = HUB.get(name, (name, None, "train"))
        try:
            return datasets.load_dataset(repository, configuration, split=split)
        except (OSError, ValueError) as error:  # no such dataset or split, or no network
            raise ValueError(
                f"{name} is no file ({', '.join(FILE_FORMATS)}), and the hub says: {one_line(error)}"
            ) from error
    if not path.is_file():
        raise ValueError(f"no such file: {name}")
    if path.suffix.lower() == ".jsonl":
        return read_jsonl_rows(path)
    try:
        if suffix == ".csv":  # datasets would make numbers of ids and answers: 1 of 01
            return pandas.read_csv(name, dtype=str, keep_default_na=False, encoding="utf-8-sig").to_dict("records")
        return datasets.load_dataset(FILE_FORMATS[suffix], data_files=name, split="train")
    except OSError as error:
        hint = "If that is the cache of datasets, set HF_HOME to a folder that can be written to"
        raise ValueError(f"{name}: {one_line(error)}. {hint}") from error
    except Exception as error:  # of many kinds, such as StopIteration for an empty file
        raise ValueError(f"{name} is not a readable {suffix[1:]} file: {one_line(error.__cause__ or error)}") from error


def read_jsonl_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, whose columns may be of several types, which datasets refuses."""
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a readable jsonl file: line {number}: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is {str(row)[:80]!r}; it must be an object")
        rows.append(row)
    return rows


def first_cell(row, columns):
    """The first cell that the row has in these columns; None if there is none."""
    cells = [row[column] for column in columns if row.get(column) is not None]
    return cells[0] if cells else None


def bare_question(prompt):
    """A text or a chat as it is, but DAPO's without its instruction; None if it is neither."""
    if isinstance(prompt, str):
        return prompt if prompt.strip() else None
    if not isinstance(prompt, list) or not prompt:
        return None
    for message in prompt:
        if not (isinstance(message, dict) and "role" in message and isinstance(message.get("content"), str)):
            return None
    text = prompt[0]["content"]
    if len(prompt) == 1 and text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER):
        return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
    return prompt


def final_answer(answer):
    """What GSM8K has after its reasoning, and DAPO in its reward_model; "" if it is no text or number."""
    if isinstance(answer, dict):
        answer = answer.get("ground_truth")
    if answer is None or isinstance(answer, (dict, list)):
        return ""
    return str(answer).split("####")[-1].strip()


# -----------------------------------------------------------------------------
# prompts


def encode(problem: Problem, tokenizer, template: str = "auto", template_args: str = "{}") -> list[int]:
    """Prompt token ids. template_args: JSON for the chat template's own switches.

    ValueError if the chat template refuses the messages, or there is none.
    """
    prompt = prompt_of(problem, tokenizer, template)
    if isinstance(prompt, list):
        return apply_chat_template(problem.id, prompt, tokenizer, json.loads(template_args))
    ids = tokenizer(prompt)["input_ids"]
    if ids[-1:] == [getattr(tokenizer, "eos_token_id", None)] and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text with EOS, as for training; nothing would be left to answer
    has_two_bos = len(ids) > 1 and ids[0] == ids[1] == getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if has_two_bos else ids  # the template's text began with BOS, and the tokenizer added another


def prompt_of(problem: Problem, tokenizer, template: str = "auto") -> str | list[dict]:
    """The text of a prompt, or its messages. template: auto, a name in CHAT_TEMPLATES or TEXT_TEMPLATES, or a text with {question}.

    auto is chat if the tokenizer has a chat template, else plain. A question of messages passes through the chat template as it
    is; templates that are texts take the text of all messages.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "plain"
    question = problem.prompt
    if template in CHAT_TEMPLATES:
        if isinstance(question, list):
            return question
        return [{"role": "user", "content": CHAT_TEMPLATES[template].replace("{question}", question)}]
    if isinstance(question, list):
        question = "\n\n".join(message["content"] for message in question)
    pattern = TEXT_TEMPLATES.get(template) or template.replace("\\n", "\n")
    return pattern.replace("{question}", question)


def apply_chat_template(id, messages, tokenizer, template_args):
    import jinja2

    continues = messages[-1]["role"] == "assistant"  # an answer that the model is to go on with
    options = {"add_generation_prompt": not continues, "continue_final_message": continues, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(messages, **options, **{"strftime_now": DATE.strftime} | template_args)
    except (jinja2.exceptions.TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        refused = f"the chat template refuses problem {id} with messages of the roles {roles}: {error}"
        raise ValueError(f"{refused}. --template plain does without a chat template") from error


def encode_all(problems, tokenizer, cfg, vocab) -> list[tuple[Problem, list[int]]]:
    """[(problem, prompt ids)]. ValueError if a prompt has an id from vocab on: the model has no embedding for it."""
    prompts = []
    for problem in problems:
        ids = encode(problem, tokenizer, cfg.template, cfg.template_args)
        if max(ids, default=0) >= vocab:
            token = f"{tokenizer.decode([max(ids)])!r} with id {max(ids)}, but the model knows {vocab} ids"
            remedy = "resize its embeddings (resize_token_embeddings), or use another --template"
            raise ValueError(f"problem {problem.id} has the token {token}: {remedy}")
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
    names = cfg.eval_data
    if names == "auto":
        names = "toy" if cfg.data == "toy" else ""
    held_out = {}
    if names and cfg.eval_every:
        for name in names.split(","):
            held_out[name] = encode_all(load(name, limit=cfg.eval_problems), tokenizer, cfg, vocab)
    for problem, ids in [prompt for prompts in held_out.values() for prompt in prompts]:
        if len(ids) > cfg.max_prompt:
            size = f"{len(ids)} tokens, more than --max_prompt {cfg.max_prompt}"
            raise ValueError(f"held-out problem {problem.id} has {size}")
    return train, held_out


# -----------------------------------------------------------------------------
# batches


@dataclass
class MicroBatch:
    """One micro-batch of B rollouts, padded on the right to L tokens; N response tokens, one response after the other.

    Made by `collate`; train.py sets the last two fields before the first update on the rollouts.
    """

    ids: Tensor  # [B, L] prompt and response. Right padding, so that causal attention needs no mask
    rows: Tensor  # [N] and cols: hidden[rows, cols] is the hidden state that predicts a response token,
    cols: Tensor  # [N] one position before the token itself
    tokens: Tensor  # [N] the response tokens, ids[rows, cols + 1]; merged stop tokens all have the id of the first
    segments: Tensor  # [N] index of the gate's segment that each of them is in (gating.py)
    position: Tensor  # [N] where in its response each of them is, in (0, 1); for the pictures
    logp_sampler: Tensor  # [N] the sampler's log-probs at temperature 1; only compared with the trainer's
    rollouts: list  # the B rollouts, on the host; none if the batch only fills up
    teacher: dict = field(default_factory=dict)  # the teacher's targets (train.py lists them), on the host
    logp_old: Tensor | None = None  # [N] the student's log-probs in its first pass over them, before any update on them


def collate(rollouts, cfg, vocabulary: Vocabulary, device, empty=False) -> MicroBatch:
    """A MicroBatch of rollouts. empty: none of their tokens counts (N = 0)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(r.prompt + r.response) for r in rollouts], batch_first=True)  # [B, L]
    counted = [] if empty else rollouts
    merged = {stop: vocabulary.merged[0] for stop in vocabulary.merged}
    sizes = {"block": cfg.block, "span_min": cfg.span_min, "span_max": cfg.span_max}
    rows, cols, tokens, segments, position, logprobs = [], [], [], [], [], []
    n_segments = 0
    for row, r in enumerate(counted):
        n_tokens, start = len(r.response), len(r.prompt)
        rows += [row] * n_tokens
        cols += range(start - 1, start - 1 + n_tokens)
        tokens += [merged.get(token, token) for token in r.response]
        position += [(i + 0.5) / n_tokens for i in range(n_tokens)]
        logprobs += r.logprobs
        is_newline = [token in vocabulary.newline_ids for token in r.response]
        for length in segment_lengths(n_tokens, cfg.gate, is_newline, **sizes):
            segments += [n_segments] * length
            n_segments += 1
    integers = {"rows": rows, "cols": cols, "tokens": tokens, "segments": segments}
    reals = {"position": position, "logp_sampler": logprobs}
    integers = {name: torch.tensor(x, dtype=torch.long, device=device) for name, x in integers.items()}
    reals = {name: torch.tensor(x, dtype=torch.float32, device=device) for name, x in reals.items()}
    return MicroBatch(ids=ids.to(device), rollouts=counted, **integers, **reals)


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

    Every rank computes the same split. A minibatch's rollouts are dealt so that the ranks have about as many response
    tokens. A rank with fewer micro-batches gets some without tokens: all ranks must join FSDP's collectives.
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
