"""The reference engine: plain transformers and PEFT. It runs where no faster engine fits, and verifies the others.

Input: a model and tokenised rows. Output: in training, the network's inputs for given rows; in inference, logits in the
order of the rows. A faster engine subclasses these two classes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2ForSequenceClassification, Qwen3ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ctxtrain.data.batches import collate
from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.batch_memory import batch_tokens
from ctxtrain.labels import LABELS
from ctxtrain.memory import gpu_memory, is_out_of_memory
from ctxtrain.model.forward import logits
from ctxtrain.model.shape import EngineKind
from ctxtrain.runtime import thread_map

Ints = NDArray[np.int64]

MAX_BATCH_TOKENS = 3072  # padding included, so that long texts need no more memory than short ones


class ReferenceNetwork(nn.Module):
    """A classifier of transformers, with or without adapters, whose head reads the pooled tokens only, in its dtype.

    The model's own forward pass scores every token, and in bfloat16 training autocast rounds these logits, so that
    different windows get equal ones. A dense model whose layers all see the whole text needs no mask; without one,
    transformers would read lengths back from the device to find that out.
    """

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) for ids of shape (B, T), padded on the right."""
        classifier: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        mask: Any = (
            {"full_attention": None} if attention_mask is None and _needs_no_mask(classifier) else attention_mask
        )
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
    engine in the memory estimate.
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
        """Inputs of `forward.logits` for these rows, on the device; with `labels_N`, also `labels` of these rows."""
        return dict(collate(tokens, rows, device, labels_N))


class InferenceEngine:
    """`network` computes logits without gradients; one batch uses all cores.

    A batch that memory does not hold is halved, and later batches of this engine are as small.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.tokens_that_fit = sys.maxsize  # of a padded batch; lowered whenever memory runs out

    def token_logits(self, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        """Logits of shape (rows, 3). `advance` is called with the number of rows of each batch.

        The logits stay on the device and are read back once, so a GPU never waits for the host between batches.
        """
        device = next(self.network.parameters()).device
        workers, max_tokens = self._batch_limits(tokens)
        batches, parts = batches_by_length(tokens.lengths, max_tokens), list[Tensor]()
        with thread_map(max(1, min(workers, len(batches)))) as run:
            for part_BC in run(lambda rows: self._batch_logits(tokens, rows, device), batches):
                parts.append(part_BC)
                if advance:
                    advance(len(part_BC))
        logits_NC = np.empty((len(tokens), len(LABELS)))
        if parts:
            logits_NC[np.concatenate(batches)] = torch.cat(parts).cpu().numpy()
        return logits_NC

    def _batch_logits(self, tokens: Tokens, rows: Ints, device: torch.device) -> Tensor:
        """Logits of shape (B, 3), on the device, computed in halves if the whole does not fit into memory."""
        size = len(rows) * int((tokens.ends[rows] - tokens.starts[rows]).max())
        if len(rows) == 1 or size <= self.tokens_that_fit:
            try:
                with torch.inference_mode():
                    return logits(self.network, collate(tokens, rows, device))
            except Exception as error:
                if len(rows) == 1 or not is_out_of_memory(error):
                    raise
            # Outside the handler, whose error would keep the tensors of the failed pass alive.
            self._lower_batch_size(len(rows), size)
        half = len(rows) // 2
        return torch.cat([self._batch_logits(tokens, part, device) for part in (rows[:half], rows[half:])])

    def _lower_batch_size(self, rows: int, size: int) -> None:
        if self.tokens_that_fit == sys.maxsize:
            warnings.warn(
                f"memory ran out in a batch of {rows:,} rows ({size:,} tokens). Batches are halved until they fit; the "
                "answers are the same. For more speed, free memory.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.tokens_that_fit = min(self.tokens_that_fit, size // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batch_limits(self, tokens: Tokens) -> tuple[int, int]:
        """Number of batches that run at the same time, and the maximum number of tokens in each."""
        weight: Tensor = next(self.network.parameters())
        if weight.device.type != "cuda" or int(tokens.lengths.sum()) <= MAX_BATCH_TOKENS:
            return 1, MAX_BATCH_TOKENS
        config: Any = cast(Any, self.network).model.config
        return 1, batch_tokens(config, weight.dtype, gpu_memory(weight.device), int(tokens.lengths.max()))


def reference_inference(model: PreTrainedModel) -> InferenceEngine:
    """The reference engine of a merged model. The head of a bfloat16 model becomes float32, in place."""
    if model.dtype == torch.float32 and model.device.type == "cpu":
        return InferenceEngine(model)
    cast(Any, model).score.float()
    return InferenceEngine(ReferenceNetwork(model).eval())


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
