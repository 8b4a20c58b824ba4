"""The passes of a dense Qwen2 or Qwen3 classifier with LoRA on a CPU, with few walks through memory.

Comes in: a `PeftModel` as `lora.add_lora` makes it. Goes out: a module around it with the same weights under the same
names, whose forward pass gives what the model's own gives, sooner; or the reason why the model's own is needed, which
holds for a merged model, too.

What is spared: padding, gradients of frozen weights and of embeddings, the mask tensor of causal attention and the
scores above its diagonal, three of four dropout masks of a layer, and in the last layer all but the pooled token of
each window. Backward passes are written out, so that little is kept between the two; docs/development-log.md has the
measurements.

Legend: B windows, T tokens of the longest, N rows: the tokens of all windows, one window after the other, and a few
that belong to none; D model width, E, F width of what goes into and out of a linear layer, H query heads, K key-value
heads, G = H/K query heads that share keys and values, P width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2ForSequenceClassification, Qwen3ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ctxtrain.engine.cpu.attention import Neighbours, attention, attention_of_last
from ctxtrain.engine.cpu.dropout import Masks
from ctxtrain.engine.cpu.layer_parts import (
    ADAPTER,
    AdaptedLinear,
    Again,
    FrozenMlp,
    Gate,
    Project,
    Shelf,
    apply,
    norm,
    norm_again,
)
from ctxtrain.engine.cpu.rope_tables import rotations
from ctxtrain.model.base_config import COMPANY_DEPENDENT

MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
TURNED = ("q_proj", "k_proj")


def why_plain(model: PeftModel | PreTrainedModel, device: torch.device) -> str | None:
    """Why the fast path does not fit this model, or None if it does."""
    base = _without_adapters(model)
    config = base.config
    if type(base) not in {Qwen2ForSequenceClassification, Qwen3ForSequenceClassification}:
        return f"{config.model_type} is neither a dense Qwen2 nor a dense Qwen3"
    if device.type != "cpu":
        return f"it was measured on a CPU only, and the model is on {device.type}"
    if reason := _unlike(config):
        return reason
    adapters = model.peft_config if isinstance(model, PeftModel) else None
    if adapters is not None and (list(adapters) != [ADAPTER] or adapters[ADAPTER].peft_type != "LORA"):
        return "the model has other adapters than one LoRA"
    for name, module in base.model.layers.named_modules():
        if _last(name) in PROJECTIONS:
            linear = module.base_layer if type(module) is LoraLinear else module
            if type(linear) is not nn.Linear:
                return f"{name} is a {type(linear).__name__}, not a plain linear layer"
            if linear is not module and _unusual(module):
                return f"{name} has a variant of LoRA"
        elif name.endswith("norm") and type(module) not in {Qwen2RMSNorm, Qwen3RMSNorm}:
            return f"{name} is a {type(module).__name__}, not a plain norm"
    if adapters is None:
        return None if base.dtype == torch.float32 else f"the merged model is in {base.dtype}, not in float32"
    odd = [name for name, weight in model.named_parameters() if weight.requires_grad and not _trained(name)]
    return f"{odd[0]} is trained" if odd else None


def _unlike(config: Any) -> str | None:
    """What sets a dense Qwen's config apart from those that the fast path computes."""
    if {*config.layer_types} != {"full_attention"}:
        return "the model has layers with a sliding window"
    if config.hidden_act != "silu" or config.attention_dropout:
        return "the model has another activation than SiLU, or dropout in its attention"
    if config.rope_parameters.get("rope_type") in COMPANY_DEPENDENT:
        return "its rotations change with the longest row of a batch"
    return None if getattr(config, "is_causal", True) else "its attention is not causal"


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _unusual(module: Any) -> bool:
    return bool(module.lora_variant or module.lora_bias[ADAPTER] or module.merged or module.disable_adapters)


def _trained(name: str) -> bool:
    return ".score." in name or (".lora_" in name and name.split(".")[-4] in PROJECTIONS)


