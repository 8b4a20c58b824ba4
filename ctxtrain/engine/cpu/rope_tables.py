"""The table of rotary position embeddings (Su et al. 2021, RoFormer, section 3.2), computed once per model.

torch computes cosines with MKL's vector math, in parts on all threads. On one processor the first such call of a
process sometimes returned the second thread's part wrong by 1.5e-4. So numpy computes the table on one thread, in
double precision, and all passes of all processes use the same values.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

MAX_GRAPH_TOKENS = 2048  # longest text for which the ONNX graph holds rotations and masks
_TABLES: WeakKeyDictionary[nn.Module, dict[torch.device, Tensor]] = WeakKeyDictionary()
_CPU = torch.device("cpu")


def rope_table(rotary: Any, positions: int, device: torch.device = _CPU) -> Tensor:
    """Table of cos + i·sin of the first positions, complex64 of shape (positions, C), for a rotary embedding.

    The angles are those of transformers: position times frequency in float32. C is the number of frequencies, one per
    pair of numbers of a head. The frequencies come from the config, so that nothing is read back from a device.
    """
    tables = _TABLES.setdefault(rotary, {})
    if device not in tables or len(tables[device]) < positions:
        frequencies_C = type(rotary)(rotary.config).inv_freq.float().numpy()
        angles_TC = np.arange(1 << (positions - 1).bit_length(), dtype=np.float32)[:, None] * frequencies_C
        angles_TC = angles_TC.astype(np.float64)
        cosines_TC, sines_TC = (
            torch.from_numpy((function(angles_TC) * rotary.attention_scaling).astype(np.float32))
            for function in (np.cos, np.sin)
        )
        tables[device] = torch.complex(cosines_TC, sines_TC).to(device)
    return tables[device][:positions]
