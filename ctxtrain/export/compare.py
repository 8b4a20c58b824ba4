"""Compare the logits of an export with those of the trained model, within tolerances measured on the same rows.

Input: logits of the trained model, of the merged one, and of the export as a fresh process and as `predict` open it.
Output: the differences, or an ExportError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ctxtrain.data.tokens import tokenise
from ctxtrain.engine.api import EngineChoice
from ctxtrain.errors import DataError, ExportError
from ctxtrain.export import reopen
from ctxtrain.export.fresh_process import BATCH_SIZE
from ctxtrain.export.predictor import load_model

Floats = NDArray[np.float64]

TOLERANCE = 1e-5
READING_TOLERANCE = 2e-6
# Merging rounds each weight once; another batch size rounds each sum of products differently. Both errors are of
# similar size, so the measured difference between batch sizes, times a margin, bounds that of merging.
NOISE_FACTOR = 16
ROUNDING_FACTOR = 4  # of the rounding measured on the first rows, for the largest of all rows
MAX_CHECKED_ROWS, MIN_CHECKED_ROWS = 200, 8
CHECK_WORK = 1e12  # multiplications and additions of one pass over the checked rows on a CPU: some seconds


def checked_rows(parameters: int, tokens: float, device: str) -> int:
    """The number of validation rows whose logits are compared; `tokens` is the mean length of their texts."""
    if device != "cpu":
        return MAX_CHECKED_ROWS
    return min(MAX_CHECKED_ROWS, max(MIN_CHECKED_ROWS, int(CHECK_WORK / (2 * parameters * tokens))))


@dataclass(frozen=True)
class TrainedLogits:
    """The trained model's logits of the checked rows, shape (N, 3), and the sizes of two errors on the first rows.

    `noise` is the largest difference of a logit between two batch sizes, in float32. `rounding` is the largest that
    rounding the merged weights to the dtype of the export makes; for float32 it is 0.
    """

    logits_NC: Floats
    noise: float
    rounding: float = 0.0

    @classmethod
    def of(cls, model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> TrainedLogits:
        logits_NC = local_logits(model, tokenizer, texts)
        size = max(1, min(BATCH_SIZE, len(texts)) // 4)
        other_NC = local_logits(model, tokenizer, texts[:BATCH_SIZE], size)
        return cls(logits_NC, float(np.abs(other_NC - logits_NC[:BATCH_SIZE]).max()))

    @property
    def scale(self) -> float:
        """The largest logit, at least 1, as float32 has 24 bits at any scale."""
        return max(1.0, float(np.abs(self.logits_NC).max()))

    @property
    def allowed(self) -> float:
        """How much a logit of the export may differ."""
        return max(TOLERANCE * self.scale, NOISE_FACTOR * self.noise) + ROUNDING_FACTOR * self.rounding


def compare_logits(reopened_NC: Floats, trained: TrainedLogits, merged_NC: Floats) -> dict[str, Any]:
    """Compare the logits of transformers in a fresh process with two references.

    The first is the model that PEFT merged in this process, on the first rows: only another way of merging, writing and
    reading lie between, so the logits may differ only in the last bits. The second is the trained model with separate
    adapters: merging rounds, so they may differ by 1e-5 times the largest logit (at least 1), or by a multiple of the
    noise measured on these rows if that is more, and by a multiple of the rounding to the export's dtype. Raises
    ExportError.
    """
    reading = max_difference("merged", reopened_NC[: len(merged_NC)], merged_NC, READING_TOLERANCE * trained.scale)
    merging = max_difference("trained", reopened_NC, trained.logits_NC, trained.allowed)
    return {
        "rows": len(reopened_NC),
        "max_logit_difference": merging,
        "allowed": trained.allowed,
        "noise": trained.noise,
        "rounding": trained.rounding,
        "changed_labels": int((reopened_NC.argmax(axis=1) != trained.logits_NC.argmax(axis=1)).sum()),
        "max_reading_difference": reading,
    }


def rounding_note(dtype: str, check: Mapping[str, Any]) -> str:
    """What an export in a smaller dtype than float32 changes, as `compare_logits` found it."""
    difference, changed = f"{check['max_logit_difference']:.1e}", check["changed_labels"]
    return (
        f"export.dtype={dtype} rounds each weight: on {check['rows']} windows logits differ by at most {difference} "
        f"({check['allowed']:.1e} is allowed), {changed} labels change"
    )


def check_archive(
    archive: Path,
    texts: list[str],
    trained: TrainedLogits,
    check: Mapping[str, Any],
    engine: EngineChoice = "auto",
) -> float:
    """Open the packed export the way `predict` does, and compare its logits with those of the trained model.

    Returns the largest difference. Raises ExportError if the logits differ or the export does not open.
    """
    try:
        opened = load_model(archive, engine=engine, dtype="float32")
    except DataError as error:
        raise ExportError(
            f"the new export must be readable, but predict rejects it: {error} The checkpoints are unchanged. Report "
            "this with the name of the base."
        ) from error
    predicted_NC = opened.token_logits(tokenise(texts, opened.tokenizer, opened.max_tokens))
    return max_difference("trained", predicted_NC, trained.logits_NC, float(check["allowed"]))


def max_difference(reference: str, actual_NC: Floats, expected_NC: Floats, allowed: float) -> float:
    """The largest difference of the logits. Raises ExportError if it is above `allowed` or NaN."""
    difference = float(np.abs(actual_NC - expected_NC).max())
    if not difference <= allowed:
        raise ExportError(
            f"the exported model must give the {reference} model's logits within {allowed:.1e}, but differs by "
            f"{difference:.1e}. The checkpoints are unchanged. Export again, and report this with the name of the base."
        )
    return difference


def local_logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int | None = None
) -> Floats:
    """Logits of shape (texts, 3), computed in this process as in `reopen.py`."""
    return np.array(reopen.model_logits(model, tokenizer, texts, batch_size or BATCH_SIZE))
