"""The most confident errors of a model, each with its bars and fields for inspection.

Input: rows, labels and calibrated probabilities of the rows that score a run. Output: plain values for
`training_summary.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import PULSES, STATES
from ctxtrain.data.parse_window import Window
from ctxtrain.labels import LABELS

ReadWindows = Callable[[NDArray[np.int64]], Iterable[Window]]  # row numbers → their windows, in that order

MAX_MISTAKES = 6
MAX_TEXT_CHARS = 600
Column = Literal["open", "high", "low", "close", "volume"]
COLUMNS: tuple[Column, ...] = get_args(Column)


def confident_mistakes(
    read_windows: ReadWindows, labels_N: NDArray[np.int64], probabilities_NC: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """At most 6 wrongly predicted windows, most confident first; ties keep the order of the file.

    `bars` maps open, high, low, close and, if given, volume to a list each, oldest bar first, the event last. `event`
    holds the structure fields of the event's bar. A text row has no bars; its `text` is cut to 600 characters.
    """
    predicted_N, confidence_N = probabilities_NC.argmax(axis=1), probabilities_NC.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    chosen = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:MAX_MISTAKES].tolist()
    return [
        {
            **_describe(window),
            "label": LABELS[labels_N[row]],
            "called": LABELS[predicted_N[row]],
            "probabilities": dict(zip(LABELS, probabilities_NC[row].tolist(), strict=True)),
        }
        for row, window in zip(chosen, read_windows(np.array(chosen, dtype=np.int64)), strict=True)
    ]


def _describe(window: Window) -> dict[str, Any]:
    return {
        "id": window.id,
        "place": window.location,
        "symbol": window.symbol,
        "time": window.position.event,
        "text": None if window.text is None else window.text[:MAX_TEXT_CHARS],
        "bars": {name: window.bars[name].tolist() for name in COLUMNS if name in window.bars},
        "event": {name: float(window.bars[name][-1]) for name in (*PULSES, *STATES) if name in window.bars},
    }
