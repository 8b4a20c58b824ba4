"""Which passes of this folder fit a model: the way in from `engine/api.py`.

Comes in: a model. Goes out: its passes, sooner than by transformers, or those of transformers with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ctxtrain.data.batches import Tokens
from ctxtrain.engine.cpu.frozen_layers import Trunk
from ctxtrain.engine.cpu.rope_tables import LONGEST
from ctxtrain.engine.cpu.training_model import FastClassifier, why_plain
from ctxtrain.engine.cpu.wide_inference import MergedClassifier
from ctxtrain.engine.reference import InferencePasses, Ints, TrainingPasses

NARROW = 512  # from this width on products take nearly all the time, and a second copy of the weights is large
STATES_OF_A_CORE = 1 << 18  # tokens times width
FEWEST_TOKENS = 512  # with fewer for each thread, threads cost more than they bring


class CpuTrainingPasses(TrainingPasses):
    """What the layers below the first adapter give is computed once a row."""

    def __init__(self, network: FastClassifier, scratch: str | None, say: Callable[[str], None]) -> None:
        super().__init__(network, None)
        self.trunk = Trunk(network, scratch, say) if network.trunk_layers else None

    def batch(self, tokens: Tokens, rows: Ints, device: torch.device) -> dict[str, Tensor]:
        batch = super().batch(tokens, rows, device)
        if self.trunk is not None:
            batch["states_BTD"] = self.trunk.states(tokens, rows)
        return batch


class GraphPasses(InferencePasses):
    """A narrow model by ONNX Runtime.

    What it does with a batch is so little that cores would mostly wait for each other. So each batch has a core of its
    own, and is so small that it stays in caches.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from ctxtrain.engine.cpu.onnx_inference import GraphClassifier

        super().__init__(GraphClassifier.of(model).eval())
        self.width = int(model.config.hidden_size)

    def _division(self, tokens: Tokens) -> tuple[int, int]:
        workers = torch.get_num_threads()
        share = -(-int(tokens.lengths.sum()) // workers)
        return workers, min(STATES_OF_A_CORE // self.width, max(FEWEST_TOKENS, share))


def for_training(
    model: PeftModel, device: torch.device, scratch: str | None, say: Callable[[str], None]
) -> TrainingPasses:
    if reason := why_plain(model, device):
        return TrainingPasses(model, reason)
    return CpuTrainingPasses(FastClassifier(model), scratch, say)


def for_inference(model: PreTrainedModel, max_tokens: int) -> InferencePasses:
    if why_plain(model, model.device) is not None:
        return InferencePasses(model)
    if model.config.hidden_size < NARROW and max_tokens <= LONGEST:
        if find_spec("onnxruntime") and find_spec("onnx"):
            return GraphPasses(model)
        _say_without_onnx()
    return InferencePasses(MergedClassifier(model).eval())


@cache  # Python's own rule, once a place, begins anew whenever a library changes the filters
def _say_without_onnx() -> None:
    warnings.warn(
        "prediction runs without ONNX Runtime, which answers about 1.2 times as fast for a model this narrow. "
        "Install it with: pip install 'ctxtrain[onnx]'.",
        RuntimeWarning,
        stacklevel=2,
    )
