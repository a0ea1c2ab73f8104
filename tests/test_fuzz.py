"""python -m pytest tests/test_fuzz.py                    EXAMPLES=10000 python -m pytest tests/test_fuzz.py: the long form"""

import json
import math
import os
import random
import tempfile
from pathlib import Path

import torch
from helpers import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import gating
import losses
import train
from configs import TrainConfig, parse
from support import toy

EXAMPLES = int(os.environ.get("EXAMPLES", 20))

# -----------------------------------------------------------------------------
# finite in, finite out; random flags and files: success or one line

logps = st.one_of(st.sampled_from([0.0, -math.inf, -1e-7, -60000.0, -1e30]), st.floats(-100, 0, width=32))
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
examples = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def tensor(data, *shape, values=logps):
    flat = data.draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(flat).reshape(shape).to(data.draw(dtypes))


@examples
@given(st.data(), st.integers(0, 3), st.integers(0, 6))
def test_gates_are_finite(data, B, T):
    logp, old = tensor(data, B, T), tensor(data, B, T)
    mask, newline = (tensor(data, B, T, values=st.booleans()).bool() for _ in range(2))
    kind, stat = data.draw(st.sampled_from(gating.KINDS)), data.draw(st.sampled_from(gating.STATS))
    tau = data.draw(st.sampled_from([0.0, 1.0, 1e4, 1e30]))
    options = dict(block=data.draw(st.integers(1, 8)), span_min=2, newline=newline)
    segments = gating.segment_index(mask, kind, **options)
    d = gating.drift(logp[mask], old[mask])
    g, s = gating.gate(d, segments, kind, tau=tau, stat=stat)
    assert g.isfinite().all() and s.isfinite().all() and ((g >= 0) & (g <= 1)).all()
    assert all(x.isfinite() for x in gating.gate_stats(g, s, d).values())
    weights = gating.gate_weights(logp, old, mask, kind, tau=tau, stat=stat, **options)
    assert weights.isfinite().all() and not weights[~mask].any()


@examples
@given(st.data(), st.integers(0, 4), st.integers(2, 5), st.sampled_from(["opd", "lsm", "tail"]))
def test_losses_and_their_gradients_are_finite(data, N, K, kind):

    def switch(*values):
        return data.draw(st.sampled_from(values))

    if kind == "opd":
        x, old, teacher = (tensor(data, N) for _ in range(3))
        loss, info = losses.opd_loss(x.requires_grad_(), old, teacher, switch(0, 0.2), switch(0, 0.2), switch(0, 3.0))
        assert all(value.isfinite().all() for value in info.values())
    else:
        x, logq = tensor(data, N, K).requires_grad_(), tensor(data, N, K)
        support = switch(None, tensor(data, N, K, values=st.booleans()).bool())
        normal = (v.float().nan_to_num(neginf=-1e4).log_softmax(-1) - 0.1 for v in (x, logq))
        loss = (
            losses.tail_loss(*normal)
            if kind == "tail"
            else losses.lsm_loss(x, logq, support, forward=switch(False, True))
        )
    assert loss.isfinite().all()
    loss.sum().backward()
    assert x.grad.isfinite().all() or x.dtype == torch.float16  # r A, unclipped, is e^20 * 1e4: no fp16 number


POOL = [0, 1, 2, 3, -1, 0.5, -0.5, 1e9, 10**30, "nan", "inf", "", "x", "true", "raw", "{question}", "../no", "é\n"]
SLOW = set("data eval_data student teacher template preset trust_remote_code tp vllm_memory rollout threads".split())
SLOW |= set("steps epochs prompts group max_prompt max_response eval_problems k out resume overwrite help".split())


def one_line(error):
    """Success, or an exit whose message is one line."""
    if error is not None:
        assert isinstance(error, SystemExit) and "\n" not in str(error.code), error


def test_fuzz_of_flags_ends_in_success_or_one_line(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.plot, "draw", lambda out: None)
    rng, ran, fields = random.Random(0), 0, TrainConfig.__dataclass_fields__.values()
    fitting = {bool: ["true", "false"], int: [0, 1, 2, 5], float: [0, 0.1, 0.5, 1, 3]}
    choices = {
        f.name: getattr(f.type, "__args__", ()) or fitting.get(f.type, POOL) for f in fields if f.name not in SLOW
    }
    for i in range(EXAMPLES):
        options = {name: rng.choice(choices[name]) for name in rng.sample(sorted(choices), 5)}
        options |= {name: rng.choice(POOL) for name in rng.sample(sorted(choices), i % 2)}
        error = None
        try:
            small = dict(steps=1, prompts=2, group=1, max_response=3, epochs=2)
            train.main(parse(TrainConfig, flags(pair, tmp_path / str(i), **small | options)))
            ran += 1
        except SystemExit as e:
            error = e
        one_line(error)
        assert capsys.readouterr().err.count("\ntrain.py: ") <= 1
    assert 0.1 * EXAMPLES < ran < 0.95 * EXAMPLES


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.just("prompt"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=4,
)
ROWS = st.dictionaries(st.sampled_from(["prompt", "question", "answer", "id", "reward_model", "Prompt"]), CELLS)
FILES = st.one_of(
    st.binary(max_size=60),
    st.lists(st.one_of(ROWS, CELLS), max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(ROWS.map(lambda r: {"prompt": "1+1", "answer": "2"} | r), max_size=3).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    ),
)


@settings(examples, max_examples=2 * EXAMPLES)
@given(FILES, st.sampled_from([".jsonl", ".json", ".parquet"]))
def test_fuzz_of_data_files_ends_in_problems_or_one_line(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        try:
            problems = data.load(str(path), seed=0)
            encoded = [(problem, data.encode(problem, toy.tokenizer())) for problem in problems]
            assert data.TrainingPrompts(encoded, 1000, 0).of_step(0, 1)
        except (ValueError, OSError):
            pass
