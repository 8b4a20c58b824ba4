"""Masks of dropout, drawn in half of the time that torch's generator takes.

Comes in: torch's global generator, the shape of what is dropped from, and the share. Goes out: masks of ones and zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TOGETHER = 1 << 16  # numbers drawn at a time, in less than it takes torch's other threads to fall asleep


class Masks:
    """Of one pass through a model, one after the other, from a generator that torch's seeds.

    Four 16-bit draws come from one of numpy's SFC64: drawing is what dropout costs on a CPU.
    """

    def __init__(self) -> None:
        self._source = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_()))

    def next(self, shape: Sequence[int], dropout: float, dtype: torch.dtype) -> tuple[Tensor, Callable[[], Tensor]]:
        """A mask of ones and, with probability `dropout` to the nearest 1/65,536, zeros; and what draws it again."""
        state = self._source.state

        def again() -> Tensor:
            source = np.random.SFC64(0)
            source.state = state
            return _drawn(source, shape, dropout, dtype)

        return _drawn(self._source, shape, dropout, dtype), again


def _drawn(source: np.random.SFC64, shape: Sequence[int], dropout: float, dtype: torch.dtype) -> Tensor:
    mask = torch.empty(*shape, dtype=dtype)
    threshold = np.int16(min(round(dropout * 65536) - 32768, 32767))
    for part in mask.view(-1).split(TOGETHER):
        draws = source.random_raw(-(-len(part) // 4)).view(np.int16)[: len(part)]
        part.copy_(torch.from_numpy(draws >= threshold))
    return mask
