r"""Grades responses: takes the final answer out of a response and compares it with the gold answer by math-verify.

    with Grader() as grader:
        verdicts = grader.grade([(text, gold, finished), ...])  # [(answer or None, correct, reason), ...]

math-verify builds SymPy expressions out of whatever a model wrote, so an answer may ask for 10^10^10 digits, a parse
tree a thousand levels deep, or all the memory there is. Worker processes therefore compare the answers, under limits of
CPU time and memory that the kernel enforces. One that dies is replaced, and its answer counts as wrong. CPU time, not
wall time: a busy machine must not change a verdict. Nothing in an answer is evaluated as Python.

The verdict is math-verify's, with these exceptions. Right, because everyone reads them as equal:
    x \ge 2 for [2,\infty)          only a gold inequality is a set for math-verify. x<1 or x>3 is a union
    3+4i, \log_2 8, 12.5% for 12.5  its i is a variable, its \log_2 8 is not 3, and its 12.5% is 0.125 only
    a column vector for a tuple     math-verify takes it for a matrix
    (B) 12 for (B), and for 12      multiple choice: the gold answer says whether the letter or the value counts
    3:30 p.m., 5 (mod 7), P(1,2)    for 3:30, 5 and (1,2)
    90°, ½, ５, 3 1/2, 1e3, €18, 18 dollars, "The answer is 42", and the rest of REWRITES: math-verify cannot read them
Wrong, because nobody does:
    1,2 or \{1,2\} for (1,2)        a list has no order. (1,2) for 1,2 stays right, and so does x=1,y=2 for (1,2)
    11 for 11_2, and 11_3 for 11_2  math-verify ignores the base
    1/2006! for 1/2004!             it rounds to 6 decimals; equal numbers must also agree to 1 part in 1,000
    1.414214 for \sqrt{2}           for the same reason. 0.333333 for 1/3 stays right
    y=1,x=2 for (1,2)               it reads the equations in the order in which they stand
    7 0 for 0                       it multiplies numbers that stand side by side
    anything for an empty gold      the reason is then "no gold"
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
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

VERSION = 2  # of the verdicts: one more with every change after which an answer may be graded otherwise
LONGEST = 1000  # characters; a longer answer is not compared. MATH-500's longest gold answer has 53
TAIL = 2000  # characters at the end of a response that are searched for an answer without a box
MEMORY = 2 << 30  # bytes of address space per worker
UNGRADABLE = ("no answer", "no gold", "too long", "unparsable", "time limit", "crash")  # say nothing about the maths

# -----------------------------------------------------------------------------
# from a response to its answer

# \boxed{, \fbox{ or boxed{ (group 1), a brace, or any other backslash with the character after it: \{ and \} are not braces.
BRACE = re.compile(r"((?:\\{1,2}(?:boxed|f(?:rame)?box)|\bboxed)\s*\{)|\\.|[{}]", re.DOTALL)
# "answer is", "answer to this is:", "Answer:", a heading "Final Answer", <answer>, \boxed 5, GSM8K's last line #### 5
ANNOUNCEMENT = re.compile(
    r"(?im)\b(?:ans(?:wers?)?|(?:correct|right) (?:option|choice))(?: (?:to|of|for) [^.:\n]{1,80}?)?\s*"
    r"(?:\b(?:is|are|equals|(?:would|should|must) be)\b|[:=：])"
    r"|^[\s#>_]*(?:(?:the|my|final) )*answer\b(?=[^A-Za-z\n]*$)|\\f?boxed(?![A-Za-z]|\s*\{)|####(?=[^\n]*\Z)|<answer>"
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
# A word with letters that English and formulas do not have (Ответ, respuesta está, 答案), up to the number after it.
FOREIGN = r"[A-Za-z]*(?:(?![\d\u066a-\u066c])[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0400-\u1fff\u3000-\u9fff\uac00-\ud7af：，])+[A-Za-z]*"


def extract(text: str, finished: bool = True) -> str | None:
    """The answer in a response, or None. Takes time linear in the length of the text.

    Only what follows the last </think> counts, and nothing in a <think> that is still open. The answer is the last
    non-empty \\boxed{}; else what the response announces as its answer, to the end of the line or sentence; else the
    last expression on the last line. A response that was cut off (finished is False) needs a box: the last number that
    it happened to write is no answer.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    answer = first_question(text)
    text, finished = answer, finished or answer != text
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


