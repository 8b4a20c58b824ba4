"""Class-weighted focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5; α_t is the class weight).

    p_t = softmax(logits)[true class]        FL = α_t · (1 − p_t)^γ · (−ln p_t)

Legend: B windows, C = 3 classes in the order of `LABELS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Loss(Protocol):
    """A loss that defines its denominator.

    The loss of an optimizer step is Σ `sums`[0] over its windows, divided once by their `weight`. So it does not depend
    on micro-batches or on the number of processes. The loss of a set of rows is the quotient of its `sums`.
    """

    def sums(self, logits_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the windows, and sum of their weights."""

    def weight(self, labels_N: Iterable[int]) -> float:
        """Sum of the weights of windows with these labels."""


class FocalLoss:
    """Focal loss with the class weights of a run, in the order of `LABELS`."""

    def __init__(self, class_weights: Sequence[float], device: torch.device, *, gamma: float) -> None:
        self.class_weights = class_weights
        self.weights_C = torch.tensor(class_weights, device=device)
        self.gamma = gamma

    def sums(self, logits_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        return focal_loss(logits_BC, labels_B, self.gamma, self.weights_C)

    def weight(self, labels_N: Iterable[int]) -> float:
        return sum(self.class_weights[label] for label in labels_N)


def make_loss(class_weights: Sequence[float], device: torch.device, *, focal_gamma: float) -> Loss:
    """Build the loss of a run from its class weights and the config section `loss`."""
    return FocalLoss(class_weights, device, gamma=focal_gamma)


def focal_loss(logits_BC: Tensor, labels_B: Tensor, gamma: float, class_weights_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of FL over the windows, and the sum of their α_t.

    The mean is their quotient, taken once over a whole optimizer step: with means per micro-batch, a window's influence
    would depend on the other windows of its micro-batch. γ = 0 is weighted cross-entropy. Computed from log-softmax in
    float32 or better, so it is finite for all finite logits.
    """
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    log_p_BC = torch.log_softmax(logits_BC, dim=-1)
    log_pt_B = log_p_BC.gather(1, labels_B[:, None]).squeeze(1)
    # 1 − p_t without cancellation; the floor keeps the slope of x^γ finite at x = 0 when γ < 1.
    wrongness_B = (-torch.expm1(log_pt_B)).clamp(min=torch.finfo(log_pt_B.dtype).tiny)
    alpha_B = class_weights_C.to(log_pt_B)[labels_B]
    return (alpha_B * wrongness_B**gamma * -log_pt_B).sum(), alpha_B.sum()
