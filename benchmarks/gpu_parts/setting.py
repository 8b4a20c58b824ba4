"""What a part of the check is given, and how it measures.

A part is a generator: it takes a `Setting` and yields dicts of figures as it has them, so that what was measured before
a crash or the end of its time is not lost. It raises `CheckFailed` for a finding that must not be.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class CheckFailed(Exception):
    """A property that must hold does not."""


@dataclass(frozen=True)
class Setting:
    """`size` is tiny or full; `deadline` is on the clock of `time.monotonic`; `ceiling` is part 1's bf16 TFLOP/s."""

    device: str
    size: str
    deadline: float
    scratch: Path
    ceiling: float | None = None

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.deadline - time.monotonic()

    @property
    def start_method(self) -> str:
        """How processes start: a fork keeps the imports, and is allowed where no device is in use."""
        return "fork" if self.device == "cpu" and sys.platform == "linux" else "spawn"

    def lacks_seconds(self, needed: float) -> str | None:
        """The words that stand in place of a figure whose measurement would not end in time, or None."""
        return f"not run: needs {needed:.0f} s, {self.left:.0f} s left" if self.left < needed else None

    def synchronize(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds of one call, until the device has finished it, and its result."""
        self.synchronize()
        start = time.perf_counter()
        result = call()
        self.synchronize()
        return time.perf_counter() - start, result

    def seconds(self, call: Callable[[], Any]) -> float:
        return self.timed(call)[0]

    def median_seconds(self, call: Callable[[], Any], repeats: int, warm_up: int = 2) -> float:
        for _ in range(warm_up):
            call()
        return statistics.median(self.seconds(call) for _ in range(repeats))

    def forget_peak(self) -> None:
        import gc

        import torch

        gc.collect()  # accelerate's patched forward refers to itself
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> dict[str, float]:
        """Most memory in use since `forget_peak`: of the device, or on a CPU of the process since it started."""
        import resource

        import torch

        if self.device == "cuda":
            return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
        return {"process_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)}


def rounded(value: float, digits: int = 3) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")
