"""The mean of the weights of several epochs as one set of adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctxtrain.model import lora
from ctxtrain.model.averaging import concatenate
from ctxtrain.model.base import load_classifier
from ctxtrain.model.skeleton import Skeleton
from ctxtrain.model.tokenizer import load_tokenizer
from tests.tiny_models import build_tiny

SETTINGS: dict[str, Any] = {"r": 3, "alpha": 5, "dropout": 0.0, "target_modules": ["q_proj", "o_proj"]}


def merged(base: Path, pad_id: int, settings: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    model = lora.add_lora(load_classifier(str(base), pad_id), **settings)
    lora.load_trainable_state(model, state)
    return lora.merge(model).state_dict()


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("qwen2", []),
        ("qwen3", ["gate_proj", "down_proj"]),
        ("qwen3_next", ["down_proj"]),
        ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_merged_weights_are_the_base_and_the_mean_of_the_updates(
    family: str, modules: list[str], tmp_path: Path
) -> None:
    """Of a qwen3_next, PEFT adapts the experts, whose adapters are stacked."""
    base = build_tiny(tmp_path / "base", family)
    pad_id = load_tokenizer(str(base)).pad_token_id
    settings = SETTINGS | {"target_modules": [*SETTINGS["target_modules"], *modules]}
    model = lora.add_lora(load_classifier(str(base), pad_id), **settings)
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in lora.trainable_parameters(model).values():
                nn.init.normal_(parameter, std=0.3)
        states.append(lora.trainable_state(model))
    mean = concatenate(states, Skeleton.of(str(base), pad_id, settings).adapted)
    actual = merged(base, pad_id, settings | {"r": 9}, mean)
    singles = [merged(base, pad_id, settings, state) for state in states]
    assert actual.keys() == singles[0].keys()
    changed = 0
    for name, weight in actual.items():
        expected = torch.stack([single[name].double() for single in singles]).mean(dim=0)
        assert torch.allclose(weight.double(), expected, rtol=0, atol=2e-6), name
        changed += not torch.equal(singles[0][name], singles[1][name])
    assert changed >= 1 + len(settings["target_modules"])
