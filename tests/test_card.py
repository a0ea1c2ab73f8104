"""python -m pytest tests/test_card.py      (the final student's model card, and --push to a stand-in for the hub)"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from helpers import flags, run
from huggingface_hub import ModelCard

import train
from configs import TrainConfig, parse

OPTIONS = dict(steps=2, eval_every=2, eval_problems=4, k=2, schedule="constant")


def test_the_final_student_says_what_it_was_made_of(pair, tmp_path):
    run(pair, tmp_path, **OPTIONS)
    card = ModelCard.load(tmp_path / "final" / "README.md")  # the hub's own reader
    assert card.data.library_name == "transformers" and "policy-drift-gating" in card.data.tags
    assert card.data.base_model is None  # both models are folders on this machine, which mean nothing to others
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (row for row in rows if "lr" not in row)
    assert f"| eval/mean@2 | {first['eval/mean@2']:.3f} | {last['eval/mean@2']:.3f} |" in card.text
    low, high = last["eval/interval"]
    assert low <= last["eval/pass@2"] <= high and f"| {low:.3f} to {high:.3f} |" in card.text
    assert "    python train.py --preset tiny" in card.text and "--eval_problems 4" in card.text
    assert "Code: commit" in card.text and f"torch {train.torch.__version__}" in card.text


def test_hub_models_are_named_as_base_models(pair, tmp_path):
    cfg = parse(TrainConfig, ["--preset", "qwen3", "--out", str(tmp_path)])
    (tmp_path / "final").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    train.metrics.write_model_card(cfg)
    card = ModelCard.load(tmp_path / "final" / "README.md")
    assert card.data.base_model == ["Qwen/Qwen3-1.7B-Base", "Thinking-Space/Qwen3-4B-Base-GRPO"]
    assert "not evaluated" in card.text


def test_a_metric_that_the_first_evaluation_lacks_does_not_end_the_run(pair, tmp_path):
    """--k and --eval_data may change on resume, and a value that is not finite is not written."""
    cfg = parse(TrainConfig, flags(pair, tmp_path, **OPTIONS))
    (tmp_path / "final").mkdir()
    rows = [{"step": 0, "eval/pass@2": 0.25}, {"step": 2, "eval/pass@2": 0.5, "eval/kl": 0.125}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.metrics.write_model_card(cfg)
    text = (tmp_path / "final" / "README.md").read_text()
    assert "| eval/pass@2 | 0.250 | 0.500 |" in text and "| eval/kl | 0.125 | 0.125 |" in text


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub's server: hub.files {name: content} of what was committed; hub.is_broken: it refuses commits."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body, status=200):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer({"name": "me", "type": "user"})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path.endswith("/create"):
                self.answer({"url": f"{server.url}/me/{json.loads(body)['name']}"})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            elif "/commit/" in self.path and server.is_broken:
                self.answer({"error": "the disk is full"}, 500)
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    change = json.loads(line)
                    if change["key"] == "file":
                        server.files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
                self.answer({"commitUrl": f"{server.url}/me/x/commit/1", "commitOid": "1", "pullRequestUrl": None})
            else:
                self.answer({"errors": [], "warnings": []})  # of the card

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.files, server.is_broken = f"http://127.0.0.1:{server.server_port}", {}, False
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_push_uploads_the_final_student(pair, tmp_path, hub, capsys):
    train.main(parse(TrainConfig, flags(pair, tmp_path, **OPTIONS, push="me/x")))
    final = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}
    assert hub.files == final and {"README.md", "model.safetensors", "config.json"} <= final.keys()
    assert f"pushed to {hub.url}/me/x/commit/1" in capsys.readouterr().out


def test_a_push_that_fails_loses_nothing_and_says_how_to_try_again(pair, tmp_path, hub, capsys):
    hub.is_broken = True
    train.main(parse(TrainConfig, flags(pair, tmp_path, **OPTIONS, push="me/x")))
    out = capsys.readouterr().out
    assert f"To try again: hf upload me/x {tmp_path}/final" in out and (tmp_path / "final" / "README.md").exists()


def test_push_without_a_token_is_one_line_before_the_first_step(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(SystemExit, match="^train.py: --push me/x: .* .to log in: hf auth login.$"):
        train.main(parse(TrainConfig, flags(pair, tmp_path / "run", **OPTIONS, push="me/x")))
    assert not (tmp_path / "run").exists()
