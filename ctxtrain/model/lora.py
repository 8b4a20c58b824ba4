"""LoRA: frozen base model, adapters, trained 3-class head.

Input: a base model of `base.py`. Output: a PEFT model, its trainable weights by name, and the merged model
without adapters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import cast

from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctxtrain.errors import ConfigError
from ctxtrain.model.base_config import HEAD
from ctxtrain.runtime import Purpose, seed_torch


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
    layers: str = "all",
    seed: int = 0,
    base_name: str | None = None,
) -> PeftModel:
    """Freeze the base model, add adapters to the target modules, and make adapters and head trainable in float32.

    `layers` is "all" or "last:N". Raises ConfigError if a target module or a layer does not exist.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    absent = [name for name in target_modules if name not in linear]
    if absent:
        raise ConfigError(
            f"lora.target_modules must name linear layers of the base, {', '.join(absent)} is not one. "
            f"It has {', '.join(sorted(linear - {HEAD}))}."
        )
    seed_torch(seed, Purpose.HEAD, 1)
    with warnings.catch_warnings():  # peft reads a deprecated attribute of transformers
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type=TaskType.SEQ_CLS,
                r=r,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=list(target_modules),
                layers_to_transform=_layer_indices(layers, model.config.get_text_config().num_hidden_layers),
                modules_to_save=[HEAD],
            ),
        )
    if base_name is not None:
        adapted.peft_config["default"].base_model_name_or_path = base_name
    return cast(PeftModel, adapted)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def trainable_state(model: PeftModel) -> dict[str, Tensor]:
    """Copies of adapters and head on the CPU, by PEFT's names."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().cpu().clone() for name in sorted(state)}


def load_trainable_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Load adapters and head. Raises ConfigError as `check_trainable_state` does."""
    check_trainable_state(model, state)
    set_peft_model_state_dict(model, dict(state))


def check_trainable_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Raises ConfigError unless names and shapes are exactly those of the adapters and head of the model."""
    current = get_peft_model_state_dict(model, save_embedding_layers=False)
    mismatched = sorted(current.keys() ^ state.keys())
    mismatched += [name for name in current if name in state and current[name].shape != state[name].shape]
    if mismatched:
        raise ConfigError(
            f"A checkpoint must hold the weights that this config trains; {len(mismatched)} differ, "
            f"the first is {mismatched[0]}. Resume with the config of the run."
        )


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge the adapters into the base weights (W + α/r · BA) and return the plain model. Consumes `model`."""
    return cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))


def parameter_counts(model: nn.Module) -> dict[str, int | float]:
    """Number of all parameters, number of trainable ones, and their share."""
    # PEFT keeps the untrained original of the head beside the trained copy; it is not part of the exported model.
    total = sum(_count(weight) for name, weight in model.named_parameters() if f"{HEAD}.original_module" not in name)
    trained = sum(weight.numel() for weight in trainable_parameters(model).values())
    return {"parameters": total, "trainable": trained, "trainable_share": trained / total}


def _count(weight: Tensor) -> int:
    """Numbers in a weight; bitsandbytes packs two of 4 bits into one byte and keeps the shape in `quant_state`."""
    quantized = getattr(weight, "quant_state", None)
    return weight.numel() if quantized is None else math.prod(quantized.shape)


def _layer_indices(layers: str, count: int) -> list[int] | None:
    if layers == "all":
        return None
    last = int(layers.removeprefix("last:"))
    if last > count:
        raise ConfigError(f"lora.layers must be at most last:{count}, the layers of the base, got {layers}.")
    return list(range(count - last, count))
