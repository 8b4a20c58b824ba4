"""Part 3: six families of two layers each, forward and backward under deterministic algorithms."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from gpu_parts.setting import CheckFailed, Setting
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.tiny_models import COMMON, FAMILIES

# On a GPU the widths of real heads, as kernels are chosen by them.
WIDER = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
WIDER_HYBRID = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
OPERATOR = re.compile(r"^(\S+).*does not have a deterministic implementation|^(.*?) defaults to a non-deterministic")


def make_family(family: str, setting: Setting) -> nn.Module | None:
    """A classifier of random weights; None if the installed transformers does not know the family."""
    values = COMMON | FAMILIES[family] | {"vocab_size": 1000, "pad_token_id": 0, "num_labels": 3, "use_cache": False}
    if not setting.is_tiny:
        values |= WIDER | (WIDER_HYBRID if "linear_key_head_dim" in values else {})
    try:
        config = AutoConfig.for_model(family, **values)
    except ValueError:
        return None
    torch.manual_seed(0)
    with torch.device(setting.device):
        return AutoModelForSequenceClassification.from_config(
            config, dtype=torch.bfloat16 if setting.device == "cuda" else torch.float32
        )


def gradients(model: nn.Module, ids_BT: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=ids_BT).logits.float().logsumexp(-1).sum().backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def throwing_operators(caught: list[warnings.WarningMessage]) -> list[str]:
    """Names of the operators of which torch says that they are not deterministic."""
    matches = (OPERATOR.match(str(warning.message)) for warning in caught)
    return sorted({match[1] or match[2] for match in matches if match})


def check_families(setting: Setting) -> Iterator[dict[str, Any]]:
    # Only a warning, so that one pass names every operator that throws in a run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    windows, tokens = (2, 16) if setting.is_tiny else (8, 481)
    ids_BT = torch.randint(1, 1000, (windows, tokens), generator=torch.Generator().manual_seed(0)).to(setting.device)
    broken = []
    for family in FAMILIES:
        model = make_family(family, setting)
        if model is None:
            yield {family: "not in this transformers"}
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first, second = gradients(model, ids_BT), gradients(model, ids_BT)
        operators = throwing_operators(caught)
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        verdict = "same bits" if same else "other bits"
        yield {family: f"{verdict}, throws: {', '.join(operators)}" if operators else verdict}
        if operators or not same:
            broken.append(family)
    if broken:
        raise CheckFailed(f"no deterministic step of {', '.join(broken)}")
