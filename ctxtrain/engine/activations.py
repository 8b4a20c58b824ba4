"""Bytes of activations in a step of the reference engine, computed from shapes.

Input: sizes of model and adapters, precision, device, and the size of a batch. Output: what the forward pass keeps for
the backward pass, and the widest tensors beside it. `tests/engine/test_activations.py` counts both.

Exact for dense Qwen2 and Qwen3. Approximate for the others: experts are counted as those of a token one after the
other, and linear attention as a multiple of its width (`LINEAR_ATTENTION_COPIES`).

Legend of comments: D model width, E width of all queries, K of all keys, F inner width of the MLP, H heads, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctxtrain.model.shape import Batch, LoraShape, ModelShape, Precision

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP_INPUTS = ("gate_proj", "up_proj")
ROTARY_TABLES = 2  # cosines and sines
LINEAR_ATTENTION_COPIES = 12  # float32 tensors of its width that torch's gated delta rule keeps; rounded up
EVALUATION_COPIES = 3  # of the widest tensor, in a pass without gradients: silu(gate), up and their product


@dataclass(frozen=True)
class Activations:
    """Bytes of a batch: kept from the forward to the backward pass, and the widest tensors besides them."""

    kept: int
    widest: int


def training_activations(
    shape: ModelShape, lora: LoraShape, precision: Precision, batch: Batch, *, checkpointing: bool
) -> Activations:
    """Activations of a micro-batch.

    With checkpointing only the input of each layer is kept, and the widest moment includes one whole layer.
    """
    tokens, first = batch.tokens, lora.first_layer(shape)
    layers = [_layer_bytes(shape, lora, precision, layer, first) for layer in range(first, shape.layers)]
    if not layers:
        return Activations(0, evaluation_activations(shape, precision, batch).widest)
    working = tokens * _working_bytes(shape, precision)
    constant = tokens * _norm_bytes(shape.width, 1)  # the last norm; the head reads few pooled tokens
    if checkpointing:
        states = tokens * len(layers) * shape.width * precision.bytes
        return Activations(constant + states, tokens * max(layers) + working)
    constant += ROTARY_TABLES * batch.longest * shape.head_width * precision.bytes
    return Activations(constant + tokens * sum(layers) + _weight_copies(shape, lora, precision), working)


def evaluation_activations(shape: ModelShape, precision: Precision, batch: Batch) -> Activations:
    """Activations of a batch without gradients: nothing is kept."""
    inner = EVALUATION_COPIES * max(_inner_width(shape), shape.query_width) * precision.bytes
    states = shape.width * (3 * precision.bytes + 4)  # residual, norm, output, and the norm's float32 copy
    return Activations(0, batch.tokens * (inner + states))


def _layer_bytes(shape: ModelShape, lora: LoraShape, precision: Precision, layer: int, first: int) -> int:
    """Bytes that one layer keeps per token; the input of the first adapted layer needs no gradient."""
    names, has_grad = lora.adapted(shape, layer), layer > first
    kept = _norm_bytes(shape.width, 1) if has_grad else 0
    if shape.layer_types[layer] == "linear_attention":
        kept += LINEAR_ATTENTION_COPIES * shape.linear_attention_width * 4
        has_grad = has_grad or bool(names)
    else:
        kept += _attention_bytes(shape, lora, precision, names, has_grad=has_grad)
        has_grad = has_grad or bool(names & {*ATTENTION_INPUTS, "o_proj"})
    if has_grad:
        kept += _norm_bytes(shape.width, 1)
    return kept + _mlp_bytes(shape, lora, precision, names, has_grad=has_grad)


def _attention_bytes(
    shape: ModelShape, lora: LoraShape, precision: Precision, names: frozenset[str], *, has_grad: bool
) -> int:
    """Adapters, norms of heads, and attention by one fused kernel: q, k, v, output and a float32 sum per head."""
    kept = _adapter_bytes(shape.width, lora, precision, names & set(ATTENTION_INPUTS), has_grad=has_grad)
    if shape.has_head_norms:
        kept += _norm_bytes(shape.query_width, shape.heads) if has_grad or "q_proj" in names else 0
        kept += _norm_bytes(shape.kv_width, shape.kv_heads) if has_grad or "k_proj" in names else 0
    if has_grad := has_grad or bool(names & set(ATTENTION_INPUTS)):
        kept += 2 * (shape.query_width + shape.kv_width) * precision.bytes + 4 * shape.heads
    if precision.dtype == "float32" and not lora.dropout:
        return kept + lora.r * precision.bytes * ("o_proj" in names)  # its input is the output of attention
    return kept + _adapter_bytes(shape.query_width, lora, precision, names & {"o_proj"}, has_grad=has_grad)


def _mlp_bytes(
    shape: ModelShape, lora: LoraShape, precision: Precision, names: frozenset[str], *, has_grad: bool
) -> int:
    """Adapters, and gate, silu(gate) and up; experts also keep their output."""
    kept = _adapter_bytes(shape.width, lora, precision, names & set(MLP_INPUTS), has_grad=has_grad)
    has_gate, has_up = has_grad or "gate_proj" in names, has_grad or "up_proj" in names
    inner = 2 * has_gate + has_up  # gate and up for the gradient of gate, silu(gate) for that of up
    kept += inner * (shape.inner_width + shape.shared_expert_width) * precision.bytes
    if has_grad := has_grad or has_gate or has_up:
        expert = shape.width + 3 * shape.expert_width
        kept += shape.experts_per_token * expert * precision.bytes
    inner_width = shape.inner_width or shape.shared_expert_width
    return kept + _adapter_bytes(inner_width, lora, precision, names & {"down_proj"}, has_grad=has_grad)


def _norm_bytes(width: int, rows: int) -> int:
    """A norm of transformers keeps a float32 copy of its input and the inverse root mean square of each row."""
    return 4 * (width + rows)


def _adapter_bytes(width: int, lora: LoraShape, precision: Precision, names: frozenset[str], *, has_grad: bool) -> int:
    """PEFT's adapters of one input, each with a dropout mask, its own dropout(x) and x·Aᵀ."""
    if not names:
        return 0
    low = len(names) * lora.r * precision.bytes
    if lora.dropout:
        mask = precision.mask_bytes if has_grad else 0
        return low + len(names) * width * (precision.bytes + mask)
    copies = 1 if precision.dtype == "float32" else len(names)  # autocast converts x for each of them
    return low + copies * width * precision.bytes


def _weight_copies(shape: ModelShape, lora: LoraShape, precision: Precision) -> int:
    """Autocast's copies of adapters."""
    return 0 if precision.dtype == "float32" else lora.adapter_weights(shape) * precision.bytes


def _inner_width(shape: ModelShape) -> int:
    return max(shape.inner_width, shape.shared_expert_width, shape.experts_per_token * shape.expert_width)


def _working_bytes(shape: ModelShape, precision: Precision) -> int:
    """Gradients in the MLP of one layer, per token: two of its inner width, and those of the residual."""
    inner = 2 * _inner_width(shape) * precision.bytes
    return inner + shape.width * (2 * precision.bytes + 4)
