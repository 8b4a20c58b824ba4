"""The dtype in which an exported model answers: that of its file, unless the user names one.

Input: the choice of the user, an export, and what this machine multiplies faster. Output: the dtype, and notes for the
user about what it costs. `auto` never changes a label: an export in float32 answers in float32, and one in bfloat16
in bfloat16 where that is faster, else in float32, which holds its weights exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ctxtrain.errors import ConfigError
from ctxtrain.model.base_config import HEAD

WEIGHTS = "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DtypeChoice = Literal["auto", "float32", "bfloat16"]
WIDE = 512  # narrower models answer on a CPU by ONNX Runtime, in float32, and are fast in any dtype elsewhere


@dataclass(frozen=True)
class AnswerDtype:
    """The dtype of the weights but the head, and notes that the user should read once."""

    dtype: torch.dtype
    notes: tuple[str, ...] = ()


def check_dtype_choice(choice: str) -> None:
    """Raise ConfigError for another choice than those of `DtypeChoice`."""
    if choice not in ("auto", *DTYPES):
        raise ConfigError(f"dtype must be auto, float32 or bfloat16, got {choice!r}. Use auto: the export's precision.")


def choose_answer_dtype(
    choice: DtypeChoice, stored: torch.dtype, fast: torch.dtype, width: int, *, on_cpu: bool
) -> AnswerDtype:
    """The dtype for a user's choice and an export of this width whose weights are stored in `stored`.

    This machine multiplies faster in `fast`.
    """
    why = "this machine multiplies faster in float32"
    if on_cpu and width < WIDE:
        fast, why = torch.float32, f"on a CPU, ONNX Runtime answers for models narrower than {WIDE}, in float32 only"
    automatic = fast if stored == torch.bfloat16 else torch.float32
    dtype = DTYPES.get(choice, automatic)
    if dtype == torch.bfloat16 and fast == torch.float32:
        return AnswerDtype(dtype, (f"bfloat16 is slower here: {why}. Use --dtype float32.",))
    if choice == "auto" and dtype == torch.float32 and fast == torch.bfloat16 and width >= WIDE:
        note = (
            "the answers are in float32, as the export is, but this machine multiplies faster in bfloat16. Try --dtype "
            "bfloat16; evaluate --compare-dtype counts the labels that it changes."
        )
        return AnswerDtype(dtype, (note,))
    return AnswerDtype(dtype)


def stored_dtype(folder: Path) -> torch.dtype:
    """bfloat16 if the file of an export holds every weight but the head in it, else float32."""
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        names = [name for name in weights.keys() if not name.startswith(f"{HEAD}.")]  # noqa: SIM118  # no mapping
        is_bfloat16 = bool(names) and all(weights.get_slice(name).get_dtype() == "BF16" for name in names)
    return torch.bfloat16 if is_bfloat16 else torch.float32


def restore_head(model: Any, folder: Path) -> None:
    """Set the head to the numbers of the file, in float32; loading in bfloat16 has rounded it."""
    with safe_open(folder / WEIGHTS, framework="pt") as weights, torch.no_grad():
        head = getattr(model, HEAD).float()
        head.weight.copy_(weights.get_tensor(f"{HEAD}.weight"))


def dtype_name(dtype: torch.dtype) -> str:
    """float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")
