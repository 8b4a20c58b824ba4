"""The optimizer of a run, and what its state must be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer


def make_optimizer(parameters: Iterable[Parameter], *, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019). One implementation, the fused one: others differ in the last bits."""
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def state_like(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Keys, types and shapes of what an optimizer of `make_optimizer` keeps of a weight that it has trained."""
    assert isinstance(optimizer, AdamW)
    return {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}


def not_finite(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> str | None:
    """What of the weights and the optimizer's state of them is not finite, the first of it by name, or None.

    An infinite second moment makes its weight stand still for good, and neither loss nor gradient shows it.
    """
    tensors = {name: weight.detach() for name, weight in parameters.items()}
    for name, weight in parameters.items():
        kept = optimizer.state.get(weight, {}).items()
        tensors |= {f"{key} of {name}": of for key, of in kept if isinstance(of, Tensor) and key != "step"}
    if math.isfinite(get_total_norm(tensors.values(), norm_type=math.inf)):
        return None
    return next(name for name, tensor in tensors.items() if not tensor.isfinite().all())
