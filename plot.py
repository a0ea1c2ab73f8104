"""Plots of what a run recorded.

    python plot.py out/tiny [out/other ...]     # writes out/tiny/curves.png and gates.png, from metrics.jsonl
    python plot.py out/tiny --tokens            # writes out/tiny/tokens.html, from trace.jsonl (train.py --trace_every)

curves.png: loss, KL to the teacher (eval/kl: exact; gap: log pi_old - log q on the sampled tokens, an estimate), drift, gates,
pass@k and response length over steps, of one or more runs.
gates.png: the mean gate by position in the response, over steps, of the first run.
tokens.html: responses as text, shaded by gate, drift or advantage. One file: the template assets/tokens.html, filled in.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

from common import read_jsonl

PANELS = {  # title: a regular expression for the names of the metrics in the panel
    "loss": "loss",
    "KL to the teacher, nats/token": "gap|eval/.*kl",
    "absolute drift since sampling, nats": "gate/(drift_abs|s_abs)",
    "gates (1: no drift)": "gate/(mean|ess|p05)",
    "share of held-out problems solved": "eval/.*(pass|mean)@.*",
    "response length, tokens": "rollout/length",
}


# The flags that tokens.html shows.
SETTINGS = ("loss", "advantage", "topk", "gate", "block", "span_min", "span_max", "tau", "stat", "lr", "max_response")


def pyplot():
    """matplotlib.pyplot without a display; imported only where a picture is drawn, because that takes a second."""
    os.environ["MPLBACKEND"] = "Agg"  # not a notebook's: without its package, matplotlib would fail to import
    import matplotlib.pyplot as plt

    return plt


def draw(*runs) -> None:
    """Writes curves.png, and gates.png if the first run recorded gates, into the first run's folder."""
    histories = {Path(run): read_jsonl(Path(run) / "metrics.jsonl") for run in runs}
    first = Path(runs[0])
    draw_curves(histories, first / "curves.png")
    rows = [row for row in histories[first] if "gate/by_position" in row]
    if rows:
        draw_gates(rows, first / "gates.png", title=f"mean gate in the last epoch of each step: {first.name}")


def draw_curves(histories, path):
    """histories: {folder: rows}. One run: a colour per metric. Several: a colour per run, a line style per metric."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    one_run = len(histories) == 1
    all_rows = sum(histories.values(), [])
    for ax, (title, pattern) in zip(axes.flat, PANELS.items(), strict=True):
        names = dict.fromkeys(name for row in all_rows for name in row if re.fullmatch(pattern, name))
        for i, name in enumerate(names):
            linestyle = "-" if one_run else ("-", "--", ":")[i % 3]
            style = dict(linestyle=linestyle, marker="o" if name.startswith("eval/") else None, markersize=5)
            for j, rows in enumerate(histories.values()):
                steps = [row["step"] for row in rows if name in row]
                values = [row[name] for row in rows if name in row]
                ax.plot(steps, values, color=f"C{i}" if one_run else f"C{j}", **style)
            ax.plot([], [], color=f"C{i}" if one_run else "gray", label=name, **style)  # for the legend only
        ax.set(title=title, xlabel="step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if len(names) > 1:
            ax.legend(fontsize=8, handlelength=3)  # long enough to tell line styles apart
    if not one_run:
        lines = [plt.Line2D([], [], color=f"C{j}", label=run.name) for j, run in enumerate(histories)]
        figure.legend(handles=lines, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_gates(rows, path, title):
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    extent = (rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, 0, 1)  # each column is centred on its step
    # [positions, steps]; NaN where there was no token
    gates = np.array([row["gate/by_position"] for row in rows], dtype=float).T
    image = ax.imshow(gates, origin="lower", aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
    ax.set(title=title, xlabel="step", ylabel="position in the response (0: start, 1: end)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="gate")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# -----------------------------------------------------------------------------
# one response, token by token: trace.jsonl (--trace_every), and the page that shows it


def trace(step, updates, micro_batches, tokenizer, cfg):
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
                advantage = tensors["advantage"][here] if "advantage" in tensors else logq - logp_old
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
        context = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[start:n], clean_up_tokenization_spaces=False)[len(context) :]
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
    if not (run / "trace.jsonl").exists():
        raise ValueError(f"{run} has no trace.jsonl: train with --trace_every 10, for example")
    config = json.loads((run / "config.json").read_text())
    settings = {name: config[name] for name in SETTINGS}
    settings["student"] = Path(config["student"]).name  # not the whole path: the page may be passed on
    settings["teacher"] = config["teacher_url"] or Path(config["teacher"]).name
    data = json.dumps({"run": run.resolve().name, "settings": settings, "steps": read_jsonl(run / "trace.jsonl")})
    data = data.replace("<", "\\u003c")  # the same to JSON, but no text in it can end the script that holds it
    template = Path(__file__).resolve().parent / "assets" / "tokens.html"
    page = run / "tokens.html"
    page.write_text(template.read_text(encoding="utf-8").replace("TRACE", data, 1), encoding="utf-8")
    return page


# -----------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a metrics.jsonl")
    parser.add_argument("--tokens", action="store_true", help="write tokens.html instead of the pictures")
    args = parser.parse_args(argv)
    for run in args.runs:
        if not (Path(run) / "metrics.jsonl").exists():
            sys.exit(f"plot.py: {run} is not a run: it has no metrics.jsonl")
    if not args.tokens:
        return draw(*args.runs)
    try:
        for run in args.runs:
            print(write_tokens(run))
    except ValueError as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
