"""The mean of the weights of several epochs, exactly, as one set of adapters.

Input: adapters and heads of k epochs of one run, by PEFT's names: A of shape (r, in), B of shape (out, r). Output: the
concatenation, A of shape (k·r, in) and B of shape (out, k·r), and the mean head.

The update of an epoch is s·B·A with s = α/r. The product of the concatenations is the sum of the products, and with the
same α the scaling of rank k·r is α/(k·r) = s/k. So the update is the mean of the k updates, and any reader of LoRA
adapters computes it. Averaging A and B themselves would not give that: the mean of products is not the product of
means. The mean of weights along one run generalises better than its points (Izmailov et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ctxtrain.model.skeleton import Trained


@dataclass(frozen=True)
class Candidates:
    """What a run may export: its `best` epoch, or the `mean` of the best `epochs`, the best one first.

    `wanted` is how many epochs were to be averaged; the mean is None for one epoch.
    """

    best: Trained
    epochs: Sequence[int]
    wanted: int = 1
    mean: Trained | None = None


def concatenate(states: Sequence[Mapping[str, Tensor]], model: PeftModel) -> dict[str, Tensor]:
    """Adapters of k times the rank whose update is the mean of those of k `states`, and the mean of all other weights.

    `model` has adapters as the states have them, and may be on the meta device.
    """
    ranks = {name: module.r["default"] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    combined = {}
    for name in states[0]:
        weights = [state[name] for state in states]
        module = name.rpartition(".lora_")[0]
        if ".lora_A." in name:  # PEFT stacks the experts of a layer, each with the rows of its rank
            parts = [weight.reshape(-1, ranks[module], weight.shape[-1]) for weight in weights]
            combined[name] = torch.cat(parts, dim=1).reshape(-1, weights[0].shape[-1])
        elif ".lora_B." in name:  # the columns of all experts are next to each other, rank by rank
            parts = [weight.reshape(len(weight), ranks[module], -1) for weight in weights]
            combined[name] = torch.cat(parts, dim=1).reshape(len(weights[0]), -1)
        else:
            combined[name] = torch.stack([weight.double() for weight in weights]).mean(dim=0).to(weights[0].dtype)
    return combined
