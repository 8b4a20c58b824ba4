"""The reference engine: plain transformers and PEFT. It runs where no faster engine fits, and verifies the others.

Input: a model and tokenised rows. Output: in training, the network's inputs for given rows; in inference, logits in the
order of the rows. A faster engine subclasses these two classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import Qwen2ForSequenceClassification, Qwen3ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ctxtrain.data.batches import Tokens, collate
from ctxtrain.labels import LABELS
from ctxtrain.model.lora import logits
from ctxtrain.model.shape import EngineKind
from ctxtrain.runtime import thread_map

Ints = NDArray[np.int64]

MAX_BATCH_TOKENS = 3072  # padding included, so that long texts need no more memory than short ones


class ReferenceNetwork(nn.Module):
    """A classifier of transformers with adapters, whose head reads the pooled tokens only, in its own precision.

    The model's own forward pass scores every token, and in bfloat16 training autocast rounds these logits, so that
    different windows get equal ones. A dense model whose layers all see the whole text needs no mask; without one,
    transformers would read lengths back from the device to find that out.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) for ids of shape (B, T), padded on the right."""
        classifier: Any = self.model.get_base_model()
        mask = {"full_attention": None} if _needs_no_mask(classifier) else None
        states_BTD = getattr(classifier, classifier.base_model_prefix)(input_ids, attention_mask=mask).last_hidden_state
        last_B = window_lengths(input_ids, classifier.config.get_text_config().pad_token_id) - 1
        pooled_BD = states_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        return SequenceClassifierOutputWithPast(logits=head_logits(classifier.score, pooled_BD))


def head_logits(score: nn.Module, pooled_BD: Tensor) -> Tensor:
    """Logits of the head in the precision of its weights, whatever autocast says."""
    with without_autocast(pooled_BD.device):
        return cast(Tensor, score(pooled_BD.to(next(score.parameters()).dtype)))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block in which each product has the precision of its weights."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()


def window_lengths(ids_BT: Tensor, pad_id: int) -> Tensor:
    """Number of tokens of each window up to the pooled one, which does not depend on later tokens."""
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return (positions_T * (ids_BT != pad_id)).argmax(dim=1) + 1  # the rule of transformers for the pooled token


def _needs_no_mask(classifier: Any) -> bool:
    config = classifier.config
    if type(classifier) not in {Qwen2ForSequenceClassification, Qwen3ForSequenceClassification}:
        return False
    sees_all = {*config.layer_types} == {"full_attention"} and getattr(config, "is_causal", True)
    return sees_all and config._attn_implementation == "sdpa"  # other implementations are causal by their mask only


class TrainingEngine:
    """`network` computes logits, with gradients for adapters and head.

    `unsupported_reason` states why this is the reference engine; it is None for a faster engine. `kind` names the
    engine in the memory arithmetic.
    """

    kind: EngineKind = "reference"

    def __init__(self, network: nn.Module, unsupported_reason: str | None) -> None:
        self.network = network
        self.unsupported_reason = unsupported_reason

    def checkpoint_layers(self) -> None:
        """From now on, keep only the input of each layer for the backward pass, which computes the layer anew.

        Gradients stay the same to the bit, dropout included.
        """
        base: Any = cast(ReferenceNetwork, self.network).model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.disable_input_require_grads()  # of the embeddings, which only the reentrant kind needs
        for layer in base.model.layers:
            if any(weight.requires_grad for weight in layer.parameters()):
                break
            layer.gradient_checkpointing = False  # nothing is kept below the first adapter

    def batch(self, tokens: Tokens, rows: Ints, device: torch.device, labels_N: Ints | None = None) -> dict[str, Any]:
        """Inputs of `lora.logits` for these rows, on the device; with `labels_N`, also `labels` of these rows."""
        return dict(collate(tokens, rows, device, labels_N))


class InferenceEngine:
    """`network` computes logits without gradients; one batch uses all cores."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def token_logits(self, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        """Logits of shape (rows, 3). `advance` is called with the number of rows of each finished batch."""
        device, logits_NC = next(self.network.parameters()).device, np.empty((len(tokens), len(LABELS)))
        workers, max_tokens = self._batch_limits(tokens)
        batches = batches_by_length(tokens.lengths, max_tokens)

        def predict_batch(rows: Ints) -> int:
            with torch.inference_mode():
                logits_NC[rows] = logits(self.network, collate(tokens, rows, device)).cpu().numpy()
            return len(rows)

        with thread_map(max(1, min(workers, len(batches)))) as run:
            for count in run(predict_batch, batches):
                if advance:
                    advance(count)
        return logits_NC

    def _batch_limits(self, _tokens: Tokens) -> tuple[int, int]:
        """Number of batches that run at the same time, and the maximum number of tokens in each."""
        return 1, MAX_BATCH_TOKENS


def batches_by_length(lengths_N: Ints, max_tokens: int) -> list[Ints]:
    """Row numbers in batches of similar length, longest first; each padded batch fits into `max_tokens`.

    A row longer than `max_tokens` is a batch of one.
    """
    order, batches, start = np.argsort(-lengths_N, kind="stable"), [], 0
    while start < len(order):
        count = max(1, max_tokens // int(lengths_N[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches
