"""In bfloat16 training the head computes in float32, so that logits are finer than bfloat16 numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ctxtrain.engine.cpu.training_model import FastClassifier
from ctxtrain.engine.reference import ReferenceNetwork
from ctxtrain.model import forward
from tests.engine.test_cpu_engine import build, ragged
from tests.tiny_models import FAMILIES, build_tiny

ROWS = tuple(range(20, 140, 2))


def answers(network: nn.Module, ids_BT: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return forward.logits(network.eval(), {"input_ids": ids_BT})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_finer_than_those_of_a_head_in_bfloat16_and_closer_to_float32(family: str, tmp_path: Path) -> None:
    folder, ids_BT = build_tiny(tmp_path, family), ragged(ROWS)
    model = build(folder, torch.bfloat16)
    head = model.get_base_model().score.modules_to_save["default"].weight
    kept: list[Tensor] = []
    model.get_base_model().score.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    rounded_BC = answers(model, ids_BT)
    finer_BC = answers(ReferenceNetwork(model), ids_BT)
    exact_BC = kept[1].double() @ head.double().T  # of the same states, so that the head alone differs
    assert kept[1].shape == (len(ROWS), 32)
    assert (finer_BC - exact_BC).abs().max() < 1e-6
    assert (rounded_BC - exact_BC).abs().max() > 1e-3
    assert torch.equal(rounded_BC, rounded_BC.bfloat16().float())
    assert not torch.equal(finer_BC, finer_BC.bfloat16().float())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_no_two_classes_tie(family: str, tmp_path: Path) -> None:
    model, ids_BT = build(build_tiny(tmp_path, family), torch.bfloat16), ragged(ROWS)
    with torch.no_grad():  # two classes that differ by less than bfloat16 can say
        score = model.get_base_model().score.modules_to_save["default"].weight
        score[1] = score[0] * (1 + 2**-12)
    assert ties(answers(model, ids_BT)) > 0
    assert ties(answers(ReferenceNetwork(model), ids_BT)) == 0
    assert ties(answers(FastClassifier(model), ids_BT)) == 0


def ties(logits_BC: Tensor) -> int:
    return int((logits_BC[:, 0] == logits_BC[:, 1]).sum())
