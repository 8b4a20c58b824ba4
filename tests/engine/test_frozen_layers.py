"""With adapters in the last layers only, the states below them are computed once a row, and nothing else changes."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxtrain.config.schema import Config
from ctxtrain.data.batches import collate
from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.cpu import frozen_layers as cache_module
from ctxtrain.engine.cpu.frozen_layers import FrozenStateCache
from ctxtrain.engine.cpu.training_model import FastClassifier
from ctxtrain.errors import Interrupted
from ctxtrain.model.embedded import embedded_base
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.train import TrainingPipeline
from tests.conftest import MakeConfig
from tests.engine.test_cpu_engine import ALL, assert_same, build, ragged, results
from tests.storage.test_resume import Signaller
from tests.test_processes import SETTINGS, torchrun
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.slow

LENGTHS = (150, 97, 81, 80, 2, 1)
LAST = "lora.layers=last:1"


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> Tokens:
    ids_BT = ragged(lengths)
    flat = np.concatenate([ids_BT[row, :length].numpy() for row, length in enumerate(lengths)]).astype(np.int32)
    return Tokens.from_lengths(flat, np.array(lengths), 0)


def never(note: str) -> None:
    raise AssertionError(note)


def kept_bytes(cache: FrozenStateCache) -> int:
    return 0 if cache.file is None else os.fstat(cache.file.fileno()).st_size


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ALL])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "embedded"])
def test_loss_logits_and_gradients_from_kept_states_are_those_of_plain_peft(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    folder, layers = (embedded_base(), "last:2") if family == "embedded" else (build_tiny(tmp_path, family), "last:1")
    model = build(folder, layers=layers, target_modules=targets)
    fast, tokens = FastClassifier(model), rows_of()
    assert fast.frozen_layer_count == len(fast.layers) - int(layers[-1])
    cache = FrozenStateCache(fast, str(tmp_path), never)

    class FromStates(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return fast(input_ids, cache.states(tokens, range(len(tokens))))

    plain = results(model, model, ragged())
    for _ in range(2):  # computed, then read
        assert_same(results(model, FromStates(), ragged()), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_the_same_bits_in_any_company_kept_or_not(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(build_tiny(tmp_path / "base"), dtype, layers="last:1")
    tokens, cache = rows_of(), FrozenStateCache(FastClassifier(model), str(tmp_path), never)
    first = cache.states(tokens, range(len(tokens)))
    assert first.dtype == dtype
    assert kept_bytes(cache) == sum(LENGTHS) * 32 * first.element_size()
    assert torch.equal(cache.states(tokens, range(len(tokens))), first)
    assert kept_bytes(cache) == sum(LENGTHS) * 32 * first.element_size()
    monkeypatch.setattr(cache_module, "MIN_FREE_BYTES", 1 << 60)
    said: list[str] = []
    without = FrozenStateCache(FastClassifier(model), str(tmp_path), said.append)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(cache.states(tokens, [row])[0], first[row, :length])
        assert torch.equal(without.states(tokens, [row])[0], first[row, :length])
        assert not first[row, length:].any()
    assert kept_bytes(without) == 0
    assert len(said) == 1


def test_the_layers_run_once_a_row_in_a_whole_run(make_config: MakeConfig) -> None:
    pipeline = TrainingPipeline(make_config(LAST))
    passed: list[int] = []
    pipeline.load_data()
    pipeline.setup_model()
    assert pipeline.model is not None
    backbone = pipeline.model.get_base_model().model
    backbone.embed_tokens.register_forward_hook(lambda *_: passed.append(1))
    for _ in range(2):
        pipeline.train_epoch()
        pipeline.evaluate()
    assert len(passed) == 46 + 20


def test_without_a_trunk_nothing_is_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    for override in ("lora.layers=all", "lora.layers=last:2", f"model.base={build_tiny(tmp_path / 'b', 'qwen2_moe')}"):
        pipeline = TrainingPipeline(make_config(override, *([LAST] if "base" in override else [])))
        pipeline.load_data()
        pipeline.setup_model()
        assert getattr(pipeline.learner.engine, "frozen_cache", None) is None


def content(config: Config) -> tuple[bytes, bytes]:
    folder = RunFolder(config.output_dir)
    return folder.metrics.path.read_bytes(), folder.zip.read_bytes()


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process grows above 200 kB; the system gives an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_fills_up_is_said_once_and_given_back(tmp_path: Path) -> None:
    model = build(build_tiny(tmp_path), layers="last:1")
    tokens, said = rows_of((150,) * 20), list[str]()
    cache = FrozenStateCache(FastClassifier(model), str(tmp_path), said.append)
    expected = [cache.classifier.frozen_states(collate(tokens, [row])["input_ids"])[0] for row in range(20)]
    with small_files():
        for _ in range(2):
            for row in range(20):
                assert torch.equal(cache.states(tokens, [row])[0], expected[row])
    assert len(said) == 1
    assert "File too large" in said[0]
    assert cache.file is None
    assert cache.offsets == {}


def test_what_is_kept_never_has_a_name(tmp_path: Path) -> None:
    model = build(build_tiny(tmp_path / "base"), layers="last:1")
    cache = FrozenStateCache(FastClassifier(model), str(tmp_path / "run"), never)
    cache.states(rows_of(), [0])
    assert kept_bytes(cache) > 0
    assert list((tmp_path / "run").iterdir()) == []  # so nothing is left behind, not even after a SIGKILL


def test_a_run_that_kept_states_and_goes_on_without_room_has_the_bits_of_a_straight_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = make_config(LAST, run="straight"), make_config(LAST, run="stopped")
    TrainingPipeline(straight).run()
    with pytest.raises(Interrupted):
        TrainingPipeline(stopped, reporter=Signaller(9, signal.SIGTERM)).run()
    monkeypatch.setattr(cache_module, "MIN_FREE_BYTES", 1 << 60)
    TrainingPipeline(stopped, resume=True).run()
    assert content(stopped) == content(straight)


def test_two_processes_give_the_curve_of_one(make_config: MakeConfig, tmp_path: Path) -> None:
    one, two = (make_config(LAST, *SETTINGS, "training.epochs=1", run=run) for run in ("one", "two"))
    TrainingPipeline(one).run()
    done = torchrun(two, tmp_path)
    assert done.returncode == 0, done.stderr
    mine, theirs = RunFolder(two.output_dir).metrics.read(), RunFolder(one.output_dir).metrics.read()
    assert len(mine) == len(theirs)
    for line, other in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "train_loss", "macro_f1"):
            assert line.get(name, 0) == pytest.approx(other.get(name, 0), abs=1e-5), (line, other)
