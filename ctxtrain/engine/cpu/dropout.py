"""Dropout masks, drawn in half the time of torch's generator.

Input: torch's global generator, a shape and a dropout probability. Output: masks of ones and zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")
CHUNK_NUMEL = 1 << 16  # drawn at a time; a longer draw lets torch's other threads fall asleep


class DropoutMasks:
    """The sequence of masks of one forward pass, from a generator that torch's generator seeds.

    Each 64-bit number of numpy's SFC64 provides four 16-bit draws: on a CPU, drawing is most of dropout's cost. A GPU
    draws with torch's generator, seeded by the number of the mask.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
        self._device = device
        self._source = np.random.SFC64(seed)
        self._next_seed = seed

    @property
    def position(self) -> Any:
        """Where the sequence stands."""
        return self._source.state, self._next_seed

    def return_to(self, position: Any) -> None:
        """Draw the same masks from `position` on as before."""
        self._source.state, self._next_seed = position

    def draw(self, shape: Sequence[int], dropout: float, dtype: torch.dtype) -> tuple[Tensor, Callable[[], Tensor]]:
        """Draw the next mask; return it and a function that draws the same mask again.

        A mask holds ones and, with probability `dropout` rounded to 1/65,536, zeros.
        """
        if self._device.type != "cpu":
            self._next_seed += 1
            draw = partial(_draw_on_device, self._next_seed, shape, dropout, dtype, self._device)
            return draw(), draw
        state = self._source.state

        def redraw() -> Tensor:
            source = np.random.SFC64(0)
            source.state = state
            return _draw_mask(source, shape, dropout, dtype)

        return _draw_mask(self._source, shape, dropout, dtype), redraw


def _draw_on_device(
    seed: int, shape: Sequence[int], dropout: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    generator = None if device.type == "meta" else torch.Generator(device)  # meta tensors have no numbers
    if generator is not None:
        generator.manual_seed(seed)
    return torch.empty(*shape, dtype=dtype, device=device).bernoulli_(1 - dropout, generator=generator)


def _draw_mask(source: np.random.SFC64, shape: Sequence[int], dropout: float, dtype: torch.dtype) -> Tensor:
    mask = torch.empty(*shape, dtype=dtype)
    threshold = np.int16(min(round(dropout * 65536) - 32768, 32767))
    for part in mask.view(-1).split(CHUNK_NUMEL):
        draws = source.random_raw(-(-len(part) // 4)).view(np.int16)[: len(part)]
        part.copy_(torch.from_numpy(draws >= threshold))
    return mask
