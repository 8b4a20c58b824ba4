"""Entry point to the engines, which compute the forward and backward passes of a model.

    make_training_engine      frozen base with LoRA → the network that an optimizer step calls
    make_inference_engine     merged model → logits of many rows
    tune_process              memory allocator and thread waiting of this process

The reference engine is plain transformers and PEFT and imports no other engine. `auto` selects the fast engine where it
supports the model and device and passes a probe; otherwise it selects the reference engine and records the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ctxtrain.engine.reference import InferenceEngine, TrainingEngine

EngineChoice = Literal["auto", "reference"]


def make_training_engine(
    model: PeftModel,
    device: torch.device,
    *,
    engine: EngineChoice = "auto",
    scratch: str | None = None,
    say: Callable[[str], None] = print,
) -> TrainingEngine:
    """Move a model with LoRA to its training device and return the engine that trains it there.

    `scratch` is the folder for cached outputs of frozen layers, by default the system's temporary folder. `say`
    receives a note if that folder has no space. Raises ConfigError if the model itself is unusable: its logits are not
    finite or depend on other rows.
    """
    from ctxtrain.engine.reference import ReferenceNetwork, TrainingEngine
    from ctxtrain.engine.tuning import warm_up_vector_math
    from ctxtrain.model.agreement import check_trainable, engine_mismatch, make_probe

    warm_up_vector_math()
    probe = make_probe(model.to(device))
    check_trainable(model, probe)
    if engine == "reference":
        selected = TrainingEngine(ReferenceNetwork(model), "model.engine is reference")
    else:
        from ctxtrain.engine.cpu import select

        selected = select.make_training_engine(model, device, scratch, say)
    mismatch = engine_mismatch(model, selected.network, probe)
    return TrainingEngine(ReferenceNetwork(model), mismatch) if mismatch else selected


def make_inference_engine(model: PreTrainedModel, max_tokens: int, *, engine: EngineChoice = "auto") -> InferenceEngine:
    """Return the engine for a merged model in evaluation mode, in its precision, on the device where it is.

    In bfloat16, pooling and head are in float32. Texts have at most `max_tokens` tokens. Raises DataError if the model
    itself is unusable.
    """
    from ctxtrain.engine.reference import reference_inference
    from ctxtrain.engine.tuning import warm_up_vector_math
    from ctxtrain.errors import DataError
    from ctxtrain.model.agreement import engine_mismatch, make_probe

    warm_up_vector_math()
    reference = reference_inference(model)
    if engine == "reference":
        return reference
    from ctxtrain.engine.cpu import select

    selected = select.make_inference_engine(model, max_tokens, reference)
    if selected is reference:
        return reference
    probe = make_probe(model)
    if mismatch := engine_mismatch(reference.network, selected.network, probe, "an exported model", DataError):
        warnings.warn(f"prediction uses the slower reference engine: {mismatch}", RuntimeWarning, stacklevel=3)
        return reference
    return selected


def tune_process() -> None:
    """Set the memory allocator and thread waiting of the whole process. Call it before torch is imported.

    glibc keeps freed memory instead of returning it to the system. OpenMP threads spin briefly before they sleep, or
    sleep immediately if other programs need the cores. Values that the user has set in the environment stay. The
    command line calls this function.
    """
    from ctxtrain.engine.tuning import keep_freed_memory, set_thread_waiting

    set_thread_waiting()
    keep_freed_memory()