@dataclass(frozen=True)
class Rows:
    """Windows one after the other, without padding.

    `groups` of them are computed side by side, in the last layer `everyone`; `last_B` has the row of the last token of
    each, which is pooled; `turns_TC` holds cos + i·sin of the rotation of each place.
    """

    groups: list[Neighbours]
    everyone: Neighbours
    last_B: Tensor
    turns_TC: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor, classifier: Any) -> Rows:
        """Of windows with so many tokens, rotated as the classifier rotates."""
        model, lengths, device = classifier.model, lengths_B.tolist(), lengths_B.device
        groups = Neighbours.of(lengths, classifier.config.num_attention_heads, device)
        return cls(
            groups,
            groups[0] if len(groups) == 1 else Neighbours(0, lengths, device),
            lengths_B.cumsum(0) - 1,
            rotations(model.rotary_emb, max(lengths)),
        )


def filled(x_N: Tensor) -> Tensor:
    """With rows of zeros, a 32nd of all at most, so that there are few counts of rows.

    oneDNN writes code for each shape that it meets, which takes as long as a small product, and keeps it for 1,024.
    """
    step = 1 << max(0, len(x_N).bit_length() - 6)
    return nn.functional.pad(x_N, (0, 0) * (x_N.ndim - 1) + (0, -len(x_N) % step))


def lengths_of(ids_BT: Tensor, pad_id: int) -> Tensor:
    """Tokens of each window up to the one that is pooled, which in causal attention depends on nothing behind it."""
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return (places_T * (ids_BT != pad_id)).argmax(dim=1) + 1  # as transformers finds it


