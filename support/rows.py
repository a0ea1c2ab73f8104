"""Rows of hub datasets and files, and the question and answer that each holds.

rows = read_rows("gsm8k:train", is_training=True)            # [(number, {column: cell}), ...]
question, answer = question_and_answer(row, "gsm8k, row 1")  # ValueError if the row holds no whole question
"""

import ast
import gzip
import hashlib
import json
import re
import string
import zlib
from contextlib import suppress
from pathlib import Path

from support.common import print0
from support.errors import one_line

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
# What surrounds the question in DAPO-Math-17k's messages. bare_question() takes it off, so that training and evaluation, whose
# benchmarks are bare questions, ask in the same way.
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
NUMBER = "number of the row"  # a column that numbered_rows adds
LARGE = 100_000  # rows; a dataset with more loses its repeated rows before they become dictionaries

# -----------------------------------------------------------------------------
# reading


def name_and_split(name):
    """("gsm8k", "train") of gsm8k:train; the split is "" if the name has none."""
    base, _, split = name.rpartition(":")
    return (base, split) if base and "/" not in split and not Path(name).exists() else (name, "")


def file_format(name):
    """What datasets calls the format of a file's name; None if it is no file's name, and so a hub dataset's or a folder's."""
    return FILE_FORMATS.get(Path(name.lower().removesuffix(".gz")).suffix)


def read_rows(name, is_training) -> list[tuple[int, dict]]:
    """[(number, row)] of a hub dataset or a file. Numbers are from 1; those of JSON lines are the lines'."""
    import datasets
    import pandas

    base, split = name_and_split(name)
    format = file_format(base)
    if not format:
        repository, configuration, usual_split = HUB.get(base, (base, None, ""))
        if Path(base).is_dir():
            check_json_files(base)
        try:
            splits = datasets.load_dataset(repository, configuration)
        except Exception as error:  # of many kinds: no such dataset, no network, a script, files with unlike columns
            raise ValueError(
                f"{base} is no file ({', '.join(FILE_FORMATS)}), and the hub says: {one_line(error.__cause__ or error)}"
            ) from error
        return numbered_rows(splits[choose_split(base, list(splits), split or usual_split, is_training)])
    if split or not Path(base).is_file():
        raise ValueError(f"no such file: {name}" + (" (a file has no splits)" if split else ""))
    if format == "json":
        return read_json_rows(Path(base))
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
    except Exception as error:  # of many kinds, such as DatasetGenerationError for a file without rows
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

    if len(rows) <= LARGE:
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


def read_json_rows(path: Path) -> list[tuple[int, dict]]:
    """[(number, row)] of a file that holds a list of objects in JSON, or one object a line; with .gz, compressed.

    datasets refuses columns of several types, and pyarrow, with which it reads, ends the process (SIGSEGV) for a file that holds null.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a readable gz file: {one_line(error)}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        if content.lstrip().startswith(b"["):
            rows = list(enumerate(json.loads(content), 1))
        else:
            rows = [
                (number, read_json_line(number, line))
                for number, line in enumerate(content.split(b"\n"), 1)
                if line.strip()
            ]
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a readable JSON file (a list of objects, or one object a line): {one_line(error)}"
        ) from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}, is {str(row)[:80]!r}; it must be an object")
    return rows


def check_json_files(folder):
    """ValueError if a file of rows in a folder, which datasets is about to read, is one that read_json_rows refuses."""
    import datasets

    try:
        files = datasets.load_dataset_builder(folder).config.data_files or {}
    except Exception:  # of many kinds: load_dataset meets it again, and is where it is reported
        return
    for path in [path for paths in files.values() for path in paths]:
        if file_format(path) == "json":
            read_json_rows(Path(path))


def read_json_line(number, line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error


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
