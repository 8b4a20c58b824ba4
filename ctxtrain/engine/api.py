"""The one door to the passes of a model: plain transformers and PEFT, or an engine that gives the same results sooner.

    for_training      frozen base with LoRA → what an optimizer step calls
    for_inference     merged model → logits of many rows
    tune_process      allocator and waiting threads of this process

`reference` is plain transformers and PEFT, and imports no engine. `auto` takes an engine where one has been proven for
this model and device; else it is the reference, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ctxtrain.engine.reference import InferencePasses, TrainingPasses

Engine = Literal["auto", "reference"]


def for_training(
    model: PeftModel,
    device: torch.device,
    *,
    engine: Engine = "auto",
    scratch: str | None = None,
    say: Callable[[str], None] = print,
) -> TrainingPasses:
    """The passes of a model with LoRA, on the device that it is to be trained on.

    `scratch` is a folder for what frozen layers give, by default the system's; `say` is told if it has no room.
    Raises ConfigError if the model itself is unsound: logits that are not finite, or that depend on other rows.
    """
    from ctxtrain.engine.reference import TrainingPasses
    from ctxtrain.engine.tuning import enter_vector_math
    from ctxtrain.model.agreement import probe_of, refuse_untrainable, why_engine_differs

    enter_vector_math()
    probe = probe_of(model.to(device))
    refuse_untrainable(model, probe)
    if engine == "reference":
        passes = TrainingPasses(model, "model.engine is reference")
    else:
        from ctxtrain.engine.cpu import select

        passes = select.for_training(model, device, scratch, say)
    differs = why_engine_differs(model, passes.network, probe)
    return TrainingPasses(model, differs) if differs else passes


def for_inference(model: PreTrainedModel, max_tokens: int, *, engine: Engine = "auto") -> InferencePasses:
    """The passes of a merged model in evaluation mode, where it is. Texts have at most `max_tokens` tokens.

    Raises DataError if the model itself is unsound.
    """
    from ctxtrain.engine.reference import InferencePasses
    from ctxtrain.engine.tuning import enter_vector_math
    from ctxtrain.errors import DataError
    from ctxtrain.model.agreement import probe_of, why_engine_differs

    enter_vector_math()
    if engine == "reference":
        return InferencePasses(model)
    from ctxtrain.engine.cpu import select

    passes = select.for_inference(model, max_tokens)
    if passes.network is model:
        return passes
    if differs := why_engine_differs(model, passes.network, probe_of(model), "an exported model", DataError):
        warnings.warn(f"prediction takes the slower path of transformers: {differs}", RuntimeWarning, stacklevel=3)
        return InferencePasses(model)
    return passes


def tune_process() -> None:
    """Set allocator and waiting threads for the whole process, before torch is imported. The command line calls it.

    glibc keeps freed memory instead of returning it; threads of OpenMP spin for a moment before they sleep, or not at
    all where other programs want the cores. What the user has set in the environment stays.
    """
    from ctxtrain.engine.tuning import keep_freed_memory, settle_waiting

    settle_waiting()
    keep_freed_memory()
