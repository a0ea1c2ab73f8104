"""Problems, their prompts, and micro-batches of rollouts.

problems = load("math500")                         # [Problem(id, prompt, answer), ...]: hub, file, or toy
ids = encode(problems[0], tokenizer, "auto")       # prompt token ids; the template is applied here, and only here
minibatches = make_minibatches(rollouts, ...)      # [minibatch][micro-batch] of MicroBatch, for this rank
"""

import ast
import datetime
import functools
import hashlib
import json
import random
import re
import string
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gating import segment_lengths
from support import toy
from support.common import digest, one_rank_at_a_time, print0, seed_for
from support.errors import one_line
from support.vocabulary import Vocabulary

# name: (hub repository, configuration, split, unless the name ends in :SPLIT)
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
# Parts of the question in columns of their own: text that goes before it, and options, which become lettered lines after it
TEXT_COLUMNS = ("body", "context", "passage")
OPTION_COLUMNS = ("options", "choices")
# What no prompt can carry: image, images, image_1, decoded_image, image_path, ...
OTHER_COLUMNS = re.compile(r"(.*_)?(image|img|picture|photo|figure|diagram|chart|table|audio|video|hint)s?(_.*|\d+)?")
# A control character, or what is left of LaTeX after a JSON parser has read \frac, \beta, \right, \times or \neq as an escape
GARBLED = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|\n(eq|abla|otin)\b|\t(imes|ext(bf|rm|it)?|heta|riangle|frac|au|ilde)\b"
)
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
NUMBER = "number of the row"  # a column that numbered_rows adds
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
    """Problems of a benchmark's name, a hub dataset, a file (FILE_FORMATS), or "toy", without repeated questions.

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


def name_and_split(name):
    """("gsm8k", "train") of gsm8k:train; the split is "" if the name has none."""
    base, _, split = name.rpartition(":")
    return (base, split) if base and "/" not in split and not Path(name).exists() else (name, "")


def file_format(name):
    """What datasets calls the format of a file's name; None if it is no file's name, and so a hub dataset's or a folder's."""
    return FILE_FORMATS.get(Path(name.lower().removesuffix(".gz")).suffix)


def read_rows(name, is_training) -> list[tuple[int, dict]]:
    """[(number, row)] of a hub dataset or a file. Numbers are from 1; those of a .jsonl file are its lines'."""
    import datasets
    import pandas

    base, split = name_and_split(name)
    format = file_format(base)
    if not format:
        repository, configuration, usual_split = HUB.get(base, (base, None, ""))
        try:
            splits = datasets.load_dataset(repository, configuration)
        except Exception as error:  # of many kinds: no such dataset, no network, a script, files with unlike columns
            raise ValueError(
                f"{base} is no file ({', '.join(FILE_FORMATS)}), and the hub says: {one_line(error.__cause__ or error)}"
            ) from error
        return numbered_rows(splits[choose_split(base, list(splits), split or usual_split, is_training)])
    if split or not Path(base).is_file():
        raise ValueError(f"no such file: {name}" + (" (a file has no splits)" if split else ""))
    if base.lower().endswith(".jsonl"):
        return read_jsonl_rows(Path(base))
    try:
        if format == "csv":  # datasets would make numbers of ids and answers: 1 of 01
            rows = pandas.read_csv(name, dtype=str, keep_default_na=False, encoding="utf-8-sig").to_dict("records")
            return list(enumerate(rows, 1))
        # The configuration's name is part of the cache's: datasets itself knows a file by its path and time alone, and a copy
        # that keeps times (rsync -t, an image's files) would get the rows of the file that it replaced.
        with open(name, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return numbered_rows(datasets.load_dataset(format, content, data_files=name, split="train"))
    except OSError as error:
        hint = "If that is the cache of datasets, set HF_HOME to a folder that can be written to"
        raise ValueError(f"{name}: {one_line(error)}. {hint}") from error
    except Exception as error:  # of many kinds, such as StopIteration for an empty file
        raise ValueError(f"{name} is not a readable {format} file: {one_line(error.__cause__ or error)}") from error


def choose_split(name, splits, split, is_training):
    """`split` if one is asked for; else train, or for evaluation test, then validation, then the only one there is."""
    usual = ["train"] if is_training else ["test", "validation", *(splits if len(splits) == 1 else [])]
    found = [x for x in ([split] if split else usual) if x in splits]
    if not found:
        raise ValueError(f"{name} has the splits {', '.join(splits)}: name one of them, as in {name}:{splits[0]}")
    if not split:
        print0(
            f"data: {name} has the splits {', '.join(splits)}; {'training' if is_training else 'evaluation'} takes {found[0]}"
        )
    return found[0]


def numbered_rows(rows) -> list[tuple[int, dict]]:
    """[(number, row)] of a datasets.Dataset. A large one loses its repeated rows first, and datasets caches what is left.

    DAPO's file has each of its 17,917 rows a hundred times, of which dictionaries take minutes.
    """
    import pyarrow

    if len(rows) <= MAX_PROBLEMS:
        return list(enumerate(rows.to_list(), 1))
    known = {*PROMPT_COLUMNS, *ANSWER_COLUMNS, *TEXT_COLUMNS, *OPTION_COLUMNS}
    columns = [column for column in rows.column_names if column.lower() in known]
    seen = set()

    def first_ones(table, numbers):
        keys = [str(row) for row in table.select(columns).to_pylist()]
        is_first = [not (key in seen or seen.add(key)) for key in keys]
        return table.append_column(NUMBER, pyarrow.array(numbers)).filter(pyarrow.array(is_first))

    options = {"batched": True, "with_indices": True, "desc": "looking for repeated rows"}
    distinct = rows.with_format("arrow").map(first_ones, **options).with_format(None)
    print0(f"data: {len(rows):,} rows, of which {len(rows) - len(distinct):,} repeat another")
    return [(row.pop(NUMBER) + 1, row) for row in distinct.to_list()]


def read_jsonl_rows(path: Path) -> list[tuple[int, dict]]:
    """[(line, row)] of a .jsonl file, whose columns may be of several types, which datasets refuses."""
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
        rows.append((number, row))
    return rows


# -----------------------------------------------------------------------------
# from a row, {column: cell}, to a question and its answer


def question_and_answer(row, where) -> tuple[str | list[dict], str]:
    """The question, with the parts of it that stand in other columns, and the answer; "" if there is none."""
    prompt = bare_question(first_cell(row, PROMPT_COLUMNS))
    if prompt is None:
        known = ", ".join(PROMPT_COLUMNS)
        raise ValueError(f"{where} has neither text nor chat in the columns {known}: {str(row)[:200]}")
    answer = final_answer(first_cell(row, ANSWER_COLUMNS))
    asked, is_text = text_of(prompt), isinstance(prompt, str)
    before, options = [], {}
    for column, cell in row.items():
        if column in TEXT_COLUMNS and is_text and isinstance(cell, str):
            before += [cell] if cell not in asked else []
        elif column in OPTION_COLUMNS and is_text and options_of(cell):
            options = options_of(cell)
        elif is_part(column, cell) and text_of(bare_question(cell) or "\0") not in asked:
            remedy = "move its content into the question, or drop the column if the question is complete without it"
            raise ValueError(f"{where}: column {column} cannot go into a prompt: {remedy}")
    if options and answer:
        answer = letter_of(answer.strip(), options, where)
    lines = [f"{letter}. {option}" for letter, option in options.items()]
    return "\n".join([*before, prompt, *lines]) if is_text else prompt, answer


def is_part(column, cell) -> bool:
    """Whether the column holds a part of the question: a text or more, but no number, such as one of images."""
    is_named = column in (*PROMPT_COLUMNS, *TEXT_COLUMNS, *OPTION_COLUMNS) or OTHER_COLUMNS.fullmatch(column)
    return bool(is_named) and not isinstance(cell, (bool, int, float))


def options_of(cell) -> dict[str, str]:
    """{letter: option} of ["4", "6"] or {"A": "4", "B": "6"}; {} of anything else."""
    cell = parsed(cell)
    if isinstance(cell, list) and len(cell) <= 26:
        cell = dict(zip(string.ascii_uppercase, cell, strict=False))
    if not isinstance(cell, dict) or not all(isinstance(x, (str, int, float, type(None))) for x in cell.values()):
        return {}
    return {letter: str(option) for letter, option in cell.items() if option is not None}


def letter_of(answer, options, where) -> str:
    """The letter of the right option. The answer names it by its letter, its text or, as in MMLU, its index from 0."""
    letter = answer.strip("(). ")
    if letter in options:
        return letter
    letters = {letter for letter, option in options.items() if option.strip() == answer}
    if answer.isdecimal() and int(answer) < len(options):
        letters.add(list(options)[int(answer)])
    if len(letters) != 1:
        raise ValueError(
            f"{where}: the answer {answer!r} matches {'two' if letters else 'none'} of the options {options}"
        )
    return letters.pop()


def garbled(text) -> str:
    """What is wrong with a text, in words; "" if nothing is."""
    found = GARBLED.search(text)
    if found:
        excerpt = text[max(0, found.start() - 20) : found.end() + 20]
        return f"{excerpt!r} has a control character, as JSON makes of \\frac where \\\\frac is meant"
    return "NaN is no answer" if text.strip().lower() == "nan" else ""


def first_cell(row, columns):
    """The first cell that the row has in these columns; None if there is none."""
    return next((row[column] for column in columns if column in row), None)


def parsed(cell):
    """A list or dictionary that is stored as text, in JSON or as Python prints it; any other cell as it is."""
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return parse(cell)
    return cell


def bare_question(prompt):
    """A text or a chat as it is, but DAPO's without its instruction; None if it is neither. A chat may be stored as text."""
    chat = parsed(prompt)
    if not isinstance(chat, list) or not chat or not all(map(is_message, chat)):
        return prompt if isinstance(prompt, str) and prompt.strip() else None
    text = chat[0]["content"]
    if len(chat) == 1 and text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER):
        return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
    return chat


def is_message(x) -> bool:
    return isinstance(x, dict) and "role" in x and isinstance(x.get("content"), str)


def text_of(prompt) -> str:
    """The question, or the texts of its messages."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def final_answer(answer) -> str:
    """What GSM8K has after its reasoning, and DAPO in its reward_model; "" if it is no text or number."""
    if isinstance(parsed(answer), dict):
        answer = parsed(answer).get("ground_truth")
    if answer is None or isinstance(answer, (dict, list)):
        return ""
    return str(answer).rpartition("####")[2]


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


def load_problems(cfg, tokenizer, vocab):
    """(TrainingPrompts, {name: [(held-out problem, prompt ids)]}). ValueError if a held-out prompt is over --max_prompt."""
    names = cfg.eval_data
    if names == "auto":
        names = "toy" if cfg.data == "toy" else ""
    names = names.split(",") if names and cfg.eval_every else []
    with one_rank_at_a_time():  # the first one on each node reads the files, and the others what datasets has cached
        problems = load(cfg.data, seed=cfg.seed)
        held_out = {name: load(name, limit=cfg.eval_problems) for name in names}
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
