r"""Grades responses: takes the final answer out of a response and compares it with the gold answer by math-verify.

    with Grader() as grader:
        verdicts = grader.grade([(text, gold, finished), ...])  # [(answer or None, correct, reason), ...]

math-verify builds SymPy expressions out of whatever a model wrote, so an answer may ask for 10^10^10 digits, a parse
tree a thousand levels deep, or all the memory there is. Worker processes therefore compare the answers, under limits of
CPU time and memory that the kernel enforces. One that dies is replaced, and its answer counts as wrong. CPU time, not
wall time: a busy machine must not change a verdict. Nothing in an answer is evaluated as Python.

The verdict is math-verify's, with these exceptions. Right, because everyone reads them as equal:
    x \ge 2 for [2,\infty)          only a gold inequality is a set for math-verify. x<1 or x>3 is a union
    a column vector for a tuple     math-verify takes it for a matrix
    (B) 12 for (B), and for 12      multiple choice: the gold answer says whether the letter or the value counts
    90°, ½, ５, 3 1/2, 1e3, €18, 18 dollars, "The answer is 42", and the rest of REWRITES: math-verify cannot read them
Wrong, because nobody does:
    1,2 or \{1,2\} for (1,2)        a list has no order. (1,2) for 1,2 stays right, and so does x=1,y=2 for (1,2)
    11 for 11_2, and 11_3 for 11_2  math-verify ignores the base
    1/2006! for 1/2004!             it rounds to 6 decimals; equal numbers must also agree to 1 part in 1,000
    7 0 for 0                       it multiplies numbers that stand side by side
    anything for an empty gold      the reason is then "no gold"
"""

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
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

LONGEST = 1000  # characters; a longer answer is not compared. MATH-500's longest gold answer has 53
TAIL = 2000  # characters at the end of a response that are searched for an answer without a box
MEMORY = 2 << 30  # bytes of address space per worker
UNGRADABLE = ("no answer", "no gold", "too long", "unparsable", "time limit", "crash")  # say nothing about the maths

# -----------------------------------------------------------------------------
# from a response to its answer

