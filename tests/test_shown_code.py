"""Runs the Python that README.md and docstrings show, as it stands there: python -m pytest tests/test_shown_code.py"""

import ast
import importlib.util
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import gating
import losses
from support import toy

HAS_TRL = importlib.util.find_spec("trl") is not None
SHOWN = {"gating.py": 2, "losses.py": 1, "examples/trl_opd_gate.py": 2}  # blocks that each docstring has at least


def python_blocks(text):
    """What stands between ```python and ```, and every indented paragraph that is Python (others are formulas, shell, tables)."""
    fenced = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    indented = [textwrap.dedent(block) for block in re.findall(r"(?m)(?:^ {4}.*\n?)+", text)]
    return fenced + [block for block in indented if does_something(block)]


def does_something(block):
    try:
        statements = ast.parse(block).body
    except SyntaxError:
        return False
    actions = ast.Import, ast.ImportFrom, ast.Assign, ast.For
    return any(isinstance(x, actions) or isinstance(getattr(x, "value", None), ast.Call) for x in statements)


def what_is_taken_for_granted():
    """{name: value} of what the shown lines speak of without defining it."""
    g = torch.Generator().manual_seed(0)
    B, T, H, V = 3, 200, 8, 50
    model = torch.nn.Linear(T, T)
    model_outputs = model(torch.randn(B, T, generator=g))
    logp = -model_outputs.square()
    logp_old = (logp + 0.1 * torch.randn(B, T, generator=g)).detach()
    mask = torch.rand(B, T, generator=g) < 0.8
    newline = torch.rand(B, T, generator=g) < 0.1
    names = dict(
        torch=torch, model=model, logp=logp, logp_old=logp_old, mask=mask, newline=newline, token_loss=logp.square()
    )
    names |= dict(device="cpu", kind="span", micro_batches=[(logp, logp_old, logp.square(), mask, newline)])
    names["dist"] = SimpleNamespace(all_reduce=lambda x: None, get_world_size=lambda: 1)  # test_gating.py has two ranks
    head = dict(hidden=(B, H), weight=(V, H), bias=(V,), hidden_t=(B, H), weight_t=(V, H), bias_t=(V,))
    names |= {name: torch.randn(shape, generator=g) for name, shape in head.items()}
    names |= dict(ids=torch.randint(V, (B, 4), generator=g), k=4)
    names |= dict(student=toy.STUDENT, teacher=toy.TEACHER)
    if HAS_TRL:
        from datasets import Dataset
        from trl import GRPOConfig

        from examples.trl_opd_gate import REQUIRED, OPDTrainer

        prompts = Dataset.from_dict({"prompt": [question + "\n" for question, _ in toy.problems(2, 0)]})
        names |= dict(prompts=prompts, GRPOConfig=GRPOConfig, REQUIRED=REQUIRED, OPDTrainer=OPDTrainer)
    return names


@pytest.fixture
def run_blocks(tmp_path, monkeypatch):
    """run_blocks(text, names): executes its Python in a temporary folder; returns how many blocks there are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def run_blocks(text, names, where):
        blocks = python_blocks(text)
        for number, block in enumerate(blocks, 1):
            if HAS_TRL or not re.search("trl|verl|GRPO|OPDTrainer", block):
                exec(compile(block, f"{where}, Python block {number}", "exec"), names)
        return len(blocks)

    return run_blocks


@pytest.mark.parametrize("name", SHOWN)
def test_the_python_of_a_docstring_runs(name, run_blocks):
    if "trl" in name and not HAS_TRL:
        pytest.skip("needs TRL: pip install 'trl>=1.16'")
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text()))
    module = {"gating.py": gating, "losses.py": losses}.get(name)
    names = what_is_taken_for_granted() | (vars(module) if module else {})
    assert run_blocks(docstring, names, name) >= SHOWN[name]


def test_the_python_of_the_readme_runs(run_blocks):
    assert run_blocks((ROOT / "README.md").read_text(), what_is_taken_for_granted(), "README.md") >= 1


def test_blocks_are_told_from_formulas_and_commands():
    text = "a\n\n```python\nx = 1\n```\n\n    g = exp(-tau |s|)   the gate\n\n    pip install x\n\n    from a import b\n\n    metrics.jsonl\n"
    assert python_blocks(text) == ["x = 1\n", "from a import b\n"]


def test_every_test_that_the_docs_name_exists():
    named = {name for page in (ROOT / "docs").glob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text())}
    files = [*(ROOT / "tests").glob("test_*.py"), *ROOT.glob("test_*.py")]
    defined = {name for file in files for name in re.findall(r"(?m)^def (test_\w+)", file.read_text())}
    assert len(named) > 50 and named <= defined, named - defined
