"""Many rows are answered in batches: by one thread after the other, or by several threads with a batch each."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ctxtrain.data.batches import Tokens, collate
from ctxtrain.engine.cpu import select
from ctxtrain.engine.cpu.select import OnnxInferenceEngine
from ctxtrain.engine.cpu.training_model import unsupported_reason
from ctxtrain.engine.cpu.wide_inference import MergedClassifier
from ctxtrain.engine.reference import InferenceEngine, batches_by_length
from ctxtrain.model import lora
from ctxtrain.runtime import thread_map
from tests.tiny_models import build_tiny

PAD = 0


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def rows_of(lengths: np.ndarray) -> Tokens:
    flat = np.random.default_rng(0).integers(1, 500, lengths.sum()).astype(np.int32)
    return Tokens.from_lengths(flat, np.array(lengths), PAD)


def classifier(folder: Path) -> PreTrainedModel:
    build_tiny(folder, "qwen3")
    model = lora.load_classifier(str(folder), PAD).eval()
    assert unsupported_reason(model, torch.device("cpu")) is None
    return model


def threads_of_passes(model: torch.nn.Module) -> list[tuple[str, int]]:
    """The name of the thread of every forward pass to come, and how many threads torch has there."""
    seen: list[tuple[str, int]] = []
    model.register_forward_hook(lambda *_: seen.append((threading.current_thread().name, torch.get_num_threads())))
    return seen


def threads_of_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


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
            alone = lora.logits(model, collate(tokens, [row]))[0]
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


def test_what_a_call_raises_ends_the_others_and_leaves_the_threads_as_they_were(two_threads: None) -> None:
    begun = []

    def fail(number: int) -> None:
        begun.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"), thread_map(2) as run:  # noqa: PT012
        for _ in run(fail, range(100_000)):
            pytest.fail("the first call has no result")
    assert len(begun) < 100_000
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker")]


def test_threads_of_torch_are_divided_between_workers() -> None:
    torch.set_num_threads(5)
    try:
        with thread_map(2) as run:
            assert list(run(lambda _: torch.get_num_threads(), range(6))) == [2] * 6
    finally:
        torch.set_num_threads(1)


def test_batches_hold_every_row_once_and_no_more_tokens_than_they_may() -> None:
    lengths = np.random.default_rng(0).integers(1, 700, 300)
    lengths[7] = 5000
    batches = batches_by_length(lengths, 1000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    assert all(len(rows) * lengths[rows].max() <= 1000 for rows in batches if len(rows) > 1)
    assert all((len(rows) + 1) * lengths[rows].max() > 1000 for rows in batches[:-1]), (
        "a batch has as many rows as may be"
    )
