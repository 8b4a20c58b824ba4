"""Checks the files of a base model before a run starts and before a library opens them.

Input: `model.base`, a folder or a hub id. Output: its folder and a config of known keys and plain values, or one
ConfigError that names every fault with its remedy. References of its files to code, other models or network addresses
never reach the library that opens them.

The export of a run must open again. So everything that the reader of exports refuses is refused or removed here, by the
same functions (`base_config.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ctxtrain.config.sections import EMBEDDED_BASE
from ctxtrain.data import strict_json
from ctxtrain.errors import ConfigError, short_repr
from ctxtrain.labels import LABELS
from ctxtrain.model.base_config import HEAD, config_faults, convert_errors, known_config, remove_references, size_fault
from ctxtrain.model.base_name import GGUF, refuse_unknown_base
from ctxtrain.model.embedded import embedded_base

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a hub repository; no code, pickles or other formats
FLOATS = ("F32", "F16", "BF16", "F64")  # types of an unquantised checkpoint
_POINTER = b"version https://git-lfs"
LABEL_LIST = ", ".join(LABELS)
MAX_FAULTS = 10
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class BaseFacts:
    """Facts from the files of a base model. `dropped` are the keys of config.json that a run removes."""

    folder: Path
    embedding_rows: int
    head_labels: list[str] | None
    dropped: list[str]

    def notes(self) -> list[str]:
        """Notes for the user about a base model that a run can use."""
        notes = []
        if self.dropped:
            notes.append(
                f"config.json of the base model has references to code or URLs under {', '.join(self.dropped)}; "
                "they are ignored and removed from the export"
            )
        if self.head_labels:
            classes = ", ".join(self.head_labels)
            notes.append(f"the base model has a head of 3 classes ({classes}); training starts from it as {LABEL_LIST}")
        return notes


def find_base(base: str, revision: str | None = None) -> Path:
    """The folder of a base model: the embedded one, a folder of the user, or the snapshot of a model on the hub.

    Raises ConfigError as `refuse_unknown_base` does, and OSError or ValueError if the download fails.
    """
    refuse_unknown_base(base)
    if base == EMBEDDED_BASE:
        return embedded_base()
    return Path(base) if Path(base).is_dir() else _snapshot(base, revision)


@cache
def _snapshot(base: str, revision: str | None) -> Path:
    return Path(snapshot_download(base, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))


def check_base(folder: Path) -> BaseFacts:
    """Check config, weights and adapters without loading them. Raises one ConfigError with all faults."""
    try:
        with convert_errors(ConfigError, "its files cannot be read"):
            faults, facts = _inspect(folder)
    except ConfigError as error:
        faults, facts = error.faults, None
    if faults or facts is None:
        raise ConfigError([f"model.base: {folder}: {fault.rstrip('.')}." for fault in faults])
    return facts


def language_config(folder: Path) -> PreTrainedConfig:
    """The config of a base model that passed `check_base`, without its classes."""
    values, _ = remove_references(_read_object(folder / "config.json"))
    return known_config({key: value for key, value in values.items() if key not in ("id2label", "label2id")})


def base_config(folder: Path) -> PreTrainedConfig:
    """The config of a base model that passed `check_base`, as a classifier of `LABELS`."""
    config = language_config(folder)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: index for index, label in enumerate(LABELS)}
    return config


def head_order(folder: Path) -> list[int] | None:
    """Index of each of `LABELS` in the base model's head if it has them in another order, otherwise None."""
    labels = [label.upper() for label in _head_labels(_read_object(folder / "config.json"))]
    if sorted(labels) != sorted(LABELS) or labels == list(LABELS):
        return None
    return [labels.index(label) for label in LABELS]


def _head_labels(values: Mapping[str, Any]) -> list[str]:
    """Class names of the head in the order of its outputs; empty if config.json does not name them."""
    labels = values.get("id2label")
    if not isinstance(labels, dict) or not all(str(key).isdecimal() for key in labels):
        return []
    return [str(labels[key]) for key in sorted(labels, key=int)]


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer files of a base model, without references to code and without chat templates."""
    for name in ("added_tokens.json", "special_tokens_map.json", *TOKENIZER_FILES):
        if (folder / name).is_file() and name != "tokenizer_config.json":
            shutil.copyfile(folder / name, target / name)
    if (folder / "tokenizer_config.json").is_file():
        values, _ = remove_references(_read_object(folder / "tokenizer_config.json"))
        values.pop("chat_template", None)
        (target / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    language_config(folder).save_pretrained(target)


def weight_files(folder: Path) -> list[Path]:
    """Paths of the weight files of a base model. Raises ConfigError if the index of a sharded checkpoint is invalid."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_weight_file_name(name) for name in names.values()):
        raise ConfigError(
            "model.safetensors.index.json: weight_map must name files of this folder. Copy the base again"
        )
    return [folder / name for name in sorted(set(names.values()))]


