"""config.json of a base or of an export: what of it a model may be made from.

Comes in: the values of a config.json that may come from anyone. Goes out: a config of the keys that its family
knows, or the reasons why none can be made. So no file names code, another model or a place on the
network, and none makes a loader take more memory than the weights need. What a run writes passes through the same
functions as what `predict` reads, so a run does not write what the reader refuses.
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

from ctxtrain.errors import ConfigError, DataError, shown
from ctxtrain.memory import ran_out

HEAD = "score"
FAMILIES = tuple(name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name.startswith("qwen"))
# Rotary embeddings that change with the longest row of a batch, so that a row's logits depend on the rows beside it.
COMPANY_DEPENDENT = ("dynamic", "longrope")
BOUNDS = {"initializer_range": (0.0, 1.0), "rms_norm_eps": (0.0, 1.0)}
DROPOUTS = (0.0, 0.99)
SIZES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
})  # fmt: skip
_DROPOUT = re.compile(r".*(dropout|pdrop|dropout_prob|dropout_rate)")
OLDER = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # in files of transformers before 5
# Keys of every config that change what a forward pass returns, or what transformers makes of labels.
_RESET = ("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type")
_LEADS_AWAY = re.compile(r"auto_map|auto_mapping|.*_implementation.*|quantization_config|trust_remote_code|.*_file")
_ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
# What transformers and the libraries under it raise for files that they cannot use.
NOT_OPENED = (
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
    """A config of the keys that its family knows, or has known under an older name."""
    kind = CONFIG_MAPPING[values["model_type"]]
    known = kind().to_dict().keys() | kind.attribute_map.keys() | OLDER
    config: PreTrainedConfig = kind.from_dict(
        {key: value for key, value in values.items() if key in known and key not in _RESET}
    )
    return config


def config_faults(values: Mapping[str, Any]) -> list[str]:
    """Why a model of this config.json can be neither trained nor opened, whatever its weights are."""
    family = values.get("model_type")
    if family not in FAMILIES:
        rule = f"config.json: model_type must be a Qwen that transformers opens as a classifier ({', '.join(FAMILIES)})"
        return [f"{rule}, got {shown(family)}. Use a Qwen2, Qwen2.5 or Qwen3 checkpoint"]
    faults = []
    for key in ("quantization_config", "compression_config"):
        if values.get(key) is not None:
            method = values[key].get("quant_method") if isinstance(values[key], dict) else values[key]
            faults.append(
                f"config.json: the weights must be plain numbers, got {key} with quant_method {shown(method)}. Use the "
                "unquantised checkpoint; model.quantization=int8 or nf4 then quantises it for training on a GPU"
            )
    for part in _parts(values):
        faults += [
            "config.json: attention must be causal, since the class is read at the last token of a padded row, got "
            f"{key} {shown(part[key])}. Use the causal checkpoint that this one was made from"
            for key, wanted in (("is_causal", True), ("use_bidirectional_attention", False))
            if bool(part.get(key, wanted)) != wanted
        ]
        faults += [fault for key, value in part.items() if (fault := _number_fault(key, value))]
        for key in ("rope_scaling", "rope_parameters"):
            faults += [
                f"config.json: a row's logits must not depend on the rows beside it, but {key} is {kind}, which "
                "changes with the longest row of a batch. Remove it from config.json: windows are far shorter than the "
                "context that it is for"
                for kind in _rope_types(part.get(key))
                if kind in COMPANY_DEPENDENT
            ]
    return faults


def size_fault(config: PreTrainedConfig, shapes: Mapping[str, list[int]], *, exact: bool) -> str | None:
    """Why weights of these shapes are not those of the config's model; found without taking memory for them.

    With `exact` they are a whole classifier, else a base: it may lack the head and hold more, as a language model does.
    """
    held = sum(map(math.prod, shapes.values()))
    text = config.get_text_config()
    described = 0
    if text.num_hidden_layers <= len(shapes) and getattr(text, "num_experts", 0) <= held:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        described = sum(
            weight.numel() for name, weight in model.named_parameters() if exact or not name.startswith(f"{HEAD}.")
        )
    if described and held and (described == held if exact else described <= held):
        return None
    return (
        f"config.json must describe the {held:,} numbers of the weights, it describes {described or 'more layers':,}"
        if exact
        else f"config.json describes {described or 'more layers than'} numbers, the files hold {held:,}"
    )


def clean(values: Any, path: str = "") -> tuple[Any, list[str]]:
    """The values without what names code, another model or a place on the network; and the keys that are left out."""
    if isinstance(values, dict):
        kept, dropped = {}, []
        for key, value in values.items():
            if leads_away(key, value):
                if value is not None:
                    dropped.append(f"{path}{key}")
            else:
                kept[key], inner = clean(value, f"{path}{key}.")
                dropped += inner
        return kept, dropped
    if isinstance(values, list):
        found = [clean(value, path) for value in values if not leads_away("", value)]
        return [value for value, _ in found], [name for _, names in found for name in names]
    return values, []


def leads_away(key: str, value: Any) -> bool:
    """Whether an entry names code, another file or a place on the network."""
    return bool(_LEADS_AWAY.fullmatch(key)) or (isinstance(value, str) and bool(_ADDRESS.match(value)))


@contextmanager
def refusing(kind: type[ConfigError | DataError], rule: str, remedy: str = "Use a whole checkpoint") -> Iterator[None]:
    """Turn the many errors of the libraries that open a model into one of ours."""
    try:
        yield
    except Exception as error:
        # tokenizers raises the bare class; memory that ran out is no fault of the files
        if ran_out(error) or (not isinstance(error, NOT_OPENED) and type(error) is not Exception):
            raise
        said = re.sub(r"\s+|For details look at .*", " ", str(error))
        reason = said.strip()[:300].rstrip(".") or type(error).__name__
        raise kind(f"{rule} ({reason}). {remedy}.") from error


def _number_fault(key: str, value: object) -> str | None:
    """What is wrong with a number that no shape of a weight contradicts; null is the family's default."""
    if key in SIZES and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        return f"config.json: {key} must be a whole number of at least 1, got {shown(value)}. Copy config.json anew"
    low, high = BOUNDS.get(key, DROPOUTS if _DROPOUT.fullmatch(key) else (-math.inf, math.inf))
    if value is None or math.isinf(high) or (isinstance(value, int | float) and low <= value <= high):
        return None
    return f"config.json: {key} must be a number from {low:g} to {high:g}, got {shown(value)}. Copy config.json anew"


def _parts(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and, where it nests that of its text model, that too."""
    text = values.get("text_config")
    return [values, text] if isinstance(text, dict) else [values]


def _rope_types(parameters: object) -> Iterator[str]:
    """The rotary types of `rope_scaling` or `rope_parameters`, which may be given for each type of layer."""
    if isinstance(parameters, dict):
        for key in ("rope_type", "type"):
            if isinstance(parameters.get(key), str):
                yield parameters[key]
        for inner in parameters.values():
            yield from _rope_types(inner)
