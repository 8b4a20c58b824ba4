"""The forward pass of a classifier, with or without adapters.

Input: a model of `base.py` or `lora.py`, and a batch. Output: `logits_BC`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Uncalibrated logits in float32, of shape (B, 3), for a batch from `batches.collate` and other model inputs.

    Drops the attention mask: in a causal model, padding on the right does not affect earlier tokens, and attention
    without a mask tensor is faster. The tests compare the result with the masked model for every model family.
    """
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    output: Tensor = model(**inputs).logits
    return output.float()
