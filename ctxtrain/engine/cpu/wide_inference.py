"""The forward pass of a wide merged dense Qwen2 or Qwen3 classifier on a CPU, for answers alone.

Comes in: a model without adapters, in float32, for which `why_plain` gives None. Goes out: a module around it that
gives the model's own logits, sooner.

Besides what `training_model.py` spares: nothing is kept for a backward pass. Queries and keys come with the two
numbers that are rotated together side by side, so that a rotation is one complex product (Su et al. 2021,
RoFormer, section 3.2). What the first layer makes of a token alone is made once for each token of the vocabulary that
occurs.

Legend: B windows, T tokens of the longest, N rows: the tokens of all windows, one window after the other, and a few
that belong to none; M rows of a product's input, D model width, E, F width of what goes into and out of a linear layer,
H query heads, K key-value heads, G = H/K query heads that share keys and values, P width of a head, C = P/2 complex
numbers of a head.
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

from ctxtrain.engine.cpu.attention import attention, attention_of_last
from ctxtrain.engine.cpu.layer_parts import add_times, inverse_rms, pairs, times
from ctxtrain.engine.cpu.training_model import Rows, filled, lengths_of

CACHED = 1 << 19  # numbers of a widest state that a product finds where the one before left them
FEWEST = 512  # rows that are worth laying out a weight for


@dataclass(frozen=True)
class Inputs:
    """What the linear layers behind a norm read: x / rms(x), and the norm's weight if it is not in x yet.

    `place_N` tells which row of x is that of each token, where tokens share rows.
    """

    x_MD: Tensor
    weight_D: Tensor | None
    place_N: Tensor | None = None

    @classmethod
    def of(cls, x_MD: Tensor, norm: Any, *readers: nn.Linear, place_N: Tensor | None = None) -> Inputs:
        """The norm's weight goes into the weights of the layers that read x if these have fewer rows than x."""
        x_MD = x_MD * inverse_rms(x_MD, norm.variance_epsilon)
        if sum(linear.out_features for linear in readers) < len(x_MD):
            return cls(x_MD, norm.weight, place_N)
        return cls(x_MD.mul_(norm.weight), None, place_N)

    def times(self, linear: nn.Linear, paired: int = 0) -> Tensor:
        """What the layer makes of x, of shape (M, F); `paired` is the width of the heads whose numbers to pair."""
        weight_FD: Tensor = linear.weight if self.weight_D is None else linear.weight * self.weight_D
        bias_F: Tensor | None = linear.bias
        if paired:
            weight_FD, bias_F = pairs(weight_FD, paired), None if bias_F is None else pairs(bias_F, paired)
        return times(self.x_MD, weight_FD, bias_F)

    def spread(self, y_MF: Tensor) -> Tensor:
        """A row for each token."""
        return y_MF if self.place_N is None else y_MF.index_select(0, self.place_N)