def first_question(text: str) -> str:
    """What precedes another question in data.py's plain template, with which a base model goes on after its answer."""
    answer, found, rest = text.partition("\nQuestion:")
    is_next = found and answer.strip() and (not rest.strip() or "put your final answer within" in rest)
    return answer if is_next else text


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
    for sentence in reversed(re.split(rf"(?<=[.?])\s+|{FOREIGN}", last_line)):
        expressions = [text for text in EXPRESSION.findall(sentence) if re.search(r"\d|\$|\\\(|\([A-J]\)", text)]
        if expressions:
            expression = DELIMITER.sub("", re.sub(r"^(?:[-–:=,;.]+ |[A-Za-z] = (?=[^=]*$))+", "", expressions[-1]))
            expression = expression.rstrip(" .,;:!?*_")
            return expression if is_balanced(expression) and not DOUBT.search(sentence) else None
    return None


# -----------------------------------------------------------------------------
# from an answer to what math-verify reads

TEXT = r"\\(?:text\w*|mathrm|mbox)\s*\{\s*"
WRAPPER = (
    r"\\(?:boxed|fbox|text(?:bf|it|rm)?|math(?:bf|rm|it|sf)|bm|boldsymbol|emph|underline|(?:text)?color\s*\{\w+\})\s*\{(.*)\}"
    r"|\$(.*)\$|\\\((.*)\\\)|\*\*(.*)\*\*|`(.*)`"
)
CHARACTERS = str.maketrans({"−": "-", "–": "-", "·": r"\cdot ", "⋅": r"\cdot ", "√": r"\sqrt ", "∞": r"\infty ",
    "∪": r"\cup ", "∈": r"\in ", "≈": r"\approx ", "°": r"^\circ ", "⁄": "/", "~": " ",
    "٫": ".", "٬": ",", "،": ",", "٪": r"\%"})  # fmt: skip
SPACE = r"(?:\s|\\[ ,;:!])*"
UNIT = rf"(?:(?=\s+\w{{3}}|\s*/\s*\w{{3}})[\s/]*{NOUN}|\s*(?:[ckm]m|km/h|[km]g|m[lL]|ft|in|yd|lb|oz|m/s))(?![A-Za-z])"
MORE_UNITS = rf"(?:\^\{{?\d\}}?|[\s/-]+(?:a|{NOUN})(?![A-Za-z]))*"
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
NUMERALS = "zero one two three four five six seven eight nine ten".split()  # of bases
FUNCTIONS = "log|ln|exp|(?:arc)?(?:sin|cos|tan)|cot|sec|csc"


def as_fraction(match):
    r"""0.1\overline{6}, 0.1(6) or 0.1666... as 16 - 1 over 90."""
    whole, start, *periods = match.groups("")
    period = max(periods)  # the others are empty
    numerator = int(whole + start + period) - int("0" + whole + start)
    return rf"\frac{{{numerator}}}{{{'9' * len(period) + '0' * len(start)}}}"


