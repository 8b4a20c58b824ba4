"""The optimizer of a run, and checks of its state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer


def make_optimizer(parameters: Iterable[Parameter], *, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), always the fused implementation: others differ in the last bits."""
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def expected_state(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Keys, types and shapes of the state that an optimizer of `make_optimizer` has for a trained weight."""
    assert isinstance(optimizer, AdamW)
    return {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}


def largest_magnitude(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> Tensor:
    """Largest magnitude of all weights and optimizer moments, a scalar on their device; not finite if one of them is.

    An infinite second moment stops all updates of its weight, which neither the loss nor the gradient shows.
    """
    return get_total_norm(_checked_tensors(parameters, optimizer).values(), norm_type=math.inf)


def find_non_finite(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> str | None:
    """Name of the first weight or optimizer moment that is not finite, or None; one read-back from the device."""
    tensors = _checked_tensors(parameters, optimizer)
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next((name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite), None)


def _checked_tensors(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {name: weight.detach() for name, weight in parameters.items()}
    for name, weight in parameters.items():
        state = optimizer.state.get(weight, {}).items()
        tensors |= {f"{key} of {name}": value for key, value in state if isinstance(value, Tensor) and key != "step"}
    return tensors