class MergedClassifier(nn.Module):
    """A merged model for which `why_plain` gives None, with a faster forward pass and no backward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def _embeddings(self) -> Tensor:
        return cast(Tensor, cast(Any, self.model).model.embed_tokens.weight)

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) of ids of shape (B, T), padded on the right."""
        with torch.autocast(input_ids.device.type, enabled=False):
            return SequenceClassifierOutputWithPast(logits=self._logits(input_ids))

    def _logits(self, ids_BT: Tensor) -> Tensor:
        classifier: Any = self.model
        lengths_B = lengths_of(ids_BT, classifier.config.pad_token_id)
        rows = Rows.of(lengths_B, classifier)
        ids_N = filled(ids_BT[torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]])
        states_ND, (*layers, last) = classifier.model.embed_tokens(ids_N), classifier.model.layers
        for number, layer in enumerate(layers):
            own, norm = layer.self_attn, layer.input_layernorm
            readers = own.q_proj, own.k_proj, own.v_proj
            inputs = Inputs.of(states_ND, norm, *readers) if number else self._of_tokens(ids_N, norm, *readers)
            q_NHP, k_NKP, v_NKP = (_heads(inputs, own, name) for name in ("q", "k", "v"))
            mixed_NE = attention(q_NHP, k_NKP, v_NKP, rows.groups, rows.turns_TC, own.scaling)
            states_ND = _rest(states_ND, mixed_NE, layer)
        pooled_BD = self._last_layer(last, states_ND, rows)
        return cast(Tensor, classifier.score(classifier.model.norm(pooled_BD)))

    def _of_tokens(self, ids_N: Tensor, norm: Any, *readers: nn.Linear) -> Inputs:
        """Of the first layer: a row for each token of the vocabulary that occurs."""
        occurs_V = torch.zeros(len(self._embeddings), dtype=torch.bool, device=ids_N.device)
        occurs_V[ids_N] = True
        ids_M = occurs_V.nonzero()[:, 0]
        place_V = torch.empty(len(occurs_V), dtype=torch.int64, device=ids_N.device)
        place_V[ids_M] = torch.arange(len(ids_M), device=ids_N.device)
        return Inputs.of(self._embeddings.index_select(0, filled(ids_M)), norm, *readers, place_N=place_V[ids_N])

    def _last_layer(self, layer: Any, states_ND: Tensor, rows: Rows) -> Tensor:
        """The last layer's output, of shape (B, D), at the token of each window that is pooled."""
        own, last_B = layer.self_attn, rows.last_B
        inputs = Inputs.of(states_ND, layer.input_layernorm, own.k_proj, own.v_proj)
        q_BHP = _heads(Inputs(inputs.x_MD.index_select(0, last_B), inputs.weight_D), own, "q")
        k_NKP, v_NKP = (_heads(inputs, own, name) for name in ("k", "v"))
        mixed_BE = attention_of_last(q_BHP, k_NKP, v_NKP, rows.everyone, rows.turns_TC, own.scaling)
        return _rest(states_ND.index_select(0, last_B), mixed_BE, layer)


def _heads(inputs: Inputs, own: Any, name: Literal["q", "k", "v"]) -> Tensor:
    """Queries, keys or values, of shape (N, H or K, P): normed where the family has a norm, not rotated yet."""
    linear, width = getattr(own, f"{name}_proj"), own.head_dim
    x_ME = inputs.times(linear, paired=0 if name == "v" else width)
    if norm := getattr(own, f"{name}_norm", None):
        x_MHP = x_ME.view(len(x_ME), -1, width)
        x_MHP.mul_(inverse_rms(x_MHP, norm.variance_epsilon)).mul_(pairs(norm.weight, width))
    x_NE = inputs.spread(x_ME)
    return x_NE.view(len(x_NE), -1, width)


def _rest(states_ND: Tensor, mixed_NE: Tensor, layer: Any) -> Tensor:
    """A layer after its attention, written over `states_ND`."""
    mlp, out = layer.mlp, layer.self_attn.o_proj
    rows = _rows_at_a_time(mlp.gate_proj.out_features)
    for block_MD, mixed_ME in zip(states_ND.split(rows), mixed_NE.split(rows), strict=True):
        _add(block_MD, mixed_ME, out)
        inputs = Inputs.of(block_MD, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        gated_MF = F.silu(inputs.times(mlp.gate_proj), inplace=True).mul_(inputs.times(mlp.up_proj))
        _add(block_MD, gated_MF, mlp.down_proj)
    return states_ND


def _add(states_ND: Tensor, x_NE: Tensor, linear: nn.Linear) -> None:
    """What the layer makes of x."""
    add_times(states_ND, x_NE, linear.weight)
    if linear.bias is not None:
        states_ND.add_(linear.bias)


def _rows_at_a_time(width: int) -> int:
    """Blocks of rows that stay in a cache between products, or all where they would be too few for each product."""
    rows = CACHED // width
    return rows if rows >= FEWEST else sys.maxsize
