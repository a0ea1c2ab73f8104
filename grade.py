"""Is a response right? Its last \\boxed{} against the gold answer, by math-verify in worker processes.

    with Grader() as grader:
        verdicts = grader.grade([(text, gold, finished), ...])  # [(answer or None, correct, reason), ...]

math-verify builds SymPy expressions out of whatever a model wrote, so an answer may ask for 10^10^10
digits, a parse tree a thousand levels deep, or all the memory there is. Each answer therefore has a
limit of CPU time and memory that the kernel enforces on a process of its own; one that dies is
replaced, and its answer counts as wrong with the reason. CPU time, not wall time: a busy machine
must not change a verdict. Nothing in an answer is evaluated as Python.
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

LONGEST = 1000  # characters of an answer; MATH-500's longest gold has 53
TAIL = 2000  # characters at the end of a response in which an answer without a box is looked for
MEMORY = 2 << 30  # bytes of address space of a worker
UNGRADABLE = ("no answer", "too long", "unparsable", "time limit", "crash")  # reasons without a verdict on the maths

# -----------------------------------------------------------------------------
# from a response to its answer

TOKEN = re.compile(r"(\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)  # \\. steps over \{ and \}
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
SAID = re.compile(rf"answer(?:\s+is)?\s*:?\s*(?:\*\*)?\s*(\$[^$\n]+\$|\\\([^\n]+?\\\)|{NUMBER})", re.IGNORECASE)
WRITTEN = re.compile(rf"\$[^$\n]+\$|\\\([^\n]+?\\\)|{NUMBER}")


def extract(text: str, finished: bool = True) -> str | None:
    """The answer in a response, or None: the last non-empty balanced \\boxed{}, in time linear in the text.

    Without a box: what follows the last "answer is" or "answer:", else the last formula or number of the
    last line. A response cut off by its token limit (finished False) needs a box: its last number is no answer.
    """
    box, stack = None, []
    for match in TOKEN.finditer(text):
        token = match.group()
        if token == "}":
            start, boxed = stack.pop() if stack else (0, False)
            if boxed and text[start : match.start()].strip():
                box = (start, match.start())
        elif token == "{" or match.group(1):
            stack.append((match.end(), bool(match.group(1))))
    if box:
        return text[slice(*box)].strip()
    tail = text[-TAIL:].strip()
    if not finished or not tail:
        return None
    found = SAID.findall(tail) or WRITTEN.findall(tail.splitlines()[-1])
    return found[-1].strip() if found else None


WRAPPED = re.compile(
    r"\s*(?:\\(?:boxed|fbox|text|textbf|mathbf|mathrm|bm|boldsymbol)\s*\{(.*)\}|\$(.*)\$|\\\((.*)\\\))\s*", re.DOTALL
)
CHOICE = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\([A-E]\)[\s~\\]*\}[\s~\\,;!]*(?=\S)"
)  # AMC: \textbf{(C)}\ 70
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,\\!|\{,\}|\\[,;: ]|~| )\d{3})+")
ENDING = re.compile(r"(?:[\s.,;:~]|\\[,;:!\s]|\\$|\\q?quad)+$")
INTEGER = re.compile(r"([-+]?)0*(\d+)(?:\.0*)?", re.ASCII)


def clean(answer: str) -> str:
    """The answer without what surrounds it on the page; math-verify reads none of `70.`, `\\mathbf{070}`, `1\\,024`."""
    answer = CHOICE.sub("", answer.strip(), count=1)
    while (match := WRAPPED.fullmatch(answer)) and re.search(r"\d", answer):
        inner = next(group for group in match.groups() if group is not None)
        if not _balanced(inner):  # \text{1}+\text{2} is not one wrapper
            break
        answer = inner
    answer = ENDING.sub("", re.sub(r"^(?:\\bf|\\displaystyle|\*\*)\s*|\*\*$", "", answer.strip()))
    return re.sub(r"[^\d+-]", "", answer) if THOUSANDS.fullmatch(answer) else answer


def _balanced(text):
    depth = 0
    for match in TOKEN.finditer(text):
        depth += (match.group() == "{" or bool(match.group(1))) - (match.group() == "}")
        if depth < 0:
            return False
    return depth == 0 and "$" not in text


def at_sight(answer: str, gold: str) -> tuple[bool, str] | None:
    """The verdict where it needs no algebra: the same text, two integers, or an answer of no sensible length."""
    if len(answer) > LONGEST:
        return (True, "equal") if answer == gold else (False, "too long")
    answer, gold = clean(answer), clean(gold)
    if answer == gold:
        return True, "equal"
    ours, theirs = INTEGER.fullmatch(answer), INTEGER.fullmatch(gold)
    if ours and theirs:
        signed = [(m[1] == "-" and m[2] != "0", m[2]) for m in (ours, theirs)]
        return (True, "equal") if signed[0] == signed[1] else (False, "different")
    return None


# -----------------------------------------------------------------------------
# the worker: one answer a line in, one verdict a line out


def serve(seconds: int):
    """Grades [answer, gold] lines from stdin. Past `seconds` of CPU time (at most one more) the kernel ends it."""
    replies = os.fdopen(os.dup(1), "w")
    for stream in (1, 2):  # math-verify and ANTLR print complaints
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(boxed_match_priority=0)]  # no plain-text expressions: SymPy would eval those

    @functools.lru_cache(maxsize=4096)
    def parse_gold(gold):
        return parse(f"\\boxed{{{gold}}}", latex, parsing_timeout=None)

    for line in sys.stdin:
        end = int(time.process_time()) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        answer, gold = json.loads(line)
        gold = parse_gold(clean(gold))
        answer = parse(f"\\boxed{{{clean(answer)}}}", latex, parsing_timeout=None)
        parsable = any(not isinstance(x, str) for x in answer)
        correct = verify(gold, answer, timeout_seconds=None)
        reason = "equal" if correct else "different" if parsable else "unparsable"
        replies.write(json.dumps([correct, reason]) + "\n")
        replies.flush()


class Grader:
    """Verdicts from a few worker processes, started when first needed and replaced when they die.

    seconds: CPU time for one answer. Equal (answer, gold) pairs are graded once.
    """

    def __init__(self, workers: int = 0, seconds: int = 3):
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.seconds, self.cache, self.started = seconds, {}, []
        self.idle = queue.SimpleQueue()
        for _ in range(self.workers):
            self.idle.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.started:
            worker.kill()
            worker.communicate()

    def grade(self, responses) -> list[tuple[str | None, bool, str]]:
        """[(answer or None, correct, reason)] for [(text, gold, finished)]; reason: equal, different, or of UNGRADABLE."""
        pairs = [(extract(text, finished), gold) for text, gold, finished in responses]
        new = [pair for pair in dict.fromkeys(pairs) if pair[0] is not None and pair not in self.cache]
        seen = {pair: at_sight(*pair) for pair in new}
        hard = [pair for pair in new if seen[pair] is None]
        with ThreadPoolExecutor(self.workers) as threads:
            seen |= zip(hard, threads.map(self._ask, hard), strict=True)
        self.cache |= seen
        return [(pair[0], *self.cache.get(pair, (False, "no answer"))) for pair in pairs]

    def _ask(self, pair):
        worker = self.idle.get()
        if worker is None:
            command = [sys.executable, __file__, str(self.seconds)]
            # a session of its own, out of the reach of Ctrl-C, which the caller may live through
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            worker = subprocess.Popen(command, **pipes)
            self.started.append(worker)
        worker.stdin.write(json.dumps(pair).encode() + b"\n")  # ASCII: lone surrogates and NULs are escaped
        worker.stdin.flush()
        ready, _, _ = select.select([worker.stdout], [], [], 60 + 10 * self.seconds)  # a process that only waits
        reply = worker.stdout.readline() if ready else b""
        if reply.endswith(b"\n"):
            self.idle.put(worker)
            return tuple(json.loads(reply))
        worker.kill()
        worker.communicate()
        self.started.remove(worker)
        self.idle.put(None)
        slow = not ready or worker.returncode == -signal.SIGXCPU
        return False, "time limit" if slow else "crash"


if __name__ == "__main__":
    serve(int(sys.argv[1]))