def check_finite(folder: Path) -> None:
    """Raise ConfigError with the name of the first weight that is not finite. Loads one tensor at a time."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # no mapping
                if not bool(torch.isfinite(weights.get_tensor(name).float()).all()):
                    raise ConfigError(
                        f"model.base: {path}: every weight must be finite, {name} holds a NaN or an infinity. Copy the "
                        "base again from its source, or use another."
                    )


def _inspect(folder: Path) -> tuple[list[str], BaseFacts | None]:
    """The faults of the files, and the facts if there are none. Raises ConfigError if a file cannot be read."""
    if (folder / "adapter_config.json").exists():
        return [_adapter_fault(folder)], None
    if not (folder / "config.json").is_file():
        return [_no_checkpoint_fault(folder)], None
    values = _read_object(folder / "config.json")
    faults = config_faults(values)
    faults += [
        _pointer_fault(name) for name in TOKENIZER_FILES if (folder / name).is_file() and _is_pointer(folder / name)
    ]
    if faults:
        return faults, None
    shapes, faults = _weight_shapes(folder)
    if faults:
        return faults, None
    kept, dropped = remove_references(values)
    with convert_errors(ConfigError, "config.json: transformers does not take it"):
        config = known_config(kept)
        fault = size_fault(config, shapes, exact=False)
    # transformers moves keys: a partial_rotary_factor that is an object becomes a part of rope_parameters
    if faults := config_faults(config.to_dict()):
        return faults, None
    table = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
    if table is None:
        return ["the weights must hold embed_tokens.weight, they do not. Use a whole checkpoint"], None
    if fault:
        return [f"{fault}. Use the config.json and the weights of one checkpoint"], None
    head = next((shape for name, shape in shapes.items() if name == f"{HEAD}.weight"), None)
    named = _head_labels(values) or ["without names"]
    return [], BaseFacts(folder, table[0], None if head is None or named == list(LABELS) else named, dropped)


def _weight_shapes(folder: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Shapes of the weights by name, and faults of the weight files."""
    shapes: dict[str, list[int]] = {}
    faults = []
    for path in weight_files(folder):
        if not path.is_file():
            faults.append(f"{path.name} is missing; {_no_checkpoint_fault(folder)}")
        elif _is_pointer(path):
            faults.append(_pointer_fault(path.name))
        else:
            try:
                with safe_open(path, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118  # no mapping
                        part = weights.get_slice(name)
                        shapes[name] = part.get_shape()
                        if part.get_dtype() not in FLOATS and name.endswith(".weight"):
                            faults.append(_quantised_fault(path.name, name, part.get_dtype()))
            except SafetensorError as error:
                faults.append(f"{path.name} is cut or damaged ({error}). Copy it again from the base's source")
    head = shapes.get(f"{HEAD}.weight")
    if head and head[0] != len(LABELS):
        faults.append(
            f"its head {HEAD}.weight must have an output for each of {', '.join(LABELS)}, it has {head[0]}. Use the "
            f"language model that it was made from, or save this one without {HEAD}.weight"
        )
    return shapes, faults[:MAX_FAULTS]


def _quantised_fault(file: str, name: str, dtype: str) -> str:
    return f"{file}: {name} must hold plain numbers ({', '.join(FLOATS)}), got {dtype}. Use the unquantised checkpoint"


def _adapter_fault(folder: Path) -> str:
    """Fault of a folder with an adapter. Beside a checkpoint, transformers would open the adapter's base model."""
    with suppress(ConfigError):
        origin = _read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        base = f" of {origin}" if isinstance(origin, str) and origin else ""
        fault = "holds an adapter" if not (folder / "config.json").exists() else "holds a checkpoint and an adapter"
        return (
            f"{fault}{base} (adapter_config.json). Merge it (PeftModel.from_pretrained(base, folder)"
            ".merge_and_unload().save_pretrained(new)) and give the new folder, or give the base without the adapter"
        )
    return "holds an adapter (adapter_config.json). Give the folder of its base, or of the merged model"


def _no_checkpoint_fault(folder: Path) -> str:
    """Fault of a folder without config.json or weights, with a remedy for the files that it does hold."""
    if next(folder.glob("*.gguf"), None):
        return f"it holds a GGUF file. {GGUF}"
    if next(folder.glob("*.bin"), None) or next(folder.glob("*.pt*"), None):
        return (
            "it holds weights as pickles (.bin), which could run code. Use the safetensors of the same model, or "
            "convert them (AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)) if you trust their source"
        )
    for inner in (folder / "export", *sorted(folder.glob("snapshots/*"))):
        if (inner / "config.json").exists():
            return f"a checkpoint lies in {inner}. Give that folder"
    return "a checkpoint needs config.json and model.safetensors. Give the folder that holds them"


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path.name} is not a file. Copy it again from the base's source")
    content = path.read_bytes()
    if content.startswith(_POINTER):
        raise ConfigError(_pointer_fault(path.name))
    try:
        values = strict_json.loads(content)
    except json.JSONDecodeError as error:
        where = f"{path.name}:{error.lineno}:{error.colno}"
        raise ConfigError(f"{where}: not valid JSON: {error.msg}. Copy it again from the base's source") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must be a JSON object, got {short_repr(values)}. Copy it again")
    return values


def _pointer_fault(name: str) -> str:
    return f"{name} is a Git LFS pointer, not the file itself. Run git lfs pull in its repository"


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _is_weight_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
