"""Part 1: versions, and the ceilings of this machine, on random data."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_parts.setting import Setting, rounded
from torch import Tensor

LINEAR = (32 * 481, 896, 4864)  # a step's tokens through the widest product of the 0.5B shape


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found["host_gb"] = rounded(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_gb": rounded(properties.total_memory / 1e9),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
        }
    else:
        found["cpu"] = torch.backends.cpu.get_cpu_capability()
    return found


def matmul_tflops(setting: Setting, dtype: torch.dtype, shape: tuple[int, int, int], repeats: int = 10) -> float:
    """TFLOP/s of a (rows, inner) by (inner, columns) product, as the median of some."""
    rows, inner, columns = shape
    a = torch.randn(rows, inner, device=setting.device, dtype=dtype)
    b = torch.randn(columns, inner, device=setting.device, dtype=dtype)
    seconds = setting.median_seconds(lambda: a @ b.t(), repeats, warm_up=3)
    return rounded(2 * rows * inner * columns / seconds / 1e12)


def copy_gb_s(setting: Setting, copy: Callable[[], Any], moved: int) -> float:
    return rounded(moved / setting.median_seconds(copy, 5) / 1e9)


def ceilings(setting: Setting) -> Iterator[dict[str, Any]]:
    """Rates of products and copies."""
    yield versions()
    side = 256 if setting.is_tiny else 8192
    square, linear = (side, side, side), (96, 64, 128) if setting.is_tiny else LINEAR
    yield {"bf16_tflops": matmul_tflops(setting, torch.bfloat16, square)}
    yield {"bf16_linear_tflops": matmul_tflops(setting, torch.bfloat16, linear)}
    if setting.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        yield {"tf32_tflops": matmul_tflops(setting, torch.float32, square)}
        torch.backends.cuda.matmul.allow_tf32 = False
    yield {"fp32_tflops": matmul_tflops(setting, torch.float32, square if setting.is_tiny else (4096,) * 3)}
    size = 1 << (20 if setting.is_tiny else 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    yield {"copy_gb_s": copy_gb_s(setting, lambda: target.copy_(source), 2 * size)}
    if setting.device == "cuda":
        pageable: Tensor = torch.randint(0, 255, (size,), dtype=torch.uint8)
        pinned = pageable.pin_memory()
        yield {
            "to_device_gb_s": copy_gb_s(setting, lambda: target.copy_(pageable), size),
            "to_device_pinned_gb_s": copy_gb_s(setting, lambda: target.copy_(pinned, non_blocking=True), size),
            "to_host_pinned_gb_s": copy_gb_s(setting, lambda: pinned.copy_(source, non_blocking=True), size),
        }
