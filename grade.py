"""Grades responses: takes the final answer out of a response and compares it with the gold answer by math-verify.

    with Grader() as grader:
        verdicts = grader.grade([(text, gold, finished), ...])  # [(answer or None, correct, reason), ...]

math-verify builds SymPy expressions out of whatever a model wrote, so an answer may ask for 10^10^10 digits, a parse
tree a thousand levels deep, or all the memory there is. Worker processes therefore compare the answers, under limits of
CPU time and memory that the kernel enforces. One that dies is replaced, and its answer counts as wrong. CPU time, not
wall time: a busy machine must not change a verdict. Nothing in an answer is evaluated as Python.
"""

import functools
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

LONGEST = 1000  # characters; a longer answer is not compared. MATH-500's longest gold answer has 53
TAIL = 2000  # characters at the end of a response that are searched for an answer without a box
MEMORY = 2 << 30  # bytes of address space per worker
UNGRADABLE = ("no answer", "too long", "unparsable", "time limit", "crash")  # reasons that say nothing about the maths

# -----------------------------------------------------------------------------
# from a response to its answer

# \boxed{ or \fbox{ (group 1), a brace, or any other backslash with the character after it: \{ and \} are not braces.
BRACE = re.compile(r"(\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
FORMULA = r"\$[^$\n]+\$|\\\([^\n]+?\\\)"
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
STATED_ANSWER = re.compile(rf"answer(?:\s+is)?\s*:?\s*(?:\*\*)?\s*({FORMULA}|{NUMBER})", re.IGNORECASE)
FORMULA_OR_NUMBER = re.compile(rf"{FORMULA}|{NUMBER}")


def extract(text: str, finished: bool = True) -> str | None:
    """The answer in a response, or None.

    Only what follows the last </think> counts, and nothing in a <think> that is still open. The answer is the last
    non-empty \\boxed{}; else what follows the last "answer is" or "answer:"; else the last formula or number on the
    last line. A response that was cut off (finished is False) needs a box: the last number that it happened to write
    is no answer.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    box = last_box(text)
    if box is not None:
        return box
    tail = text[-TAIL:].strip()
    if not finished or not tail:
        return None
    last_line = tail.splitlines()[-1]
    candidates = STATED_ANSWER.findall(tail) or FORMULA_OR_NUMBER.findall(last_line)
    return candidates[-1].strip() if candidates else None


def last_box(text: str) -> str | None:
    """What the last complete, non-empty \\boxed{} or \\fbox{} holds. One pass: a text may hold 100,000 open braces."""
    box = None
    open_braces = []  # (where its content starts, whether it opens a box)
    for match in BRACE.finditer(text):
        if match.group(1):
            open_braces.append((match.end(), True))
        elif match.group() == "{":
            open_braces.append((match.end(), False))
        elif match.group() == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and text[start : match.start()].strip():
                box = (start, match.start())
    return None if box is None else text[box[0] : box[1]].strip()


# -----------------------------------------------------------------------------
# from an answer to what math-verify reads

WRAPPER = re.compile(
    r"\s*(?:\\(?:boxed|fbox|text|textbf|mathbf|mathrm|bm|boldsymbol)\s*\{(.*)\}|\$(.*)\$|\\\((.*)\\\))\s*", re.DOTALL
)
# The letter in \textbf{(C)}\ 70, as in the AMC's multiple choice.
CHOICE = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\([A-E]\)[\s~\\]*\}[\s~\\,;!]*(?=\S)")
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,\\!|\{,\}|\\[,;: ]|~| )\d{3})+")
STYLE = re.compile(r"^(?:\\bf|\\displaystyle|\*\*)\s*|\*\*$")
ENDING = re.compile(r"(?:[\s.,;:~]|\\[,;:!\s]|\\$|\\q?quad)+$")
INTEGER = re.compile(r"([-+]?)0*(\d+)(?:\.0*)?", re.ASCII)


def clean(answer: str) -> str:
    """The answer without its typography: math-verify cannot read `70.`, `\\mathbf{070}` or `1\\,024`."""
    answer = CHOICE.sub("", answer.strip(), count=1)
    while has_digit(answer):  # words keep their wrapper: math-verify reads \text{Evelyn} as one symbol
        wrapped = WRAPPER.fullmatch(answer)
        if wrapped is None:
            break
        content = next(group for group in wrapped.groups() if group is not None)
        if not is_balanced(content):  # \text{1}+\text{2} is not one wrapper
            break
        answer = content
    answer = ENDING.sub("", STYLE.sub("", answer.strip()))
    if THOUSANDS.fullmatch(answer):
        return re.sub(r"[^\d+-]", "", answer)
    return answer


def has_digit(text):
    return re.search(r"\d", text) is not None


def is_balanced(text):
    """Whether every brace in it is closed, and no dollar sign is left."""
    depth = 0
    for match in BRACE.finditer(text):
        if match.group() == "{" or match.group(1):
            depth += 1
        elif match.group() == "}":
            depth -= 1
        if depth < 0:
            return False
    return depth == 0 and "$" not in text


def verdict_at_sight(answer: str, gold: str) -> tuple[bool, str] | None:
    """(correct, reason) if no algebra is needed: an answer that is too long, two equal texts, or two integers."""
    if len(answer) > LONGEST:
        return (True, "equal") if answer == gold else (False, "too long")
    answer, gold = clean(answer), clean(gold)
    if answer == gold:
        return True, "equal"
    values = integer_value(answer), integer_value(gold)
    if None in values:
        return None
    return (True, "equal") if values[0] == values[1] else (False, "different")


def integer_value(text):
    """(is negative, digits without leading zeros) of an integer, else None. No int(): Python refuses 4,301 digits."""
    match = INTEGER.fullmatch(text)
    if match is None:
        return None
    sign, digits = match.groups()
    return sign == "-" and digits != "0", digits


# -----------------------------------------------------------------------------
# worker processes: one line with an answer in, one line with its verdict out


def serve(seconds: int):
    """A worker: reads [answer, gold] lines, writes [correct, reason] lines.

    An answer that takes more than `seconds` of CPU time, rounded up by at most one second, ends the process.
    """
    replies = os.fdopen(os.dup(1), "w")
    for stream in (1, 2):  # math-verify and ANTLR print complaints
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify

    latex_only = [LatexExtractionConfig(boxed_match_priority=0)]  # SymPy would eval a plain-text expression

    def parse_latex(answer):
        return parse(f"\\boxed{{{clean(answer)}}}", latex_only, parsing_timeout=None)

    parse_gold = functools.lru_cache(maxsize=4096)(parse_latex)  # a problem has many answers

    for line in sys.stdin:
        cpu_limit = int(time.process_time()) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, resource.RLIM_INFINITY))
        answer, gold = json.loads(line)
        parsed_gold = parse_gold(gold)
        parsed_answer = parse_latex(answer)
        is_parsable = any(not isinstance(reading, str) for reading in parsed_answer)
        if verify(parsed_gold, parsed_answer, timeout_seconds=None):
            verdict = (True, "equal")
        else:
            verdict = (False, "different" if is_parsable else "unparsable")
        replies.write(json.dumps(verdict) + "\n")
        replies.flush()


class Grader:
    """Verdicts from a few worker processes, which start when first needed and are replaced when they die.

    workers: 0 for one per core, at most 8. seconds: CPU time per answer. Equal (answer, gold) pairs are graded once.
    """

    def __init__(self, workers: int = 0, seconds: int = 3):
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.seconds = seconds
        self.verdicts = {}  # (answer, gold) -> (correct, reason)
        self.started = []  # the processes that are alive
        self.idle = queue.SimpleQueue()  # of processes; None is a worker that is yet to be started
        for _ in range(self.workers):
            self.idle.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.started:
            worker.kill()
            worker.communicate()

    def grade(self, responses) -> list[tuple[str | None, bool, str]]:
        """[(answer or None, correct, reason)] for [(text, gold, finished)]. Reasons: equal, different, UNGRADABLE."""
        pairs = [(extract(text, finished), gold) for text, gold, finished in responses]
        hard = []  # pairs that need a worker
        for pair in dict.fromkeys(pairs):
            if pair[0] is None:
                self.verdicts[pair] = (False, "no answer")
            elif pair not in self.verdicts:
                verdict = verdict_at_sight(*pair)
                if verdict is None:
                    hard.append(pair)
                else:
                    self.verdicts[pair] = verdict
        with ThreadPoolExecutor(self.workers) as threads:
            self.verdicts.update(zip(hard, threads.map(self._ask, hard), strict=True))
        return [(answer, *self.verdicts[answer, gold]) for answer, gold in pairs]

    def _ask(self, pair):
        """A worker's verdict on (answer, gold)."""
        worker = self.idle.get() or self._start_worker()
        worker.stdin.write(json.dumps(pair).encode() + b"\n")  # ASCII: lone surrogates and NULs are escaped
        worker.stdin.flush()
        # Only a process that waits for something other than the CPU gets as far as this timeout.
        ready, _, _ = select.select([worker.stdout], [], [], 60 + 10 * self.seconds)
        reply = worker.stdout.readline() if ready else b""
        if reply.endswith(b"\n"):
            self.idle.put(worker)
            return tuple(json.loads(reply))
        worker.kill()
        worker.communicate()
        self.started.remove(worker)
        self.idle.put(None)
        is_slow = not ready or worker.returncode == -signal.SIGXCPU
        return False, "time limit" if is_slow else "crash"

    def _start_worker(self):
        worker = subprocess.Popen(
            [sys.executable, __file__, str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # out of reach of a Ctrl-C that the caller may survive
        )
        self.started.append(worker)
        return worker


if __name__ == "__main__":
    serve(int(sys.argv[1]))
