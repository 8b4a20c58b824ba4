"""Targets and losses of pre-training.

Input: statistics of windows. Output: losses of the model's predictions. Numbers are standardised and have a Huber loss;
binary statistics have a cross-entropy loss. At the event there are also random rules as binary targets, each a
conjunction of two to four statistics above or below a threshold. They make the final state represent the terms of such
rules in a form that a linear head can read. The rules are drawn from the seed and use no labels.

Legend: B windows, L bars, X bars of all windows, P statistics a bar, E at the event, R rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ctxtrain.pretraining.practice_windows import PracticeWindows
from ctxtrain.pretraining.statistics import BINARY

RULES = 96
RULE_CONDITIONS = (2, 4)
FLAG_CONDITIONS, ABOVE = 0.4, 0.6  # share of conditions on binary statistics; share of “above” conditions
CLIP = 4.0  # standard deviations
BAR_WEIGHT = 0.5  # of the losses at bars; those at the event have 1

Rule = list[tuple[int, float, int]]  # statistic, threshold, side


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of statistics over the first windows; which are binary, and which vary at all."""

    mean: Tensor
    spread: Tensor
    binary: Tensor
    varies: Tensor

    @classmethod
    def fit(cls, values: NDArray[np.float32], names: list[str]) -> Scale:
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        binary = np.array([name.startswith(BINARY) for name in names])
        spread = np.nanstd(flat, axis=0)
        varies = spread > 1e-6
        return cls(
            mean=torch.from_numpy(np.where(binary, 0.0, np.nanmean(flat, axis=0))).float(),
            spread=torch.from_numpy(np.where(binary | ~varies, 1.0, spread)).float(),
            binary=torch.from_numpy(binary),
            varies=torch.from_numpy(varies),
        )

    def standardize(self, values: Tensor) -> Tensor:
        return ((values.nan_to_num() - self.mean) / self.spread).clamp(-CLIP, CLIP)

    def losses(self, predictions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of the numbers and mean loss of the binary statistics, without unknown ones (NaN)."""
        known, targets = ~values.isnan() & self.varies, self.standardize(values)
        numbers, flags = known & ~self.binary, known & self.binary
        huber = F.smooth_l1_loss(predictions, targets, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(predictions, targets.clamp(0, 1), reduction="none")
        return (
            (huber * numbers).sum() / numbers.sum().clamp(min=1),
            (entropy * flags).sum() / flags.sum().clamp(min=1),
        )


class Targets:
    """Targets: at each bar, its statistics; at the event, statistics of its bar and of the window, and rules."""

    def __init__(self, rng: Generator, first: PracticeWindows) -> None:
        values, names = _event_statistics(first.bar_WLP, first.event_WE), [*first.bar_names, *first.event_names]
        self.rules = _draw_rules(rng, values, names)
        self.bar_names, self.event_names = first.bar_names, [*names, *(f"{BINARY}rule_{k}" for k in range(RULES))]
        with_rules = np.concatenate([values, self._rule_values(torch.from_numpy(values)).numpy()], axis=1)
        self.bar_scale = Scale.fit(first.bar_WLP, self.bar_names)
        self.event_scale = Scale.fit(with_rules, self.event_names)

    def losses(self, bars_XP: Tensor, event_BE: Tensor, bar_BLP: Tensor, window_BE: Tensor) -> dict[str, Tensor]:
        """Weighted losses of the predictions at bars and at the event, by name; training minimises their sum."""
        exists_BL = ~bar_BLP[:, :, 0].isnan()
        bar_numbers, bar_flags = self.bar_scale.losses(bars_XP, bar_BLP[exists_BL])
        numbers, flags = self.event_scale.losses(event_BE, self._event_values(bar_BLP, window_BE))
        return {
            "bar numbers": BAR_WEIGHT * bar_numbers,
            "bar flags": BAR_WEIGHT * bar_flags,
            "event numbers": numbers,
            "event flags": flags,
        }

    def explained_variance(self, event_BE: Tensor, bar_BLP: Tensor, window_BE: Tensor) -> dict[str, float]:
        """Explained variance of the predictions at the event, averaged over numbers, binary statistics and rules."""
        values, scale = self._event_values(bar_BLP, window_BE), self.event_scale
        known, targets = ~values.isnan(), scale.standardize(values)
        predictions = torch.where(scale.binary, event_BE.sigmoid(), event_BE)
        count = known.sum(dim=0).clamp(min=1)
        mean = (targets * known).sum(dim=0) / count
        spread = ((targets - mean).square() * known).sum(dim=0) / count
        share = 1 - ((predictions - targets).square() * known).sum(dim=0) / count / spread.clamp(min=1e-6)
        is_rule = torch.arange(len(share)) >= len(share) - RULES
        varies = spread > 0.01
        groups = {"numbers": ~scale.binary, "flags": scale.binary & ~is_rule, "rules": is_rule}
        return {name: float(share[group & varies].mean()) for name, group in groups.items()}

    def _event_values(self, bar_BLP: Tensor, window_BE: Tensor) -> Tensor:
        values = torch.cat([bar_BLP[:, -1], window_BE], dim=1)
        return torch.cat([values, self._rule_values(values)], dim=1)

    def _rule_values(self, values: Tensor) -> Tensor:
        """1 where a rule holds, else 0, of shape (B, R); NaN where one of its statistics is unknown."""
        rule_values = []
        for rule in self.rules:
            columns, thresholds, sides = (torch.tensor(part) for part in zip(*rule, strict=True))
            compared = values[:, columns]
            holds = ((compared - thresholds) * sides > 0).all(dim=1).float()
            rule_values.append(holds.masked_fill(compared.isnan().any(dim=1), torch.nan))
        return torch.stack(rule_values, dim=1)


def _event_statistics(bar_WLP: NDArray[np.float32], event_WE: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([bar_WLP[:, -1], event_WE], axis=1)


def _draw_rules(rng: Generator, values: NDArray[np.float32], names: list[str]) -> list[Rule]:
    flags = [column for column, name in enumerate(names) if name.startswith(BINARY)]
    rules = []
    for _ in range(RULES):
        count = int(rng.integers(*RULE_CONDITIONS, endpoint=True))
        columns = [
            int(rng.choice(flags)) if rng.random() < FLAG_CONDITIONS else int(rng.integers(len(names)))
            for _ in range(count)
        ]
        thresholds = [
            0.5 if column in flags else float(np.nanquantile(values[:, column], rng.uniform(0.25, 0.75)))
            for column in columns
        ]
        sides = [1 if rng.random() < ABOVE else -1 for _ in columns]
        rules.append(list(zip(columns, thresholds, sides, strict=True)))
    return rules
