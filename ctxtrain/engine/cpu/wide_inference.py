"""Forward pass of a wide merged dense Qwen2 or Qwen3 classifier on a CPU, for prediction only.

Input: a model without adapters that `unsupported_reason` accepts, in float32, or in bfloat16 with a float32 head.
Output: a module around it that computes the same logits faster. In bfloat16, products and the states between layers are
in bfloat16, and norms, rotations, attention, pooling and head in float32.

Beyond what `training_model.py` skips: nothing is saved for a backward pass. The two numbers that RoPE rotates together
are adjacent in queries and keys, so a rotation is one complex product (Su et al. 2021, RoFormer, section 3.2). In the
first layer, results that depend only on the token are computed once per distinct token.

Legend: B windows, T tokens of the longest, N rows: the tokens of all windows, concatenated, and a few rows of padding;
M input rows of a product, D model width, E, F input and output width of a linear layer, H query heads, K key-value
heads, G = H/K query heads that share keys and values, P width of a head, C = P/2 complex numbers of a head.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ctxtrain.engine.cpu.attention import attention, last_token_attention
from ctxtrain.engine.cpu.layer_parts import add_matmul_t, interleave_pairs, inverse_rms, matmul_t
from ctxtrain.engine.cpu.training_model import PackedBatch, pad_rows
from ctxtrain.engine.reference import window_lengths

CACHE_NUMEL = 1 << 19  # elements of a block's widest state that stay in cache from one product to the next
MIN_BLOCK_ROWS = 512  # with fewer rows, laying out a weight for a product costs more than the cache saves


@dataclass(frozen=True)
class NormedInputs:
    """Inputs of the linear layers after a norm: x / rms(x), and the norm's weight if x does not contain it yet.

    If tokens share rows of x, `row_of_N` is the row of each token.
    """

    x_MD: Tensor
    weight_D: Tensor | None
    row_of_N: Tensor | None = None

    @classmethod
    def from_states(cls, x_MD: Tensor, norm: Any, *layers: nn.Linear, row_of_N: Tensor | None = None) -> NormedInputs:
        """Multiply the norm's weight into x or into the weights of `layers`, whichever has fewer rows.

        In bfloat16 always into x, before its one rounding.
        """
        if x_MD.dtype != torch.float32:
            inverse_M1 = inverse_rms(x_MD.float(), norm.variance_epsilon)
            return cls((x_MD * inverse_M1).mul_(norm.weight).to(x_MD.dtype), None, row_of_N)
        x_MD = x_MD * inverse_rms(x_MD, norm.variance_epsilon)
        if sum(linear.out_features for linear in layers) < len(x_MD):
            return cls(x_MD, norm.weight, row_of_N)
        return cls(x_MD.mul_(norm.weight), None, row_of_N)

    def project(self, linear: nn.Linear, rope_width: int = 0) -> Tensor:
        """Output of the layer, of shape (M, F), with heads of `rope_width` in the order of `interleave_pairs`."""
        weight_FD: Tensor = linear.weight if self.weight_D is None else linear.weight * self.weight_D
        bias_F: Tensor | None = linear.bias
        if rope_width:
            weight_FD = interleave_pairs(weight_FD, rope_width)
            bias_F = None if bias_F is None else interleave_pairs(bias_F, rope_width)
        return matmul_t(self.x_MD, weight_FD, bias_F)

    def expand(self, y_MF: Tensor) -> Tensor:
        """One row per token, of shape (N, F)."""
        return y_MF if self.row_of_N is None else y_MF.index_select(0, self.row_of_N)


class MergedClassifier(nn.Module):
    """A merged model that `unsupported_reason` accepts, with a faster forward pass and no backward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def _embeddings(self) -> Tensor:
        return cast(Tensor, cast(Any, self.model).model.embed_tokens.weight)

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) for ids of shape (B, T), padded on the right."""
        with torch.autocast(input_ids.device.type, enabled=False):
            return SequenceClassifierOutputWithPast(logits=self._logits(input_ids))

    def _logits(self, ids_BT: Tensor) -> Tensor:
        classifier: Any = self.model
        lengths = window_lengths(ids_BT, classifier.config.pad_token_id).tolist()
        batch = PackedBatch.from_lengths(lengths, classifier, ids_BT.shape[1])
        ids_N = pad_rows(ids_BT.flatten().index_select(0, batch.token_N))
        states_ND, (*layers, last) = classifier.model.embed_tokens(ids_N), classifier.model.layers
        for number, layer in enumerate(layers):
            attn, norm = layer.self_attn, layer.input_layernorm
            qkv = attn.q_proj, attn.k_proj, attn.v_proj
            if number == 0:
                inputs = self._first_layer_inputs(ids_N, norm, *qkv)
            else:
                inputs = NormedInputs.from_states(states_ND, norm, *qkv)
            q_NHP, k_NKP, v_NKP = (_heads(inputs, attn, name) for name in ("q", "k", "v"))
            attended_NE = attention(q_NHP, k_NKP, v_NKP, batch.groups, batch.rope_TC, attn.scaling)
            states_ND = _finish_layer(states_ND, attended_NE, layer)
        pooled_BD = self._last_layer(last, states_ND, batch)
        return cast(Tensor, classifier.score(classifier.model.norm(pooled_BD.float())))

    def _first_layer_inputs(self, ids_N: Tensor, norm: Any, *layers: nn.Linear) -> NormedInputs:
        """Inputs of the first layer, with one row per distinct token."""
        occurs_V = torch.zeros(len(self._embeddings), dtype=torch.bool, device=ids_N.device)
        occurs_V[ids_N] = True
        ids_M = occurs_V.nonzero()[:, 0]
        row_of_V = torch.empty(len(occurs_V), dtype=torch.int64, device=ids_N.device)
        row_of_V[ids_M] = torch.arange(len(ids_M), device=ids_N.device)
        states_MD = self._embeddings.index_select(0, pad_rows(ids_M))
        return NormedInputs.from_states(states_MD, norm, *layers, row_of_N=row_of_V[ids_N])

    def _last_layer(self, layer: Any, states_ND: Tensor, batch: PackedBatch) -> Tensor:
        """Output of the last layer at the pooled token of each window, of shape (B, D)."""
        attn, last_B = layer.self_attn, batch.last_B
        inputs = NormedInputs.from_states(states_ND, layer.input_layernorm, attn.k_proj, attn.v_proj)
        q_BHP = _heads(NormedInputs(inputs.x_MD.index_select(0, last_B), inputs.weight_D), attn, "q")
        k_NKP, v_NKP = (_heads(inputs, attn, name) for name in ("k", "v"))
        attended_BE = last_token_attention(q_BHP, k_NKP, v_NKP, batch.all_windows, batch.rope_TC, attn.scaling)
        return _finish_layer(states_ND.index_select(0, last_B), attended_BE, layer)


def _heads(inputs: NormedInputs, attn: Any, name: Literal["q", "k", "v"]) -> Tensor:
    """Queries, keys or values, of shape (N, H or K, P), not rotated yet; normalised if the model family does so."""
    linear, width = getattr(attn, f"{name}_proj"), attn.head_dim
    x_ME = inputs.project(linear, rope_width=0 if name == "v" else width).float()
    if norm := getattr(attn, f"{name}_norm", None):
        x_MHP = x_ME.view(len(x_ME), -1, width)
        x_MHP.mul_(inverse_rms(x_MHP, norm.variance_epsilon)).mul_(interleave_pairs(norm.weight, width))
    x_NE = inputs.expand(x_ME)
    return x_NE.view(len(x_NE), -1, width)


def _finish_layer(states_ND: Tensor, attended_NE: Tensor, layer: Any) -> Tensor:
    """The part of a layer after attention, written over `states_ND`."""
    mlp, out = layer.mlp, layer.self_attn.o_proj
    rows = _block_rows(mlp.gate_proj.out_features)
    for block_MD, attended_ME in zip(states_ND.split(rows), attended_NE.split(rows), strict=True):
        _add_linear(block_MD, attended_ME.to(block_MD.dtype), out)
        inputs = NormedInputs.from_states(block_MD, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        gated_MF = F.silu(inputs.project(mlp.gate_proj), inplace=True).mul_(inputs.project(mlp.up_proj))
        _add_linear(block_MD, gated_MF, mlp.down_proj)
    return states_ND


def _add_linear(states_ND: Tensor, x_NE: Tensor, linear: nn.Linear) -> None:
    """Add the layer's output for x to the states, in place."""
    add_matmul_t(states_ND, x_NE, linear.weight)
    if linear.bias is not None:
        states_ND.add_(linear.bias)


def _block_rows(width: int) -> int:
    """Rows per block that stay in cache between products; no blocks if they would have too few rows."""
    rows = CACHE_NUMEL // width
    return rows if rows >= MIN_BLOCK_ROWS else sys.maxsize
