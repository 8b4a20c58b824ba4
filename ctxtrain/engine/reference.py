"""Passes by plain transformers and PEFT: what every engine is compared with, and what runs where none fits.

Comes in: a model and tokenised rows. Goes out: in training, what the network takes for some rows; in inference, logits
in the order of the rows. An engine gives a subclass of these two.
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
from ctxtrain.runtime import side_by_side

Ints = NDArray[np.int64]

TOKENS_AT_A_TIME = 3072  # of a batch, padding included, so that long texts need no more memory than short ones


class TrainingPasses:
    """`network` gives logits with gradients of adapters and head.

    `unsupported_reason` says why it is plain transformers and PEFT; it is None where an engine runs.
    """

    def __init__(self, network: nn.Module, unsupported_reason: str | None) -> None:
        self.network = network
        self.unsupported_reason = unsupported_reason

    def batch(self, tokens: Tokens, rows: Ints, device: torch.device) -> dict[str, Tensor]:
        """What `lora.logits` takes for these rows, on the device."""
        return collate(tokens, rows, device)


class InferencePasses:
    """`network` gives logits alone. A batch keeps all cores busy."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def token_logits(self, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        """Logits of shape (rows, 3); `advance` is told how many rows each batch held."""
        device, logits_NC = next(self.network.parameters()).device, np.empty((len(tokens), len(LABELS)))
        workers, together = self._division(tokens)
        batches = batches_that_fit(tokens.lengths, together)

        def answer(rows: Ints) -> int:
            with torch.inference_mode():
                logits_NC[rows] = logits(self.network, collate(tokens, rows, device)).cpu().numpy()
            return len(rows)

        with side_by_side(max(1, min(workers, len(batches)))) as run:
            for count in run(answer, batches):
                if advance:
                    advance(count)
        return logits_NC

    def _division(self, _tokens: Tokens) -> tuple[int, int]:
        """How many batches go through the network at once, and the largest number of tokens of each."""
        return 1, TOKENS_AT_A_TIME


def batches_that_fit(lengths_N: Ints, tokens_at_a_time: int) -> list[Ints]:
    """Every row once, the longest first, rows of like length together, and as many of them as fit."""
    order, batches, start = np.argsort(-lengths_N, kind="stable"), [], 0
    while start < len(order):
        together = max(1, tokens_at_a_time // int(lengths_N[order[start]]))
        batches.append(order[start : start + together])
        start += together
    return batches
