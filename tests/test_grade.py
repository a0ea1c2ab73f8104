"""grade.py on surface forms, hostile answers and real problems. Run: python -m pytest tests/test_grade.py"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, SHARED

import data
from support.grade import LONGEST, REWRITES, TAIL, UNGRADABLE, Grader, clean, extract

DATA = SHARED / "data"

# ten ways to write an integer, and more
FORMS = [
    "70", "070", "70.", "70.0", "$70$", r"\text{70}", r"\textbf{70}", r"\mathbf{070}", r"70^\circ", r"70^{\circ}", r"x = 70",
    r"m+n=70", r"70 \text{ degrees}", r"\$70", r"\(70\)", r"\boxed{70}", r"\frac{140}{2}", r"7 \times 10", r"\textbf{(C)}\ 70",
    r"\textbf{(C) }70", "70,", r"70\ ", r"70~", r"\bf 70", "**70**", "+70", r"\left(70\right)", r"\displaystyle 70", "70 cm",
]  # fmt: skip
THOUSAND = ["1024", "1,024", "1{,}024", r"1\,024", "1 024", r"1,\!024", "1024.00", "01024", "2^{10}"]
WRONG = ["-70", "0.70", "700", "7", "7 0", r"\frac{70}{2}", "70x", "71", "70, 71", r"\text{seventy}", "(70, 70)"]


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


def grade(grader, answers, gold):
    return grader.grade([(f"So it is \\boxed{{{answer}}}.", gold, True) for answer in answers])


def problems(name):
    if not (DATA / name).exists():
        pytest.skip(f"needs {name} in ../shared/data, which does not come with the repository")
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def test_an_integer_in_any_usual_form_is_right_and_another_number_is_wrong(grader):
    for forms, gold, expected in ((FORMS, "70", True), (THOUSAND, "1024", True), (WRONG, "70", False)):
        found = {form: verdict[1] for form, verdict in zip(forms, grade(grader, forms, gold), strict=True)}
        assert found == dict.fromkeys(forms, expected)


def test_every_aime_and_amc_answer_is_right_in_every_form(grader):
    rows = [row for name in ("aime24", "aime25", "amc23") for row in problems(f"{name}.jsonl")]
    golds = [str(int(float(row["answer"]))) for row in rows]
    forms = [
        "0%s", "%s.", "%s.0", "$%s$", r"\text{%s}", r"%s^\circ", r"\textbf{%s}", "x=%s", r"\(%s\)", r"%s\text{ units}",
    ]  # fmt: skip
    cases = [
        (f"\\boxed{{{form % gold}}}", row["answer"], True)
        for row, gold in zip(rows, golds, strict=True)
        for form in forms
    ]
    wrong = [case for case, verdict in zip(cases, grader.grade(cases), strict=True) if not verdict[1]]
    assert not wrong


def test_all_math500_solutions_are_right_and_the_next_problems_answer_is_wrong_unless_equal(grader):
    rows = problems("math500.jsonl")
    verdicts = grader.grade([(row["solution"], row["answer"], True) for row in rows])
    assert sum(v[1] for v in verdicts) == 500
    pairs = list(zip(rows, rows[1:] + rows[:1], strict=True))
    verdicts = grader.grade([(row["solution"], other["answer"], True) for row, other in pairs])
    equal = [(a["answer"], b["answer"]) for (a, b), v in zip(pairs, verdicts, strict=True) if v[1]]
    assert equal == [("5", "x=5"), ("7", "7"), ("3", "3")]


def test_math500_answers_are_equal_to_themselves_by_algebra_too(grader):
    """The same text is right at sight, so this asks a worker directly."""
    golds = [row["answer"] for row in problems("math500.jsonl")[:150]]
    assert [gold for gold in golds if grader._ask((gold, gold)) != "equal"] == []


def test_mathematically_equal_answers_are_right(grader):
    equal = [
        (r"\dfrac12", r"\frac{1}{2}"), ("0.5", r"\frac{1}{2}"), (r"\sqrt{2}/2", r"\frac{1}{\sqrt2}"), ("3,5,7", "7,5,3"),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"), (r"x \in [-2,7]", "[-2,7]"), ("Evelyn", r"\text{Evelyn}"),
        ("C", r"\text{(C)}"), ("(x+1)^2", "x^2+2x+1"),
    ]  # fmt: skip
    different = [
        ("2k", "2k+2"), ("1.4142", r"\sqrt{2}"), ("(1,2)", "(2,1)"), ("Ann", r"\text{Evelyn}"), ("[0,1)", "[0,1]"),
    ]  # fmt: skip
    verdicts = grader.grade([(f"\\boxed{{{a}}}", gold, True) for a, gold in equal + different])
    assert [v[1] for v in verdicts] == [True] * len(equal) + [False] * len(different)


def test_the_last_complete_box_is_the_answer():
    assert extract(r"\boxed{1} then \boxed{2}") == "2"
    assert extract(r"\boxed{\frac{1}{\{2\}}}") == r"\frac{1}{\{2\}}"
    assert extract(r"\boxed{5} and \boxed{cut off") == "5"
    assert extract(r"\boxed{7}, in the form \boxed{}") == "7"
    assert extract(r"} { \boxed{8} }") == "8"
    assert extract(r"\fbox{9}") == "9"


def test_without_a_box_the_stated_answer_counts_only_if_the_response_ended():
    stated = [
        "The answer is 70.", "The answer is $70$.\nDone.", "**Answer:** 70", "so we get x = 70.", r"Answer: \(70\)",
    ]  # fmt: skip
    for text in stated:
        assert clean(extract(text)) == "70", text
        assert extract(text, finished=False) is None
    assert extract(r"\boxed{70} but wait", finished=False) == "70"
    assert extract("I do not know.") is None
    assert extract("") is None


def test_the_first_answer_counts_if_another_question_follows():
    """A base model goes on in the plain template; the sampler stops at its first words."""
    again = data.TEXT_TEMPLATES["plain"].replace("{question}", "What is 10-6?")
    stopped = again[: again.index(" What")]
    for answer in (r" 2+3 = \boxed{5}.", " The answer is 5.", "It is x = 5"):
        for rest in (again + r" \boxed{4}", again + " The answer is 4.", stopped):
            assert extract(f"{answer}\n\n{rest}", finished=False) == "5"
    restated = "I restate it.\nQuestion: what is 2+3?\nAnswer: 5"  # in a chat; nothing was answered before
    assert extract(restated) == "5" and extract(again + " The answer is 4.") == "4"


def test_only_what_follows_the_reasoning_is_graded(grader):
    right = [
        (r"<think>\boxed{5}</think>\boxed{7}", "7", True), (r"maybe \boxed{5}</think>The answer is 7.", "7", True),
        ("<think>5</think> or <think>6</think>The answer is 7.", "7", True), (r"<think></think>\boxed{7}", "7", False),
        (r"\boxed{7} <think>or \boxed{8}", "7", True),
    ]  # fmt: skip
    wrong = [
        (r"<think>\boxed{5}</think>The answer is 7.", "5", True), (r"<think>\boxed{5}</think>", "5", True),
        (r"<think>maybe \boxed{5}", "5", False), ("<think>The answer is 5.", "5", True),
        (r"\boxed{5}</think>I cannot tell.", "5", True),
    ]  # fmt: skip
    assert [v[1] for v in grader.grade(right + wrong)] == [True] * len(right) + [False] * len(wrong)


# (answer in a box, gold answer)
EQUAL = [
    ("90°", "90"), ("90 °C", "90"), (r"90\degree", "90"), ("5cm", "5"), ("5 cm^2", "5"), (r"12\pi cm²", r"12\pi"),
    ("60 miles per hour", "60"), (r"5~\mathrm{cm}^2", "5"), ("€18", "18"), ("18 dollars", "18"),
    (r"\text{18 dollars}", "18"), (r"\frac{1}{2} cup", "1/2"), ("1 000.5", "1000.5"), ("3 1/2", "7/2"),
    ("-3 1/2", "-7/2"), ("x = 3 1/2", "3.5"), ("3½", "7/2"), ("½", "0.5"), (r"\frac 3 4", "0.75"), ("1e3", "1000"),
    ("1000", "1e3"), ("1.5e-3", "0.0015"), ("５", "5"), ("（１，２）", "(1,2)"), ("−5", "-5"), ("–5", "-5"),
    (r"x \ge 2", r"[2,\infty)"), ("2≤x", "[2,∞)"), (r"[2,\infty)", r"x \ge 2"), ("0<x<12.5", "(0,12.5)"),
    (r"-2 \le x \le 7", r"x \in [-2,7]"), (r"x \ne 5", r"(-\infty,5)\cup(5,\infty)"),
    (r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)"), (r"\approx 10", "10"), (r"\text{Thus, } 42", "42"),
    (r"\text{The answer is } 42", "42"), (r"\text{The answer is 42}", "42"), ("The answer is $42$", "42"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), (r"\left(\begin{array}{c}1\\2\end{array}\right)", "(1,2)"),
    ("(1,-16,-4)", r"\begin{pmatrix} 1 \\ -16 \\ -4 \end{pmatrix}"), (r"\langle 1,2\rangle", r"\left(1,2\right)"),
    (r"x=\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), ("√(12)", r"2\sqrt3"),
    (r"\sqrt(12)", r"2\sqrt3"), ("x²", "x^2"), ("10⁻³", "0.001"), ("10^-3", "0.001"), ("18¢", "18"), ("90^o", "90"),
    ("2·3", "6"), ("2pi/3", r"\frac{2\pi}{3}"), (r"\varnothing", r"\emptyset"), (r"\{ \}", r"\emptyset"),
    ("(C) 12", "C"), ("(C) .25", "1/4"), ("C. 12", r"\text{(C)}"), (r"\textbf{(C)}\ \frac{1}{2}", "1/2"),
    # math-verify's own verdicts
    ("52_8", "52_{8}"), ("12_{10}", "12"), (r"6_8 \cdot 7_8 = 42_{10} = 52_8", "52_8"), ("x=1, y=2", "(1,2)"),
    ("(1,2)", "1,2"), ("2,1", "1,2"), ("{1,2}", r"\{1,2\}"), (r"50\%", "50"), (r"12\%", "0.12"),
    ("0.333333", r"\frac13"), ("0.001667", r"\frac{1}{600}"), (r"+\infty", r"\infty"),
    (r"6.72\times10^{-5}", ".0000672"), (r"\frac{2}{2\cdot 2004!}", r"\frac{1}{2004!}"),
    ("10^{-20}", r"\frac{1}{10^{20}}"),
    # numbers: in other scripts, ordinal, repeating, with words, in functions, complex
    ("٤٢", "42"), ("४२", "42"), ("۴۲", "42"), ("٣٫٥", "3.5"), ("١٬٠٠٠", "1000"), ("3√13", r"3\sqrt{13}"),
    (r"7^\text{th}", "7"), (r"7^{\text{th}}", "7"), (r"1^{\mathrm{st}}", "1"), ("3^{rd}", "3"), ("2nd", "2"), ("12", r"12^{\text{th}}"),
    (r"0.\overline{3}", r"\frac13"), (r"\frac{7}{6}", r"1.1\overline{6}"), (r"0.\bar{27}", r"\frac{3}{11}"), ("0.333...", "1/3"), ("0.(3)", "1/3"),
    (r"1\text{ million}", "1000000"), ("5 million", "5000000"), ("3 x 10^5", "300000"), ("2**10", "1024"), (r"12\text{,}345", "12345"),
    (r"\log_2 8", "3"), ("3", r"\log_2 8"), ("log2(8)", "3"), (r"\frac{\ln 3}{\ln 2}", r"\log_2 3"), (r"\log_9 25", r"\log_3 5"), (r"\log_4 2", "0.5"),
    (r"\sin 30^\circ", r"\frac12"), (r"\tan 45^{\circ}", "1"), (r"\cos\frac{\pi}{2}", "0"),
    ("3 + 4 i", "3+4i"), (r"3+4\mathrm{i}", "3+4i"), (r"\sqrt{-1}", "i"), ("i", r"e^{i\pi/2}"), (r"12.5\,\%", "12.5"), (r"33.3\%", "33.3"),
    # sets, and what the question says already
    (r"\text{infinity}", r"\infty"), (r"\text{negative infinity}", r"-\infty"), ("[0, infinity)", r"[0,\infty)"),
    (r"\{x \mid x \ge 0\}", r"[0,\infty)"), (r"(-\infty,2) \text{ or } (3,\infty)", r"(-\infty,2)\cup(3,\infty)"),
    (r"(-\infty,2)\cup(3,\infty)", r"x<2\text{ or }x>3"), (r"1 \ge x \ge -1", r"-1\le x\le1"), (r"\text{all real numbers}", r"(-\infty,\infty)"),
    (r"\text{no solution}", r"\emptyset"), (r"\lbrace 1,2\rbrace", "1,2"), ("y=2, x=1", "(1,2)"), (r"\frac12 \text{ or } 0.5", "1/2"), ("P(3,4)", "(3,4)"),
    (r"\big(1,2\big)", "(1,2)"), ("3:30 PM", "3:30"), ("3:30 PM", r"3:30\text{ p.m.}"), (r"42 \pmod{100}", "42"), (r"42\text{ (mod }100)", "42"),
    (r"1101_{\text{two}}", "1101_2"), (r"1101\text{ (base 2)}", "1101_2"), ("(1101)_2", "1101_{2}"),
    ("12", r"\textbf{(B)}\ 12"), ("B", r"\textbf{(B)}\ 12"), ("Option B", "B"), ("true", r"\text{True}"), ("an ellipse", r"\text{ellipse}"),
    (r"\underline{42}", "42"), (r"\textcolor{red}{42}", "42"), (r"\color{red} 42", "42"), ("`42`", "42"), (r"42\\", "42"), (r"42 \checkmark", "42"),
]  # fmt: skip
DIFFERENT = [
    ("31/2", "7/2"), ("3 1/2", "3/2"), ("3 1/2", "31/2"), ("1e3", "3e"), ("x > 2", r"[2,\infty)"),
    (r"0<x\le12.5", "(0,12.5)"), (r"x^2-4\ge0", r"(-\infty,-2]\cup[2,\infty)"), ("x>1, x<3", "(1,3)"),
    (r"x<2 \text{ or } x>4", r"(-\infty,2)\cup(3,\infty)"), (r"\approx 11", "10"), (r"\text{The answer is } 42", "43"),
    (r"\begin{bmatrix}1\\2\end{bmatrix}", "(2,1)"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)"),
    ("5xy", "5"), ("5 xy", "5"), ("5 + x", "5"), ("5 -3", "5"), ("5 million", "5"), ("3 squared", "3"), ("3!", "3"),
    ("5 apples and 3 pears", "5"), ("5 feet 3 inches", "5"), ("(C) 12", "D"), ("(A) and (B)", "A"), ("(A), (B)", "A"),
    (r"42 \text{ or } 43", "42"), ("x_1", "x_2"), (r"-\infty", r"\infty"), ("[1,2)", "[1,2]"),
    ("٤٣", "42"), ("7^{t}", "7"), ("8th", "7"), (r"0.\overline{34}", "1/3"), ("0.3", r"0.\overline{3}"), (r"5\text{ million}", "5"),
    (r"\log_2 9", "3"), (r"\ln 3", r"\log_2 3"), (r"\sin 30", r"\frac12"), ("3-4i", "3+4i"), (r"3+4\mathrm{i}", "7"), ("1.25", r"12.5\%"),
    ("1.41421356", r"\sqrt2"), ("3.141593", r"\pi"), (r"\text{negative infinity}", r"\infty"), ("y=1, x=2", "(1,2)"), ("y>3", "x>3"),
    (r"\frac12 \text{ or } \frac13", "1/2"), (r"42 \text{ or more}", "42"), ("3:30 AM", "3:30 PM"), (r"3\pmod 5", r"3\pmod 7"),
    (r"1101_{\text{three}}", "1101_2"), ("C", r"\textbf{(B)}\ 12"), ("13", r"\textbf{(B)}\ 12"), ("not an ellipse", r"\text{ellipse}"),
]  # fmt: skip


def test_boxes_that_everyone_reads_as_equal_are_right(grader):
    verdicts = grader.grade([(f"\\boxed{{{answer}}}", gold, True) for answer, gold in EQUAL + DIFFERENT])
    assert [pair for pair, verdict in zip(EQUAL + DIFFERENT, verdicts, strict=True) if verdict[1]] == EQUAL


@pytest.mark.parametrize("rewrite", REWRITES, ids=[example for _, _, example, _ in REWRITES])
def test_every_rewrite_does_what_its_example_says(rewrite, monkeypatch):
    _, _, example, result = rewrite
    assert clean(example) == result
    monkeypatch.setattr("support.grade.REWRITES", [row for row in REWRITES if row != rewrite])
    assert clean(example) != result


def test_boxes_that_only_math_verify_reads_as_equal_are_wrong(grader):
    pairs = [
        ("1,2", "(1,2)"), ("1, 2, 3", "(1,2,3)"), (r"\{1,2\}", "(1,2)"), ("1,2", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("11", "11_2"), ("11_3", "11_2"), ("11_{10}", "11_2"), ("52", "52_8"), ("53_8", "52_8"), ("7 0", "0"),
        ("7 0", "70"), ("2 3", "6"), (r"\frac{1}{2006!}", r"\frac{1}{2004!}"), ("10^{-20}", "10^{-21}"),
        ("10^{-20}", "0"), ("0", r"\frac{1}{2004!}"), ("e^{-100}", "e^{-101}"), (".0000674", ".0000672"),
    ]  # fmt: skip
    verdicts = grader.grade([(f"\\boxed{{{answer}}}", gold, True) for answer, gold in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict[1]] == []


def test_nothing_equals_an_empty_gold_answer(grader):
    texts = [r"\boxed{5}", r"\boxed{\,}", r"\boxed{.}", "Answer: 5"]
    verdicts = grader.grade([(text, gold, True) for gold in ("", " ", "$$", r"\,", ".") for text in texts])
    assert {verdict[1:] for verdict in verdicts} == {(False, "no gold")}
    assert "no gold" in UNGRADABLE


# (response without a box, gold answer)
STATED = [
    # announced: to the end of the line or sentence
    (r"Answer: \frac{1}{2}", "1/2"), ("Answer: (1, 2)", "(1,2)"), ("Answer: (B)", "B"), ("Answer: −5", "-5"),
    ("ANSWER: 42\n", "42"), (r"The answer is 3\sqrt{2}.", r"3\sqrt{2}"), ("The answer is 12 + 3i", "12+3i"),
    ("The answer is 1, 2 and 3.", "3,2,1"), ("Answer: a + b", "a+b"), ("Answer: x = 3 or x = -3", "3,-3"),
    ("the answer is [0,1)", "[0,1)"), ("Ans: 42", "42"), ("Answer：42", "42"), ("**Answer: 42**", "42"),
    ("The answer is **$72**.", "72"), ("(Answer: 5)", "5"), ("[Answer: 5]", "5"), ("**Final Answer**\n\n34", "34"),
    ("**Final Answer:**\n\n\\[\n\\frac{7}{2}.\n\\]", "3.5"), ("The answer is given by\n$$\n42\n$$\nDone.", "42"),
    (r"So $\boxed 5$ is it.", "5"), (r"\boxed \frac{1}{2}", "0.5"), ("<answer>42</answer>", "42"),
    ("48 + 24 = 72\n#### $1,234", "1234"), ("#### 2. Compute the sum\nWe get 9.", "9"),
    ("Question: 2+2? Answer: 4\nQuestion: 2+3? Answer: 5", "5"),
    (r"Final Answer: The final answer is $(3, \pi)$. I hope it is correct.", r"(3,\pi)"),
    ("The answer should be 12.", "12"), ("The answer is 5. I hope my answer is correct.", "5"),
    ("The answer to the question is 17.", "17"),
    # and what the sentence says besides
    ("The answer is 72 clips.", "72"), ("The answer is $1,200 per month.", "1200"),
    ("The answer is 25 percent.", r"25\%"), (r"The answer is $12\text{ cm}^2$.", "12"),
    (r"The answer is $\frac{1}{2}$ cup.", "1/2"), ("Answer: 42 cm (approximately)", "42"),
    ("The answer is 42, which is the largest of 5 values.", "42"), ("The answer is 5 (five).", "5"),
    ("The answer is 5, i.e. five.", "5"), ("My answer is 12, and I am sure.", "12"),
    ("The answer is not 5, it is 7.", "7"), ("The answer is 7, not 5.", "7"), ("The answer is 2/3 of the cake.", "2/3"),
    # words and letters
    ("The answer is Evelyn.", r"\text{Evelyn}"), ("The answer is an ellipse.", r"\text{ellipse}"),
    ("Answer: yes", r"\text{Yes}"), ("The answer is: does not exist.", r"\text{does not exist}"),
    ("The answer is (B) 12.", "B"), ("The answer is (B) 12.", "12"), ("The correct answer is option (C).", "C"),
    ("The answer is (B), not (A).", "B"),
    # not announced: the last expression on the last line
    ("The correct option is C.", "C"),
    (r"So $\boxed5$.", "5"), ("So boxed{5}", "5"), (r"\framebox{5}", "5"), ("Answer: ٤٢", "42"), ("Ответ: 42.", "42"), ("답: 42", "42"), ("الجواب هو ٤٢.", "42"),
    ("So x = 12 + 3i", "12+3i"), ("Thus the point is (1, 2).", "(1,2)"), ("- 5 apples", "5"),
    ("48+24 = 72 clips", "72"), ("Total = $5 + $3 = $8", "8"), ("She earns $18/hour.", "18"), ("It weighs 5kg.", "5"),
    ("It is 72!", "72"), ("He has 7 apples. That is all.", "7"), ("Hence\n\\[\nx = 42.\n\\]", "42"), ("(B) 12", "B"),
    ("所以答案是5。", "5"), (r"So $p - q$.", "p-q"), (r"The cost is $\$36$.", "36"),
]  # fmt: skip
NOT_STATED = [
    (r"Answer: \frac{3}{2}", "2"), (r"The answer is 3\sqrt{2}.", "3"), ("Answer: 5x+3", "5"), ("Answer: 2^{10}", "2"),
    ("Answer: (B)", "C"), ("I cannot answer 3 questions", "3"), ("The answers are 3 and 4.", "4"),
    ("Answer: 1, pi", "1"), ("The answer is $5$ or $6$.", "6"), ("The answer is east, west", r"\text{east}"),
    ("The answer is (A) or (B).", "A"), ("The answer is 5 million.", "5"), ("The answer is 5 more than x.", "5"),
    ("The answer is not 5, it is 7.", "5"), ("The answer is 7, not 5.", "5"), ("The answer is not 5.", "5"),
    ("Answer: between 3 and 5", "5"), ("What is the answer? 5 or 6?", "6"), ("3 apples. The answer is unknown.", "3"),
    (r"So x = 3\sqrt{2}.", "2"), ("Thus the point is (1, 2).", "2"), ("It is 3 or 4", "4"), ("It is not 5.", "5"),
    ("Is it 5?", "5"), ("There are 3 ways to answer.", "3"), ("He came 3rd.", "3"), ("See (Section 2).", "2"),
    (r"\boxed{5", "5"), (r"\boxed{}", "5"),
]  # fmt: skip


def test_an_answer_without_a_box_is_taken_whole_or_not_at_all(grader):
    verdicts = grader.grade([(text, gold, True) for text, gold in STATED + NOT_STATED])
    assert [pair for pair, verdict in zip(STATED + NOT_STATED, verdicts, strict=True) if verdict[1]] == STATED


def test_every_answer_of_the_benchmarks_is_right_however_it_is_announced(grader):
    names = ("math500", "aime24", "aime25", "amc23", "gsm8k_test")
    golds = dict.fromkeys(row["answer"] for name in names for row in problems(f"{name}.jsonl"))
    announcements = [
        "Answer: %s", "Answer: %s.", "The answer is $%s$.", "**Answer:** $%s$", "**Final Answer**\n\n%s",
        r"So $\boxed %s$.", "Final Answer: The final answer is $%s$. I hope it is correct.",
        r"So the answer is \(%s\), which we wanted.", r"Thus the answer is \[ %s \]", "Hence\n\\[\n%s.\n\\]",
        "So we get $%s$.", "The answer is %s because of that.",
    ]  # fmt: skip
    cases = [(announcement % gold, gold, True) for gold in golds for announcement in announcements]
    assert [case for case, verdict in zip(cases, grader.grade(cases), strict=True) if not verdict[1]] == []


def test_extraction_without_a_box_reads_only_the_end_of_a_long_text():
    """So its time is bounded, if no pattern takes more than a few steps per character of that end."""
    units = [
        "answer to a ", "not a, ", "the ", "a ", "1, ab ", "$1", r"\(", r"\[", r"\ab", "5 ab ", "#### \n", "1 or ", " ",
        "字",
    ]  # fmt: skip
    for unit in units:
        text = unit * (100_000 // len(unit))
        assert extract(text + " xx") == extract(text[-TAIL:] + " xx")
        assert extract(text + "\nThe answer is 7.") == "7"


@pytest.mark.parametrize("name", ["extract", "forms"])
def test_collected_cases_are_graded_as_people_do(grader, name):
    path = SHARED / "cases" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"needs {name}.jsonl in ../shared/cases, which does not come with the repository")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.setdefault("text", f"\\boxed{{{row.get('answer')}}}")
    verdicts = grader.grade([(row["text"], row["gold"], row.get("finished", True)) for row in rows])
    wrong = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict[1] != row["right"]]
    assert not wrong


HOSTILE = {
    "tower": "10^{10^{10}}", "power": "(1+x+y+z)^{200}",
    "long": "1" * 100_000, "long sum": "1+" * 50_000 + "1", "deep": "{" * 450 + "1" + "}" * 450, "deeper": "(" * 50_000 + ")" * 50_000,
    "NUL": "7\x000", "surrogate": "\ud800 70", "python": "__import__('os').system('touch pwned')", "lambda": "(lambda: 1)()",
    "backslashes": "\\\\" * 400, "dollars": "$" * 999, "percent": "%" * 300, "spaces": " " * 50_000 + "1", "emoji": "\U0001f600" * 99,
    "division": r"\frac{1}{0}", "newlines": "\n" * 500, "wrapped": r"\text{" * 150 + "1" + "}" * 150, "control": "\x1b[2J\r\b",
}  # fmt: skip
BARE = [
    "\\boxed{" * 100_000, "{" * 100_000, "}" * 100_000, "\\" * 100_000, r"\boxed" + " " * 100_000, "answer is " * 50_000,
    "\x00" * 1000,
]  # fmt: skip


@pytest.mark.slow
def test_hostile_answers_are_wrong_within_a_bound_and_the_grader_lives_on(tmp_path, monkeypatch):
    """An answer costs at most its CPU limit, one second of rounding, and a new worker's start."""
    monkeypatch.chdir(tmp_path)
    with Grader(workers=1, seconds=1) as grader:
        for name, answer in HOSTILE.items():
            start = time.perf_counter()
            (_, correct, reason), *_ = grade(grader, [answer], r"\frac{70}{3}")
            assert not correct and reason in (*UNGRADABLE, "different"), name
            assert time.perf_counter() - start < 10, name  # 3 s on an idle machine
        start = time.perf_counter()
        assert not any(v[1] for v in grader.grade([(text, "70", True) for text in BARE]))
        assert time.perf_counter() - start < 10
        assert grade(grader, [r"\frac{140}{6}"], r"\frac{70}{3}")[0][1]
    assert not list(tmp_path.iterdir())  # nothing was run


