"""Batches of answers as large as memory allows, and halved where it does not hold them."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForSequenceClassification

from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.batch_memory import MAX_TOKENS, SHARE_OF_FREE, batch_tokens, peak_bytes_per_token
from ctxtrain.engine.cpu.select import OnnxInferenceEngine
from ctxtrain.engine.reference import InferenceEngine, ReferenceNetwork
from ctxtrain.model.base import load_classifier
from tests.tiny_models import build_tiny

PAD = 0
GIB = 1 << 30
SHAPES: dict[str, dict[str, int]] = {  # in the proportions of their namesakes
    "Qwen2.5-0.5B": {"hidden_size": 224, "intermediate_size": 1216, "num_attention_heads": 14, "head_dim": 16},
    "Qwen3-4B": {"hidden_size": 320, "intermediate_size": 1216, "num_attention_heads": 32, "head_dim": 16},
    "narrow MLP": {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32},
}


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes that tensors made under it take together."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_estimate_is_the_measured_peak_or_a_little_more(family: str, shape: str, dtype: torch.dtype) -> None:
    """In float32 with attention that writes its scores, as kernels for GPUs do there."""
    config = AutoConfig.for_model(
        family,
        vocab_size=500,
        num_hidden_layers=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        num_labels=3,
        use_cache=False,
        **SHAPES[shape],
    )
    attention = "eager" if dtype == torch.float32 else "sdpa"
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.score.float()
    ids_BT = torch.randint(1, 400, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), LiveBytes() as bytes_:
        bytes_.seen |= {weight.untyped_storage()._cdata for weight in model.parameters()}
        ReferenceNetwork(model)(input_ids=ids_BT)
    measured, estimate = bytes_.peak / ids_BT.numel(), peak_bytes_per_token(config, dtype, 128)
    assert measured <= estimate <= 1.5 * measured, (measured, estimate)


def test_a_batch_takes_its_share_of_free_memory_within_bounds() -> None:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
    )
    per_token = peak_bytes_per_token(config, torch.bfloat16, 481)
    assert per_token == 8 + 2 * (2 * 128 + 4 * 3584 + 3 * 18944)
    tokens = batch_tokens(config, torch.bfloat16, 4 * GIB, 481)
    assert tokens == int(SHARE_OF_FREE * 4 * GIB) // per_token
    assert tokens * per_token <= SHARE_OF_FREE * 4 * GIB < (tokens + 1) * per_token
    assert batch_tokens(config, torch.float32, 4 * GIB, 481) < tokens / 1.9
    assert batch_tokens(config, torch.bfloat16, 200 * GIB, 481) == MAX_TOKENS
    assert batch_tokens(config, torch.bfloat16, 1000, 481) == 1


def test_experts_that_process_a_token_count_as_its_mlp() -> None:
    experts: dict[str, int] = {"moe_intermediate_size": 700, "shared_expert_intermediate_size": 300}
    sizes: dict[str, int] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen2_moe", intermediate_size=500, num_experts_per_tok=4, **experts, **sizes)
    assert peak_bytes_per_token(config, torch.bfloat16, 100) == 8 + 2 * (2 * 16 + 4 * 64 + 3 * (4 * 700 + 300))


class SmallMemory(nn.Module):
    """A network on a device with memory for so many tokens of a padded batch."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most
        self.sizes: list[int] = []

    def forward(self, input_ids: Tensor) -> Any:
        self.sizes.append(input_ids.numel())
        if input_ids.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.network(input_ids)


def rows_of(lengths: list[int]) -> Tokens:
    flat = np.random.default_rng(0).integers(1, 500, sum(lengths)).astype(np.int32)
    return Tokens.from_lengths(flat, np.array(lengths), PAD)


@pytest.mark.parametrize("engine", ["reference", "threads"])
def test_a_batch_that_memory_does_not_hold_is_halved_and_the_answers_stay_in_order(engine: str, tmp_path: Path) -> None:
    model = load_classifier(str(build_tiny(tmp_path)), PAD).eval()
    passes = InferenceEngine(model) if engine == "reference" else OnnxInferenceEngine(model)
    tokens = rows_of(np.random.default_rng(1).integers(20, 90, 150).tolist())
    expected, done = passes.token_logits(tokens), list[int]()
    small = passes.network = SmallMemory(passes.network, 500)
    try:
        torch.set_num_threads(1 if engine == "reference" else 2)
        with pytest.warns(
            RuntimeWarning, match=r"memory ran out in a batch of [\d,]+ rows \(\d,\d{3} tokens\)"
        ) as said:
            found = passes.token_logits(tokens, done.append)
        assert len(said) == 1 or engine == "threads"
        assert found == pytest.approx(expected, abs=1e-6, rel=0)
        assert sum(done) == len(tokens)
        assert len({*expected[:, 0].tolist()}) > 100
        small.sizes.clear()
        assert passes.token_logits(tokens) == pytest.approx(expected, abs=1e-6, rel=0)  # and says nothing more
        assert max(small.sizes) <= 500
    finally:
        torch.set_num_threads(1)


def test_a_row_that_does_not_fit_alone_is_an_error_and_so_is_any_other_fault(tmp_path: Path) -> None:
    model = load_classifier(str(build_tiny(tmp_path)), PAD).eval()
    with (
        pytest.warns(RuntimeWarning, match="memory ran out in a batch of 2 rows"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        InferenceEngine(SmallMemory(model, 10)).token_logits(rows_of([20, 15]))
    with pytest.raises(IndexError, match="index out of range"):
        InferenceEngine(model).token_logits(Tokens.from_lengths(np.full(30, 20_000, np.int32), np.array([15, 15]), PAD))