# Applied in this order: (pattern, replacement, example, what becomes of it).
REWRITES = [
    (r"(\d*)\.(\d*?)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\)$|(\d{1,9}?)\5{2,}(?:\\[lc]?dots|\.{3}))", as_fraction, r"0.1\overline{6}", r"\frac{15}{90}"),
    (r"^\\(?:bf|rm|displaystyle|[lL]arge|color\s*\{\w+\})(?![A-Za-z])|(?:[\s.,;:]|\\[,;:!\s]|\\+$|\\q?quad|\\checkmark)+$", "", r"\bf 70.\ ", "70"),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])(?:\.(?!\d))?", "", r"\left(1,2\right)", "(1,2)"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", "√(2)", r"\sqrt{2}"),
    (r"(?<!frac)\\sqrt\s*(\d{2,})", r"\\sqrt{\1}", "3√13", r"3\sqrt{13}"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", "2pi/3", r"2\pi /3"),
    (rf"(?<![A-Za-z\\])({FUNCTIONS})(?=[\s_(\d])(\d+(?=\())?", lambda m: rf"\{m[1]}" + (f"_{{{m[2]}}}" if m[2] else ""), "log2(8)", r"\log_{2}(8)"),
    (rf"(\\(?:{FUNCTIONS})\s*[({{]?\s*)(\d+(?:\.\d+)?)\s*\^\s*\{{?\s*\\circ\s*\}}?", r"\1{\\frac{\2\\pi}{180}}", r"\sin 30^\circ", r"\sin {\frac{30\pi}{180}}"),
    (rf"(?<!\\)({TEXT})?((?:negative|minus)\s+)?\binf(?:inity)?\b(?(1)\s*\}})", lambda m: ("-" if m[2] else "") + r"\infty ",
        r"\text{negative infinity}", r"-\infty"),
    (r"\\(?:mathrm|text|mathit)\s*\{\s*([ie])\s*\}|\\([ij])math(?![a-z])", r"\1\2", r"3+4\mathrm{i}", "3+4i"),
    (rf"\\varnothing|\\\{{\s+\\\}}|^(?:{TEXT})?[Nn]o (?:real )?solutions?\}}?$", r"\\emptyset", r"\varnothing", r"\emptyset"),
    (rf"^(?:{TEXT})?[Aa]ll reals?(?: numbers)?\}}?$", r"(-\\infty,\\infty)", r"\text{all reals}", r"(-\infty,\infty)"),
    (r"\\langle(.*?)\\rangle", r"(\1)", r"\langle 1, 2\rangle", "( 1, 2)"),
    (r"\\([lr])brace(?![a-z])", lambda m: r"\{" if m[1] == "l" else r"\}", r"\lbrace 1\rbrace", r"\{ 1\}"),
    (r"^\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|:|\|)(.*)\\\}$", r"\1", r"\{x \mid x>2\}", "x>2"),
    (rf"^([(\[]-\\infty[^()\[\]]*[)\]])\s*({TEXT})?or(?(2)\s*\}})\s*", r"\1\\cup ", r"(-\infty,1) or (2,3)", r"(-\infty,1)\cup (2,3)"),
    (r"^(?:[A-Za-z]|\\[a-z]+)\s*\\in\b", "", r"x \in [0,1]", "[0,1]"),
    (r"^(?:\\text\w*\s*\{\s*)?(?:[Oo]ption |[Cc]hoice )?\(?([A-J])\)?\s*\}?$", r"\1", r"\text{(C)}", "C"),
    # prose before the answer
    (r"^\\text\s*\{[^{}]*(?:\b(?:is|are|about|approximately|answer)|[:=,])\s*\}", "", r"\text{Answer: } 42", "42"),
    (r"^[^{}\\\d]*(?:\b(?:is|are|equals|about|approximately|roughly)\b|answer:):?\s+", "", "The answer is 42", "42"),
    (r"^(?:\\approx|\\sim|=)", "", r"\approx 10", "10"),
    # what a number counts
    (r"^(?:USD|EUR|GBP|Rs\.?)\s*(?=\d)|(?:\bUS)?\\?[$€£¥₹¢]|\\text\s*\{\s*[€£¥₹]\s*\}", "", "€18", "18"),
    (r"(?<=\d)(?:\s*\^?\s*\{?\\(?:circ|degree)\s*\}?\s*[CF]?|\^o)$", r"^\\circ", r"20^\circ C", r"20^\circ"),
    (rf"(?<=\d)\s*\^?\s*(\{{)?\s*({TEXT})?(?:st|nd|rd|th)(?![A-Za-z])(?(2)\s*\}})(?(1)\s*\}})", "", r"7^{\text{th}}", "7"),
    (rf"(?<=[\d}}]){SPACE}({TEXT})?({'|'.join(POWERS)})s?\b(?(1)[^{{}}]*\}})", lambda m: rf"\times 10^{{{POWERS[m[2]]}}}", r"5\text{ million}", r"5\times 10^{6}"),
    (rf"(?:(?<=[\d}}])|(?<=\\pi)){UNIT}{MORE_UNITS}$", "", "18 dollars a day", "18"),
    (r"\\text\w*\s*\{(\s*or\s+[^{}]*\w[^{}]*)\}", r"\1", r"5\text{ or more}", "5 or more"),
    (rf"{SPACE}(?=\\?%)", "", r"12.5\,\%", r"12.5\%"),
    # ways to write a number
    (r"^([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)$", r"\1\\times 10^{\2}", "1e3", r"1\times 10^{3}"),
    (r"(?<=\d)\s*[xX]\s*(?=10\^)", r"\\times ", "3 x 10^5", r"3\times 10^5"),
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^", "2**10", "2^10"),
    (r"(?:^|(?<==)|(?<== ))([-+]?\d+)(?:\s|\\[ ,;])+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", "3 1/2", r"3\frac{1}{2}"),
    (r"(?<=\d)(?:,\\!|\{,\}|\\text\s*\{,\}|\\[,;: ]| )\s*(?=\d{3}(?!\d))", "", r"1\,024", "1024"),
    (rf"^(?:\(|{TEXT})(\d+)[)}}](?=_)", r"\1", "(11)_2", "11 u_{2}"),
    (rf"(?<=\d)\s*({TEXT})?(\()?(?:in )?base[\s-]*(?(1)\}}?)\s*(\d+)(?(2)\))(?(1)\}}?)$", r"_{\3}", r"11\text{ (base 2)}", "11 u_{2}"),
    (rf"(?<=\d)(?<!log_\d)_\s*(\{{)?\s*({TEXT})?\(?(?!10\b)(\d+|{'|'.join(NUMERALS[2:])})\)?(?(2)\s*\}})(?(1)\s*\}})",
        lambda m: f" u_{{{NUMERALS.index(m[3]) if m[3] in NUMERALS else m[3]}}}", "11_2", "11 u_{2}"),
    (r"\^(-\d+)", r"^{\1}", "10^-3", "10^{-3}"),
    (r"^([^()\[\]]*)[)\]]$", r"\1", "5)", "5"),
    (r"^(?:\+|-(?=[0.]+$))?(-?)0*([0-9]+)(?:\.0*)?$", r"\1\2", "070.0", "70"),
    (r"(?<!frac \d)(?<!_\d)(?<=\d)\s+(?=\d[\d.\s]*$)", ", ", "7 0", "7, 0"),
]  # fmt: skip
CHOICE = r"(?:\\\w+\{)?\s*\(?([A-J])[).:](?:[\s,;:}]|\.(?!\d)|\\[ ,;:!])*(?![\s,;:}]|\.\D|(?:and|or|\(?[A-J])\b|$)"


