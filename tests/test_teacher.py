"""python -m pytest tests/test_teacher.py      (a server of our own on loopback; test_vllm.py asks a real one)"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from helpers import far, finished, flags, refused, run
from scenes import toy_vocabulary
from transformers import AutoModelForCausalLM, AutoTokenizer

import policy
import train
from configs import TrainConfig, parse
from policy import LocalTeacher
from support import checkpoint, server_teacher


class Server(ThreadingHTTPServer):
    """Answers as vLLM's does, with the log-probs of a transformers model."""

    def __init__(self, path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.context, self.limit, self.failures, self.dies_after, self.asked = 512, 20, 0, 10**9, 0
        self.lacks = {}  # {path: what it answers instead, as a server that is not vLLM}
        self.alter = lambda rows: rows
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @torch.no_grad()
    def answer(self, path, body):
        """(status, JSON)."""
        self.asked += 1
        if self.failures > 0:
            self.failures -= 1
            return 503, {"error": "busy"}
        if path in self.lacks:
            return 200, self.lacks[path]
        if path == "/v1/models":
            return 200, {"data": [{"id": "the-teacher", "max_model_len": self.context}]}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        ids, k = body["prompt"], body["prompt_logprobs"]
        if k > self.limit:
            return 400, {"error": {"message": f"Requested prompt logprobs of {k}, which is greater than {self.limit}"}}
        if max(ids) >= self.model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}}
        rows = [None]
        for logp, token in zip(self.model(torch.tensor([ids])).logits[0].log_softmax(-1), ids[1:], strict=False):
            order = logp.argsort(descending=True).tolist()
            chosen = {token, *order[:k]}
            rows.append({str(i): {"logprob": logp[i].item(), "rank": order.index(i) + 1} for i in chosen})
        return 200, {"choices": [{"prompt_logprobs": self.alter(rows)}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        status, answer = self.server.answer(self.path, json.loads(self.rfile.read(length) or "null"))
        if self.server.asked > self.server.dies_after:
            return  # no answer, and the connection is closed
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def loss_on(student, batch, cfg):
    return train.base_loss(train.student_outputs(student, batch, cfg), batch, cfg)[0]


def test_reverse_kl_is_that_of_all_logits_at_every_position(pair, scene):
    student, scoring, (batches, *_), cfg, _ = scene(loss="opd", micro_tokens=70, temperature=0.7)
    found = LocalTeacher(scoring, cfg, torch.device("cpu")).reverse_kl(student, batches)
    for batch, kl in zip(batches, found, strict=True):
        logp, logq = (
            m.lm(batch.ids).logits[batch.rows, batch.cols].div(0.7).log_softmax(-1) for m in (student, scoring)
        )
        torch.testing.assert_close(kl, (logp.exp() * (logp - logq)).sum(-1), rtol=1e-4, atol=1e-6)


@pytest.fixture
def server(pair):
    with Server(pair[0]) as it:
        yield it
        it.shutdown()


@pytest.mark.parametrize("loss", ["opd", "lsm", "fkl_topk", "tail_topk"])
def test_server_gives_the_targets_of_the_model_it_serves(pair, scene, server, loss):
    student, _, minibatches, cfg, _ = scene(loss=loss, micro_tokens=70)
    batches = sum(minibatches, [])
    remote = server_teacher.ServerTeacher(
        server.url + "/v1", cfg, AutoTokenizer.from_pretrained(pair[1]), toy_vocabulary()
    )
    for batch, found in zip(batches, remote.targets(batches), strict=True):
        torch.testing.assert_close(found["logq_sampled"], batch.teacher["logq_sampled"], rtol=1e-5, atol=1e-5)
        local = loss_on(student, batch, cfg)
        if loss != "opd":
            assert torch.equal(found["topk_ids"], batch.teacher["topk_ids"])
            torch.testing.assert_close(found["topk_logq"], batch.teacher["topk_logq"], rtol=1e-5, atol=1e-5)
        batch.teacher = found
        torch.testing.assert_close(loss_on(student, batch, cfg), local, rtol=1e-3, atol=1e-5)


def test_training_on_a_server_is_training_on_its_model(pair, server, tmp_path):
    for loss in ("opd", "lsm"):
        _, local = run(pair, tmp_path / f"{loss}a", loss=loss)
        _, remote = run((tmp_path / "nowhere", pair[1]), tmp_path / f"{loss}b", loss=loss, teacher_url=server.url)
        assert far(remote, local) < 1e-4


def test_a_busy_server_is_asked_again(pair, scene, server):
    _, _, (batches, *_), cfg, _ = scene(loss="opd")
    remote = server_teacher.ServerTeacher(server.url, cfg, AutoTokenizer.from_pretrained(pair[1]), toy_vocabulary())
    server.failures = 2
    for batch, found in zip(batches, remote.targets(batches), strict=True):
        torch.testing.assert_close(found["logq_sampled"], batch.teacher["logq_sampled"], rtol=1e-5, atol=1e-5)
    assert server.failures == 0


def test_a_busy_server_cannot_make_a_run_wait_for_an_hour(pair, scene, server, monkeypatch):
    """urllib3/urllib3#1338, netdata/netdata#5082: Retry-After: 3600."""
    _, _, (batches, *_), cfg, _ = scene(loss="opd")
    remote = server_teacher.ServerTeacher(server.url, cfg, AutoTokenizer.from_pretrained(pair[1]), toy_vocabulary())
    monkeypatch.setattr(Handler, "end_headers", retry_later)
    asked_to_wait = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", asked_to_wait.append)
    server.failures = 1
    remote.targets(batches[:1])
    assert server.failures == 0 and max(asked_to_wait, default=0) <= 8


def retry_later(handler):
    handler.send_header("Retry-After", "3600")
    BaseHTTPRequestHandler.end_headers(handler)


def test_no_step_uses_the_connections_of_the_one_before(pair, scene, server, monkeypatch):
    """defilantech/LLMKube#459: what lies between has forgotten them, and a request on them waits for its whole timeout."""
    connections = []
    setup = Handler.setup
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")  # connections stay open
    monkeypatch.setattr(Handler, "setup", lambda handler: (connections.append(handler), setup(handler)))
    _, _, (batches, *_), cfg, _ = scene(loss="opd")
    remote = server_teacher.ServerTeacher(server.url, cfg, AutoTokenizer.from_pretrained(pair[1]), toy_vocabulary())
    remote.targets(batches[:1])
    before = len(connections)
    remote.targets(batches[:1])
    assert len(connections) > before


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict(limit=3), dict(loss="lsm"), "prompt logprobs of 4"), (dict(context=88), {}, "takes 88 tokens.* are 89"),
        (dict(failures=99), {}, "no answer from .*503"), ({}, dict(teacher_url="http://127.0.0.1:1"), "no answer from .*refused"),
        (dict(model=SimpleNamespace(config=SimpleNamespace(vocab_size=41))), {}, "Token id 41 is out of vocabulary"),
        (dict(tokenizer=SimpleNamespace(decode=lambda ids: "<pad><bos>x")), {}, "the same ids are '<eos>.*' for the student"),
        ({}, dict(loss="jsd"), "--loss jsd needs"), ({}, dict(temperature=0.7), "--temperature is 0.7"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_fit_is_one_line_before_the_student_loads(
    pair, server, tmp_path, monkeypatch, capsys, change, options, message
):
    monkeypatch.setattr(server_teacher, "RETRIES", 1)
    monkeypatch.setattr(train, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(SystemExit) as stop:
        train.main(parse(TrainConfig, flags(pair, tmp_path / "a", **dict(teacher_url=server.url) | options)))
    error = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    assert re.search(message, error) and error.strip().count("\n") == 0, error


@pytest.mark.parametrize(
    "path, answer, message",
    [
        ("/v1/models", {"data": [{"id": "llama"}]}, "/v1/models gives no max_model_len, as vLLM's server does"),
        ("/v1/models", {"data": []}, "/v1/models gives no data"), ("/v1/models", {}, "/v1/models gives no data"),
        ("/v1/models", "<html>", "/v1/models gives no data"), ("/detokenize", {"content": "x"}, "/detokenize gives no prompt"),
        ("/v1/completions", {"choices": [{"text": "x"}]}, "/v1/completions gives no prompt_logprobs"),
        ("/v1/completions", {"choices": []}, "/v1/completions gives no choices"),
    ],
)  # fmt: skip
def test_a_server_that_is_not_vllm_is_one_line_that_names_what_is_missing(
    pair, server, tmp_path, path, answer, message
):
    server.lacks = {path: answer}
    refused(flags(pair, tmp_path / "run", teacher_url=server.url), f"train.py: --teacher_url: {server.url}{message}")


def test_a_run_whose_setup_failed_can_be_started_again_as_it_stands(pair, server, tmp_path):
    """With other settings, too: nothing was made with the first ones."""
    server.lacks = {"/v1/models": {"data": []}}
    assert (
        finished(flags(pair, tmp_path / "run", teacher_url=server.url)) == 1
    )  # in a process of its own, which frees the lock
    assert (tmp_path / "run/config.json").exists()
    server.lacks = {}
    rows, _ = run(pair, tmp_path / "run", teacher_url=server.url, lr=1e-3)
    assert len(rows) == 2
    refused(flags(pair, tmp_path / "run", teacher_url=server.url), "already holds a run")


def changed(rows, change):
    return [row and {i: x | change(x) for i, x in row.items()} for row in rows]


@pytest.mark.parametrize(
    "alter, message",
    [
        (lambda rows: [None, {"1": {"logprob": -1.0, "rank": 1}}, *rows[1:]], "scores 3 tokens where 2 were sent; it must add none, such as BOS"),
        (lambda rows: [None, *rows[2:], rows[1]], "scores '.+' as token [0-9]+, where '.+' was sent"),
        (lambda rows: changed(rows, lambda x: {"logprob": x["logprob"] / 4}), r"gives '.+' \([0-9]+\) and its top 4 a probability of [1-9]"),
        (lambda rows: changed(rows, lambda x: {"logprob": float("nan")}), "and its top 4 a probability of nan"),
        (lambda rows: changed(rows, lambda x: {"rank": 50 - x["rank"]}), "a rank that its log-probs contradict"),
    ],
)  # fmt: skip
def test_a_server_whose_scores_of_one_answer_are_wrong_is_one_line_before_the_student_loads(
    pair, server, tmp_path, monkeypatch, alter, message
):
    monkeypatch.setattr(train, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    server.alter = alter
    refused(flags(pair, tmp_path / "a", teacher_url=server.url, loss="lsm"), "--teacher_url: the-teacher.*" + message)


def test_a_server_is_compared_with_the_local_copy_of_its_model(pair, server, tmp_path, capsys):
    for name, teacher in (("a", pair[0]), ("b", pair[1])):
        run((teacher, pair[1]), tmp_path / name, teacher_url=server.url, steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "the log-probs of http" in line]
    differences = [float(re.search("differ by (.*) nats on average", line)[1]) for line in lines]
    assert differences[0] < 1e-5 < 0.1 < differences[1]
    assert [line.startswith("warning: ") for line in lines] == [False, True]


@pytest.mark.slow
def test_a_server_that_dies_stops_the_run_and_the_next_start_goes_on(pair, server, tmp_path, monkeypatch):
    """Nothing is lost: the steps before are saved, though no checkpoint was due."""
    monkeypatch.setattr(server_teacher, "RETRIES", 1)
    options = dict(loss="lsm", steps=4, teacher_url=server.url)
    _, straight = run(pair, tmp_path / "a", **options)
    server.dies_after = server.asked + 5 + 2 * 6  # the three checks, an answer twice, and two steps of six rollouts
    with pytest.raises(SystemExit, match="--teacher_url: no answer"):
        run(pair, tmp_path / "b", **options)
    assert checkpoint.latest(tmp_path / "b").name == "step-2"
    server.dies_after = 10**9
    _, resumed = run(pair, tmp_path / "b", **options, resume=True)
    assert far(resumed, straight) == 0


@pytest.mark.parametrize("loss", ["lsm", "fkl_topk", "tail_topk"])
def test_places_of_the_top_k_that_stay_empty_do_not_count(scene, loss):
    """A server's top-K may hold ids that only pad its embedding: the support is then smaller."""
    student, _, ((batch,),), cfg, _ = scene(minibatches=1, micro_tokens=10**6, loss=loss, topk=5)
    full, grads = dict(batch.teacher), []
    last = torch.arange(5) == 4
    ids, logq = full["topk_ids"], full["topk_logq"]
    less = {"topk_ids": ids.masked_fill(last, 0), "topk_logq": logq.masked_fill(last, -torch.inf)}
    for targets in (less, {"topk_ids": ids[:, :4], "topk_logq": logq[:, :4]}):
        batch.teacher = full | targets
        x, info = train.base_loss(train.student_outputs(student, batch, cfg), batch, cfg)
        x.sum().backward()
        grads.append({name: p.grad for name, p in student.named_parameters()} | info | {"loss": x.detach()})
        student.zero_grad()
    assert far(*grads) < 1e-5 and grads[0]["loss"].isfinite().all()


def test_an_offloaded_teacher_waits_in_host_memory_and_says_the_same(scene, monkeypatch):
    _, lm, (batches, *_), cfg, _ = scene(loss="lsm", teacher_offload=True)
    moves, to = [], policy.Policy.to
    monkeypatch.setattr(policy.Policy, "to", lambda self, device: moves.append(str(device)) or to(self, device))
    local = LocalTeacher(lm, cfg, torch.device("cpu", 0))
    for batch, found in zip(batches, local.targets(batches), strict=True):
        assert all(torch.equal(found[name], x) for name, x in batch.teacher.items())
    assert moves == ["cpu", "cpu:0", "cpu"]  # "cpu:0" stands for the GPU here