# \boxed{ or \fbox{ (group 1), a brace, or any other backslash with the character after it: \{ and \} are not braces.
BRACE = re.compile(r"(\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
# "answer is", "answer to this is:", "Answer:", a heading "Final Answer", <answer>, \boxed 5, GSM8K's last line #### 5
ANNOUNCEMENT = re.compile(
    r"(?im)\bans(?:wers?)?(?: (?:to|of|for) [^.:\n]{1,80}?)?\s*(?:\b(?:is|are|equals|(?:would|should|must) be)\b|[:=：])"
    r"|^[\s#>_]*(?:(?:the|my|final) )*answer\b(?=[^A-Za-z\n]*$)|\\f?boxed\b(?!\s*\{)|####(?=[^\n]*\Z)|<answer>"
)
DISPLAY = re.compile(r"(?s)(?:\$\$|\\\[)(.+?)(?:\$\$|\\\])")
DELIMITER = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
# A word after a number, but none that makes it another number: 5 million, 3 more than x.
NOUN = (
    r"(?!(?:and|or|plus|minus|times|over|mod(?:ulo)?|base|pi|sqrt|(?:sin|cos|tan|cot|sec|csc)h?|log|ln|percent(?:age)?"
    r"|if|hundred|thousand|[mbtr]+illion|dozen|factorial|squared|cubed|hal(?:f|ves)|third|quarter|root|more|less|than)"
    r"s?\b)[A-Za-z]{2,}"
)
# What a sentence says before its answer, and after it: 5, which is odd; 72 clips, altogether; 5 (five).
BEFORE = re.compile(
    r"[\s*_:：,}]*(?:not\b[^,;\n]*[,;]? (?:but|rather|it is|it's)\s+|(?:therefore|thus|then|hence|simply|just|exactly"
    rf"|the|option|choice|number|value|set|interval|point|equal to|given by|as follows|below)[,:]?\s+|an? (?={NOUN}))*"
)
AFTER = re.compile(
    r"[,;:]? (?:which|because|since|as|so|where|when|while|but|thus|hence|therefore|giving|i\.e|of (?:the|an?|all|them)"
    r"|and (?:the|it|this|that|so|we|he|she|they|there|I))\b.*|, not\b.*"
    rf"|(\d[^,;$]*)[,;$] {NOUN}[^\d\\$]*$| \((?!mod)[a-z]{{2,}}.*| [–—] {NOUN}.*"
)
DOUBT = re.compile(r"(?i)\b(?:not|cannot|never|unable|maybe|perhaps|guess|between|answer\w*)\b|n't\b|\?")
REMARK = re.compile(r"(?:not |in)?(?:correct|right|wrong|valid|clear|helpful|reasonable|unique)")  # I hope my answer is
# An expression in prose: formulas, and words without two letters in a row but for units (5cm, not 3rd).
FORMULA = r"\$(?:\\.|[^$\\\n])+\$(?!\d)|\\\([^\n]+?\\\)"  # there is none in: she pays $18 and he pays $20
LETTERS = r"\\[A-Za-z]+(?![A-Za-z])|[A-Za-z](?![A-Za-z])|(?<=[\d/])(?!st\b|nd\b|rd\b|th\b)[A-Za-z]{2,}(?![A-Za-z])"
TERM = rf"(?:{FORMULA}|(?!(?:a|A|I)(?!\S))(?:{LETTERS}|\\[^A-Za-z\s]|[^\sA-Za-z\\])+(?!\S))"
EXPRESSION = re.compile(rf"(?<!\S){TERM}(?:[.,;]?\s+(?:(?:and|or)\s+)?{TERM})*")


def extract(text: str, finished: bool = True) -> str | None:
    """The answer in a response, or None. Takes time linear in the length of the text.

    Only what follows the last </think> counts, and nothing in a <think> that is still open. The answer is the last
    non-empty \\boxed{}; else what the response announces as its answer, to the end of the line or sentence; else the
    last expression on the last line. A response that was cut off (finished is False) needs a box: the last number that
    it happened to write is no answer.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    box = last_box(text)
    if box is not None or not finished:
        return box
    tail = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)|`|</answer>", "", text[-TAIL:])  # bold type and code; 2**10 stays
    tail = DISPLAY.sub(lambda display: " $" + " ".join(display.group(1).split()).rstrip(".,") + "$ ", tail).strip()
    for announcement in reversed(list(ANNOUNCEMENT.finditer(tail))):
        phrase = first_phrase(tail[announcement.end() :])
        if phrase and not REMARK.fullmatch(phrase):
            is_wordy = len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}", phrase)) > 5
            is_denied = re.search(r"[\d\\]", phrase) and DOUBT.search(phrase)  # "does not exist" is an answer
            return None if is_wordy or is_denied else phrase
    return last_expression(tail)


def last_box(text: str) -> str | None:
    """What the last complete, non-empty \\boxed{} or \\fbox{} holds. One pass: a text may hold 100,000 open braces."""
    box = None
    open_braces = []  # (where its content starts, whether it opens a box)
    for match in BRACE.finditer(text):
        if match.group(1) or match.group() == "{":
            open_braces.append((match.end(), match.group() != "{"))
        elif match.group() == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and text[start : match.start()].strip():
                box = (start, match.start())
    return text[slice(*box)].strip() if box else None


def first_phrase(text):
    """The first line or sentence of a text, without what goes before and after the answer in it."""
    text = text[BEFORE.match(text).end() :]
    sentence = re.split(r"[.?](?=\s|$)", text.partition("\n")[0])[0]
    phrase = AFTER.sub(r"\1", " ".join(sentence.split()))
    return DELIMITER.sub("", phrase).lstrip(" ,;:*_").rstrip(" .,;:*_")


def last_expression(tail):
    """The last expression on the last line, whole: 12 + 3i, (1, 2), x = 70, the 72 of "72 clips". None if in doubt."""
    last_line = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s", "", tail.rpartition("\n")[2])  # without the mark of a list
    for sentence in reversed(re.split(r"(?<=[.?])\s+|[\u3000-\u9fff：，]+", last_line)):
        expressions = [text for text in EXPRESSION.findall(sentence) if re.search(r"\d|\$|\\\(|\([A-J]\)", text)]
        if expressions:
            expression = DELIMITER.sub("", re.sub(r"^(?:[-–:=,;.]+ |[A-Za-z] = (?=[^=]*$))+", "", expressions[-1]))
            expression = expression.rstrip(" .,;:!?*_")
            return expression if is_balanced(expression) and not DOUBT.search(sentence) else None
    return None


# -----------------------------------------------------------------------------
# from an answer to what math-verify reads

WRAPPER = r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm|bm|boldsymbol)\s*\{(.*)\}|\$(.*)\$|\\\((.*)\\\)|\*\*(.*)\*\*"
CHARACTERS = str.maketrans({"−": "-", "–": "-", "·": r"\cdot ", "⋅": r"\cdot ", "√": r"\sqrt ", "∞": r"\infty ",
    "∪": r"\cup ", "∈": r"\in ", "≈": r"\approx ", "°": r"^\circ ", "⁄": "/", "~": " "})  # fmt: skip
UNIT = rf"(?:(?=\s+\w{{3}}|\s*/\s*\w{{3}})[\s/]*{NOUN}|\s*(?:[ckm]m|km/h|[km]g|m[lL]|ft|in|yd|lb|oz|m/s))(?![A-Za-z])"
MORE_UNITS = rf"(?:\^\{{?\d\}}?|[\s/-]+(?:a|{NOUN})(?![A-Za-z]))*"
# Applied in this order: (pattern, replacement, example, what becomes of it).
REWRITES = [
    (r"^(?:\\bf|\\displaystyle)\b|(?:[\s.,;:]|\\[,;:!\s]|\\$|\\q?quad)+$", "", r"\bf 70.\ ", "70"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", "√(2)", r"\sqrt{2}"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", "2pi/3", r"2\pi /3"),
    (r"\\varnothing|\\\{\s+\\\}", r"\\emptyset", r"\varnothing", r"\emptyset"),
    (r"(?:\\left)?\\langle(.*?)(?:\\right)?\\rangle", r"(\1)", r"\langle 1, 2\rangle", "( 1, 2)"),
    (r"^(?:[A-Za-z]|\\[a-z]+)\s*\\in\b", "", r"x \in [0,1]", "[0,1]"),
    (r"^(?:\\text\w*\s*\{\s*)?\(?([A-J])\)?\s*\}?$", r"\1", r"\text{(C)}", "C"),
    # prose before the answer
    (r"^\\text\s*\{[^{}]*(?:\b(?:is|are|about|approximately|answer)|[:=,])\s*\}", "", r"\text{Answer: } 42", "42"),
    (r"^[^{}\\\d]*(?:\b(?:is|are|equals|about|approximately|roughly)\b|answer:):?\s+", "", "The answer is 42", "42"),
    (r"^(?:\\approx|\\sim|=)", "", r"\approx 10", "10"),
    # what a number counts
    (r"^(?:USD|EUR|GBP|Rs\.?)\s*(?=\d)|(?:\bUS)?\\?[$€£¥₹¢]|\\text\s*\{\s*[€£¥₹]\s*\}", "", "€18", "18"),
    (r"(?<=\d)(?:\s*\^?\s*\{?\\(?:circ|degree)\s*\}?\s*[CF]?|\^o)$", r"^\\circ", r"20^\circ C", r"20^\circ"),
    (rf"(?:(?<=[\d}}])|(?<=\\pi)){UNIT}{MORE_UNITS}$", "", "18 dollars a day", "18"),
    # ways to write a number
    (r"^([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)$", r"\1\\times 10^{\2}", "1e3", r"1\times 10^{3}"),
    (r"(?:^|(?<==)|(?<== ))([-+]?\d+)(?:\s|\\[ ,;])+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", "3 1/2", r"3\frac{1}{2}"),
    (r"(?<=\d)(?:,\\!|\{,\}|\\[,;: ]| )\s*(?=\d{3}(?!\d))", "", r"1\,024", "1024"),
    (r"(?<=\d)(?:_\{(?!10\})(\d+)\}|_(?!10\b)(\d+)|\s+\(?base (\d+)\)?)", r" u_{\1\2\3}", "11_2", "11 u_{2}"),
    (r"\^(-\d+)", r"^{\1}", "10^-3", "10^{-3}"),
    (r"^([^()\[\]]*)[)\]]$", r"\1", "5)", "5"),
    (r"^(?:\+|-(?=[0.]+$))?(-?)0*([0-9]+)(?:\.0*)?$", r"\1\2", "070.0", "70"),
    (r"(?<!frac \d)(?<=\d)\s+(?=\d[\d.\s]*$)", ", ", "7 0", "7, 0"),
]  # fmt: skip
CHOICE = r"(?:\\\w+\{)?\s*\(?([A-J])[).:](?:[\s,;:}]|\.(?!\d)|\\[ ,;:!])*(?![\s,;:}]|\.\D|(?:and|or|\(?[A-J])\b|$)"


def clean(answer: str) -> str:
    """The answer without its typography: math-verify cannot read `70.`, `\\mathbf{070}`, `1\\,024` or `90°`."""
    answer = re.sub("[⁺⁻⁰¹²³⁴-⁹]+", r"^{\g<0>}", answer)
    answer = re.sub("[₀-₉]+", r"_{\g<0>}", answer)
    answer = re.sub("[¼-¾⅐-⅞]", r" \g<0>", answer)  # 3½ is 3 1/2
    answer = unicodedata.normalize("NFKC", answer).translate(CHARACTERS).strip()
    while re.search(r"\d", answer):  # words keep their wrapper: math-verify reads \text{Evelyn} as one symbol
        wrapped = re.fullmatch(WRAPPER, answer, re.DOTALL)
        if wrapped is None or not is_balanced(wrapped[wrapped.lastindex]):  # \text{1}+\text{2} is not one wrapper
            break
        answer = wrapped[wrapped.lastindex].strip()
    for pattern, replacement, _, _ in REWRITES:
        answer = re.sub(pattern, replacement, answer).strip()
    return answer


def clean_pair(answer: str, gold: str) -> tuple[str, str]:
    """Both clean and alike: the letter or the value of a choice, as the gold answer is; points as vectors if one is."""
    answer, gold = clean(answer), clean(gold)
    choice = re.match(CHOICE, answer)
    if choice and re.fullmatch("[A-J]", gold):
        answer = choice.group(1)
    elif choice and is_balanced(answer[choice.end() :]):
        answer = clean(answer[choice.end() :])
    if "\\begin{" in answer + gold:
        answer, gold = as_vector(answer), as_vector(gold)
    return answer, gold


def as_vector(text):
    point = re.fullmatch(r"(?:\\left)?\((.*?)(?:\\right)?\)", text)
    return r"\begin{pmatrix}" + point.group(1).replace(",", r"\\") + r"\end{pmatrix}" if point else text


def is_balanced(text):
    """Whether every bracket in it has its partner, and no dollar sign is left."""
    braces = re.sub(r"\\[{}]|[^{}]", "", text)
    while "{}" in braces:
        braces = braces.replace("{}", "")
    is_paired = len(re.findall(r"[(\[]", text)) == len(re.findall(r"[)\]]", text))  # (0, 1] too
    return not braces and is_paired and not re.search(r"(?<!\\)\$", text)


def reason_at_sight(answer: str | None, gold: str) -> str | None:
    """The verdict's reason if no algebra is needed, else None."""
    if answer is None:
        return "no answer"
    if len(answer) > LONGEST:
        return "equal" if answer == gold else "too long"
    answer, gold = clean_pair(answer, gold)
    if not gold:
        return "no gold"
    if answer == gold:
        return "equal"
    if re.fullmatch("-?[0-9]+", answer) and re.fullmatch("-?[0-9]+", gold):
        return "different"
    return None


# -----------------------------------------------------------------------------
# worker processes: one line with an answer in, one line with the reason for its verdict out


def serve(seconds: int):
    """A worker: [answer, gold] lines in, lines with a reason out. Over `seconds` of CPU time for one, it dies."""
    replies = os.fdopen(os.dup(1), "w")
    for stream in (1, 2):  # math-verify and ANTLR print complaints
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse

    latex_only = [LatexExtractionConfig(boxed_match_priority=0)]  # SymPy would eval a plain-text expression
    for line in sys.stdin:
        cpu_limit = int(time.process_time()) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, resource.RLIM_INFINITY))
        texts = clean_pair(*json.loads(line))
        answer, gold = [parse(f"\\boxed{{{text}}}", latex_only, parsing_timeout=None) for text in texts]
        is_parsable = any(not isinstance(reading, str) for reading in answer)
        reason = "equal" if is_equal(gold, answer) else "different" if is_parsable else "unparsable"
        print(reason, file=replies, flush=True)


