"""One response of a step, token by token: trace.jsonl (train.py --trace_every), and the page that shows it.

    python -m support.trace out/tiny           # writes out/tiny/tokens.html

The page shows responses as text, shaded by gate, drift or advantage, over the epochs. It is one file: the template
assets/tokens.html, filled in.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from support.common import ROOT
from support.files import CONFIG, TRACE, read_jsonl
from support.vocabulary import decode

# The flags that the page shows
SETTINGS = ("loss", "advantage", "topk", "gate", "block", "span_min", "span_max", "tau", "stat", "lr", "max_response")


def trace_row(step, updates, micro_batches, tokenizer, cfg):
    """A row of trace.jsonl: what a step's updates saw at each token of one response. None if this rank has no response.

    The response is the one of median length among this rank's. Log-probs are at cfg.temperature; they, drift and
    advantage are in nats. "epochs" holds what the update of each epoch saw, and how many updates had been made on this
    step's rollouts before it. The advantage is the one that --loss opd uses; for other losses, log q - log pi_old.
    """
    responses = [(batch, i) for batch in micro_batches for i in range(len(batch.rollouts))]
    if not responses:
        return None
    responses.sort(key=lambda response: len(response[0].rollouts[response[1]].response))
    batch, i = responses[len(responses) // 2]
    r = batch.rollouts[i]
    here = batch.rows == i  # [N], True at its tokens
    segments = batch.segments[here]
    logp_old = batch.logp_old[here]
    logq = batch.teacher["logq_sampled"].to(logp_old.device)[here]
    special_ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    row = {
        "step": step,
        "prompt": tokenizer.decode(r.prompt),
        "finish": r.finish,
        "text": token_texts(r.response, tokenizer),
        "special": [token in special_ids for token in r.response],
        "segment": (segments - segments[0]).tolist(),
        "logp_old": numbers(logp_old),
        "logq": numbers(logq),
        "epochs": [],
    }
    n_updates = 0
    for minibatch, result, per_token in updates:
        for other, tensors in zip(minibatch, per_token, strict=True):
            if other is batch:
                d = tensors["d"][here]
                advantage = tensors["loss/advantage"][here] if "loss/advantage" in tensors else logq - logp_old
                columns = {"logp": logp_old + d, "drift": d, "segment_drift": tensors["s"][here]}
                columns |= {"gate": tensors["g"][here], "advantage": advantage}
                row["epochs"].append({"updates": n_updates} | {name: numbers(x) for name, x in columns.items()})
        n_updates += not result["skipped"]
    return row


def numbers(x):
    """A tensor as a list that JSON can hold: None for NaN and infinity."""
    return [round(value, 6) if math.isfinite(value) else None for value in x.tolist()]


def token_texts(ids, tokenizer) -> list[str]:
    """Texts of the tokens, which add up to the decoded response.

    Decoded alone, a token may lose its leading space, and one with a part of a character becomes U+FFFD. So each text
    is what the token adds to the text so far; a character that several tokens share belongs to the last of them.
    """
    texts = []
    start = end = 0  # texts cover ids[:end]; those from start on are the context of the next one
    for n in range(1, len(ids) + 1):
        context = decode(tokenizer, ids[start:end], clean_up_tokenization_spaces=False)
        text = decode(tokenizer, ids[start:n], clean_up_tokenization_spaces=False)[len(context) :]
        is_part = text.endswith("\ufffd") and n - end < 4  # UTF-8 characters have at most 4 bytes
        if is_part and n < len(ids):
            texts.append("")
        else:
            texts.append(text)
            start, end = end, n
    return texts


def write_tokens(run) -> Path:
    """Writes tokens.html into the run's folder, and returns its path. ValueError if the run has no trace."""
    run = Path(run)
    if not (run / TRACE).exists():
        raise ValueError(f"{run} has no {TRACE}: train with --trace_every 10, for example")
    config = json.loads((run / CONFIG).read_text())
    settings = {name: config[name] for name in SETTINGS}
    settings["student"] = Path(config["student"]).name  # not the whole path: the page may be passed on
    settings["teacher"] = config["teacher_url"] or Path(config["teacher"]).name
    data = json.dumps({"run": run.resolve().name, "settings": settings, "steps": read_jsonl(run / TRACE)})
    data = data.replace("<", "\\u003c")  # the same to JSON, but no text in it can end the script that holds it
    template = ROOT / "assets" / "tokens.html"
    page = run / "tokens.html"
    page.write_text(template.read_text(encoding="utf-8").replace("TRACE", data, 1), encoding="utf-8")
    return page


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m support.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a trace.jsonl")
    try:
        for run in parser.parse_args(argv).runs:
            print(write_tokens(run))
    except ValueError as error:
        sys.exit(f"support.trace: {error}")


if __name__ == "__main__":
    main()
