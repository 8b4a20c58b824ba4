"""Entry point to the engines, which compute the forward and backward passes of a model.

    make_training_engine      frozen base with LoRA → the network that an optimizer step calls
    choose_checkpointing      whether layers are computed anew in the backward pass, by the memory of the run
    make_inference_engine     merged model → logits of many rows
    tune_process              memory allocator and thread waiting of this process

The reference engine is plain transformers and PEFT and imports no other engine. `auto` selects the fast engine where it
supports the model and device and passes a probe; otherwise it selects the reference engine and records the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ctxtrain.engine.reference import InferenceEngine, TrainingEngine
    from ctxtrain.model.shape import ModelShape, Training

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
    from ctxtrain.engine.tuning import allocator, warm_up_vector_math
    from ctxtrain.model.agreement import check_trainable, engine_mismatch, make_probe

    warm_up_vector_math()
    probe = make_probe(model.to(device))
    allocator.settle(device.type)
    check_trainable(model, probe)
    if engine == "reference":
        selected = TrainingEngine(ReferenceNetwork(model), "model.engine is reference")
    else:
        from ctxtrain.engine.cpu import select

        selected = select.make_training_engine(model, device, scratch, say)
    mismatch = engine_mismatch(model, selected.network, probe)
    return TrainingEngine(ReferenceNetwork(model), mismatch) if mismatch else selected


def choose_checkpointing(
    engine: TrainingEngine,
    shape: ModelShape,
    run: Training,
    setting: Literal["auto"] | bool,
    free: int | None,
    say: Callable[[str], None],
) -> None:
    """Let the engine compute layers anew in the backward pass if `setting` says so or, with `auto`, memory is short.

    `free` are the bytes that were free before the base was loaded. `say` receives what was chosen, and a note if the
    run may not fit. Results do not depend on the choice.
    """
    from ctxtrain.engine import memory_needs

    choice = memory_needs.choose_checkpointing(shape, replace(run, engine=engine.kind), setting, free)
    for note in choice.notes:
        say(f"note: {note}")
    if choice.checkpointing:
        engine.checkpoint_layers()


def make_inference_engine(model: PreTrainedModel, max_tokens: int, *, engine: EngineChoice = "auto") -> InferenceEngine:
    """Return the engine for a merged model in evaluation mode, in its precision, on the device where it is.

    In bfloat16, pooling and head are in float32. Texts have at most `max_tokens` tokens. Raises DataError if the model
    itself is unusable.
    """
    from ctxtrain.engine.reference import reference_inference
    from ctxtrain.engine.tuning import allocator, warm_up_vector_math
    from ctxtrain.errors import DataError
    from ctxtrain.model.agreement import engine_mismatch, make_probe

    warm_up_vector_math()
    allocator.settle(model.device.type)
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


def tune_process(*, cpu_only: bool = False) -> None:
    """Set the memory allocator and thread waiting of the whole process. Call it before torch is imported.

    On a CPU, glibc keeps freed memory instead of returning it to the system; where the process sees a GPU it does so
    only with `cpu_only`, or once an engine computes on the CPU. OpenMP threads spin briefly before they sleep, or sleep
    immediately if other programs need the cores. Values that the user has set in the environment stay. The command line
    calls this function.
    """
    from ctxtrain.engine.tuning import allocator, set_thread_waiting

    set_thread_waiting()
    allocator.tune()
    if cpu_only:
        allocator.settle("cpu")
