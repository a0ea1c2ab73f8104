"""Tables and figures of study.jsonl, which study.run writes."""

from pathlib import Path

import numpy as np

from common import read_jsonl


def read(path) -> dict:
    """{cell: its line}."""
    return {line["cell"]: line for line in read_jsonl(path)}


def score(line, metric, when="end") -> float:
    """A metric's mean over the benchmarks, after training or before it ("start"). "pass@" finds pass@8."""
    values = [x for name, x in line[when].items() if name.split("/")[-1].startswith(metric)]
    return float(np.mean(values))


def report(path: Path):
    print(f"{len(read(path))} cells in {path}")
