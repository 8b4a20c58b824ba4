"""Muon, an optimizer for matrices (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

Input: weights with two axes and their gradients. Output: updated weights. The update is the nearest semi-orthogonal
matrix of the momentum, approximated by five Newton-Schulz steps with that article's coefficients, so that all
directions of a matrix learn at the same rate. It works in float32 and on all matrices of one shape at once; torch's
Muon works in bfloat16, which is slow on CPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    def __init__(
        self, parameters: Iterable[Parameter], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight once; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Parameter, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                by_shape[weight.shape].append((weight, weight.grad.lerp(momentum, group["momentum"])))
            for (rows, columns), pairs in by_shape.items():
                scale = max(1.0, rows / columns) ** 0.5
                for (weight, _), update in zip(pairs, orthogonalize(torch.stack([g for _, g in pairs])), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of each matrix; singular values end between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result
