"""A classifier without numbers: the names and shapes of its weights, and the tensors of the base's files behind them.

Input: `model.base` and the LoRA settings. Output: the model on torch's meta device, with and without adapters, and for
each tensor of the files the weight that it becomes. Nothing is loaded, so a model of any size takes a moment.

Files and model may name a weight differently: transformers removes prefixes, and it stacks the experts of a layer into
one weight. Its own rules (`conversion_mapping`, `core_model_loading`) decide here too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from ctxtrain.errors import ConfigError
from ctxtrain.model import lora
from ctxtrain.model.base import classifier_config
from ctxtrain.model.base_config import HEAD
from ctxtrain.model.base_files import find_base, weight_files
from ctxtrain.model.tokenizer import quiet_transformers

CHUNK_BYTES = 1 << 25
MAPPED_BYTES = 1 << 26  # pages of a mapped file count as memory of this process until the file is closed
HEAD_WEIGHT = f"{HEAD}.weight"


@dataclass(frozen=True)
class Source:
    """A tensor of the base's files. `weight` is the weight of the model that it becomes, or becomes a part of.

    `pattern` is the rule of transformers that puts several tensors into one weight, None if the tensor is the weight.
    """

    file: Path
    name: str
    weight: str
    pattern: str | None


class Skeleton:
    """`plain` and `adapted` are on the meta device; `sources` has the tensors of the files that the model uses."""

    def __init__(self, folder: Path, plain: PreTrainedModel, adapted: PeftModel) -> None:
        self.folder = folder
        self.plain = plain
        self.adapted = adapted
        self.naming = Naming(plain)
        self._stamps = _stamps(folder)
        self.sources = list(_sources(folder, self.naming))

    @classmethod
    def of(cls, base: str, pad_id: int, settings: Mapping[str, Any], *, revision: str | None = None) -> Skeleton:
        """The skeleton of a base model that passed `check_base`, with adapters of the LoRA `settings`."""
        folder = find_base(base, revision)

        def empty() -> PreTrainedModel:
            config = classifier_config(folder, pad_id)
            return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)

        with torch.device("meta"), quiet_transformers():
            return cls(folder, empty(), lora.add_lora(empty(), **settings))

    @property
    def nbytes(self) -> int:
        """Size of the weights in float32."""
        return sum(weight.nbytes for weight in self.plain.state_dict().values())

    def sha256(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor that the frozen model uses, so without the head."""
        digest, reader = hashlib.sha256(), WeightReader()
        for source in sorted(self.sources, key=lambda source: source.name):
            if source.weight != HEAD_WEIGHT:
                digest.update(f"{source.name} {reader.dtype(source)} {reader.shape(source)}\n".encode())
                for rows in reader.rows(source):
                    digest.update(as_bytes(rows))
        return digest.hexdigest()

    def require_unchanged(self) -> None:
        """Raise ConfigError if a weight file is not the one that was there when this skeleton was made."""
        now = _stamps(self.folder)
        if changed := [path for path, stamp in self._stamps.items() if now.get(path) != stamp]:
            raise ConfigError(
                f"model.base: the files of the base must stay in place during a run, {changed[0]} was changed or "
                "removed. Put the file back and continue with train --resume."
            )


@dataclass(frozen=True)
class Trained:
    """What a run has trained. `weights` are adapters and head; `load` builds the base in float32 with both.

    `notes` are for the user of an export.
    """

    skeleton: Skeleton
    weights: Mapping[str, Tensor]
    load: Callable[[], PeftModel]
    notes: Sequence[str] = ()


class Naming:
    """How transformers names the tensors of a checkpoint; `weights` are those of the model, on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.weights: dict[str, Tensor] = model.state_dict()
        self._prefix = model.base_model_prefix
        self._rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]

    def weight(self, name: str) -> tuple[str, str | None]:
        """The weight that a tensor becomes, and the rule that puts several tensors into one weight, if one does.

        As `convert_and_load_state_dict_in_model` of transformers decides it.
        """
        weight, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.weights)
        if weight not in self.weights and name in self.weights:
            weight, pattern = rename_source_key(name, [], [], self._prefix, self.weights)
        return weight, pattern

    def used_rules(self) -> list[WeightTransform]:
        """The rules that some tensor met so far; those that `save_pretrained` reverses after loading them."""
        return [rule for rule in self._rules if rule.was_used()]


class WeightReader:
    """Reads tensors of safetensors files, a few million numbers at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._mapped = 0

    def dtype(self, source: Source) -> str:
        return str(self._slice(source).get_dtype())

    def shape(self, source: Source) -> tuple[int, ...]:
        return tuple(self._slice(source).get_shape())

    def tensor(self, source: Source) -> Tensor:
        """The whole tensor, a view of the mapped file."""
        part = self._slice(source)
        tensor: Tensor = part[...]
        self._mapped += tensor.nbytes
        return tensor

    def rows(self, source: Source) -> Iterator[Tensor]:
        """The tensor in parts of whole rows, from the first to the last."""
        shape = self.shape(source)
        if not shape or not shape[0]:
            yield self.tensor(source)
            return
        count, start = shape[0], 0
        while start < count:
            part: Tensor = self._slice(source)[start : start + 1]
            end = min(count, start + max(1, CHUNK_BYTES // max(1, part.nbytes)))
            part = self._slice(source)[start:end]
            self._mapped += part.nbytes
            yield part
            start = end

    def _slice(self, source: Source) -> Any:
        if source.file != self._path or self._mapped > MAPPED_BYTES:
            self._path, self._mapped = source.file, 0
            self._file = safe_open(source.file, framework="pt")
        return self._file.get_slice(source.name)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    content: memoryview = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    return content


def _sources(folder: Path, naming: Naming) -> Iterator[Source]:
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as weights:
            files |= dict.fromkeys(weights.keys(), path)
    for name in sorted(files, key=dot_natural_key):
        weight, pattern = naming.weight(name)
        if weight in naming.weights:
            yield Source(files[name], name, weight, pattern)


def _stamps(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """What tells one version of each weight file from another, without reading it."""
    return {
        path: (status.st_size, status.st_mtime_ns, status.st_ino)
        for path in weight_files(folder)
        if path.is_file() and (status := path.stat())
    }
