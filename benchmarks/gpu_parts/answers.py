"""Part 7: windows per second of merged models in three precisions, and the labels that change."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_parts.models import make_classifier, make_rows
from gpu_parts.setting import Setting, rounded

from ctxtrain.engine.api import make_inference_engine

SHAPES = {"0.5b": 1024, "7b": 96}  # windows
ESTIMATE = 12  # seconds that 7B takes in one precision
MAX_TOKENS = 2048


def precisions(setting: Setting) -> list[tuple[str, torch.dtype, bool]]:
    """Name, dtype of the weights, and whether products may use TF32; the others are set against the first."""
    found = [("fp32", torch.float32, False), ("tf32", torch.float32, True), ("bf16", torch.bfloat16, False)]
    return [entry for entry in found if setting.device == "cuda" or not entry[2]]


def answer(setting: Setting) -> Iterator[dict[str, Any]]:
    for shape, windows in SHAPES.items():
        tokens, _ = make_rows(setting, windows)
        model = make_classifier(shape, setting, torch.float32).eval()
        expected_NC = None
        for name, dtype, tf32 in precisions(setting):
            if late := setting.lacks_seconds(0 if setting.is_tiny else ESTIMATE):
                yield {f"{shape}_{name}": late}
                continue
            torch.backends.cuda.matmul.allow_tf32 = tf32
            engine = make_inference_engine(model.to(dtype), MAX_TOKENS)
            setting.forget_peak()
            engine.token_logits(tokens)
            seconds, logits_NC = setting.timed(partial(engine.token_logits, tokens))
            figures = {"windows_a_second": rounded(len(tokens) / seconds), **setting.peak_gb()}
            if expected_NC is None:
                expected_NC = logits_NC
            else:
                figures["labels_changed"] = int((logits_NC.argmax(1) != expected_NC.argmax(1)).sum())
                figures["largest_difference"] = rounded(float(np.abs(logits_NC - expected_NC).max()))
            yield {f"{shape}_{name}": figures | {"windows": len(tokens)}}
        del model, engine
