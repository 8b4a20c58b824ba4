"""Merge adapters into the files of the base and write one `model.safetensors`, tensor by tensor.

Input: the skeleton of a model, and its trained weights by PEFT's names. Output: the file that `save_pretrained` of the
merged model would write, and its digest. A merged weight is W + α/r · BA (Hu et al. 2021, section 4.1), in float32 and
in PEFT's order of operations, so it has the bits of PEFT's `merge_and_unload`; an export in bfloat16 rounds once more.

The computer's memory holds one tensor at a time, and no GPU is used. The file begins with the length and the text of a
JSON header, which has the place of each tensor; this header needs shapes alone, so the tensors can follow one by one.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from ctxtrain.config.value_types import ExportDtype
from ctxtrain.errors import ExportError
from ctxtrain.model import lora
from ctxtrain.model.skeleton import HEAD_WEIGHT, Skeleton, Source, WeightReader, as_bytes
from ctxtrain.storage.atomic_files import Digester, FileDigest

_CODES: dict[ExportDtype, str] = {"float32": "F32", "bfloat16": "BF16"}
_PEFT_PREFIX = "base_model.model."
ALIGNMENT = 8  # the header's length is a multiple of it

Parts = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Entry:
    """A tensor of the file to write; `parts` gives its rows in float32, from the first to the last."""

    shape: tuple[int, ...]
    parts: Parts


class _NotStreamable(Exception):
    """The file cannot be written tensor by tensor; the message has the reason."""


def write_merged(
    path: Path,
    skeleton: Skeleton,
    weights: Mapping[str, Tensor],
    dtype: ExportDtype,
    load: Callable[[], PeftModel],
) -> FileDigest:
    """Write the merged model and return the digest of the file, computed while it is written.

    `load` builds the trained model in float32, for adapters that this module cannot merge: those of a layer's experts,
    which are one weight in the model and many tensors in the files. Raises ConfigError if the files of the base changed
    or do not fit the trained weights, ExportError if a merged weight is not finite.
    """
    skeleton.require_unchanged()
    lora.check_trainable_state(skeleton.adapted, weights)
    try:
        entries = _stream(skeleton, weights)
    except _NotStreamable:
        entries = _load_all(load)
    return _write(path, entries, dtype)


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give each float32 weight the nearest value of another dtype."""
    for weight in model.state_dict().values():
        weight.copy_(weight.to(dtype))


def _stream(skeleton: Skeleton, weights: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The tensors of the merged file by name. Raises _NotStreamable."""
    reader, adapters = WeightReader(), _adapters(skeleton.adapted)
    entries = {}
    for name, (shape, source) in _layout(skeleton).items():
        if source is None:
            entries[name] = Entry(shape, _in_memory(name, weights[_PEFT_PREFIX + HEAD_WEIGHT]))
        elif source.weight in adapters:
            if source.pattern is not None:
                raise _NotStreamable(f"{source.weight} is made of several tensors")
            module, scaling = adapters.pop(source.weight)
            a, b = (weights[f"{module}.lora_{side}.weight"].clone() for side in "AB")
            entries[name] = Entry(shape, _merged(name, reader, source, a, b, scaling))
        else:
            entries[name] = Entry(shape, _unchanged(reader, source))
    if adapters:
        raise _NotStreamable(f"{next(iter(adapters))} is not in the files")
    return entries


def _layout(skeleton: Skeleton) -> dict[str, tuple[tuple[int, ...], Source | None]]:
    """Name and shape of each tensor as `save_pretrained` writes them, with the tensor of the files; the head has none.

    Stacking a layer's experts on reading and parting them on writing gives back the same tensors in the same order.
    """
    plain, naming = skeleton.plain, skeleton.naming
    sources: defaultdict[tuple[str, str | None], deque[Source]] = defaultdict(deque)
    for source in skeleton.sources:
        sources[source.weight, source.pattern].append(source)
    plain._weight_conversions = naming.used_rules()
    written = revert_weight_conversion(plain, dict(naming.weights))
    reader = WeightReader()
    layout: dict[str, tuple[tuple[int, ...], Source | None]] = {}
    for name in sorted(written, key=dot_natural_key):
        shape, key = tuple(written[name].shape), naming.weight(name)
        if key[0] == HEAD_WEIGHT:
            layout[name] = shape, None
        elif not sources[key] or reader.shape(sources[key][0]) != shape:
            raise _NotStreamable(f"{name} is not in the files")
        else:
            layout[name] = shape, sources[key].popleft()
    return layout


def _adapters(model: PeftModel) -> dict[str, tuple[str, float]]:
    """PEFT's name and scaling α/r of each adapter, by the name of the weight that it changes."""
    adapters = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if type(module) is not Linear:
                raise _NotStreamable(f"{name} is a {type(module).__name__}")
            adapters[f"{name.removeprefix(_PEFT_PREFIX)}.weight"] = name, module.scaling["default"]
    return adapters


def _merged(name: str, reader: WeightReader, source: Source, a: Tensor, b: Tensor, scaling: float) -> Parts:
    def parts() -> Iterator[Tensor]:
        merged = reader.tensor(source).to(torch.float32, copy=True)
        merged += (b @ a).mul_(scaling)
        yield _require_finite(name, merged)

    return parts


def _unchanged(reader: WeightReader, source: Source) -> Parts:
    def parts() -> Iterator[Tensor]:
        for rows in reader.rows(source):
            yield rows.float()

    return parts


def _in_memory(name: str, weight: Tensor) -> Parts:
    return lambda: iter([_require_finite(name, weight.float())])


def _load_all(load: Callable[[], PeftModel]) -> dict[str, Entry]:
    merged = lora.merge(load())
    state = revert_weight_conversion(merged, merged.state_dict())
    return {name: Entry(tuple(weight.shape), _in_memory(name, weight)) for name, weight in state.items()}


def _require_finite(name: str, weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise ExportError(
            f"every merged weight must be finite, {name} holds a NaN or an infinity. The checkpoints are unchanged. "
            "Train with a lower training.learning_rate."
        )
    return weight


def _write(path: Path, entries: Mapping[str, Entry], dtype: ExportDtype) -> FileDigest:
    """Write the entries in the order of their names, as safetensors does for one dtype."""
    target: torch.dtype = getattr(torch, dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(entries):
        start, end = end, end + math.prod(entries[name].shape) * target.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": entries[name].shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digester = Digester()
    with path.open("wb") as stream:
        for part in (len(text).to_bytes(8, "little"), text):
            digester.update(part)
            stream.write(part)
        for name in sorted(entries):
            for rows in entries[name].parts():
                content = as_bytes(rows.to(target))
                digester.update(content)
                stream.write(content)
    digest = digester.digest()
    assert digest.bytes == 8 + len(text) + end, "every tensor has the size that the header states"
    return digest