def clean(answer: str) -> str:
    """The answer without its typography: math-verify cannot read `70.`, `\\mathbf{070}`, `1\\,024` or `90°`."""
    answer = re.sub("[⁺⁻⁰¹²³⁴-⁹]+", r"^{\g<0>}", answer)
    answer = re.sub("[₀-₉]+", r"_{\g<0>}", answer)
    answer = re.sub("[¼-¾⅐-⅞]", r" \g<0>", answer)  # 3½ is 3 1/2
    answer = unicodedata.normalize("NFKC", answer).translate(CHARACTERS).strip()
    answer = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), answer)  # 42 in any script
    while re.search(r"\d", answer):  # words keep their wrapper: math-verify reads \text{Evelyn} as one symbol
        wrapped = re.fullmatch(WRAPPER, answer, re.DOTALL)
        if wrapped is None or not is_balanced(wrapped[wrapped.lastindex]):  # \text{1}+\text{2} is not one wrapper
            break
        answer = wrapped[wrapped.lastindex].strip()
    for pattern, replacement, _, _ in REWRITES:
        answer = re.sub(pattern, replacement, answer).strip()
    return answer


HALF_DAY = rf"(?<=\d){SPACE}({TEXT})?([AaPp])\.?\s?[Mm]\b\.?(?(1)\s*\}})$"
MODULUS = rf"(?<=\d){SPACE}(?:\\p?mod(?![a-z])|{TEXT}\(?mod\b|\(?mod\b).*$"


def clean_pair(answer: str, gold: str) -> tuple[str, str]:
    """Both clean and alike: what the gold answer leaves to the question, such as 3:30 p.m., (mod 7) or P(1,2), is left out."""
    answer, gold = clean(answer), clean(gold)
    answer = choose(answer, gold)
    gold = choose(gold, answer)
    if "\\begin{" in answer + gold:
        answer, gold = as_vector(answer), as_vector(gold)
    if re.search(HALF_DAY, answer) and re.search(HALF_DAY, gold):
        answer, gold = (re.sub(HALF_DAY, lambda m: f" u_{{{m[2].lower()}}}", text) for text in (answer, gold))
    answer, gold = (re.sub(HALF_DAY, "", text) for text in (answer, gold))
    if "mod" not in gold:
        answer = re.sub(MODULUS, "", answer)
    if gold.startswith("("):
        answer = re.sub(r"^[A-Z]\s*(?=\([^()]*\)$)", "", answer)
    return answer, gold


def choose(text, other):
    """Of a choice such as (B) 12: the letter, if the other answer is one, else the value."""
    choice = re.match(CHOICE, text)
    if choice and re.fullmatch("[A-J]", other):
        return choice.group(1)
    return clean(text[choice.end() :]) if choice and is_balanced(text[choice.end() :]) else text


