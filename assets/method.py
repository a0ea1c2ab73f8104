"""Draws assets/method.svg, the picture of the method in the README.      python assets/method.py

One response of four blocks of eight tokens, followed over three updates. The drift is made up; gates and weights are
computed from it by Eq. 1. The colours follow the reader's light or dark theme.
"""

import math
import random
from pathlib import Path

BLOCKS, TOKENS, TAU = 4, 8, 1.0
MEAN_DRIFT = [0.05, -0.5, 0.3, 1.5]  # of each block at the last update, in nats
UPDATES = [("update 1", 0.0), ("update 2", 0.5), ("update 3", 1.0)]  # share of the drift that has built up

STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; fill: #1f2328 }
  .line { stroke: #8b949e; stroke-width: 1; fill: none }
  .tick { stroke: #8b949e; stroke-width: 1; stroke-dasharray: 2 3 }
  .token { fill: #eaeef2; stroke: #8b949e; stroke-width: 0.6 }
  .drift { fill: #54aeff }
  .mean { stroke: #0550ae; stroke-width: 2.5 }
  .gate { fill: #bc4c00 }
  .small { font-size: 12px; fill: #57606a } .title { font-size: 15px; font-weight: bold } .math { font-size: 14px; font-style: italic }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9da7b3 } .token { fill: #21262d; stroke: #6e7681 }
    .line, .tick { stroke: #6e7681 } .drift { fill: #1f6feb } .mean { stroke: #a5d6ff } .gate { fill: #f0883e }
  }
"""


def text(x, y, words, kind="small", anchor="middle"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def sub(base, index):
    """base with a subscript."""
    return f'{base}<tspan dy="3" font-size="75%">{index}</tspan><tspan dy="-3">\u200b</tspan>'


def line(x1, y1, x2, y2, kind="line"):
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" class="{kind}"/>'


def rect(x, y, width, height, kind, opacity=1.0):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}" opacity="{opacity:.2f}"/>'


def token_drifts():
    """[block][token]: drift around each block's mean, at the last update."""
    rng = random.Random(4)
    noise = [[rng.gauss(0, 0.45) for _ in range(TOKENS)] for _ in range(BLOCKS)]
    return [[mean + x - sum(row) / TOKENS for x in row] for mean, row in zip(MEAN_DRIFT, noise, strict=True)]


def draw_sampling(x, y, width):
    """Responses as strips of tokens, and the teacher that scores them."""
    parts = [text(x + width / 2, 28, "1. Sample and score, once", "title")]
    parts.append(text(x + width / 2, 48, f"y ~ {sub('π', 'old')},   log {sub('π', 'old')}(y),   log q(y)", "math"))
    for row, n in enumerate((15, 11, 16, 9)):
        for i in range(n):
            parts.append(rect(x + 12 * i, y + 24 * row, 10, 15, "token"))
    words = [
        "The student samples responses.",
        "The teacher q scores every token:",
        "the sampled one, or its top-K.",
        "Then the same batch serves",
        "several updates.",
    ]
    for i, sentence in enumerate(words):
        parts.append(text(x, y + 122 + 19 * i, sentence, anchor="start"))
    return parts


def draw_update(x, y, share, drifts):
    """Drift by token and block, gates by block, and the weights on the token losses; one row of the picture."""
    width, block_width = 10 * TOKENS * BLOCKS, 10 * TOKENS
    scale, zero = 18, y + 45  # pixels per nat
    parts = [line(x, zero, x + width, zero)]
    gates = []
    for b, row in enumerate(drifts):
        left = x + b * block_width
        if b:
            parts.append(line(left, y + 4, left, y + 80, "tick"))
        for t, d in enumerate(row):
            height = abs(d * share) * scale
            parts.append(rect(left + 10 * t + 2, zero - height if d > 0 else zero, 6, height, "drift"))
        s = share * sum(row) / TOKENS
        parts.append(line(left + 2, zero - s * scale, left + block_width - 2, zero - s * scale, "mean"))
        gates.append(math.exp(-TAU * abs(s)))

    x = x + width + 70
    bottom = y + 72
    parts += [line(x - 6, bottom, x + 4 * 42, bottom), line(x - 6, bottom - 56, x + 4 * 42, bottom - 56, "tick")]
    for b, g in enumerate(gates):
        parts.append(rect(x + 42 * b, bottom - 56 * g, 30, 56 * g, "gate"))
        parts.append(text(x + 42 * b + 15, bottom + 14, f"{g:.2f}"))

    x = x + 4 * 42 + 62
    mean = sum(gates) / BLOCKS
    for b, g in enumerate(gates):
        for t in range(TOKENS):
            left = x + b * (TOKENS * 7 + 6) + 7 * t
            parts += [rect(left, y + 28, 6, 30, "token"), rect(left, y + 28, 6, 30, "gate", min(1.0, 0.75 * g / mean))]
        parts.append(text(x + b * (TOKENS * 7 + 6) + TOKENS * 3.5, y + 74, f"{g / mean:.2f}"))
    return parts


def picture() -> str:
    drifts = token_drifts()
    x = 290
    columns = [x + 160, x + 320 + 70 + 81, x + 320 + 70 + 4 * 42 + 62 + 121]
    parts = draw_sampling(14, 72, 190)
    for center, title in zip(columns, ("2. Drift, block by block", "3. Gate", "4. Weighted loss"), strict=True):
        parts.append(text(center, 28, title, "title"))
    for center, formula in zip(
        columns,
        (
            f"{sub('d', 't')} = log π({sub('y', 't')}) − log {sub('π', 'old')}({sub('y', 't')}),   s = mean of d over a block",
            "g = exp(−τ |s|)",
            f"L = Σ {sub('g', 't')} {sub('ℓ', 't')} / Σ {sub('g', 't')}",
        ),
        strict=True,
    ):
        parts.append(text(center, 48, formula, "math"))
    for i, (name, share) in enumerate(UPDATES):
        y = 62 + 96 * i
        parts.append(text(x - 12, y + 49, name, anchor="end"))
        parts += draw_update(x, y, share, drifts)
    parts += [
        text(columns[0], 366, "bars: tokens, in nats; lines: block means s"),
        text(columns[1], 366, "1 without drift; no gradient"),
        text(columns[2], 366, "token losses times g / mean g"),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1180 384" width="1180" height="384">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    path = Path(__file__).with_name("method.svg")
    path.write_text(picture())
    print(path)
