"""Check an untrusted export before a library opens it.

Input: the folder of an export. Output: the config of its model, or a DataError. `model/base_config.py` decides which
keys of config.json reach transformers.
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
from ctxtrain.errors import DataError, short_repr
from ctxtrain.limits import MAX_TEXT_TOKENS
from ctxtrain.model.base_config import config_faults, is_external_reference, known_config, size_fault
from ctxtrain.regular_files import read_regular
from ctxtrain.storage.archive import EXPORT_FILES
from ctxtrain.storage.atomic_files import list_files

TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")
ADAPTER_KEYS = frozenset(LoraConfig().to_dict())


def open_config(folder: Path) -> PreTrainedConfig:
    """The model config of an export. Raises DataError if a file names code or a path outside the folder."""
    unexpected = [name for name in list_files(folder) if name not in EXPORT_FILES]
    if unexpected:
        raise DataError([f"{folder / name}: not a file of an export. Move it away." for name in unexpected])
    tokenizer = _read(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") not in TOKENIZERS:
        raise DataError(
            f"{folder}/tokenizer_config.json: tokenizer_class must be one of {', '.join(TOKENIZERS)}, "
            f"got {short_repr(tokenizer.get('tokenizer_class'))}. Export the model again."
        )
    if type(max_length := tokenizer.get("model_max_length")) is not int or not 1 <= max_length <= MAX_TEXT_TOKENS:
        raise DataError(
            f"{folder}/tokenizer_config.json: model_max_length must be a whole number of tokens, at most "
            f"{MAX_TEXT_TOKENS:,}, got {short_repr(max_length)}. Export the model again."
        )
    adapter = folder / "adapter" / "adapter_config.json"
    unknown = sorted(_read(adapter).keys() - ADAPTER_KEYS) if adapter.exists() else []
    if unknown:
        raise DataError(f"{adapter}: PEFT has no key {short_repr(unknown[0])}. Export the model again.")
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
    """Raise DataError if a token ID has no embedding, or if tokenizer and model differ in the pad token."""
    largest, size = max(tokenizer.get_vocab().values(), default=0), config.get_text_config().vocab_size
    if largest >= size or tokenizer.pad_token_id is None:
        raise DataError(
            f"{folder}/tokenizer.json: needs a pad token and ids below the model's {size:,}, got {largest:,}. "
            "Export the model again."
        )
    if {config.pad_token_id, config.get_text_config().pad_token_id} != {tokenizer.pad_token_id}:
        raise DataError(
            f"{folder}/config.json: pad_token_id must be the {tokenizer.pad_token_id:,} of the tokenizer, "
            f"got {short_repr(config.pad_token_id)}. Export the model again."
        )


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError if a key or text in it refers to code or a path outside the folder."""
    try:
        values = strict_json.loads(read_regular(path))
    except FileNotFoundError:
        raise DataError(f"{path}: missing. Export the model again.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}. Export again.") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be a JSON object, got {short_repr(values)}. Export the model again.")
    reference = next(_external_references(values), None)
    if reference is not None:
        raise DataError(f"{path}: an export must not name code or outside paths, got {reference}. Do not open it.")
    return values


def _external_references(values: Any) -> Iterator[str]:
    stack = [values]  # not recursive: an untrusted file may be nested deeply
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield from (
                short_repr({key: item})
                for key, item in value.items()
                if item is not None and is_external_reference(key, item)
            )
            stack += value.values()
        elif isinstance(value, list):
            yield from (short_repr(item) for item in value if is_external_reference("", item))
            stack += value
