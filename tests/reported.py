"""A finished run whose rows carry hostile words, for the tests of its report."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ctxtrain.config.schema import Config
from ctxtrain.train import TrainingPipeline
from tests.helpers import DRIFT, Row, bars_of, make_row, write_rows
from tests.tiny_models import build_tiny

SECTIONS = [
    *("targets", "baselines", "learning", "curve", "confusion", "classes", "calibration", "confidence", "balance"),
    *("mistakes", "data", "reproduce"),
]
CHARTS = 12 + 6  # the last are the windows that were most confidently wrong
HOSTILE = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 2'>\"'&{{ 7 * 7 }}"


def hostile_rows(count: int, seed: int) -> list[Row]:
    """Learnable rows with flags, on twenty days, three LONG to two SHORT to one SKIP.

    Each id and symbol would break out of a page.
    """
    rng = np.random.default_rng(seed)
    mix = {"LONG": count // 2, "SHORT": count // 3, "SKIP": count // 6}
    labels = rng.permutation([label for label, rows in mix.items() for _ in range(rows)]).tolist()
    rows = [
        make_row(label, seed=1000 * seed + i, drift=DRIFT[label] / 2, id=f"{HOSTILE} {seed}-{i}", symbol=HOSTILE)
        for i, label in enumerate(labels)
    ]
    for i, row in enumerate(rows):
        for bar in bars_of(row):
            bar["time"] = bar["time"].replace("2025-03-03", f"2025-03-{3 + i % 20:02d}")
    return rows


def finished_run(folder: Path) -> Path:
    """Train a tiny model for three epochs on 48 rows, judged on 60 test rows; returns the run folder."""
    files = {
        name: str(write_rows(folder / f"{name}.jsonl", hostile_rows(count, seed)))
        for seed, (name, count) in enumerate({"train": 48, "val": 30, "test": 60}.items())
    }
    config = Config.parse(
        {
            "data": files,
            "model": {"base": str(build_tiny(folder / "base")), "max_tokens": 512},
            "training": {"epochs": 3, "warmup_steps": 1, "learning_rate": 1e-2, "gradient_accumulation": 1},
            "evaluation": {"learning_curve": [12, 24, 5000]},
            "output_dir": str(folder / "<b>run"),
        }
    )
    TrainingPipeline(config).run()
    return Path(config.output_dir)


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = orjson.loads((run / "training_summary.json").read_bytes())
    return summary
