"""Forward and backward passes of a dense Qwen2 or Qwen3 classifier with LoRA, with few passes over memory.

Input: a `PeftModel` as `lora.add_lora` makes it. Output: a module with the same weights under the same names and a
faster forward pass with the same results, or the reason why this engine does not support the model. The reason also
applies to merged models.

It skips padding, gradients of frozen weights and of embeddings, the mask tensor of causal attention and the scores
above its diagonal, three of four dropout masks of a layer, and in the last layer all but the pooled token of each
window. Backward passes are hand-written, so that little is saved for them; docs/development-log.md has the
measurements. All of it runs on any device but attention, which CPUs and GPUs do differently.

Legend: B windows, T tokens of the longest, N rows: the tokens of all windows, concatenated, and a few rows of padding;
D model width, E, F input and output width of a linear layer, H query heads, K key-value heads, G = H/K query heads that
share keys and values, P width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Qwen2ForSequenceClassification, Qwen3ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ctxtrain.engine.cpu.attention import WindowGroup, attention, last_token_attention
from ctxtrain.engine.cpu.device_attention import DeviceBatch, Kernel, select_kernel
from ctxtrain.engine.cpu.dropout import DropoutMasks
from ctxtrain.engine.cpu.layer_parts import (
    ADAPTER,
    AdaptedLinear,
    BufferPool,
    FrozenMlp,
    LoraProjection,
    Recompute,
    SwiGlu,
    apply,
    recompute_norm,
    rms_norm,
)
from ctxtrain.engine.cpu.rope_tables import rope_table
from ctxtrain.engine.reference import head_logits, window_lengths, without_autocast
from ctxtrain.model.base_config import BATCH_DEPENDENT_ROPE

MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
ROTATED = ("q_proj", "k_proj")


def unsupported_reason(model: PeftModel | PreTrainedModel, device: torch.device) -> str | None:
    """Why the fast engine does not support this model, or None if it does."""
    base = _without_adapters(model)
    config = base.config
    if type(base) not in {Qwen2ForSequenceClassification, Qwen3ForSequenceClassification}:
        return f"{config.model_type} is neither a dense Qwen2 nor a dense Qwen3"
    if device.type not in ("cpu", "cuda", "meta"):
        return f"the fast engine is for CPUs and CUDA, and the model is on {device.type}"
    if reason := _unsupported_config(config):
        return reason
    adapters = model.peft_config if isinstance(model, PeftModel) else None
    if adapters is not None and (list(adapters) != [ADAPTER] or adapters[ADAPTER].peft_type != "LORA"):
        return "the model has other adapters than one LoRA"
    for name, module in base.model.layers.named_modules():
        if _leaf_name(name) in PROJECTIONS:
            linear = module.base_layer if type(module) is LoraLinear else module
            if type(linear) is not nn.Linear:
                return f"{name} is a {type(linear).__name__}, not a plain linear layer"
            if linear is not module and _is_lora_variant(module):
                return f"{name} has a variant of LoRA"
        elif name.endswith("norm") and type(module) not in {Qwen2RMSNorm, Qwen3RMSNorm}:
            return f"{name} is a {type(module).__name__}, not a plain norm"
    if adapters is None:
        if device.type != "cpu":
            return f"a merged model has a fast engine on CPUs only, and the model is on {device.type}"
        plain = base.dtype in {torch.float32, torch.bfloat16}
        return None if plain else f"the merged model is in {base.dtype}, not in float32 or bfloat16"
    extra = [name for name, weight in model.named_parameters() if weight.requires_grad and not _can_train(name)]
    return f"{extra[0]} is trained" if extra else None


def _unsupported_config(config: Any) -> str | None:
    """Why the fast engine does not support the config of a dense Qwen, or None."""
    if {*config.layer_types} != {"full_attention"}:
        return "the model has layers with a sliding window"
    if config.hidden_act != "silu" or config.attention_dropout:
        return "the model has another activation than SiLU, or dropout in its attention"
    if config.rope_parameters.get("rope_type") in BATCH_DEPENDENT_ROPE:
        return "its rotations change with the longest row of a batch"
    return None if getattr(config, "is_causal", True) else "its attention is not causal"


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_lora_variant(module: Any) -> bool:
    return bool(module.lora_variant or module.lora_bias[ADAPTER] or module.merged or module.disable_adapters)


def _can_train(name: str) -> bool:
    return ".score." in name or (".lora_" in name and name.split(".")[-4] in PROJECTIONS)


@dataclass(frozen=True)
class PackedBatch:
    """Layout of windows that are concatenated without padding, on a CPU; `DeviceBatch` is its like for GPUs.

    Attention runs over `groups`, in the last layer over `all_windows` at once. `token_N` is the position of each token
    in ids of shape (B, T), `last_B` the row of the last token of each window, which the head pools. `rope_TC` holds
    cos + i·sin of each position.
    """

    groups: list[WindowGroup]
    all_windows: WindowGroup
    token_N: Tensor
    last_B: Tensor
    rope_TC: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], classifier: Any, width: int = 0) -> PackedBatch:
        """Layout for windows of these lengths, with the rotary embedding of the classifier; ids have `width` columns.

        The width is by default the longest length.
        """
        length_B = np.asarray(lengths, dtype=np.int64)
        groups = WindowGroup.split(lengths, classifier.config.num_attention_heads)
        column_T = np.arange(width or max(lengths))
        return cls(
            groups,
            groups[0] if len(groups) == 1 else WindowGroup(0, lengths),
            torch.from_numpy(np.flatnonzero(column_T < length_B[:, None])),
            torch.from_numpy(length_B.cumsum() - 1),
            rope_table(classifier.model.rotary_emb, max(lengths)),
        )

    def attention(self, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, scale: float) -> Tensor:
        return attention(q_NHP, k_NKP, v_NKP, self.groups, self.rope_TC, scale)

    def last_token_attention(self, q_BHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, scale: float) -> Tensor:
        return last_token_attention(q_BHP, k_NKP, v_NKP, self.all_windows, self.rope_TC, scale)


def pad_rows(x_N: Tensor) -> Tensor:
    """Append rows of zeros, at most 1/32 of all, so that few different row counts occur.

    oneDNN generates code for each new shape, which takes as long as a small product, and caches it for 1,024 shapes.
    """
    return nn.functional.pad(x_N, (0, 0) * (x_N.ndim - 1) + (0, padded_count(len(x_N)) - len(x_N)))


def padded_count(rows: int) -> int:
    """Number of rows after `pad_rows`."""
    return rows + -rows % (1 << max(0, rows.bit_length() - 6))


class FastClassifier(nn.Module):
    """A model that `unsupported_reason` accepts, with a faster forward pass and backward pass for adapters and head.

    `frozen_layer_count` is the number of layers below the first one with an adapter. Their output and the embeddings do
    not change in training. With `checkpoints_layers`, the backward pass computes each layer anew from its input.
    `kernel` names the attention of `DeviceBatch`; None is that of `PackedBatch` on a CPU, and on other devices the one
    that fits.
    """

    def __init__(self, model: PeftModel, kernel: Kernel | None = None) -> None:
        super().__init__()
        self.model = model
        self.checkpoints_layers = False
        embeddings = self.embeddings
        self.kernel = kernel
        if kernel is None and embeddings.device.type != "cpu":
            head_width = model.get_base_model().model.layers[0].self_attn.head_dim
            self.kernel = select_kernel(embeddings.device, embeddings.dtype, head_width)
        self.mlp_buffers = BufferPool()
        self._masks: DropoutMasks | None = None  # of the current forward pass
        self.layers = [
            {
                _leaf_name(path): AdaptedLinear.from_module(
                    module, layer.self_attn.head_dim if _leaf_name(path) in ROTATED and self.kernel is None else 0
                )
                for path, module in layer.named_modules()
                if _leaf_name(path) in PROJECTIONS
            }
            for layer in self._classifier.model.layers
        ]
        adapted = [
            number for number, linears in enumerate(self.layers) if any(part.a is not None for part in linears.values())
        ]
        self.frozen_layer_count = min(adapted, default=0)

    @property
    def _classifier(self) -> Any:
        return self.model.get_base_model()

    @property
    def embeddings(self) -> Tensor:
        """The embedding table, of shape (vocabulary, D)."""
        return cast(Tensor, self._classifier.model.embed_tokens.weight)

    def forward(
        self, input_ids: Tensor, states_BTD: Tensor | None = None, lengths: Sequence[int] | None = None
    ) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) for ids of shape (B, T), padded on the right.

        `lengths` are the numbers of tokens up to the pooled one; without them they are read back from the device. With
        `states_BTD`, the output of `frozen_states`, the frozen layers are skipped.
        """
        if lengths is None:
            lengths = window_lengths(input_ids, self._classifier.config.pad_token_id).tolist()
        with without_autocast(input_ids.device):
            return SequenceClassifierOutputWithPast(logits=self._logits(input_ids, states_BTD, lengths))

    @torch.no_grad()
    def frozen_states(self, ids_BT: Tensor) -> Tensor:
        """States of shape (B, T, D) that enter the first layer with an adapter, for ids without padding."""
        with without_autocast(ids_BT.device):
            windows, tokens = ids_BT.shape
            states_ND = self._run_frozen_layers(pad_rows(ids_BT.flatten()), self._layout([tokens] * windows, tokens))
            return states_ND[: ids_BT.numel()].view(windows, tokens, -1)

    def _layout(self, lengths: Sequence[int], width: int) -> PackedBatch | DeviceBatch:
        if self.kernel is None:
            return PackedBatch.from_lengths(lengths, self._classifier, width)
        rope_TC = rope_table(self._classifier.model.rotary_emb, max(lengths), self.embeddings.device)
        return DeviceBatch.from_lengths(lengths, self.kernel, rope_TC, width)

    def _logits(self, ids_BT: Tensor, states_BTD: Tensor | None, lengths: Sequence[int]) -> Tensor:
        self._masks = DropoutMasks(ids_BT.device) if self.training else None
        classifier, batch = self._classifier, self._layout(lengths, ids_BT.shape[1])
        # Only oneDNN needs rows of padding, and DeviceBatch has no place for them.
        fill = pad_rows if self.kernel is None else nn.Identity()
        if states_BTD is None:
            states_ND = self._run_frozen_layers(fill(ids_BT.flatten().index_select(0, batch.token_N)), batch)
        else:
            states_ND = fill(states_BTD.flatten(0, 1).index_select(0, batch.token_N))
        run_layer = self._checkpointed_layer if self.checkpoints_layers and torch.is_grad_enabled() else self._layer
        for number in range(self.frozen_layer_count, len(self.layers) - 1):
            states_ND = run_layer(number, states_ND, batch)
        pooled_BD = rms_norm(self._last_layer(states_ND, batch), classifier.model.norm)
        return head_logits(classifier.score, pooled_BD)

    def _run_frozen_layers(self, ids_N: Tensor, batch: PackedBatch | DeviceBatch) -> Tensor:
        states_ND = self._classifier.model.embed_tokens(ids_N)
        for number in range(self.frozen_layer_count):
            states_ND = self._layer(number, states_ND, batch)
        return cast(Tensor, states_ND)

    def _checkpointed_layer(self, number: int, states_ND: Tensor, batch: PackedBatch | DeviceBatch) -> Tensor:
        """`_layer` that keeps only its input for the backward pass and draws the same dropout masks there."""
        masks = self._masks
        position = masks.position if masks else None

        def run(states_ND: Tensor) -> Tensor:
            if masks and position:
                masks.return_to(position)
            self._masks = masks
            return self._layer(number, states_ND, batch)

        return cast(Tensor, checkpoint(run, states_ND, use_reentrant=False, preserve_rng_state=False))

    def _layer(self, number: int, states_ND: Tensor, batch: PackedBatch | DeviceBatch) -> Tensor:
        layer, linears = self._classifier.model.layers[number], self.layers[number]
        attn, normed_ND = layer.self_attn, rms_norm(states_ND, layer.input_layernorm)
        recompute = self._recompute(states_ND, layer.input_layernorm)
        q_NHP, k_NKP, v_NKP = self._heads(normed_ND, linears, attn, "q_proj", "k_proj", "v_proj", recompute=recompute)
        attended_NE = batch.attention(q_NHP, k_NKP, v_NKP, attn.scaling)
        return self._finish_layer(states_ND, attended_NE, layer, linears)

    def _last_layer(self, states_ND: Tensor, batch: PackedBatch | DeviceBatch) -> Tensor:
        """Output of the last layer at the pooled token of each window, of shape (B, D)."""
        layer, linears, last_B = self._classifier.model.layers[-1], self.layers[-1], batch.last_B
        attn, normed_ND = layer.self_attn, rms_norm(states_ND, layer.input_layernorm)
        k_NKP, v_NKP = self._heads(normed_ND, linears, attn, "k_proj", "v_proj")
        (q_BHP,) = self._heads(normed_ND.index_select(0, last_B), linears, attn, "q_proj")
        attended_BE = batch.last_token_attention(q_BHP, k_NKP, v_NKP, attn.scaling)
        return self._finish_layer(states_ND.index_select(0, last_B), attended_BE, layer, linears)

    def _heads(
        self, x_ND: Tensor, linears: dict[str, AdaptedLinear], attn: Any, *names: str, recompute: Recompute = None
    ) -> list[Tensor]:
        """Queries, keys or values, of shape (N, H or K, P), not rotated yet; normalised if the model family does so."""
        projected = self._project(x_ND, linears, *names, recompute=recompute)
        heads = [x_NE.unflatten(1, (-1, attn.head_dim)) for x_NE in projected]
        norms = [getattr(attn, name.replace("proj", "norm"), None) for name in names]
        return [
            x if norm is None else rms_norm(x, norm, interleaved=self.kernel is None)
            for x, norm in zip(heads, norms, strict=True)
        ]

    def _finish_layer(
        self, states_ND: Tensor, attended_NE: Tensor, layer: Any, linears: dict[str, AdaptedLinear]
    ) -> Tensor:
        """The part of a layer after attention: output projection and MLP, each with its residual."""
        (update_ND,) = self._project(attended_NE.to(states_ND.dtype), linears, "o_proj")
        states_ND = update_ND.add_(states_ND)
        normed_ND = rms_norm(states_ND, layer.post_attention_layernorm)
        recompute = self._recompute(states_ND, layer.post_attention_layernorm)
        mlp = [linears[name] for name in MLP]
        if all(part.a is None and part.bias_F is None for part in mlp):
            return cast(Tensor, apply(FrozenMlp, normed_ND, mlp, recompute, self.mlp_buffers)).add_(states_ND)
        gate_NF, up_NF = self._project(normed_ND, linears, *MLP[:2], recompute=recompute)
        (update_ND,) = self._project(apply(SwiGlu, gate_NF, up_NF), linears, *MLP[2:])
        return update_ND.add_(states_ND)

    def _recompute(self, states_ND: Tensor, norm: Any) -> Recompute:
        """`recompute_norm`; None if the whole layer is computed anew, because the function keeps the states."""
        return None if self.checkpoints_layers else recompute_norm(states_ND, norm)

    def _project(
        self, x_NE: Tensor, linears: dict[str, AdaptedLinear], *names: str, recompute: Recompute = None
    ) -> tuple[Tensor, ...]:
        """Outputs of linear layers with the same input; those with adapters share one dropout mask."""
        parts = [linears[name] for name in names]
        factors = [weight for part in parts for weight in part.factors()]
        return cast(tuple[Tensor, ...], apply(LoraProjection, x_NE, parts, self._masks, recompute, *factors))


def _leaf_name(path: str) -> str:
    return path.rpartition(".")[2]
