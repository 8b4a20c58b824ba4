"""The allocator keeps freed memory on a CPU, and returns it where a GPU computes."""

import subprocess
import sys
from pathlib import Path

import pytest

from ctxtrain.engine import tuning
from ctxtrain.engine.tuning import Allocator, sees_gpu

# Resident MB after 240 MB of tensors were freed, as the process is tuned, and after it settled on a GPU.
CODE = """
import ctypes, sys
from pathlib import Path
from ctxtrain.engine import tuning
from ctxtrain.engine.api import tune_process
tuning.DEVICES = Path(sys.argv[1])
tune_process()
import torch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

start = resident()
tensors = [torch.ones(1 << 20) for _ in range(60)]
del tensors
tuned = resident() - start
tuning.allocator.settle("cuda")
print(tuned, resident() - start)
"""


def freed(devices: Path) -> list[float]:
    done = subprocess.run([sys.executable, "-c", CODE, str(devices)], capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def test_freed_memory_stays_on_a_cpu_and_goes_back_where_a_gpu_computes(tmp_path: Path) -> None:
    tuned, settled = freed(tmp_path)
    assert tuned > 200
    assert settled < 60
    (tmp_path / "nvidiactl").touch()
    guessed, settled = freed(tmp_path)
    assert guessed < 60
    assert settled < 60


@pytest.mark.parametrize(
    ("device", "hidden", "sees"),
    [
        (None, None, False),
        ("nvidiactl", None, True),
        ("dxg", None, True),
        ("nvidiactl", "", False),
        ("nvidiactl", "-1", False),
        ("kfd", "1", True),
    ],
)
def test_a_gpu_is_seen_by_its_driver_unless_it_is_hidden(
    device: str | None, hidden: str | None, sees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if device:
        (tmp_path / device).touch()
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert sees_gpu() is sees


def test_a_process_that_did_not_ask_for_it_keeps_its_allocator() -> None:
    allocator = Allocator()
    allocator.settle("cpu")
    assert not allocator.keeps_freed_memory
