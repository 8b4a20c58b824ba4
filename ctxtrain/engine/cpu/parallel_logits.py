"""Logits of many rows from a model that is only asked.

Comes in: a model in evaluation mode, and tokenised rows. Goes out: their logits, in the order of the rows.

A batch keeps all cores busy where the model is wide. What a narrow one does with a batch is so little that cores would
mostly wait for each other, so there each batch has a core of its own, and is so small that it stays in caches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ctxtrain.data.batches import Tokens, collate
from ctxtrain.engine.cpu.onnx_inference import GraphClassifier
from ctxtrain.labels import LABELS
from ctxtrain.model.lora import logits
from ctxtrain.runtime import side_by_side

Ints = NDArray[np.int64]

TOKENS_AT_A_TIME = 3072  # of a batch, padding included, so that long texts need no more memory than short ones
STATES_OF_A_CORE = 1 << 18  # tokens times width
FEWEST_TOKENS = 512  # with fewer for each thread, threads cost more than they bring


def token_logits(model: nn.Module, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
    """Logits of shape (rows, 3); `advance` is told how many rows each batch held."""
    device, logits_NC = next(model.parameters()).device, np.empty((len(tokens), len(LABELS)))
    workers, together = 1, TOKENS_AT_A_TIME
    if isinstance(model, GraphClassifier):
        workers = torch.get_num_threads()
        together = min(STATES_OF_A_CORE // model.width, max(FEWEST_TOKENS, -(-len(tokens.flat) // workers)))
    batches = batches_that_fit(tokens.lengths, together)

    def answer(rows: Ints) -> int:
        with torch.inference_mode():
            logits_NC[rows] = logits(model, collate(tokens, rows, device)).cpu().numpy()
        return len(rows)

    with side_by_side(max(1, min(workers, len(batches)))) as run:
        for count in run(answer, batches):
            if advance:
                advance(count)
    return logits_NC


def batches_that_fit(lengths_N: Ints, tokens_at_a_time: int) -> list[Ints]:
    """Every row once, the longest first, rows of like length together, and as many of them as fit."""
    order, batches, start = np.argsort(-lengths_N, kind="stable"), [], 0
    while start < len(order):
        together = max(1, tokens_at_a_time // int(lengths_N[order[start]]))
        batches.append(order[start : start + together])
        start += together
    return batches