def is_equal(gold, answer) -> bool:
    """math-verify's verdict on what it parsed, [expression, text] or less, with this file's exceptions."""
    from math_verify import verify
    from sympy import Eq, FiniteSet, Interval, Rel, Tuple, UnevaluatedExpr, Union

    if len(gold) < 2 or len(answer) < 2:  # no expression
        return verify(gold, answer, timeout_seconds=None)
    # x >= 2 may stand for a set, but not x^2 >= 4: that may be the question.
    sides = [side for relation in answer[0].atoms(Rel) for side in relation.args]
    is_solved = bool(sides) and all(side.is_Symbol or not side.free_symbols for side in sides)
    if is_solved and isinstance(gold[0], Union) and isinstance(answer[0], FiniteSet):  # x < 1 or x > 3
        answer = [Union(*(relation.as_set() for relation in answer[0].args))]
    if not verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=is_solved):
        return False
    gold, answer = gold[0], answer[0]
    if isinstance(gold, (Tuple, Interval)) and isinstance(answer, FiniteSet):
        return all(isinstance(element, Eq) for element in answer.args)
    for number in (gold, answer):
        if not getattr(number, "is_number", False) or number.has(UnevaluatedExpr):  # 50% may be 50 or 0.5
            return True
    return gold == answer or bool(abs((gold - answer).evalf()) <= 1e-3 * abs(gold.evalf()))