class FastClassifier(nn.Module):
    """A model for which `why_plain` gives None, with a faster forward pass and, for adapters and head, backward pass.

    `trunk_layers` counts the layers below the first one with an adapter; with the embeddings they make the trunk, whose
    output does not change in training.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.shelf = Shelf()
        self._masks: Masks | None = None  # of the pass that runs
        self.layers = [
            {
                _last(path): AdaptedLinear.of(module, layer.self_attn.head_dim if _last(path) in TURNED else 0)
                for path, module in layer.named_modules()
                if _last(path) in PROJECTIONS
            }
            for layer in self._classifier.model.layers
        ]
        adapted = [
            number for number, linear in enumerate(self.layers) if any(part.a is not None for part in linear.values())
        ]
        self.trunk_layers = min(adapted, default=0)

    @property
    def _classifier(self) -> Any:
        return self.model.get_base_model()

    @property
    def embeddings(self) -> Tensor:
        """The table of tokens, of shape (vocabulary, D)."""
        return cast(Tensor, self._classifier.model.embed_tokens.weight)

    def forward(self, input_ids: Tensor, states_BTD: Tensor | None = None) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) of ids of shape (B, T), padded on the right; with `states_BTD`, what `trunk` gave."""
        with torch.autocast(input_ids.device.type, enabled=False):  # each product has the precision of its weights
            return SequenceClassifierOutputWithPast(logits=self._logits(input_ids, states_BTD))

    @torch.no_grad()
    def trunk(self, ids_BT: Tensor) -> Tensor:
        """The states, of shape (B, T, D), that go into the first layer with an adapter; for ids without padding."""
        with torch.autocast(ids_BT.device.type, enabled=False):
            batch, tokens = ids_BT.shape
            rows = Rows.of(torch.full((batch,), tokens, device=ids_BT.device), self._classifier)
            states_ND = self._trunk(filled(ids_BT.flatten()), rows)
            return states_ND[: ids_BT.numel()].view(batch, tokens, -1)

    def _logits(self, ids_BT: Tensor, states_BTD: Tensor | None) -> Tensor:
        self._masks = Masks() if self.training else None
        classifier = self._classifier
        lengths_B = lengths_of(ids_BT, classifier.config.pad_token_id)
        read_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
        rows = Rows.of(lengths_B, classifier)
        states_ND = self._trunk(filled(ids_BT[read_BT]), rows) if states_BTD is None else filled(states_BTD[read_BT])
        for number in range(self.trunk_layers, len(self.layers) - 1):
            states_ND = self._layer(number, states_ND, rows)
        pooled_BD = norm(self._last_layer(states_ND, rows), classifier.model.norm)
        return cast(Tensor, classifier.score(pooled_BD.to(next(classifier.score.parameters()).dtype)))

    def _trunk(self, ids_N: Tensor, rows: Rows) -> Tensor:
        states_ND = self._classifier.model.embed_tokens(ids_N)
        for number in range(self.trunk_layers):
            states_ND = self._layer(number, states_ND, rows)
        return cast(Tensor, states_ND)

    def _layer(self, number: int, states_ND: Tensor, rows: Rows) -> Tensor:
        layer, linear = self._classifier.model.layers[number], self.layers[number]
        own, normed_ND = layer.self_attn, norm(states_ND, layer.input_layernorm)
        again = norm_again(states_ND, layer.input_layernorm)
        q_NHP, k_NKP, v_NKP = self._heads(normed_ND, linear, own, "q_proj", "k_proj", "v_proj", again=again)
        mixed_NE = attention(q_NHP, k_NKP, v_NKP, rows.groups, rows.turns_TC, own.scaling)
        return self._rest(states_ND, mixed_NE, layer, linear)

    def _last_layer(self, states_ND: Tensor, rows: Rows) -> Tensor:
        """The last layer's output, of shape (B, D), at the token of each window that is pooled."""
        layer, linear, last_B = self._classifier.model.layers[-1], self.layers[-1], rows.last_B
        own, normed_ND = layer.self_attn, norm(states_ND, layer.input_layernorm)
        k_NKP, v_NKP = self._heads(normed_ND, linear, own, "k_proj", "v_proj")
        (q_BHP,) = self._heads(normed_ND.index_select(0, last_B), linear, own, "q_proj")
        mixed_BE = attention_of_last(q_BHP, k_NKP, v_NKP, rows.everyone, rows.turns_TC, own.scaling)
        return self._rest(states_ND.index_select(0, last_B), mixed_BE, layer, linear)

    def _heads(
        self, x_ND: Tensor, linear: dict[str, AdaptedLinear], own: Any, *names: str, again: Again = None
    ) -> list[Tensor]:
        """Queries, keys or values, of shape (N, H or K, P): normed where the family has a norm, not rotated yet."""
        heads = [x_NE.unflatten(1, (-1, own.head_dim)) for x_NE in self._project(x_ND, linear, *names, again=again)]
        norms = [getattr(own, name.replace("proj", "norm"), None) for name in names]
        return [x if of is None else norm(x, of, paired=True) for x, of in zip(heads, norms, strict=True)]

    def _rest(self, states_ND: Tensor, mixed_NE: Tensor, layer: Any, linear: dict[str, AdaptedLinear]) -> Tensor:
        """A layer after its attention."""
        (update_ND,) = self._project(mixed_NE.to(states_ND.dtype), linear, "o_proj")
        states_ND = update_ND.add_(states_ND)
        normed_ND = norm(states_ND, layer.post_attention_layernorm)
        again = norm_again(states_ND, layer.post_attention_layernorm)
        mlp = [linear[name] for name in MLP]
        if all(part.a is None and part.bias_F is None for part in mlp):
            return cast(Tensor, apply(FrozenMlp, normed_ND, mlp, again, self.shelf)).add_(states_ND)
        gate_NF, up_NF = self._project(normed_ND, linear, *MLP[:2], again=again)
        (update_ND,) = self._project(apply(Gate, gate_NF, up_NF), linear, *MLP[2:])
        return update_ND.add_(states_ND)

    def _project(
        self, x_NE: Tensor, linear: dict[str, AdaptedLinear], *names: str, again: Again = None
    ) -> tuple[Tensor, ...]:
        """What some linear layers make of the same input; those with adapters share one dropout mask."""
        parts = [linear[name] for name in names]
        factors = [weight for part in parts for weight in part.factors()]
        return cast(tuple[Tensor, ...], apply(Project, x_NE, parts, self._masks, again, *factors))


def _last(path: str) -> str:
    return path.rpartition(".")[2]
