"""Answers in bfloat16 are transformers' own within rounding, on every engine, with a float32 head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from ctxtrain.data.batches import collate
from ctxtrain.engine.api import make_inference_engine
from ctxtrain.engine.cpu.wide_inference import MergedClassifier
from ctxtrain.engine.reference import ReferenceNetwork
from ctxtrain.model import agreement
from ctxtrain.model.agreement import engine_mismatch, probe_rows, rounding_noise
from ctxtrain.model.forward import logits
from tests.tiny_models import FAMILIES, build_tiny


def classifier(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """A classifier none of whose weights is at its start, saved in float32 and opened by transformers in `dtype`."""
    build_tiny(folder / "base", family)
    config = AutoConfig.from_pretrained(folder / "base", num_labels=3, use_cache=False, **changes)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder / "model")
    return AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=dtype).eval()


def transformers_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What transformers itself computes, in its own forward pass, if the head takes float32."""
    head = nn.Linear(model.score.in_features, 3, bias=False)
    head.weight = nn.Parameter(model.score.weight.float())
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    before, model.score = model.score, head
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    model.score = before
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_reference_gives_the_bits_of_transformers_with_a_float32_head(family: str, tmp_path: Path) -> None:
    model, tokens = classifier(tmp_path, family), probe_rows(400, 0)
    batch = collate(tokens, range(2))
    expected = transformers_logits(model, batch)
    engine = make_inference_engine(model, 900, engine="reference")
    assert type(engine.network) is ReferenceNetwork
    with torch.no_grad():
        found = engine.network(**batch).logits
    assert (found.dtype, model.score.weight.dtype) == (torch.float32, torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [32, 512])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_fast_engine_differs_from_transformers_by_rounding(family: str, width: int, tmp_path: Path) -> None:
    model, tokens = classifier(tmp_path, family, hidden_size=width), probe_rows(400, 0)
    batch = collate(tokens, range(2))
    expected = transformers_logits(model, batch)
    engine = make_inference_engine(model, 900)
    assert type(engine.network) is MergedClassifier
    noise = rounding_noise(ReferenceNetwork(model), batch, expected, torch.bfloat16)
    with torch.inference_mode():
        difference = float((logits(engine.network, batch) - expected).abs().max())
    assert 0 < difference < 2 * noise < 0.2 * float(expected.abs().max())


def test_other_families_use_the_reference_and_say_why(tmp_path: Path) -> None:
    model = classifier(tmp_path, "qwen3_moe")
    with pytest.warns(
        RuntimeWarning, match="answers in bfloat16 use the slower reference engine: qwen3_moe is neither"
    ):
        assert type(make_inference_engine(model, 900).network) is ReferenceNetwork


class Skewed(MergedClassifier):
    """An engine that is wrong in the states of its last layer."""

    def _last_layer(self, layer: Any, states_ND: Tensor, batch: Any) -> Tensor:
        return super()._last_layer(layer, states_ND, batch).mul_(torch.linspace(0.5, 1.5, states_ND.shape[1]))


def test_the_probe_allows_rounding_in_bfloat16_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = classifier(tmp_path, "qwen3"), probe_rows(400, 0)
    model.score.float()
    reference = ReferenceNetwork(model)
    assert engine_mismatch(reference, MergedClassifier(model), tokens) is None
    assert "rounding explains" in str(engine_mismatch(reference, Skewed(model), tokens))
    monkeypatch.setattr(agreement, "NOISE_FACTOR", 1e-3)
    assert "rounding explains" in str(engine_mismatch(reference, MergedClassifier(model), tokens))


def test_noise_is_that_of_the_layers_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Deeper models round more often; the same call gives the same number."""
    noises = []
    for layers in (2, 16):
        model = classifier(
            tmp_path / str(layers), "qwen2", num_hidden_layers=layers, layer_types=["full_attention"] * layers
        )
        batch, network = collate(probe_rows(400, 0), range(2)), ReferenceNetwork(model)
        model.score.float()
        with torch.no_grad():
            before = logits(network, batch)
        first = rounding_noise(network, batch, before, torch.bfloat16)
        assert rounding_noise(network, batch, before, torch.bfloat16) == first
        with torch.no_grad():
            assert torch.equal(logits(network, batch), before)
        noises.append(first / float(before.abs().max()))
    assert 0 < noises[0] < noises[1] < 0.5
