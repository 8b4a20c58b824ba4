"""The best epoch of a run, by its validation scores.

Input: the records of the finished epochs. Output: their numbers, best first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def rank_epochs(epochs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Epoch numbers, best first: by highest macro-F1, then lowest validation loss, then earliest epoch.

    Epochs with a NaN score are left out.
    """
    scored = [entry for entry in epochs if not math.isnan(entry["macro_f1"] + entry["loss"])]
    ordered = sorted(scored, key=lambda entry: (-entry["macro_f1"], entry["loss"], entry["epoch"]))
    return [entry["epoch"] for entry in ordered]