def test_a_slow_answer_is_a_time_limit_and_a_long_one_too_long():
    with Grader(workers=1, seconds=1) as grader:
        verdicts = grade(grader, ["10^{10^{10}}", "1" * (LONGEST + 1)], "70")
    assert [v[2] for v in verdicts] == ["time limit", "too long"]


def answers_of_a_process(setup, cases):
    """What a grader in a process of its own says, and its stderr. setup: code that the process and its workers run first."""
    code = f"from support.grade import Grader\nwith Grader(workers=1) as grader: print(grader.grade({cases!r}))"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(setup)
        env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    return done.stdout, done.stderr


EASY = [(r"\boxed{\frac{1}{2}}", "0.5", True), (r"\boxed{x+1}", "1+x", True), (r"\boxed{x+2}", "1+x", True)]
RIGHT = "[('\\\\frac{1}{2}', True, 'equal'), ('x+1', True, 'equal'), ('x+2', False, 'different')]\n"
REFUSE = """
import resource
set_limit = resource.setrlimit
def refuse(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    set_limit(kind, limits)
resource.setrlimit = refuse
"""


def test_limits_that_the_system_has_or_refuses_are_no_crash():
    """Hard limits (login nodes, batch systems), also where this process may not raise them; macOS knows none of memory."""
    low = "import resource\nfor kind, n in ((resource.RLIMIT_CPU, 36000), (resource.RLIMIT_AS, 1600 << 20)): resource.setrlimit(kind, (n, n))"
    for setup, warning in ((low, ""), (REFUSE, "this system refuses to set RLIMIT_AS")):
        out, err = answers_of_a_process(setup, EASY)
        assert out == RIGHT and warning in err and bool(err) == bool(warning)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("import sys\nif 'grade.py' in ' '.join(sys.orig_argv): import os; os._exit(3)", "its worker crashes"),
        ("import sys\nsys.modules['math_verify'] = None", "ModuleNotFoundError"),
        (
            "import math_verify\nmath_verify.verify = lambda *_, **__: True",
            "its verdict on .*'x\\+2', '1\\+x'.* is wrong",
        ),
    ],
)
def test_a_grader_that_cannot_tell_right_from_wrong_ends_the_evaluation(setup, message):
    """In a worker that crashes, or a broken installation, right answers were wrong without a word."""
    out, err = answers_of_a_process(setup, EASY)
    assert not out and re.search(f"ValueError: the grader does not work here: .*{message}", err)


