"""python -m pytest tests/test_trace.py      (train.py --trace_every and its page; the page's tests need a Chromium)"""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import finished, flags, run, same
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import train
from support import toy, trace
from support.files import read_jsonl


def traced(out):
    return read_jsonl(Path(out) / "trace.jsonl")


# -----------------------------------------------------------------------------
# trace.jsonl


def test_a_trace_holds_what_each_update_saw(scene):
    """Against a plain forward pass of the one response before each update, and the definitions of drift and gate."""
    student, _, minibatches, cfg, _ = scene(minibatches=1, micro_tokens=60, block=4, epochs=2)
    batches = minibatches[0]
    responses = sorted([r for batch in batches for r in batch.rollouts], key=lambda r: len(r.response))
    r = responses[len(responses) // 2]
    assert len({len(x.response) for x in responses}) == len(responses)  # so that the one of median length is unique
    sgd, updates, logps = torch.optim.SGD(student.parameters(), lr=0.2), [], []
    for _ in range(cfg.epochs):
        with torch.no_grad():
            logits = student.lm(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(r.response)[:, None])[:, 0])
        updates.append((batches, *train.update(student, sgd, batches, cfg)))
    row = trace.trace_row(3, updates, batches, toy.tokenizer(), cfg)
    assert row["step"] == 3 and "".join(row["text"]) == toy.tokenizer().decode(r.response)
    assert row["segment"] == [i // 4 for i in range(len(r.response))]
    torch.testing.assert_close(torch.tensor(row["logp_old"]), logps[0], rtol=1e-4, atol=1e-5)
    assert len(row["epochs"]) == 2
    segments = torch.tensor(row["segment"])
    for epoch, logp in zip(row["epochs"], logps, strict=True):
        assert epoch["updates"] == row["epochs"].index(epoch)
        epoch = {name: torch.tensor(x) for name, x in epoch.items()}
        torch.testing.assert_close(epoch["logp"], logp, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(epoch["drift"], logp - logps[0], rtol=1e-3, atol=2e-5)
        for i in segments.unique():
            s = (logp - logps[0])[segments == i].mean()
            assert (epoch["segment_drift"][segments == i] - s).abs().max() < 2e-5
        torch.testing.assert_close(epoch["gate"], (-epoch["segment_drift"].abs()).exp(), rtol=0, atol=2e-6)
        advantage = torch.tensor(row["logq"]) - logps[0]
        torch.testing.assert_close(epoch["advantage"], advantage, rtol=1e-4, atol=2e-5)
    assert epoch["drift"].abs().max() > 0.01


def test_a_trace_counts_the_updates_since_sampling(scene):
    """In epoch 1 the second minibatch is already seen by a student that has drifted; a skipped update does not count."""
    student, _, (first, second), cfg, _ = scene(minibatches=2)
    sgd = torch.optim.SGD(student.parameters(), lr=0.2)
    updates = [(batches, *train.update(student, sgd, batches, cfg)) for batches in (first, second, first, second)]

    def counts(batches):
        return [epoch["updates"] for epoch in trace.trace_row(1, updates, batches, toy.tokenizer(), cfg)["epochs"]]

    assert counts(first) == [0, 2] and counts(second) == [1, 3]
    updates[1][1]["skipped"] = True
    assert counts(first) == [0, 1] and counts(second) == [1, 2]


def test_the_current_advantage_is_traced(scene):
    student, _, (batches,), cfg, _ = scene(minibatches=1, advantage="current")
    sgd = torch.optim.SGD(student.parameters(), lr=0.2)
    updates = [(batches, *train.update(student, sgd, batches, cfg)) for _ in range(2)]
    row = trace.trace_row(1, updates, batches, toy.tokenizer(), cfg)
    for epoch in row["epochs"]:
        difference = torch.tensor(row["logq"]) - torch.tensor(epoch["logp"]) - torch.tensor(epoch["advantage"])
        assert difference.abs().max() < 1e-5


def test_tracing_changes_no_bit_and_survives_a_kill(pair, tmp_path):
    """A run resumed from step 2 of 4 drops the traces beyond it, and ends with the trace of one that was not killed."""
    options = dict(steps=4, epochs=2, save_every=2, keep=9, minibatches=2)
    run(pair, tmp_path / "plain", **options)
    run(pair, tmp_path / "a", **options, trace_every=1)
    assert same(tmp_path / "a", tmp_path / "plain") and not (tmp_path / "plain" / "trace.jsonl").exists()
    assert [row["step"] for row in traced(tmp_path / "a")] == [1, 2, 3, 4]
    assert all(len(row["epochs"]) == 2 for row in traced(tmp_path / "a"))

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "step-4")
    with (tmp_path / "b" / "trace.jsonl").open("a") as file:
        file.write('{"step": 5, "te')  # cut off by the kill
    run(pair, tmp_path / "b", **options, trace_every=1, resume=True)
    assert (tmp_path / "b" / "trace.jsonl").read_bytes() == (tmp_path / "a" / "trace.jsonl").read_bytes()
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("loss", ["lsm", "rkl"])
def test_trace_every_counts_steps_like_sample_every(pair, tmp_path, loss):
    run(pair, tmp_path / "a", steps=4, trace_every=3, loss=loss)
    assert [row["step"] for row in traced(tmp_path / "a")] == [1, 4]


@pytest.mark.slow
def test_two_ranks_trace_a_response_of_the_first(pair, tmp_path):
    """With one response in a step, the second rank has empty micro-batches only."""
    for n, options in enumerate((dict(prompts=3, group=2, micro_tokens=70), dict(prompts=1, group=1, minibatches=1))):
        argv = flags(pair, tmp_path / str(n), **options, epochs=2, trace_every=1)
        assert finished(argv, log=tmp_path / "log", ranks=2) == 0, (tmp_path / "log").read_text()[-3000:]
        rows = traced(tmp_path / str(n))
        assert [row["step"] for row in rows] == [1, 2]
        assert all(len(epoch["gate"]) == len(row["text"]) > 0 for row in rows for epoch in row["epochs"])


def byte_tokenizer():
    """Byte-level BPE without merges: every byte is a token."""
    vocabulary = {text: i for i, text in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_texts_of_tokens_add_up_to_the_response():
    tokenizer = byte_tokenizer()
    text = "x = é\n  数 ≥ 🙂"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    texts = trace.token_texts(ids, tokenizer)
    assert texts == [*"x = ", "", "é", *"\n  ", "", "", "数", " ", "", "", "≥", " ", "", "", "", "🙂", "<eos>"]
    for cut in range(len(ids)):  # a response that was cut off in a character, or begins in one
        for part in (ids[:cut], ids[cut:]):
            texts = trace.token_texts(part, tokenizer)
            assert len(texts) == len(part) and "".join(texts) == tokenizer.decode(part)
    garbage = tokenizer("🙂")["input_ids"][:1] * 9 + tokenizer("ok")["input_ids"]  # no character ever ends
    texts = trace.token_texts(garbage, tokenizer)
    assert "".join(texts) == tokenizer.decode(garbage)
    assert texts[3] == "\ufffd" * 4 and texts[-1] == "k"


# -----------------------------------------------------------------------------
# tokens.html, in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")


def browse(page, *options, view="", size="900,700"):
    """(what Chromium prints, what the page wrote to its console)."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={size}", "--virtual-time-budget=2000"]
    command += [*options, f"{page.as_uri()}#{view}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def seen(page, script="", view="", size="900,700"):
    """What the browser shows after a script in the page. The console must stay empty."""
    look = """
        const tokens = [...document.querySelectorAll(".token")];
        const shades = tokens.map(x => getComputedStyle(x).backgroundColor);
        const result = {
            shades, hash: location.hash.slice(1), text: tokens.map(x => x.textContent).join(""),
            step: document.getElementById("step").value, epoch: document.getElementById("epoch").value,
            by: document.querySelector("[name=by]:checked").value, focused: tokens.indexOf(document.activeElement),
            rows: [...document.getElementById("response").rows].map(x => [...x.cells].map(cell => cell.innerText)),
            numbers: document.getElementById("details").innerText,
            header: document.querySelector("header").innerText, now: document.querySelector(".controls").innerText,
            places: Object.fromEntries(["details", "response"].map(id => [id, document.getElementById(id).getBoundingClientRect()])),
            lines: tokens.map(x => [...x.getClientRects()].filter(box => box.width > 1).length),
        };
        const pre = document.createElement("pre");
        pre.id = "result";
        pre.textContent = JSON.stringify(result);
        document.body.append(pre);"""
    copy = page.with_name("copy.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("</html>") == 1
    # Later, because a window that is just opening has no focus yet, and fires no focus events.
    late = f"<script>setTimeout(() => {{{script}\n{look}}}, 500)</script></html>"
    copy.write_text(text.replace("</html>", late), encoding="utf-8")
    dom, console = browse(copy, "--dump-dom", view=view, size=size)
    assert console == []
    return json.loads(html.unescape(re.search('<pre id="result">(.*)</pre>', dom, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def page(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "run"
    run(pair, out, steps=2, epochs=3, minibatches=1, trace_every=1)
    return trace.write_tokens(out)


def minus(x, digits=3):
    """A number as the page writes it."""
    return f"{x:+.{digits}f}".replace("-", "\u2212")


@needs_browser
def test_the_page_shows_the_response_and_its_gates(page):
    row = traced(page.parent)[0]
    first, last = seen(page, view="step=1&epoch=1&by=gate"), seen(page, view="step=1&by=gate")
    assert first["text"].replace("\u23ce\n", "\n") == "".join(row["text"])
    assert all(shade.endswith(", 0)") for shade in first["shades"])  # no drift before the first update: no shade
    assert "after 0 updates" in first["now"] and "after 2 updates" in last["now"]
    assert last["epoch"] == "3"  # without an epoch in the address, the last one
    epoch = row["epochs"][2]
    gates = epoch["gate"]
    darkest = [float(re.search(r"([\d.]+)\)$", shade)[1]) for shade in last["shades"]]
    assert darkest.index(max(darkest)) == gates.index(min(gates)) and max(darkest) > 0.05
    for fact in ("opd (sampled tokens)", "block, 4 tokens", "3e-3", f"{len(gates)} tokens", "student", "rank 0"):
        assert fact in first["header"], fact
    student = json.loads((page.parent / "config.json").read_text())["student"]
    assert Path(student).name in first["header"] and student not in page.read_text(encoding="utf-8")
    for name, values in (("drift", epoch["drift"]), ("s", epoch["segment_drift"])):
        mean = sum(abs(x) for x in values) / len(values)
        assert re.search(rf"mean \|{name}\|\s+{mean:.3f}", last["now"])


@needs_browser
@pytest.mark.slow
def test_each_block_has_its_drift_and_gate_beside_its_text(page):
    row = traced(page.parent)[0]
    epoch = row["epochs"][2]
    for by in ("gate", "drift", "advantage"):
        rows = seen(page, view=f"by={by}")["rows"]
        assert len(rows) == row["segment"][-1] + 1
        for k, (number, s, size, gate, _) in enumerate(rows):
            mine = [i for i, segment in enumerate(row["segment"]) if segment == k]
            drifts = [epoch["drift"][i] for i in mine]
            assert (number, gate) == (str(k + 1), f"{epoch['gate'][mine[0]]:.3f}")
            assert float(s.replace("\u2212", "-")) == pytest.approx(sum(drifts) / len(drifts), abs=6e-4)
            assert float(size) == pytest.approx(sum(abs(d) for d in drifts) / len(drifts), abs=6e-4)


@needs_browser
@pytest.mark.slow
def test_the_controls_of_the_page_work(page):
    start = seen(page)
    assert (start["step"], start["epoch"], start["by"]) == ("1", "3", "gate")
    slide = (
        'const slider = document.getElementById("epoch"); slider.value = 2; slider.dispatchEvent(new Event("input"));'
    )
    middle = seen(page, slide)
    assert middle["epoch"] == "2" and middle["hash"] == "step=1&epoch=2&by=gate" and middle["shades"] != start["shades"]
    views = [middle]
    for by in ("drift", "advantage"):
        views.append(seen(page, f'{slide} document.querySelector("[value={by}]").click();'))
        assert views[-1]["by"] == by and views[-1]["hash"] == f"step=1&epoch=2&by={by}"
        assert all(views[-1]["shades"] != other["shades"] for other in views[:-1])
        assert seen(page, view=views[-1]["hash"])["shades"] == views[-1]["shades"]  # the address is a link to the view
    other = seen(page, 'step.value = "2"; step.dispatchEvent(new Event("change"));')
    assert other["step"] == "2" and other["text"] != start["text"]
    wrong = seen(page, view="step=77&epoch=x&by=y&token=12345")
    assert (wrong["step"], wrong["epoch"], wrong["by"]) == ("1", "3", "gate")
    assert wrong["numbers"] == start["numbers"]


HOVER = 'document.querySelectorAll(".token")[{}].dispatchEvent(new MouseEvent("mouseover", {{bubbles: true}}));'


@needs_browser
@pytest.mark.slow
def test_numbers_appear_on_hover_and_by_keyboard(page):
    row = traced(page.parent)[0]
    key = (
        'document.querySelector(".token[tabindex=\'0\']").focus(); for (const key of ["ArrowRight", "ArrowRight"])'
        'document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));'
    )
    leave = 'document.getElementById("response").dispatchEvent(new MouseEvent("mouseleave"));'
    start = seen(page)
    assert start["numbers"].startswith("Point at a token") and "fixed" not in start["numbers"]
    by_mouse, by_key = seen(page, HOVER.format(2)), seen(page, key)
    assert by_key["focused"] == 2 and by_key["numbers"] == by_mouse["numbers"]
    assert by_key["hash"].endswith("&token=3") and "token 3 of" in by_key["numbers"]  # both count from 1
    assert seen(page, view=by_key["hash"])["numbers"] == by_key["numbers"]
    # The mouse may pass over other tokens on its way to the slider: the focused one's numbers come back.
    assert "token 6 of" in seen(page, key + HOVER.format(5))["numbers"]
    assert seen(page, key + HOVER.format(5) + leave)["numbers"] == by_key["numbers"]
    epoch = row["epochs"][2]
    for x in (row["logp_old"][2], row["logq"][2], *(epoch[name][2] for name in epoch if name != "updates")):
        assert f"{abs(x):.4f}" in by_mouse["numbers"]
    assert minus(row["logq"][2] - epoch["logp"][2], 4) in by_mouse["numbers"].split("gap now")[1]
    percent = re.search(r"log \u03c0old\s+\S+ \((.*) %\)", by_mouse["numbers"])[1]
    assert float(percent) == pytest.approx(100 * math.exp(row["logp_old"][2]), rel=0.006)


@needs_browser
@pytest.mark.parametrize("size", ["500,900", pytest.param("1100,900", marks=pytest.mark.slow)])
def test_the_numbers_are_below_the_text_and_on_the_screen(page, size):
    """For the last token, too; and moving over the text moves nothing."""
    n = len(traced(page.parent)[0]["text"])
    width, height = map(int, size.split(","))
    bottom = "scrollTo(0, document.body.scrollHeight);"
    places = [seen(page, bottom + hover, size=size)["places"] for hover in ("", HOVER.format(0), HOVER.format(n - 1))]
    for place in places:
        assert place == places[0]
        assert place["details"]["top"] >= place["response"]["bottom"] - 1
        assert place["details"]["bottom"] <= height and place["details"]["right"] <= width


@needs_browser
def test_any_text_is_shown_as_it_is(page, tmp_path):
    """Markup, the end of a script, a token without text, white space, and a number that is not finite."""
    row = traced(page.parent)[0]
    texts = ["</script><script>oops()</script>", "<!--", "<b>&amp;", "", "\t", "\u2028", "TRACE", '"\\', "constructor"]
    for i, text in enumerate(texts):
        row["text"][i] = text
    row["logq"][0] = row["epochs"][0]["advantage"][0] = None
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(page.parent / name, tmp_path)
    (tmp_path / "trace.jsonl").write_text(json.dumps(row) + "\n")
    result = seen(trace.write_tokens(tmp_path), view="epoch=1&by=advantage&token=1")
    shown = "".join(texts).replace("\t", "\u21e5\t").replace("<b>&amp;", "<b>&amp;\u25af")
    assert result["text"].startswith(shown) and "not finite" in result["numbers"]


@needs_browser
def test_a_space_does_not_hang_over_the_end_of_a_line(page, tmp_path):
    """So each of these words is one shaded box. Spaces that mean something, at a line's start or in a row, stay."""
    row = traced(page.parent)[0]
    row["text"] = [" " + "w" * 20] * len(row["text"])
    row["text"][-3:] = ["\n", "  ", " x"]
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(page.parent / name, tmp_path)
    (tmp_path / "trace.jsonl").write_text(json.dumps(row) + "\n")
    result = seen(trace.write_tokens(tmp_path), size="500,900")
    assert result["lines"] == [1] * len(row["text"])
    assert result["rows"][-1][-1].endswith("\u23ce\n   x")


@needs_browser
def test_the_page_is_readable_in_light_and_dark_and_needs_no_network(page, tmp_path):
    brightness = {}
    for theme, option in (("light", "--hide-scrollbars"), ("dark", "--force-dark-mode")):
        picture = tmp_path / f"{theme}.png"
        _, console = browse(page, option, f"--screenshot={picture}", view="epoch=3&by=drift")
        pixels = imread(picture)[:, :, :3].mean(2)
        brightness[theme] = float(pixels.mean())
        assert console == [] and pixels.std() > 0.03  # there is something on it
    assert brightness["light"] > 0.85 and brightness["dark"] < 0.25
    assert not re.search(r"https?:|src=|@import|url\(", page.read_text(encoding="utf-8"))


@needs_browser
def test_the_console_is_heard(page):
    """An error in the page's script would fail the tests above."""
    copy = page.with_name("broken.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("fillOnce();", "fillTwice();"), encoding="utf-8")
    _, console = browse(copy, "--dump-dom")
    assert len(console) == 1 and "fillTwice is not defined" in console[0]


def test_a_run_without_a_trace_is_one_line(pair, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="trace.jsonl: train with --trace_every"):
        trace.main([str(tmp_path)])
