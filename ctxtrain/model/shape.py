"""Sizes of a model, of its adapters and of its batches, from configs alone: no weight is loaded.

Input: the config of a base model as transformers reads it, and settings of a run. Output: numbers of weights, widths of
layers, and bytes of the base in each precision. `engine/memory_needs.py` computes the memory of a run from them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from ctxtrain.labels import LABELS
from ctxtrain.model.base_config import HEAD

Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["none", "int8", "nf4"]
Device = Literal["cpu", "cuda"]
EngineKind = Literal["reference", "packed"]

FLOAT_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
# Of a weight in a linear layer. nf4: half a byte, and a float32 scale for each block of 64 (Dettmers et al. 2023,
# section 3, without double quantization). int8: one byte; the scale of each output row is left out.
QUANTIZED_BYTES: dict[Quantization, float] = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
TRAINED_BYTES = 16  # float32 weight, gradient and AdamW's two moments
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a classifier, in numbers of weights and widths of vectors; the head is not part of `weights`.

    `linears` holds for each layer the sum of input and output width of its linear layers, by name. `linear_weights` are
    the weights in linear layers, which `model.quantization` shrinks; stacked experts are not among them.
    """

    family: str
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner_width: int
    has_head_norms: bool
    layer_types: tuple[str, ...]
    experts_per_token: int
    expert_width: int
    shared_expert_width: int
    linear_attention_width: int
    weights: int
    linear_weights: int
    largest_weight: int
    largest_linear: int
    linears: tuple[Mapping[str, int], ...]

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Sizes of the sequence classifier of a transformers config, from a model on the meta device."""
        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        linears: list[Counter[str]] = [Counter() for _ in range(text.num_hidden_layers)]
        linear_numels = [0]
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != HEAD:
                linear_numels.append(module.weight.numel())
                if layer := _LAYER.search(name):
                    linears[int(layer[1])][name.rpartition(".")[2]] += module.in_features + module.out_features
        numels = [weight.numel() for name, weight in model.named_parameters() if not name.startswith(f"{HEAD}.")]
        experts = getattr(text, "num_experts_per_tok", 0) or 0
        return cls(
            family=text.model_type,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            inner_width=0 if experts else text.intermediate_size,
            has_head_norms=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
            layer_types=tuple(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers),
            experts_per_token=experts,
            expert_width=getattr(text, "moe_intermediate_size", 0) or 0,
            shared_expert_width=getattr(text, "shared_expert_intermediate_size", 0) or 0,
            linear_attention_width=_linear_attention_width(text),
            weights=sum(numels),
            linear_weights=sum(linear_numels),
            largest_weight=max(numels),
            largest_linear=max(linear_numels),
            linears=tuple(linears),
        )

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return self.kv_heads * self.head_width

    @property
    def head_weights(self) -> int:
        return self.width * len(LABELS)

    def base_bytes(self, dtype: Dtype, quantization: Quantization = "none") -> int:
        """Bytes of the frozen weights in training, with the two copies of the head that PEFT keeps, one untrained."""
        plain = (self.weights - self.linear_weights) * FLOAT_BYTES[dtype]
        linear = self.linear_weights * QUANTIZED_BYTES.get(quantization, FLOAT_BYTES[dtype])
        return math.ceil(plain + linear) + 4 * self.head_weights

    def export_bytes(self, dtype: Dtype = "float32") -> int:
        """Bytes of all weights of an exported model, head included."""
        return (self.weights + self.head_weights) * FLOAT_BYTES[dtype]


@dataclass(frozen=True)
class LoraShape:
    """The LoRA settings that sizes depend on, as in the config section `lora`."""

    r: int = 8
    dropout: float = 0.05
    target_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers: str = "all"

    def adapted(self, shape: ModelShape, layer: int) -> frozenset[str]:
        """Names of the linear layers of one layer that have an adapter."""
        count = shape.layers if self.layers == "all" else int(self.layers.removeprefix("last:"))
        if layer < shape.layers - count:
            return frozenset()
        return frozenset(shape.linears[layer]) & frozenset(self.target_modules)

    def first_layer(self, shape: ModelShape) -> int:
        """The first layer with an adapter; the number of layers if there is none."""
        return next((layer for layer in range(shape.layers) if self.adapted(shape, layer)), shape.layers)

    def adapter_weights(self, shape: ModelShape) -> int:
        """Weights of all A and B."""
        return self.r * sum(
            shape.linears[layer][name] for layer in range(shape.layers) for name in self.adapted(shape, layer)
        )

    def trained_bytes(self, shape: ModelShape) -> int:
        """Bytes of adapters and head in float32, with their gradients and AdamW's moments."""
        return TRAINED_BYTES * (self.adapter_weights(shape) + shape.head_weights)


@dataclass(frozen=True)
class Precision:
    """How a step computes: `dtype` of frozen weights and products, and the device."""

    dtype: Dtype = "float32"
    device: Device = "cpu"

    @property
    def bytes(self) -> int:
        return FLOAT_BYTES[self.dtype]

    @property
    def mask_bytes(self) -> int:
        """Of an element of PEFT's dropout masks: torch keeps floats on a CPU and booleans on a GPU."""
        return 1 if self.device == "cuda" else 4


@dataclass(frozen=True)
class Batch:
    """Size of a batch: `tokens`, padding included, in rows of at most `longest` tokens."""

    tokens: int
    longest: int

    @classmethod
    def of_rows(cls, rows: int, longest: int, tokens_per_batch: int | None = None) -> Batch:
        """The largest batch of `rows` rows, or within `tokens_per_batch`; see `plan_step`."""
        return cls(rows * longest if tokens_per_batch is None else max(longest, tokens_per_batch), longest)


@dataclass(frozen=True)
class Training:
    """How a run trains: what memory depends on besides the sizes of the model."""

    lora: LoraShape
    precision: Precision
    micro_batch: Batch
    validation_batch: Batch
    engine: EngineKind = "reference"
    quantization: Quantization = "none"
    checkpointing: bool = False


def _linear_attention_width(text: Any) -> int:
    """Width of queries, keys and values of a layer with linear attention; 0 without such layers."""
    if "linear_attention" not in (getattr(text, "layer_types", None) or ()):
        return 0
    keys: int = text.linear_num_key_heads * text.linear_key_head_dim
    values: int = text.linear_num_value_heads * text.linear_value_head_dim
    return 2 * keys + values
