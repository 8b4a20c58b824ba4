"""Memory of a run in bytes, by part, and whether to compute layers anew in the backward pass.

Input: sizes of model and adapters (`model/shape.py`), and how a run trains. Output: `MemoryNeeds`. Nothing is loaded
and nothing is measured: docs/real-qwen.md has the formulas as a table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ctxtrain.engine import activations
from ctxtrain.model.shape import FLOAT_BYTES, Dtype, ModelShape, Training

GB = 10**9
# Allowances, not computed: a CUDA context with cuBLAS's workspace and the allocator's gaps; Python with its libraries.
RUNTIME_BYTES = {"cuda": GB, "cpu": 7 * GB // 10}
EXPORT_BYTES = 3 * GB // 10  # beside the largest weight in float32: Python with its libraries, updates, buffers
EXACT_FAMILIES = ("qwen2", "qwen3")
REMEDY = "Use a smaller training.batch_size, training.tokens_per_batch or model.max_tokens, or a smaller base"


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes by part. The export takes `export_host` in any case, and `export_check` on the device of its check.

    `approximate` says why a part is an estimate; empty if all are exact but `runtime` and the widest tensors.
    """

    base: int
    trained: int
    kept: int
    widest: int
    widest_validation: int
    runtime: int
    export_host: int
    export_check: int
    approximate: str = ""

    @property
    def training(self) -> int:
        """Peak of an optimizer step."""
        return self.base + self.trained + self.kept + self.widest + self.runtime

    @property
    def validation(self) -> int:
        """Peak of a validation batch, beside the optimizer's state."""
        return self.base + self.trained + self.widest_validation + self.runtime

    @property
    def peak(self) -> int:
        return max(self.training, self.validation)


def memory_needs(shape: ModelShape, run: Training, export_dtype: Dtype = "float32") -> MemoryNeeds:
    """Memory that a run needs in each process."""
    copies, sizes = 0, (shape, run.lora, run.precision, run.micro_batch)
    if run.engine == "packed":
        from ctxtrain.engine.cpu import activations as packed  # only where this engine is selected

        step = packed.training_activations(*sizes, checkpointing=run.checkpointing)
        validation = packed.evaluation_activations(shape, run.precision, run.validation_batch)
        copies = packed.weight_copies(shape, run.precision)
    else:
        step = activations.training_activations(*sizes, checkpointing=run.checkpointing)
        validation = activations.evaluation_activations(shape, run.precision, run.validation_batch)
    # bitsandbytes makes each quantised weight plain while it multiplies.
    dequantized = 0 if run.quantization == "none" else shape.largest_linear * run.precision.bytes
    return MemoryNeeds(
        base=shape.base_bytes(run.precision.dtype, run.quantization) + copies,
        trained=run.lora.trained_bytes(shape),
        kept=step.kept,
        widest=step.widest + dequantized,
        widest_validation=validation.widest + dequantized,
        runtime=RUNTIME_BYTES[run.precision.device],
        export_host=shape.largest_weight * FLOAT_BYTES["float32"] + EXPORT_BYTES,
        export_check=shape.export_bytes(export_dtype) + RUNTIME_BYTES[run.precision.device],
        approximate=_approximate(shape, run),
    )


@dataclass(frozen=True)
class Choice:
    """Whether layers are computed anew in the backward pass, and what to say about it."""

    checkpointing: bool
    notes: tuple[str, ...]


def choose_checkpointing(shape: ModelShape, run: Training, setting: Literal["auto"] | bool, free: int | None) -> Choice:
    """Decide `model.gradient_checkpointing` with `free` bytes, measured before the base was loaded.

    `auto` keeps activations where the peak fits, or where the system does not say what is free. Results are the same
    either way.
    """
    plain, checkpointed = (memory_needs(shape, replace(run, checkpointing=on)) for on in (False, True))
    is_on = setting if setting != "auto" else free is not None and plain.peak > free
    needed = (checkpointed if is_on else plain).peak
    if free is None:
        return Choice(is_on, ())
    about = f" (approximate: {needs})" if (needs := plain.approximate) else ""
    notes = []
    if setting == "auto" and is_on:
        notes.append(
            f"gradient checkpointing is on: a step would need about {_gb(plain.peak)} without it, {_gb(needed)} with "
            f"it, and {_gb(free)} are free{about}"
        )
    elif setting == "auto":
        notes.append(
            f"gradient checkpointing is off: a step needs about {_gb(needed)} of {_gb(free)} that are free{about}"
        )
    if needed > free:
        quantize = "" if run.quantization == "nf4" or run.precision.device == "cpu" else ", or model.quantization=nf4"
        turn_on = "" if is_on else ", or model.gradient_checkpointing=true"
        notes.append(
            f"memory may run out: the run needs about {_gb(needed)} and {_gb(free)} are free. "
            f"{REMEDY}{quantize}{turn_on}"
        )
    return Choice(is_on, tuple(notes))


def _approximate(shape: ModelShape, run: Training) -> str:
    reasons = []
    if shape.family not in EXACT_FAMILIES:
        reasons.append(f"activations of {shape.family} are estimated")
    if run.quantization == "int8" and run.engine == "reference":
        reasons.append("the inputs that int8 layers keep are not counted")
    if run.precision.device == "cuda" and run.precision.dtype == "float32" and run.engine == "reference":
        reasons.append("attention in float32 may keep its weights on a GPU")
    return ", ".join(reasons)


def _gb(count: int) -> str:
    return f"{count / GB:.1f} GB"
