"""What a step does on a GPU: kernels, host syncs, how long the device is busy, the attention kernels."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from gpu_parts.setting import rounded
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COPIES = ("Memcpy", "Memset")
ATTENTION = ("flash", "fmha", "attention", "softmax")


def count_syncs(call: Callable[[], Any]) -> int:
    """How often the host waits for the device, as torch's own check counts it."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def describe_step(call: Callable[[], Any], milliseconds: float) -> dict[str, Any]:
    """`busy_share` is the time of all kernels and copies / `milliseconds`, a step's time without the profiler."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels = [event for event in on_device if not event.name.startswith(COPIES)]
    busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e3
    attending = Counter(event.name.split("<")[0][-60:] for event in kernels if is_attention(event.name))
    return {
        "kernels": len(kernels),
        "copies": len(on_device) - len(kernels),
        "host_syncs": count_syncs(call),
        "busy_share": rounded(busy / milliseconds),
        "attention_kernels": dict(attending.most_common(4)),
    }


def is_attention(name: str) -> bool:
    return any(word in name.lower() for word in ATTENTION)
