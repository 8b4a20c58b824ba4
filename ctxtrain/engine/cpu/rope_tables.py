"""The table of rotary embeddings (Su et al. 2021, RoFormer, section 3.2), made once for a model.

torch computes cosines by MKL's vector mathematics, in parts on all threads. On one processor the first such call of a
process now and then gave the second thread's part wrong by 1.5e-4. So the table is made by numpy, on one thread, in
double precision, and kept: whatever is rotated with it is rotated alike in every pass and every process.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

LONGEST = 2048  # tokens of a text for which ONNX Runtime's graph holds rotations and masks
_TABLES: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def rotations(rotary: Any, places: int) -> Tensor:
    """Cos + i·sin of the first places, complex64 of shape (places, C), for a rotary embedding of transformers.

    The angles are those of transformers, place times frequency in float32; C frequencies, for as many pairs of a head.
    """
    table_TC = _TABLES.get(rotary)
    if table_TC is None or len(table_TC) < places:
        frequencies_C = rotary.inv_freq.detach().float().cpu().numpy()
        angles_TC = np.arange(1 << (places - 1).bit_length(), dtype=np.float32)[:, None] * frequencies_C
        angles_TC = angles_TC.astype(np.float64)
        cosines_TC, sines_TC = (
            torch.from_numpy((function(angles_TC) * rotary.attention_scaling).astype(np.float32))
            for function in (np.cos, np.sin)
        )
        table_TC = _TABLES[rotary] = torch.complex(cosines_TC, sines_TC).to(rotary.inv_freq.device)
    return table_TC[:places]
