"""Focal loss against independent formulas."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch.nn.functional import cross_entropy

from ctxtrain.config.sections import LossConfig
from ctxtrain.model.losses import focal_loss, make_loss

GAMMAS = (0.0, 0.5, 2.0, 5.0)
WEIGHTS = torch.tensor([0.5, 2.0, 0.75], dtype=torch.float64)


def logits_and_labels(count: int = 64, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(0, scale, (count, 3))), torch.tensor(rng.integers(0, 3, count))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_equals_the_formula_written_out_in_float64(gamma: float) -> None:
    logits_BC, labels_B = logits_and_labels()
    expected = 0.0
    for scores, label in zip(logits_BC.numpy(), labels_B.tolist(), strict=True):
        log_pt = log_softmax(scores)[label]
        expected += WEIGHTS[label].item() * (1 - math.exp(log_pt)) ** gamma * -log_pt
    for dtype in (torch.float64, torch.float32):
        loss_sum, weight_sum = focal_loss(logits_BC.to(dtype), labels_B, gamma, WEIGHTS.to(dtype))
        assert loss_sum.item() == pytest.approx(expected, rel=1e-6)
        assert weight_sum.item() == pytest.approx(WEIGHTS[labels_B].sum().item(), rel=1e-6)


def test_is_weighted_cross_entropy_at_gamma_0() -> None:
    logits_BC, labels_B = logits_and_labels()
    loss_sum, weight_sum = focal_loss(logits_BC, labels_B, 0.0, WEIGHTS)
    mean = cross_entropy(logits_BC, labels_B, weight=WEIGHTS)
    assert (loss_sum / weight_sum).item() == pytest.approx(mean.item(), rel=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_agrees_with_finite_differences(gamma: float) -> None:
    logits_BC, labels_B = logits_and_labels(count=5)
    logits_BC.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda scores: focal_loss(scores, labels_B, gamma, WEIGHTS)[0], (logits_BC,))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_loss_and_gradient_are_finite_at_extreme_logits(gamma: float, size: float) -> None:
    rows = [[size, -size, 0.0], [-size, size, 0.0], [size, size, size], [0.0, 0.0, -size]]
    for label in range(3):
        logits_BC = torch.tensor(rows, requires_grad=True)
        loss_sum, _ = focal_loss(logits_BC, torch.full((4,), label), gamma, WEIGHTS.float())
        loss_sum.backward()
        assert torch.isfinite(loss_sum)
        assert logits_BC.grad is not None
        assert torch.isfinite(logits_BC.grad).all()


def test_starts_at_ln_3_to_the_weight_of_two_thirds_for_a_zero_head() -> None:
    loss_sum, weight_sum = focal_loss(torch.zeros(9, 3), torch.arange(9) % 3, 2.0, torch.ones(3))
    assert (loss_sum / weight_sum).item() == pytest.approx((2 / 3) ** 2 * math.log(3), rel=1e-6)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits_BC, labels_B = logits_and_labels()
    half = logits_BC.to(torch.bfloat16)
    loss_sum, _ = focal_loss(half, labels_B, 2.0, WEIGHTS.float())
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(focal_loss(half.double(), labels_B, 2.0, WEIGHTS)[0].item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_the_keys_of_the_config_make_the_loss(gamma: float) -> None:
    logits_BC, labels_B = logits_and_labels()
    loss = make_loss([0.5, 2.0, 0.75], torch.device("cpu"), **LossConfig(focal_gamma=gamma).settings)
    found, weight = loss.sums(logits_BC, labels_B)
    expected, weight_sum = focal_loss(logits_BC, labels_B, gamma, WEIGHTS)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.weight(labels_B.tolist()) == pytest.approx(weight_sum.item()) == weight.item()
