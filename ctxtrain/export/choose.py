"""The weights that a run exports: those of its best epoch, or the mean of its best epochs.

Input: `Candidates` and the validation rows. Output: the chosen `Trained`, with scores and reason for the summary.
Both are scored as they would be exported: merged, in the dtype of the export, before calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ctxtrain.config.value_types import ExportDtype
from ctxtrain.data.dataset import Dataset
from ctxtrain.engine.api import EngineChoice
from ctxtrain.evaluation.metrics import PRIMARY_METRIC, evaluate_logits
from ctxtrain.export.check_device import choose_device
from ctxtrain.export.merge import round_weights
from ctxtrain.export.predictor import Predictor
from ctxtrain.memory import release_memory
from ctxtrain.model.averaging import Candidates
from ctxtrain.model.lora import merge
from ctxtrain.model.skeleton import Trained


def choose_weights(
    candidates: Candidates,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    *,
    dtype: ExportDtype,
    engine: EngineChoice,
    say: Callable[[str], None],
) -> tuple[Trained, dict[str, Any] | None]:
    """The mean if its validation macro-F1 is not lower than that of the best epoch alone.

    The second value is None if no mean was wanted.
    """
    epochs, wanted, mean = list(candidates.epochs), candidates.wanted, candidates.mean
    if wanted == 1:
        return candidates.best, None
    found: dict[str, Any] = {"wanted": wanted, "epochs": epochs, "macro_f1": None, "best_epoch_macro_f1": None}
    if mean is None:
        reason = f"epoch {epochs[0]} is exported alone: no other epoch has a score to average with"
        say(f"note: {reason}")
        return candidates.best, found | {"used": False, "reason": reason}
    say(f"scoring the mean of epochs {_listed(epochs)}")
    best_score, mean_score = (
        exported_macro_f1(trained, tokenizer, data, "val", dtype, engine) for trained in (candidates.best, mean)
    )
    is_used = mean_score >= best_score
    reason = (
        f"the mean of epochs {_listed(epochs)} is exported: its validation macro-F1 of {mean_score:.4f} is not lower "
        f"than {best_score:.4f}, that of epoch {epochs[0]}, the best one"
        if is_used
        else f"epoch {epochs[0]}, the best one, is exported alone: its validation macro-F1 is {best_score:.4f}, that "
        f"of the mean of epochs {_listed(epochs)} only {mean_score:.4f}"
    )
    say(f"note: {reason}")
    found |= {"macro_f1": mean_score, "best_epoch_macro_f1": best_score, "used": is_used, "reason": reason}
    return mean if is_used else candidates.best, found


def exported_macro_f1(
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    split: str,
    dtype: ExportDtype,
    engine: EngineChoice,
) -> float:
    """Macro-F1 of the merged model on the rows of `split`, in the dtype of the export; no model is kept."""
    merged = merge(trained.load().eval())
    if dtype != "float32":
        round_weights(merged, getattr(torch, dtype))
    merged = merged.to(choose_device("auto", trained.skeleton.nbytes))
    predictor = Predictor(merged, tokenizer, data.codec, 1.0, data.max_tokens, engine=engine)
    score = evaluate_logits(predictor.token_logits(data.tokens[split]), data.labels[split])[PRIMARY_METRIC]
    del predictor, merged
    release_memory()  # the next model is loaded anew
    return float(score)


def _listed(epochs: list[int]) -> str:
    """In order of training: `2, 4 and 5`."""
    *first, last = map(str, sorted(epochs))
    return f"{', '.join(first)} and {last}"
