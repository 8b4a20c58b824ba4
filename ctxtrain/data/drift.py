"""Does validation look like training? One number a feature: the population stability index.

Comes in: surveys of two splits. Goes out: PSI by feature, and what chance alone would give.

PSI = Σ (q − p) ln(q / p) over ten bins of equal mass of the first split's values, or over the values themselves where
there are few (Siddiqi, Credit Risk Scorecards, 2006, chapter 10, with its rule of thumb: above 0.25 the population has
shifted). Half a row is added to each bin. Without drift PSI / (1/n + 1/m) is about χ² with bins − 1 degrees of freedom
for n and m independent rows (Yurdakul and Naranjo 2020), so few rows give large values by chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from ctxtrain.data.profile import Survey, Values

SHIFTED = 0.25
BINS = 10
_UNSEEN = frozenset({"open", "high", "low", "close", "volume", "delta", "buy_vol", "sell_vol", "atr_14"})


def drift(first: Survey, second: Survey) -> list[dict[str, Any]]:
    """`feature`, `psi`, `chance` and `shifted` of every number that both splits have, the largest PSI first.

    `chance` is what independent rows without drift exceed once in a thousand times; a feature has shifted if its PSI is
    above that and above 0.25.
    """
    mine, theirs = _numbers(first), _numbers(second)
    if not mine or not theirs:
        return []
    found = []
    for name in sorted(set.intersection(*map(set, mine), *map(set, theirs))):
        ours, others = (np.array([values[name] for values in rows]) for rows in (mine, theirs))
        psi, bins = population_stability(ours, others)
        chance = 2 * float(gammaincinv((bins - 1) / 2, 0.999)) * (1 / len(ours) + 1 / len(others)) if bins > 1 else 0.0
        found.append({"feature": name, "psi": psi, "chance": chance, "shifted": psi > max(SHIFTED, chance)})
    return sorted(found, key=lambda entry: -float(entry["psi"]))


def population_stability(first_N: NDArray[np.float64], second_N: NDArray[np.float64]) -> tuple[float, int]:
    """PSI of the second sample against the first, and the number of bins."""
    values = np.unique(first_N)
    if len(values) <= BINS:
        edges = (values[1:] + values[:-1]) / 2
    else:
        edges = np.unique(np.quantile(first_N, np.arange(1, BINS) / BINS))
    bins = len(edges) + 1
    p, q = (
        (np.bincount(np.searchsorted(edges, sample, side="right"), minlength=bins) + 0.5) / (len(sample) + 0.5 * bins)
        for sample in (first_N, second_N)
    )
    return float(((q - p) * np.log(q / p)).sum()), bins


def _numbers(one: Survey) -> list[Values]:
    """Shape of the windows, flags at the event and features; prices and counts of contracts are seen in the shape."""
    return [
        shape | {name: value for name, value in values.items() if name not in _UNSEEN}
        for shape, values in zip(one.sample.shape, one.sample.values, strict=True)
    ]
