"""A Qwen sequence classifier: frozen base model, LoRA adapters, trained 3-class head.

Input: a folder or hub id of any Qwen that transformers opens as a sequence classifier. Output: a PEFT model whose
`logits(...)` has shape (B, 3), its trainable weights by name, and the merged model without adapters.

The head is `score` of transformers (hidden → 3, no bias). It pools the last token whose id is not the pad id, so texts
are padded on the right and `batches.py` refuses a pad id inside a text.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ctxtrain.errors import ConfigError
from ctxtrain.model.base import (
    base_config,
    check_finite,
    find_base,
    head_order,
)
from ctxtrain.model.base_config import HEAD
from ctxtrain.model.tokenizer import convert_load_errors
from ctxtrain.runtime import Purpose, seed_torch

# Weights of a complete checkpoint that a text classifier never has: the language model's head, multi-token prediction,
# and the image and audio towers.
_NON_CLASSIFIER_WEIGHTS = re.compile(r"(^|\.)(lm_head|mtp|visual|vision_tower|audio_tower|thinker|talker)(\.|$)")


def load_classifier(
    base: str,
    pad_id: int,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    quantization: str = "none",
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """Load a base model with a 3-class head, which the seed initialises if the base model has none.

    A `dtype` of None keeps the dtype of the files. `say` receives a note about unused weights, except those of language
    or vision parts. Raises ConfigError if the base model cannot be opened as a sequence classifier, lacks any weight
    but the head, or has a weight that is not finite.
    """
    with convert_load_errors(base):
        folder = find_base(base, revision)
        config = classifier_config(folder, pad_id)
        seed_torch(seed, Purpose.HEAD)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            quantization_config=_quantization(quantization, dtype or torch.float32),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_weights names them
        )
    _check_weights(base, report)
    if say and (
        unused := sorted(name for name in report["unexpected_keys"] if not _NON_CLASSIFIER_WEIGHTS.search(name))
    ):
        say(
            f"{len(unused)} weights of the base model are not part of its classifier and are ignored, first {unused[0]}"
        )
    if (order := head_order(folder)) is not None and f"{HEAD}.weight" not in report["missing_keys"]:
        with torch.no_grad():
            getattr(model, HEAD).weight.copy_(getattr(model, HEAD).weight[order].clone())
    if any(weight.is_floating_point() and not bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        check_finite(folder)
    getattr(model, HEAD).to(torch.float32)  # the head is trained, and trained weights stay float32
    return cast(PreTrainedModel, model)


def classifier_config(folder: Path, pad_id: int) -> PreTrainedConfig:
    """The config of a base model as a classifier of `LABELS` whose texts are padded with `pad_id`."""
    config = base_config(folder)
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
    config.get_text_config().use_cache = False
    return config


def _check_weights(base: str, report: Mapping[str, Any]) -> None:
    """Raises ConfigError if the loading report of transformers has weights of other shapes, missing or surplus ones."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, file_shape, config_shape = mismatched[0]
        raise ConfigError(
            f"model.base must hold weights of the shapes that its config.json describes, {len(mismatched)} of {base!r} "
            f"differ, first {name}: {tuple(file_shape)} in the files, {tuple(config_shape)} by config.json. "
            "Use the config.json and the weights of one checkpoint."
        )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(f"{HEAD}."))
    if missing:
        raise ConfigError(
            f"model.base must hold every weight but the head, {base!r} lacks {len(missing)}, first {missing[0]}. "
            "Use a whole checkpoint."
        )
    if surplus := sorted(name for name in report["unexpected_keys"] if ".layers." in name and "mtp" not in name):
        raise ConfigError(
            f"config.json must describe every layer of the weights, that of {base!r} has no layer for "
            f"{len(surplus)} weights, first {surplus[0]}. Use the config.json and the weights of one checkpoint."
        )


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


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Uncalibrated logits in float32, of shape (B, 3), for a batch from `batches.collate` and other model inputs.

    Drops the attention mask: in a causal model, padding on the right does not affect earlier tokens, and attention
    without a mask tensor is faster. The tests compare the result with the masked model for every model family.
    """
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    output: Tensor = model(**inputs).logits
    return output.float()


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


def _quantization(name: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Settings of bitsandbytes for the frozen base model. They need a GPU and have not been tested on one."""
    if name == "none":
        return None
    if not torch.cuda.is_available():
        raise ConfigError(
            f"model.quantization={name} needs a GPU, and this machine has none. Use model.quantization=none."
        )
    return BitsAndBytesConfig(
        load_in_8bit=name == "int8",
        load_in_4bit=name == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[HEAD],
    )