def as_vector(text):
    point = re.fullmatch(r"\((.*?)\)", text)
    return r"\begin{pmatrix}" + point.group(1).replace(",", r"\\") + r"\end{pmatrix}" if point else text


def in_words(text):
    """An answer of one or more words without its typography, case and article; "" if it is a formula."""
    text = re.sub(rf"{TEXT}([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"^(?:an?|the) ", "", " ".join(text.lower().split())).rstrip(".")
    return text if re.fullmatch(r"[a-z]{3}[a-z' -]*", text) else ""


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
    if answer == gold or (in_words(gold) and in_words(answer) == in_words(gold)):
        return "equal"
    if re.fullmatch("-?[0-9]+", answer) and re.fullmatch("-?[0-9]+", gold):
        return "different"
    return None


# -----------------------------------------------------------------------------
# worker processes: one line with an answer in, one line with the reason for its verdict out


SELF_TEST = [(r"\frac{1}{2}", "0.5", "equal"), ("x+1", "1+x", "equal"), ("x+2", "1+x", "different")]
LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_AS": MEMORY, "RLIMIT_CPU": 60}  # the last one is for the start


def serve(seconds: int):
    """A worker. It says "ready" and what limits it does without, or else what is wrong. Then it answers a line [answer, gold]
    with a line that has the reason. Over `seconds` of CPU time for one, it dies.
    """
    replies = os.fdopen(os.dup(1), "w")
    for stream in (1, 2):  # math-verify and ANTLR print complaints
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    refused = [name for name, amount in LIMITS.items() if not set_limit(name, amount)]
    state = f"ready, but this system refuses to set {' and '.join(refused)}" if refused else "ready"
    try:
        wrong = [pair for *pair, reason in SELF_TEST if reason_by_algebra(*pair) != reason]
        state = f"its verdict on {wrong[0]} is wrong" if wrong else state
    except Exception as error:
        state = repr(error)
    print(state, file=replies, flush=True)
    for line in sys.stdin:
        set_limit("RLIMIT_CPU", int(time.process_time()) + seconds + 1)
        print(reason_by_algebra(*json.loads(line)), file=replies, flush=True)


def set_limit(name, amount) -> bool:
    """Limits this process to the amount, or to the system's own limit if that is less. False if it refuses, as macOS does."""
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))
        return True
    return False


def reason_by_algebra(answer: str, gold: str) -> str:
    """The verdict's reason, from math-verify."""
    from math_verify import LatexExtractionConfig, parse

    latex_only = [LatexExtractionConfig(boxed_match_priority=0)]  # SymPy would eval a plain-text expression
    texts = clean_pair(answer, gold)
    answer, gold = [parse(f"\\boxed{{{text}}}", latex_only, parsing_timeout=None) for text in texts]
    is_parsable = any(not isinstance(reading, str) for reading in answer)
    return "equal" if is_equal(gold, answer) else "different" if is_parsable else "unparsable"


def is_equal(gold, answer) -> bool:
    """math-verify's verdict on what it parsed, [expression, text] or less, with this file's exceptions."""
    from math_verify import verify
    from math_verify.grader import get_pct_val
    from sympy import Eq, FiniteSet, Interval, Set, Tuple, UnevaluatedExpr

    if len(gold) < 2 or len(answer) < 2:  # no expression
        return verify(gold, answer, timeout_seconds=None)
    (gold, gold_text), (answer, answer_text) = gold, answer
    gold, answer = with_numbers(gold), with_numbers(answer)
    sets = solution_set(gold), solution_set(answer)
    if all(isinstance(x, Set) for x in sets) and len(gold.free_symbols | answer.free_symbols) < 2:
        gold, answer = sets
    if isinstance(gold, (Tuple, Interval)) and isinstance(answer, FiniteSet):
        equations = answer._unsorted_args
        if not all(isinstance(equation, Eq) for equation in equations):
            return False
        if all(len(str(equation.lhs)) == 1 for equation in equations):  # y = 2, x = 1 is (1, 2)
            answer = type(answer)(*sorted(equations, key=lambda equation: str(equation.lhs)))
    if isinstance(answer, FiniteSet) and getattr(gold, "is_number", False):  # 1/2 or 0.5
        return all(verify(gold, element, timeout_seconds=None) for element in answer.args)
    if not verify([gold, gold_text], [answer, answer_text], timeout_seconds=None):
        bare = get_pct_val(gold, gold), get_pct_val(answer, answer)  # 12.5% may be 12.5, too
        return (bare[0] is gold) != (bare[1] is answer) and verify(*bare, timeout_seconds=None)
    for number in (gold, answer):
        if not getattr(number, "is_number", False) or number.has(UnevaluatedExpr):  # 50% may be 50 or 0.5
            return True
    if answer.is_Float and gold.doit().is_rational is False:  # a decimal is never the square root of 2
        return False
    return gold == answer or bool(abs((gold - answer).doit().evalf()) <= 1e-3 * abs(gold.evalf()))


