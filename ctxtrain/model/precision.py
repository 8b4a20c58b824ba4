"""The precision in which a run trains its frozen base: float32 or bfloat16.

Input: `model.dtype`, the base's config, and the precision in which the run began. Output: one decision with its reason,
which the run makes once; all other modules receive its dtype.

`auto` takes bfloat16 on a GPU that computes it natively. GPUs such as T4 and V100 emulate it. On a CPU it measures.
The step also has attention, norms and fixed costs, which bfloat16 does not shorten. In a base narrower than
`MIN_WIDTH`, products are a third of the step (docs/development-log.md), so that bfloat16 could not save a third of its
time at any speed. Such a base trains in float32 on a CPU, without a measurement, and keeps its accuracy. In wider bases
they are four fifths. float16 is not offered: its range needs a loss scale.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

MIN_WIDTH = 512  # the width at which products are most of a step on CPUs
MIN_SPEEDUP = 1.5  # adapters, norms and attention stay in float32, so a smaller gain would not reach the step
MAX_ROWS, MAX_WIDTH = 128, 1024  # of the measured product: milliseconds in float32
MAX_TRIES = 7


@dataclass(frozen=True)
class Precision:
    """The dtype of the frozen base, and a line for the user; it is empty if the user named the dtype."""

    dtype: torch.dtype
    line: str = ""


def choose_precision(name: str, config: Any, began_in: str | None) -> Precision:
    """The precision of a run with `model.dtype=name`; `config` is the config of the base.

    `began_in` is the stored precision of the run that is resumed, or of its siblings. `auto` takes it over whatever
    it would choose today, so that a measurement cannot stop a resume.
    """
    if name != "auto":
        return Precision(getattr(torch, name))
    is_faster, reason = _ask_gpu() if torch.cuda.is_available() else _ask_cpu(config.get_text_config())
    today = torch.bfloat16 if is_faster else torch.float32
    begun = next((dtype for dtype in (torch.float32, torch.bfloat16) if str(dtype) == began_in), today)
    if begun == today:
        return Precision(today, f"training in {_name(today)}: {reason}")
    difference = f"in which the run began; a new run would take {_name(today)}: {reason}"
    return Precision(begun, f"note: training in {_name(begun)}, {difference}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ask_gpu() -> tuple[bool, str]:
    """Whether bfloat16 is faster on the GPU, and why."""
    device = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return True, f"{device} computes it natively"
    return False, f"{device} does not compute bfloat16 natively, and float16 is not offered"


def _ask_cpu(config: Any) -> tuple[bool, str]:
    """Whether bfloat16 is faster for this base on the CPU, and why."""
    width = int(config.hidden_size)
    if width < MIN_WIDTH:
        return False, f"a base {width} wide, below {MIN_WIDTH}, gains too little from bfloat16 on a CPU"
    inner = int(getattr(config, "intermediate_size", None) or width)
    speedup = bfloat16_speedup(min(width, MAX_WIDTH), min(inner, MAX_WIDTH))
    return speedup >= MIN_SPEEDUP, f"this CPU multiplies bfloat16 {speedup:.1f} times as fast as float32"


@cache
def bfloat16_speedup(width: int, inner: int) -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16, by a product of a layer's shape.

    The tries alternate, and the fastest of each side counts, so that other programs disturb both alike. Measured once
    per process and shape. It stops early where bfloat16 is slower, as on a CPU without units for it.
    """
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    operands = {
        dtype: (torch.ones(MAX_ROWS, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)) for dtype in seconds
    }
    speedup = 0.0
    with torch.no_grad():
        for dtype in seconds:  # the first call of a shape makes its code
            F.linear(*operands[dtype])
        for number in range(MAX_TRIES):
            for dtype, tries in seconds.items():
                start = time.perf_counter()
                F.linear(*operands[dtype])
                tries.append(time.perf_counter() - start)
            speedup = min(seconds[torch.float32]) / min(seconds[torch.bfloat16])
            if number and speedup < 1:
                break
    return speedup
