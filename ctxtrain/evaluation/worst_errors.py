"""The windows that the model got most confidently wrong, each with what a person needs to look at it.

Comes in: rows, labels and calibrated probabilities of the rows that judge a run. Goes out: plain values for
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

Take = Callable[[NDArray[np.int64]], Iterable[Window]]  # row numbers → their windows, in that order

MOST = 6
TEXT_SHOWN = 600  # characters of a text row
Column = Literal["open", "high", "low", "close", "volume"]
COLUMNS: tuple[Column, ...] = get_args(Column)


def confident_mistakes(
    take: Take, labels_N: NDArray[np.int64], probabilities_NC: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """At most 6 wrongly called windows, the most confident first; equal ones in the order of the file.

    `bars` maps open, high, low, close and volume to a list each, oldest first, the event last; `event` holds the
    structure fields of the event's bar. A text row has no bars, and the beginning of its `text`.
    """
    called_N, confidence_N = probabilities_NC.argmax(axis=1), probabilities_NC.max(axis=1)
    wrong = np.flatnonzero(called_N != labels_N)
    chosen = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:MOST].tolist()
    return [
        {
            **_shown(window),
            "label": LABELS[labels_N[row]],
            "called": LABELS[called_N[row]],
            "probabilities": dict(zip(LABELS, probabilities_NC[row].tolist(), strict=True)),
        }
        for row, window in zip(chosen, take(np.array(chosen, dtype=np.int64)), strict=True)
    ]


def _shown(window: Window) -> dict[str, Any]:
    return {
        "id": window.id,
        "place": window.place,
        "symbol": window.symbol,
        "time": window.placed.event,
        "text": None if window.text is None else window.text[:TEXT_SHOWN],
        "bars": {name: window.bars[name].tolist() for name in COLUMNS if window.bars},
        "event": {name: float(window.bars[name][-1]) for name in (*PULSES, *STATES) if name in window.bars},
    }