def with_numbers(reading):
    """An expression with i as the imaginary unit, and logarithms to a base as quotients, which SymPy can evaluate."""
    from sympy import I, log

    numbers = {symbol: I for symbol in reading.free_symbols if symbol.name == "i"}
    numbers |= {term: log(*term.args) for term in reading.atoms(log) if len(term.args) == 2}
    return reading.xreplace(numbers) if numbers else reading


def solution_set(reading):
    """The numbers that solved inequalities allow, as a set; else the reading. x >= 2 is solved, x^2 >= 4 may be the question."""
    from sympy import Eq, FiniteSet, Rel, Union

    relations = reading.args if isinstance(reading, FiniteSet) else (reading,)  # x < 1 or x > 3
    sides = [side for relation in reading.atoms(Rel) for side in relation.args]
    is_solved = bool(sides) and all(side.is_Symbol or not side.free_symbols for side in sides)
    if not is_solved or reading.atoms(Eq):
        return reading
    with suppress(Exception):  # there are many kinds
        return Union(*(relation.as_set() for relation in relations))
    return reading


warn_once = functools.cache(functools.partial(print, file=sys.stderr, flush=True))


class Grader:
    """Verdicts from a few worker processes, which start when first needed and are replaced when they die.

    workers: 0 for one per core, at most 8. seconds: CPU time per answer. Equal (answer, gold) pairs are graded once.
    """

    def __init__(self, workers: int = 0, seconds: int = 3):
        self.workers, self.seconds = workers or min(8, os.cpu_count() or 1), seconds
        self.reasons = {}  # (answer, gold) -> reason
        self.started = []  # the processes that are alive
        self.idle = queue.LifoQueue()  # of processes; None is a worker that is yet to be started
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
        if hard and not self.started:
            self.check()
        with ThreadPoolExecutor(self.workers) as threads:
            reasons.update(zip(hard, threads.map(self._ask, hard), strict=True))
        self.reasons |= reasons
        return [(pair[0], self.reasons[pair] == "equal", self.reasons[pair]) for pair in pairs]

    def check(self):
        """Starts a worker now. ValueError if it cannot tell right from wrong: better before the first sample than after the last."""
        self.idle.put(self._next_worker())

    def _next_worker(self):
        worker = self.idle.get()
        if worker:
            return worker
        command = [sys.executable, __file__, str(self.seconds)]
        # a session of its own, out of reach of a Ctrl-C that the caller may survive
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.started.append(worker)
        ready, _, _ = select.select([worker.stdout], [], [], 300)  # its imports may come over a slow network
        state = worker.stdout.readline().decode().strip() if ready else "its worker does not start within 300 s"
        if not state.startswith("ready"):
            self._end(worker)
            raise ValueError(f"the grader does not work here: {state or 'its worker crashes'}")
        if state != "ready":
            warn_once(f"warning: the grader is {state}")
        return worker

    def _end(self, worker):
        worker.kill()
        worker.communicate()
        self.started.remove(worker)
        self.idle.put(None)

    def _ask(self, pair, retries=1):
        """A worker's reason for its verdict on (answer, gold). A worker that something else kills, such as the OOM killer, is asked again."""
        worker = self._next_worker()
        with suppress(BrokenPipeError):  # it died while it was idle, and gives no reply
            worker.stdin.write(json.dumps(pair).encode() + b"\n")  # ASCII: lone surrogates and NULs are escaped
            worker.stdin.flush()
        ready, _, _ = select.select([worker.stdout], [], [], 60 + 10 * self.seconds)  # it may hang and use no CPU
        reply = worker.stdout.readline() if ready else b""
        if reply.endswith(b"\n"):
            self.idle.put(worker)
            return reply.decode().strip()
        self._end(worker)
        if ready and worker.returncode == -signal.SIGKILL and retries:
            return self._ask(pair, retries - 1)
        is_slow = not ready or worker.returncode == -signal.SIGXCPU
        return "time limit" if is_slow else "crash"


if __name__ == "__main__":
    serve(int(sys.argv[1]))
