"""Selects the fast engine that fits a model; `engine/api.py` calls it.

Input: a model. Output: a fast engine, or the reference engine with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.cpu.frozen_layers import FrozenStateCache
from ctxtrain.engine.cpu.rope_tables import MAX_GRAPH_TOKENS
from ctxtrain.engine.cpu.training_model import FastClassifier, unsupported_reason
from ctxtrain.engine.cpu.wide_inference import MergedClassifier
from ctxtrain.engine.reference import InferenceEngine, Ints, ReferenceNetwork, TrainingEngine
from ctxtrain.model.shape import EngineKind

NARROW_WIDTH = 512  # from this width on, products dominate the time and the graph's copy of the weights is large
STATES_PER_CORE = 1 << 18  # tokens times width
MIN_BATCH_TOKENS = 512  # per thread; with fewer, starting a thread costs more than it saves


class PackedTrainingEngine(TrainingEngine):
    """Passes the network the lengths of the windows; on a CPU, caches the outputs of layers below the first adapter."""

    kind: EngineKind = "packed"

    def __init__(self, network: FastClassifier, scratch: str | None, say: Callable[[str], None]) -> None:
        super().__init__(network, None)
        self.classifier = network
        is_cached = network.frozen_layer_count and network.embeddings.device.type == "cpu"
        self.frozen_cache = FrozenStateCache(network, scratch, say) if is_cached else None

    def checkpoint_layers(self) -> None:
        self.classifier.checkpoints_layers = True

    def batch(self, tokens: Tokens, rows: Ints, device: torch.device, labels_N: Ints | None = None) -> dict[str, Any]:
        batch = super().batch(tokens, rows, device, labels_N)
        batch["lengths"] = tokens.lengths[rows].tolist()
        if self.frozen_cache is not None:
            batch["states_BTD"] = self.frozen_cache.states(tokens, rows)
        return batch


class OnnxInferenceEngine(InferenceEngine):
    """Runs a narrow model with ONNX Runtime, one batch per core.

    Operators of a narrow model are so short that cores sharing a batch would mostly wait for each other. The batches
    are small enough to stay in a core's caches.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from ctxtrain.engine.cpu.onnx_inference import OnnxClassifier

        super().__init__(OnnxClassifier.from_model(model).eval())
        self.width = int(model.config.hidden_size)

    def _batch_limits(self, tokens: Tokens) -> tuple[int, int]:
        workers = torch.get_num_threads()
        share = -(-int(tokens.lengths.sum()) // workers)
        return workers, min(STATES_PER_CORE // self.width, max(MIN_BATCH_TOKENS, share))


def make_training_engine(
    model: PeftModel, device: torch.device, scratch: str | None, say: Callable[[str], None]
) -> TrainingEngine:
    if reason := unsupported_reason(model, device):
        return TrainingEngine(ReferenceNetwork(model), reason)
    return PackedTrainingEngine(FastClassifier(model), scratch, say)


def make_inference_engine(model: PreTrainedModel, max_tokens: int, reference: InferenceEngine) -> InferenceEngine:
    """The fast engine that fits a merged model and its precision, or `reference`."""
    if model.device.type != "cpu":
        return reference
    in_float32 = model.dtype == torch.float32
    if reason := unsupported_reason(model, model.device):
        if not in_float32:
            _warn_once(f"answers in bfloat16 use the slower reference engine: {reason}")
        return reference
    if in_float32 and model.config.hidden_size < NARROW_WIDTH and max_tokens <= MAX_GRAPH_TOKENS:
        if find_spec("onnxruntime") and find_spec("onnx"):
            return OnnxInferenceEngine(model)
        _warn_once(
            "prediction runs without ONNX Runtime, which is about 1.2 times as fast for a model this narrow. "
            "Install it with: pip install 'ctxtrain[onnx]'."
        )
    return InferenceEngine(MergedClassifier(model).eval())


@cache  # Python's once-per-location filter resets whenever a library changes the warning filters
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
