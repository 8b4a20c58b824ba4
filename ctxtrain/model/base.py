"""Loads a base model as a sequence classifier.

Input: a folder or hub id of any Qwen that transformers opens as a sequence classifier. Output: the model with a 3-class
head, in plain transformers. The head is `score` (hidden → 3, no bias). It pools the last token whose id is not the pad
id, so texts are padded on the right and `tokens.py` refuses a pad id inside a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ctxtrain.errors import ConfigError
from ctxtrain.model.base_config import HEAD
from ctxtrain.model.base_files import base_config, check_finite, find_base, head_order
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
