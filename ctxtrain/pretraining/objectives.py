"""What the base is asked while it is pre-trained, and how its answers are marked.

Comes in: statistics of windows. Goes out: losses of a reader's guesses. Numbers are standardised and marked by the
Huber loss, statistics that are yes or no by cross-entropy. At the event the base is also asked about random rules, each
a conjunction of two to four statistics above or below a threshold, so that it keeps what rules are made of where a
linear head finds it. The seed draws the rules; no label takes part.

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

from ctxtrain.pretraining.practice_windows import Practice
from ctxtrain.pretraining.statistics import BINARY

RULES = 96
RULE_CONDITIONS = (2, 4)
FLAG_CONDITIONS, ABOVE = 0.4, 0.6  # shares of conditions on yes-or-no statistics, and of those that ask for more
CLIP = 4.0  # standard deviations
BAR_WEIGHT = 0.5  # of the losses at bars; those at the event have 1

Rule = list[tuple[int, float, int]]  # statistic, threshold, side


@dataclass(frozen=True)
class Scale:
    """Location and spread of statistics over the first windows; which are yes or no, and which vary at all."""

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

    def standardised(self, values: Tensor) -> Tensor:
        return ((values.nan_to_num() - self.mean) / self.spread).clamp(-CLIP, CLIP)

    def losses(self, guesses: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of the numbers, and of the yes-or-no statistics; unknown ones (NaN) do not count."""
        known, wanted = ~values.isnan() & self.varies, self.standardised(values)
        numbers, flags = known & ~self.binary, known & self.binary
        huber = F.smooth_l1_loss(guesses, wanted, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(guesses, wanted.clamp(0, 1), reduction="none")
        return (
            (huber * numbers).sum() / numbers.sum().clamp(min=1),
            (entropy * flags).sum() / flags.sum().clamp(min=1),
        )


class Targets:
    """Statistics at bars; those of the event bar, of the window and of the rules at the event."""

    def __init__(self, rng: Generator, first: Practice) -> None:
        values, names = _at_event(first.bar_WLP, first.event_WE), [*first.bar_names, *first.event_names]
        self.rules = _draw_rules(rng, values, names)
        self.bar_names, self.event_names = first.bar_names, [*names, *(f"{BINARY}rule_{k}" for k in range(RULES))]
        ruled = np.concatenate([values, self._rule_values(torch.from_numpy(values)).numpy()], axis=1)
        self.bar_scale = Scale.fit(first.bar_WLP, self.bar_names)
        self.event_scale = Scale.fit(ruled, self.event_names)

    def losses(self, bars_XP: Tensor, event_BE: Tensor, bar_BLP: Tensor, window_BE: Tensor) -> dict[str, Tensor]:
        """Weighted losses of guesses at bars and at the event, by name; their sum is what is learnt from."""
        exists_BL = ~bar_BLP[:, :, 0].isnan()
        bar_numbers, bar_flags = self.bar_scale.losses(bars_XP, bar_BLP[exists_BL])
        numbers, flags = self.event_scale.losses(event_BE, self._event_values(bar_BLP, window_BE))
        return {
            "bar numbers": BAR_WEIGHT * bar_numbers,
            "bar flags": BAR_WEIGHT * bar_flags,
            "event numbers": numbers,
            "event flags": flags,
        }

    def explained(self, event_BE: Tensor, bar_BLP: Tensor, window_BE: Tensor) -> dict[str, float]:
        """Share of variance that guesses at the event explain, a mean over numbers, yes-or-no statistics and rules."""
        values, scale = self._event_values(bar_BLP, window_BE), self.event_scale
        known, wanted = ~values.isnan(), scale.standardised(values)
        guesses = torch.where(scale.binary, event_BE.sigmoid(), event_BE)
        count = known.sum(dim=0).clamp(min=1)
        mean = (wanted * known).sum(dim=0) / count
        spread = ((wanted - mean).square() * known).sum(dim=0) / count
        share = 1 - ((guesses - wanted).square() * known).sum(dim=0) / count / spread.clamp(min=1e-6)
        is_rule = torch.arange(len(share)) >= len(share) - RULES
        varies = spread > 0.01
        groups = {"numbers": ~scale.binary, "flags": scale.binary & ~is_rule, "rules": is_rule}
        return {name: float(share[group & varies].mean()) for name, group in groups.items()}

    def _event_values(self, bar_BLP: Tensor, window_BE: Tensor) -> Tensor:
        values = torch.cat([bar_BLP[:, -1], window_BE], dim=1)
        return torch.cat([values, self._rule_values(values)], dim=1)

    def _rule_values(self, values: Tensor) -> Tensor:
        """1 where a rule holds, else 0, of shape (B, R); NaN where one of its statistics is unknown."""
        columns = []
        for rule in self.rules:
            picked, cuts, sides = (torch.tensor(part) for part in zip(*rule, strict=True))
            compared = values[:, picked]
            holds = ((compared - cuts) * sides > 0).all(dim=1).float()
            columns.append(holds.masked_fill(compared.isnan().any(dim=1), torch.nan))
        return torch.stack(columns, dim=1)


def _at_event(bar_WLP: NDArray[np.float32], event_WE: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([bar_WLP[:, -1], event_WE], axis=1)


def _draw_rules(rng: Generator, values: NDArray[np.float32], names: list[str]) -> list[Rule]:
    flags = [column for column, name in enumerate(names) if name.startswith(BINARY)]
    rules = []
    for _ in range(RULES):
        count = int(rng.integers(*RULE_CONDITIONS, endpoint=True))
        picked = [
            int(rng.choice(flags)) if rng.random() < FLAG_CONDITIONS else int(rng.integers(len(names)))
            for _ in range(count)
        ]
        cuts = [
            0.5 if column in flags else float(np.nanquantile(values[:, column], rng.uniform(0.25, 0.75)))
            for column in picked
        ]
        sides = [1 if rng.random() < ABOVE else -1 for _ in picked]
        rules.append(list(zip(picked, cuts, sides, strict=True)))
    return rules