class Grader:
    """Verdicts from a few worker processes, which start when first needed and are replaced when they die.

    workers: 0 for one per core, at most 8. seconds: CPU time per answer. Equal (answer, gold) pairs are graded once.
    """

    def __init__(self, workers: int = 0, seconds: int = 3):
        self.workers, self.seconds = workers or min(8, os.cpu_count() or 1), seconds
        self.reasons = {}  # (answer, gold) -> reason
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
        reasons = {pair: reason_at_sight(*pair) for pair in pairs if pair not in self.reasons}
        hard = [pair for pair, reason in reasons.items() if reason is None]
        with ThreadPoolExecutor(self.workers) as threads:
            reasons.update(zip(hard, threads.map(self._ask, hard), strict=True))
        self.reasons |= reasons
        return [(pair[0], self.reasons[pair] == "equal", self.reasons[pair]) for pair in pairs]

    def _ask(self, pair, retries=1):
        """A worker's reason for its verdict on (answer, gold). A worker that something else kills, such as the OOM killer, is asked again."""
        worker = self.idle.get()
        if worker is None:
            command = [sys.executable, __file__, str(self.seconds)]
            # a session of its own, out of reach of a Ctrl-C that the caller may survive
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            self.started.append(worker)
        with suppress(BrokenPipeError):  # it died while it was idle, and gives no reply
            worker.stdin.write(json.dumps(pair).encode() + b"\n")  # ASCII: lone surrogates and NULs are escaped
            worker.stdin.flush()
        ready, _, _ = select.select([worker.stdout], [], [], 60 + 10 * self.seconds)  # it may hang and use no CPU
        reply = worker.stdout.readline() if ready else b""
        if reply.endswith(b"\n"):
            self.idle.put(worker)
            return reply.decode().strip()
        worker.kill()
        worker.communicate()
        self.started.remove(worker)
        self.idle.put(None)
        if ready and worker.returncode == -signal.SIGKILL and retries:
            return self._ask(pair, retries - 1)
        is_slow = not ready or worker.returncode == -signal.SIGXCPU
        return "time limit" if is_slow else "crash"


if __name__ == "__main__":
    serve(int(sys.argv[1]))
