"""Narrow models answer many rows in several threads with a batch each; others in the thread that asks."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ctxtrain.data.batches import collate
from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.cpu import select
from ctxtrain.engine.cpu.select import OnnxInferenceEngine
from ctxtrain.engine.cpu.training_model import unsupported_reason
from ctxtrain.engine.cpu.wide_inference import MergedClassifier
from ctxtrain.engine.reference import InferenceEngine
from ctxtrain.model import forward
from ctxtrain.model.base import load_classifier
from tests.helpers import threads_of_a_new_thread
from tests.tiny_models import build_tiny

PAD = 0


def rows_of(lengths: np.ndarray) -> Tokens:
    flat = np.random.default_rng(0).integers(1, 500, lengths.sum()).astype(np.int32)
    return Tokens.from_lengths(flat, np.array(lengths), PAD)


def classifier(folder: Path) -> PreTrainedModel:
    build_tiny(folder, "qwen3")
    model = load_classifier(str(folder), PAD).eval()
    assert unsupported_reason(model, torch.device("cpu")) is None
    return model


def threads_of_passes(model: torch.nn.Module) -> list[tuple[str, int]]:
    """The name of the thread of every forward pass to come, and how many threads torch has there."""
    seen: list[tuple[str, int]] = []
    model.register_forward_hook(lambda *_: seen.append((threading.current_thread().name, torch.get_num_threads())))
    return seen


def test_a_narrow_model_answers_many_rows_in_threads_of_their_own(
    tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = classifier(tmp_path), rows_of(np.random.default_rng(1).integers(20, 200, 120))
    passes = OnnxInferenceEngine(model)
    monkeypatch.setattr(select, "STATES_PER_CORE", 1000 * passes.width)
    seen, done, sizes = threads_of_passes(passes.network), list[int](), list[int]()
    passes.network.register_forward_pre_hook(
        lambda _, __, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    logits_NC = passes.token_logits(tokens, done.append)
    assert sum(done) == len(tokens)
    assert {name.rpartition("_")[0] for name, _ in seen} == {"worker"}
    assert {threads for _, threads in seen} == {1}
    assert len({name for name, _ in seen}) == 2
    assert max(sizes) <= 1000
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
    for row in range(len(tokens)):
        with torch.inference_mode():
            alone = forward.logits(model, collate(tokens, [row]))[0]
        torch.testing.assert_close(torch.tensor(logits_NC[row]).float(), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["few rows", "one thread", "a wide model", "plain modules"])
def test_other_rows_are_answered_by_the_thread_that_asks(what: str, tmp_path: Path, two_threads: None) -> None:
    model = classifier(tmp_path)
    passes: InferenceEngine = OnnxInferenceEngine(model)
    if what in ("a wide model", "plain modules"):
        passes = InferenceEngine(MergedClassifier(model).eval() if what == "a wide model" else model)
    if what == "one thread":
        torch.set_num_threads(1)
    tokens, seen = rows_of(np.full(4 if what == "few rows" else 100, 120)), threads_of_passes(passes.network)
    passes.token_logits(tokens)
    assert {*seen} == {("MainThread", 1 if what == "one thread" else 2)}


def test_no_rows_have_no_logits(tmp_path: Path) -> None:
    assert OnnxInferenceEngine(classifier(tmp_path)).token_logits(rows_of(np.empty(0, dtype=np.int64))).shape == (0, 3)
