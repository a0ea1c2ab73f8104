"""Problems, their prompts, and micro-batches of rollouts.

problems = load("math500")                         # [Problem(id, prompt, answer), ...]: hub, file, or toy
ids = encode(problems[0], tokenizer, "auto")       # prompt token ids; the template is applied here, and only here
minibatches = make_minibatches(rollouts, ...)      # [minibatch][micro-batch] of MicroBatch, for this rank
"""

import datetime
import functools
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
from support.common import digest, one_rank_at_a_time, print0, seed_for
from support.rows import (
    ANSWER_COLUMNS,
    DAPO_AFTER,
    DAPO_BEFORE,
    file_format,
    garbled,
    name_and_split,
    question_and_answer,
    read_rows,
    text_of,
)
from support.vocabulary import Vocabulary

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
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
TOY_TRAINING, TOY_HELD_OUT = 4096, 256  # problems
MAX_PROBLEMS = 100_000  # of a training set; all of them are tokenized before the first step

# -----------------------------------------------------------------------------
# problems


@dataclass
class Problem:
    id: str
    prompt: str | list[dict]  # the question, or chat messages
    answer: str


def load(name: str, *, seed: int | None = None, limit: int = 0) -> list[Problem]:
    """Problems of a benchmark's name (HUB in support/rows.py), a hub dataset, a file, or "toy", without repeated questions.

    A dataset's name may end in :SPLIT. seed: for training: shuffle with it; answers may be missing. None: for evaluation: keep
    the order, and insist on an answer and an id of its own for every problem. Without an id, a problem gets its row's number.
    limit: at most this many; 0 for all. Prints what it leaves out. ValueError if a dataset is empty or unreadable, or has a
    row that is not a whole problem.
    """
    is_training = seed is not None
    if name == "toy":
        n = limit or (TOY_TRAINING if is_training else TOY_HELD_OUT)
        pairs = toy.problems(n, seed if is_training else toy.HELD_OUT)
        return [Problem(f"toy-{i}", [{"role": "user", "content": q}], a) for i, (q, a) in enumerate(pairs)]
    base, _ = name_and_split(name)
    is_strict = file_format(base) or not is_training  # only hub training data may lose rows
    problems, first_with, row_of_id, left_out = [], {}, {}, Counter()
    for number, row in read_rows(name, is_training):
        where = f"{name}, row {number}"
        row = {str(column).lower(): cell for column, cell in row.items() if cell not in (None, "", [], {})}
        prompt, answer = question_and_answer(row, where)
        if not answer.strip() and not is_training:
            known = ", ".join(ANSWER_COLUMNS)
            raise ValueError(f"{where}: answer is empty; evaluation needs an answer, in {known}")
        fault = garbled(text_of(prompt)) or garbled(answer)
        answer = answer.strip()
        first_answer, first_number = first_with.setdefault(str(prompt), (answer, number))
        if answer != first_answer:
            fault = f"the question is that of row {first_number}, but the answer is {answer!r}, not {first_answer!r}"
        if fault and is_strict:
            raise ValueError(f"{where}: {fault}")
        if fault or number != first_number:
            left_out["rows that are garbled or contradict another" if fault else "rows that repeat a question"] += 1
            continue
        id = str(row.get("id", "")).strip() or f"{Path(base).stem}-{number - 1}"
        if id in row_of_id:
            if not is_training:
                rows = f"{row_of_id[id]} and {number}"
                raise ValueError(f"{name}, rows {rows}, have the id {id!r}; every problem needs its own")
            id = f"{id}-{number - 1}"
        row_of_id[id] = number
        problems.append(Problem(id, prompt, answer))
    if not problems:
        raise ValueError(f"{name} is empty")
    most = limit or len(problems)
    if is_training:
        problems = [problems[i] for i in np.random.default_rng(seed).permutation(len(problems))]
        most = min(most, MAX_PROBLEMS)
    left_out[f"problems beyond {most:,}"] = max(0, len(problems) - most)
    if left_out.total():
        print0(f"data: {name}, without " + " and ".join(f"{n:,} {what}" for what, n in left_out.items() if n))
    return problems[:most]


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
    pattern = TEXT_TEMPLATES.get(template) or template.replace("\\n", "\n")
    return pattern.replace("{question}", text_of(question))


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


def named_sets(names: str) -> dict[str, str]:
    """{what columns and tables call it: dataset or file} of a comma-separated list. ValueError if two are called the same."""
    found = {Path(name).stem: name for name in names.split(",") if name}
    if len(found) < len(names.split(",")):
        raise ValueError(f"{names}: two sets have the same name, or one has none")
    return found


def load_problems(cfg, tokenizer, vocab):
    """(TrainingPrompts, {name: [(held-out problem, prompt ids)]}). ValueError if a held-out prompt is over --max_prompt."""
    names = cfg.eval_data
    if names == "auto":
        names = "toy" if cfg.data == "toy" else ""
    sets = named_sets(names) if names and cfg.eval_every else {}
    with one_rank_at_a_time():  # the first one on each node reads the files, and the others what datasets has cached
        problems = load(cfg.data, seed=cfg.seed)
        held_out = {name: load(path, limit=cfg.eval_problems) for name, path in sets.items()}
    train = TrainingPrompts(encode_all(problems, tokenizer, cfg, vocab), cfg.max_prompt, cfg.seed)
    held_out = {name: encode_all(problems, tokenizer, cfg, vocab) for name, problems in held_out.items()}
    trained_on = {same_words(problem) for problem, _ in train.prompts}
    for name, prompts in held_out.items():
        for problem, ids in prompts:
            if len(ids) > cfg.max_prompt:
                size = f"{len(ids)} tokens, more than --max_prompt {cfg.max_prompt}"
                raise ValueError(f"held-out problem {problem.id} has {size}")
        n = sum(same_words(problem) in trained_on for problem, _ in prompts)
        if n:
            print0(f"warning: {n} of the {len(prompts)} held-out problems of {name} are also training problems")
    return train, held_out


def same_words(problem) -> str:
    """Its question, in which neither spaces nor capitals count."""
    return " ".join(text_of(problem.prompt).casefold().split())


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
