"""The device on which the trained model and the export are compared.

Input: `export.check_device`, and the size of the model in float32. Output: `cpu` or `cuda`. Both sides of the
comparison use one device, one after the other, because logits of two devices differ by more than reading may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ctxtrain.config.value_types import CheckDevice
from ctxtrain.errors import ConfigError, ExportError
from ctxtrain.export.fresh_process import fresh_process
from ctxtrain.runtime import is_main_process
from ctxtrain.storage.run_folder import RunFolder

# Of a GPU's memory, beyond the weights: activations, by their share, and the CUDA libraries of the fresh process.
ACTIVATIONS = 0.25
CONTEXT_BYTES = 1 << 30


@contextmanager
def lock_in_first_process(folder: RunFolder) -> Iterator[None]:
    """In the first process, lock the run folder and keep the process running that will check the export."""
    if is_main_process():
        with folder.lock(), fresh_process.running():
            yield
    else:
        yield


def rehearse_check(setting: CheckDevice, say: Callable[[str], None]) -> None:
    """Let the fresh process do, before the first optimizer step, what it will do after the last.

    Raises ExportError if it cannot import torch and transformers, ConfigError if `setting` is cuda and it cannot use a
    GPU. With auto, `say` receives a note instead.
    """
    fresh_process.rehearse("cpu")
    if setting == "cuda" or (setting == "auto" and torch.cuda.is_available()):
        try:
            fresh_process.rehearse("cuda")
        except ExportError as error:
            reason = str(error).strip().splitlines()[-1]
            if setting == "cuda":
                raise ConfigError(
                    f"export.check_device=cuda needs a GPU that a second process can use, this one cannot ({reason}). "
                    "Use export.check_device=cpu."
                ) from error
            say(f"note: the export will be checked on the CPU, as a second process cannot use the GPU ({reason})")


def choose_device(setting: CheckDevice, model_bytes: int) -> str:
    """`setting`, or for auto `cuda` if a GPU has room for the model and a second process can use it, else `cpu`."""
    if setting != "auto":
        return setting
    if not torch.cuda.is_available():
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    if free < (1 + ACTIVATIONS) * model_bytes + CONTEXT_BYTES:
        return "cpu"
    try:
        fresh_process.rehearse("cuda")
    except ExportError:  # `rehearse_check` has said so
        return "cpu"
    return "cuda"
