"""Checks and filters config.json of a base model or of an export.

Input: the values of an untrusted config.json. Output: a config with the keys of its model family only, or the faults.
So no config.json can name code, another model or a network address, or make a loader allocate more memory than the
weights need. Runs check what they write with the same functions as `predict` checks what it reads, so `predict` accepts
every export.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ctxtrain.errors import ConfigError, DataError, short_repr
from ctxtrain.memory import is_out_of_memory

HEAD = "score"
FAMILIES = tuple(name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name.startswith("qwen"))
# Rotary embeddings that change with the longest row of a batch, so that a row's logits depend on other rows.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
BOUNDS = {"initializer_range": (0.0, 1.0), "rms_norm_eps": (0.0, 1.0)}
DROPOUTS = (0.0, 0.99)
SIZES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
})  # fmt: skip
_DROPOUT = re.compile(r".*(dropout|pdrop|dropout_prob|dropout_rate)")
LEGACY_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # in files of transformers before 5
# Keys of every config that change what a forward pass returns, or what transformers makes of labels.
_RESET = ("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type")
_REFERENCE_KEY = re.compile(r"auto_map|auto_mapping|.*_implementation.*|quantization_config|trust_remote_code|.*_file")
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
# Raised by transformers and its libraries for files that they cannot use.
LOADER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def known_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """A config with the keys of its model family, including their older names; other keys are dropped."""
    config_class = CONFIG_MAPPING[values["model_type"]]
    known = config_class().to_dict().keys() | config_class.attribute_map.keys() | LEGACY_KEYS
    config: PreTrainedConfig = config_class.from_dict(
        {key: value for key, value in values.items() if key in known and key not in _RESET}
    )
    return config


def config_faults(values: Mapping[str, Any]) -> list[str]:
    """Faults of a config.json that prevent training and opening, independent of the weights."""
    family = values.get("model_type")
    if family not in FAMILIES:
        rule = f"config.json: model_type must be a Qwen that transformers opens as a classifier ({', '.join(FAMILIES)})"
        return [f"{rule}, got {short_repr(family)}. Use a Qwen2, Qwen2.5 or Qwen3 checkpoint"]
    faults = []
    for key in ("quantization_config", "compression_config"):
        if values.get(key) is not None:
            method = values[key].get("quant_method") if isinstance(values[key], dict) else values[key]
            faults.append(
                f"config.json: the weights must be plain numbers, got {key} with quant_method {short_repr(method)}. "
                "Use the unquantised checkpoint; model.quantization=int8 or nf4 then quantises it for training on a GPU"
            )
    for part in _parts(values):
        faults += [
            "config.json: attention must be causal, since the class is read at the last token of a padded row, got "
            f"{key} {short_repr(part[key])}. Use the causal checkpoint that this one was made from"
            for key, required in (("is_causal", True), ("use_bidirectional_attention", False))
            if bool(part.get(key, required)) != required
        ]
        faults += [fault for key, value in part.items() if (fault := _number_fault(key, value))]
        for key in ("rope_scaling", "rope_parameters"):
            faults += [
                f"config.json: a row's logits must not depend on the rows beside it, but {key} is {rope_type}, which "
                "changes with the longest row of a batch. Remove it from config.json: windows are far shorter than the "
                "context that it is for"
                for rope_type in _rope_types(part.get(key))
                if rope_type in BATCH_DEPENDENT_ROPE
            ]
    return faults


def size_fault(config: PreTrainedConfig, shapes: Mapping[str, list[int]], *, exact: bool) -> str | None:
    """Why weights of these shapes do not fit the config, or None. Allocates no memory for the weights.

    With `exact`, they must be a complete classifier. Otherwise they are a base model, which may lack the head and have
    additional weights, such as a language model's head.
    """
    stored = sum(map(math.prod, shapes.values()))
    text = config.get_text_config()
    described = 0
    if text.num_hidden_layers <= len(shapes) and getattr(text, "num_experts", 0) <= stored:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        described = sum(
            weight.numel() for name, weight in model.named_parameters() if exact or not name.startswith(f"{HEAD}.")
        )
    if described and stored and (described == stored if exact else described <= stored):
        return None
    description = f"{described:,} parameters" if described else "more layers than there are weights"
    return (
        f"config.json must describe the {stored:,} parameters of the weights, it describes {description}"
        if exact
        else f"config.json describes {description}, the files hold {stored:,} parameters"
    )


def remove_references(values: Any, path: str = "") -> tuple[Any, list[str]]:
    """The values without references to code, other models or network addresses, and the removed keys."""
    if isinstance(values, dict):
        kept, dropped = {}, []
        for key, value in values.items():
            if is_external_reference(key, value):
                if value is not None:
                    dropped.append(f"{path}{key}")
            else:
                kept[key], inner = remove_references(value, f"{path}{key}.")
                dropped += inner
        return kept, dropped
    if isinstance(values, list):
        items = [remove_references(value, path) for value in values if not is_external_reference("", value)]
        return [value for value, _ in items], [name for _, names in items for name in names]
    return values, []


def is_external_reference(key: str, value: Any) -> bool:
    """Whether an entry names code, another file or a network address."""
    return bool(_REFERENCE_KEY.fullmatch(key)) or (isinstance(value, str) and bool(_URL.match(value)))


@contextmanager
def convert_errors(
    error_type: type[ConfigError | DataError], rule: str, remedy: str = "Use a whole checkpoint"
) -> Iterator[None]:
    """Convert the errors of the libraries that open a model into `error_type`, with rule, reason and remedy."""
    try:
        yield
    except Exception as error:
        # tokenizers raises plain Exception; running out of memory is not a fault of the files
        if is_out_of_memory(error) or (not isinstance(error, LOADER_ERRORS) and type(error) is not Exception):
            raise
        text = re.sub(r"\s+|For details look at .*", " ", str(error))
        reason = text.strip()[:300].rstrip(".") or type(error).__name__
        raise error_type(f"{rule} ({reason}). {remedy}.") from error


def _number_fault(key: str, value: object) -> str | None:
    """Fault of a number that the shapes of the weights cannot reveal, or None; null is the family's default."""
    if key in SIZES and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        return (
            f"config.json: {key} must be a whole number of at least 1, got {short_repr(value)}. Copy config.json again"
        )
    low, high = BOUNDS.get(key, DROPOUTS if _DROPOUT.fullmatch(key) else (-math.inf, math.inf))
    if value is None or math.isinf(high) or (isinstance(value, int | float) and low <= value <= high):
        return None
    return (
        f"config.json: {key} must be a number from {low:g} to {high:g}, got {short_repr(value)}. Copy config.json again"
    )


def _parts(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config, and the nested config of its text model if it has one."""
    text = values.get("text_config")
    return [values, text] if isinstance(text, dict) else [values]


def _rope_types(parameters: object) -> Iterator[str]:
    """The RoPE types of `rope_scaling` or `rope_parameters`, which may differ between types of layers."""
    if isinstance(parameters, dict):
        for key in ("rope_type", "type"):
            if isinstance(parameters.get(key), str):
                yield parameters[key]
        for inner in parameters.values():
            yield from _rope_types(inner)
