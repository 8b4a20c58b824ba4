"""The validation pass after each epoch.

Input: the learner, and tokens and labels of the validation rows. Output: the mean focal loss, and the metrics of
section 6.1 of the specification. No weight changes, and no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctxtrain.data.tokens import Tokens
from ctxtrain.errors import TrainingDiverged
from ctxtrain.evaluation.metrics import evaluate_logits
from ctxtrain.model.losses import Loss
from ctxtrain.training.step import REMEDY, Ints, Learner

EVALUATION_BATCH = 32  # rows


def validate(
    learner: Learner,
    loss_fn: Loss,
    tokens: Tokens,
    labels_N: Ints,
    names: Sequence[str],
    after_batch: Callable[[int], None],
) -> dict[str, Any]:
    """`loss`, with the class weights of training, and every metric of the logits. `names` are those of the rows.

    `after_batch` receives the number of rows of each batch. Raises TrainingDiverged if a logit is not finite.
    """
    logits_NC = learner.logits(tokens, EVALUATION_BATCH, after_batch)
    _require_finite(logits_NC, names)
    loss_sum, weight_sum = loss_fn.sums(logits_NC, torch.from_numpy(labels_N).to(logits_NC.device))
    return {"loss": float(loss_sum / weight_sum), **evaluate_logits(logits_NC.cpu().numpy(), labels_N)}


def _require_finite(logits_NC: Tensor, names: Sequence[str]) -> None:
    """Raises TrainingDiverged, with the names of the first rows, if a logit is not finite."""
    rows = (~torch.isfinite(logits_NC)).any(dim=1).nonzero().flatten().tolist()
    if rows:
        first = ", ".join(names[row] for row in rows[:10])
        raise TrainingDiverged(f"the logits of {len(rows)} validation rows are not finite: {first}. {REMEDY}.")
