"""Logits of many rows from a model that is only asked.

Comes in: a model in evaluation mode, and tokenised rows. Goes out: their logits, in the order of the rows.

A batch keeps all cores busy where the model is wide. What a narrow one does with a batch is so little that cores would
mostly wait for each other, so there each batch has a core of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ml.data.batches import Tokens, collate
from ml.labels import LABELS
from ml.model.merged import MergedClassifier
from ml.model.qwen import logits
from ml.runtime import side_by_side

Ints = NDArray[np.int64]

TOKENS_AT_A_TIME = 3072  # of a batch, padding included, so that long texts need no more memory than short ones
STATES_AT_A_TIME = 12288 * 128  # tokens times width: the calls for a narrow model cost as much as its arithmetic
TOKENS_OF_A_WORKER = 4096  # with fewer for each, all threads work on one batch
MOST_WORKERS = 8  # they share the interpreter's lock; more threads than this are divided between them


def token_logits(model: nn.Module, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
    """Logits of shape (rows, 3); `advance` is told how many rows each batch held."""
    device, logits_NC = next(model.parameters()).device, np.empty((len(tokens), len(LABELS)))
    workers, together = 1, _tokens_at_a_time(model)
    if together > TOKENS_AT_A_TIME:
        workers = max(1, min(torch.get_num_threads(), MOST_WORKERS, len(tokens.flat) // TOKENS_OF_A_WORKER))
    batches = batches_that_fit(tokens.lengths, together)
    if workers > 1:
        batches = equal_batches(tokens.lengths, -(-len(tokens.flat) // (together * workers)) * workers)

    def answer(rows: Ints) -> int:
        with torch.inference_mode():
            logits_NC[rows] = logits(model, collate(tokens, rows, device)).cpu().numpy()
        return len(rows)

    with side_by_side(workers) as run:
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


def equal_batches(lengths_N: Ints, count: int) -> list[Ints]:
    """The same rows in so many batches, or fewer if there are fewer rows, with as many tokens in each."""
    order = np.argsort(-lengths_N, kind="stable")
    middles_N = np.cumsum(lengths_N[order]) - lengths_N[order] / 2
    edges = np.searchsorted(middles_N, lengths_N.sum() * np.arange(1, count) / count)
    return [rows for rows in np.split(order, edges) if len(rows)]


def _tokens_at_a_time(model: nn.Module) -> int:
    if not isinstance(model, MergedClassifier) or not model.is_reentrant:
        return TOKENS_AT_A_TIME
    return max(TOKENS_AT_A_TIME, STATES_AT_A_TIME // model.width)