def test_a_verdict_does_not_depend_on_what_was_graded_before():
    random.seed(0)
    cases = [(f"\\boxed{{{a}}}", "70", True) for a in [*FORMS, *WRONG, r"\frac{1}{0}", "2^{x^y}"]]
    with Grader(workers=1) as one, Grader(workers=2) as two:
        expected = dict(zip(cases, one.grade(cases), strict=True))
        shuffled = random.sample(cases, len(cases))
        assert [expected[case] for case in shuffled] == two.grade(shuffled)


@pytest.mark.slow
def test_a_thousand_ordinary_answers_grade_in_seconds(grader):
    random.seed(0)
    cases = [(f"\\boxed{{\\frac{{{random.randrange(1, 999)}}}{{{i + 2}}}}}", r"\frac{3}{4}", True) for i in range(1000)]
    start = time.perf_counter()
    grader.grade(cases)
    assert time.perf_counter() - start < 20  # 2 s on an idle machine


def test_ctrl_c_does_not_reach_the_workers():
    """A training run saves and exits in order; a worker that died first would break its evaluation."""
    with Grader(workers=1) as grader:
        grade(grader, [r"\frac{1}{3}"], r"\frac{2}{6}")
        (worker,) = grader.started
        assert os.getpgid(worker.pid) != os.getpgrp()


def test_a_graders_worker_that_is_killed_changes_no_verdict():
    """OpenRLHF/OpenRLHF#1139, joblib/loky#1: by the OOM killer, say, while it is idle or at work."""
    with Grader(workers=1) as grader:
        assert grader.grade([("\\boxed{x+1}", "1+x", True)]) == [("x+1", True, "equal")]
        os.kill(grader.started[0].pid, signal.SIGKILL)
        os.waitid(os.P_PID, grader.started[0].pid, os.WEXITED | os.WNOWAIT)
        assert grader.grade([("\\boxed{x+2}", "2+x", True)]) == [("x+2", True, "equal")]
        pid = grader.started[0].pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        assert grader.grade([("\\boxed{x+3}", "3+x", True)]) == [("x+3", True, "equal")]
        assert len(grader.started) == 1
