"""An export may come from anyone: what its folder must not hold, before a library opens it.

Comes in: the folder of an export. Goes out: the config of its model, or a DataError. Of config.json only known keys and
plain numbers reach transformers, and it must describe as many numbers as the weights hold. So no file names code,
another model or a place on the network, and none makes the loader take more memory than the weights need.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ml import memory
from ml.data import strict_json
from ml.errors import DataError, shown
from ml.output.archive import FILES
from ml.output.files import files_below
from ml.regular import read_regular

TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")
ADAPTER_KEYS = frozenset(LoraConfig().to_dict())
CLASSIFIERS = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
_NOT_OPENED = (
    ArithmeticError,
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
_LEADS_AWAY = re.compile(r"auto_map|auto_mapping|.*_implementation.*|quantization_config|trust_remote_code|.*_file")
_ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")


def open_config(folder: Path) -> PreTrainedConfig:
    """The config of an export's model. Raises DataError if a file of the folder could lead out of it."""
    odd = [name for name in files_below(folder) if name not in FILES]
    if odd:
        raise DataError([f"{folder / name}: no file of an export. Take it away." for name in odd])
    tokenizer = _read(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") not in TOKENIZERS:
        raise DataError(
            f"{folder}/tokenizer_config.json: tokenizer_class must be one of {', '.join(TOKENIZERS)}, "
            f"got {shown(tokenizer.get('tokenizer_class'))}. Export the model again."
        )
    if type(longest := tokenizer.get("model_max_length")) is not int or longest < 1:
        raise DataError(
            f"{folder}/tokenizer_config.json: model_max_length must be a whole number of tokens, got {shown(longest)}. "
            "Export the model again."
        )
    adapter = folder / "adapter" / "adapter_config.json"
    unknown = sorted(_read(adapter).keys() - ADAPTER_KEYS) if adapter.exists() else []
    if unknown:
        raise DataError(f"{adapter}: PEFT has no key {shown(unknown[0])}. Export the model again.")
    values = _read(folder / "config.json")
    family = values.get("model_type")
    if not isinstance(family, str) or not family.startswith("qwen") or family not in CLASSIFIERS:
        raise DataError(f"{folder}/config.json: model_type must be a Qwen's, got {shown(family)}. Export again.")
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict().keys() | kind.attribute_map.keys()
    inert = {key: value for key, value in values.items() if key in known or isinstance(value, int | float | None)}
    config: PreTrainedConfig = kind.from_dict(inert)
    _check_sizes(folder, config)
    return config


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises DataError if the tokenizer could give an id that the model has no embedding for."""
    largest, size = max(tokenizer.get_vocab().values(), default=0), config.get_text_config().vocab_size
    if largest >= size or tokenizer.pad_token_id is None:
        raise DataError(
            f"{folder}/tokenizer.json: needs a pad token and ids below the model's {size:,}, got {largest:,}. "
            "Export the model again."
        )


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Turn the many errors of the libraries that open an export into one DataError."""
    try:
        yield
    except Exception as error:
        if memory.ran_out(error) or (
            not isinstance(error, _NOT_OPENED) and type(error) is not Exception
        ):  # tokenizers raises the bare class
            raise
        reason = re.sub(r"\s+", " ", str(error)).strip()[:300]
        raise DataError(f"{folder}: not an export that transformers opens ({reason}). Export again.") from error


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file, if no key and no text in it leads elsewhere."""
    try:
        values = strict_json.loads(read_regular(path))
    except FileNotFoundError:
        raise DataError(f"{path}: missing. Export the model again.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}. Export again.") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be a JSON object, got {shown(values)}. Export the model again.")
    leading = next(_leading_away(values), None)
    if leading is not None:
        raise DataError(f"{path}: a model of a stranger must not name code or places, got {leading}. Do not open it.")
    return values


def _leading_away(values: Any) -> Iterator[str]:
    level = [values]
    while level:
        value = level.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                address = isinstance(item, str) and _ADDRESS.match(item)
                if address or (item is not None and _LEADS_AWAY.fullmatch(key)):
                    yield shown({key: item})
            level += value.values()
        elif isinstance(value, list):
            yield from (shown(item) for item in value if isinstance(item, str) and _ADDRESS.match(item))
            level += value


def _check_sizes(folder: Path, config: PreTrainedConfig) -> None:
    """Raises DataError unless the model that the config describes has as many numbers as the weights hold."""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118  # no mapping
    held = sum(map(math.prod, shapes))
    text = config.get_text_config()
    described = 0
    if text.num_hidden_layers <= len(shapes) and getattr(text, "num_experts", 0) <= held:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        described = sum(weight.numel() for weight in model.parameters())
    if not held or described != held:
        raise DataError(
            f"{folder}: config.json must describe the {held:,} numbers of model.safetensors, it describes "
            f"{described or 'more layers':,}. Export the model again."
        )
