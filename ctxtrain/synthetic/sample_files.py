"""The files of a sample, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def describe_sample(folder: Path, written: Mapping[str, Any]) -> str:
    """The files that `write_sample` wrote, one per line, and the best possible scores on them."""
    lines = [
        f"{folder / f'{name}.jsonl'}  {facts['rows']:,} windows  {facts['labels']}"
        for name, facts in written["files"].items()
    ]
    best = written["expected"]["best"]
    macro_f1 = "unknown" if best["macro_f1"] is None else f"{best['macro_f1']:.3f}"
    lines.append(f"best possible: accuracy {best['accuracy']:.3f}, macro-F1 {macro_f1}; see sample.json")
    return "".join(f"{line}\n" for line in lines)
