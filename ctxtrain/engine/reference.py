"""The reference engine: plain transformers and PEFT. It runs where no faster engine fits, and verifies the others.

Input: a model and tokenised rows. Output: in training, the network's inputs for given rows; in inference, logits in the
order of the rows. A faster engine subclasses these two classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctxtrain.data.batches import Tokens, collate
from ctxtrain.labels import LABELS
from ctxtrain.model.lora import logits
from ctxtrain.runtime import thread_map

Ints = NDArray[np.int64]

MAX_BATCH_TOKENS = 3072  # padding included, so that long texts need no more memory than short ones


class TrainingEngine:
    """`network` computes logits, with gradients for adapters and head.

    `unsupported_reason` states why this is the reference engine; it is None for a faster engine.
    """

    def __init__(self, network: nn.Module, unsupported_reason: str | None) -> None:
        self.network = network
        self.unsupported_reason = unsupported_reason

    def batch(self, tokens: Tokens, rows: Ints, device: torch.device) -> dict[str, Tensor]:
        """Inputs of `lora.logits` for these rows, on the device."""
        return collate(tokens, rows, device)


class InferenceEngine:
    """`network` computes logits without gradients; one batch uses all cores."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def token_logits(self, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        """Logits of shape (rows, 3). `advance` is called with the number of rows of each finished batch."""
        device, logits_NC = next(self.network.parameters()).device, np.empty((len(tokens), len(LABELS)))
        workers, max_tokens = self._batch_limits(tokens)
        batches = batches_by_length(tokens.lengths, max_tokens)

        def predict_batch(rows: Ints) -> int:
            with torch.inference_mode():
                logits_NC[rows] = logits(self.network, collate(tokens, rows, device)).cpu().numpy()
            return len(rows)

        with thread_map(max(1, min(workers, len(batches)))) as run:
            for count in run(predict_batch, batches):
                if advance:
                    advance(count)
        return logits_NC

    def _batch_limits(self, _tokens: Tokens) -> tuple[int, int]:
        """Number of batches that run at the same time, and the maximum number of tokens in each."""
        return 1, MAX_BATCH_TOKENS


def batches_by_length(lengths_N: Ints, max_tokens: int) -> list[Ints]:
    """Row numbers in batches of similar length, longest first; each padded batch fits into `max_tokens`.

    A row longer than `max_tokens` is a batch of one.
    """
    order, batches, start = np.argsort(-lengths_N, kind="stable"), [], 0
    while start < len(order):
        count = max(1, max_tokens // int(lengths_N[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches
