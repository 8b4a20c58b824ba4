"""An export may come from anyone: what its folder must not hold, before a library opens it.

Comes in: the folder of an export. Goes out: the config of its model, or a DataError. What of config.json may reach
transformers is settled in `model/base_config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctxtrain.data import strict_json
from ctxtrain.errors import DataError, shown
from ctxtrain.limits import MOST_TOKENS
from ctxtrain.model.base_config import config_faults, known_config, leads_away, size_fault
from ctxtrain.regular_files import read_regular
from ctxtrain.storage.archive import FILES
from ctxtrain.storage.atomic_files import files_below

TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")
ADAPTER_KEYS = frozenset(LoraConfig().to_dict())


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
    if type(longest := tokenizer.get("model_max_length")) is not int or not 1 <= longest <= MOST_TOKENS:
        raise DataError(
            f"{folder}/tokenizer_config.json: model_max_length must be a whole number of tokens, at most "
            f"{MOST_TOKENS:,}, got {shown(longest)}. Export the model again."
        )
    adapter = folder / "adapter" / "adapter_config.json"
    unknown = sorted(_read(adapter).keys() - ADAPTER_KEYS) if adapter.exists() else []
    if unknown:
        raise DataError(f"{adapter}: PEFT has no key {shown(unknown[0])}. Export the model again.")
    values = _read(folder / "config.json")
    if faults := config_faults(values):
        raise DataError([f"{folder}/{fault}." for fault in faults])
    config = known_config(values)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  # no mapping
    if fault := size_fault(config, shapes, exact=True):
        raise DataError(f"{folder}: {fault}. Export the model again.")
    return config


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises DataError if the tokenizer could give an id that the model has no embedding for, or pads with another."""
    largest, size = max(tokenizer.get_vocab().values(), default=0), config.get_text_config().vocab_size
    if largest >= size or tokenizer.pad_token_id is None:
        raise DataError(
            f"{folder}/tokenizer.json: needs a pad token and ids below the model's {size:,}, got {largest:,}. "
            "Export the model again."
        )
    if {config.pad_token_id, config.get_text_config().pad_token_id} != {tokenizer.pad_token_id}:
        raise DataError(
            f"{folder}/config.json: pad_token_id must be the {tokenizer.pad_token_id:,} of the tokenizer, "
            f"got {shown(config.pad_token_id)}. Export the model again."
        )


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
            yield from (shown({key: item}) for key, item in value.items() if item is not None and leads_away(key, item))
            level += value.values()
        elif isinstance(value, list):
            yield from (shown(item) for item in value if leads_away("", item))
            level += value
