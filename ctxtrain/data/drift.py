"""Drift between two splits: one population stability index (PSI) per feature.

Input: surveys of two splits. Output: PSI by feature, and the value that chance alone would give.

PSI = Σ (q − p) ln(q / p) over ten bins of equal mass of the first split's values, or over the values themselves if
there are at most ten (Siddiqi, Credit Risk Scorecards, 2006, chapter 10, with its rule of thumb: above 0.25 the
population has shifted). Half a row is added to each bin. Without drift, PSI / (1/n + 1/m) is about χ² with bins − 1
degrees of freedom for n and m independent rows (Yurdakul and Naranjo 2020), so few rows give large values by chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from ctxtrain.data.profile import Survey, Values, event_numbers

SHIFTED = 0.25
BINS = 10
_EXCLUDED = frozenset({"open", "high", "low", "close", "volume", "delta", "buy_vol", "sell_vol", "atr_14"})


def drift(first: Survey, second: Survey) -> list[dict[str, Any]]:
    """`feature`, `psi`, `chance` and `shifted` of every number that both splits have, largest PSI first.

    Independent rows without drift exceed `chance` once in a thousand times. A feature has shifted if its PSI exceeds
    both `chance` and 0.25.
    """
    samples = _numbers(first, second)
    if not all(samples):
        return []
    entries = []
    for name in sorted(set.intersection(*(set(values) for rows in samples for values in rows))):
        first_N, second_N = (np.array([values[name] for values in rows]) for rows in samples)
        psi, bins = population_stability(first_N, second_N)
        spread = 1 / len(first_N) + 1 / len(second_N)
        chance = 2 * float(gammaincinv((bins - 1) / 2, 0.999)) * spread if bins > 1 else 0.0
        entries.append({"feature": name, "psi": psi, "chance": chance, "shifted": psi > max(SHIFTED, chance)})
    return sorted(entries, key=lambda entry: -float(entry["psi"]))


def population_stability(first_N: NDArray[np.float64], second_N: NDArray[np.float64]) -> tuple[float, int]:
    """PSI of the second sample relative to the first, and the number of bins."""
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


def _numbers(*surveys: Survey) -> list[list[Values]]:
    """Window shape, event flags, features and words by row. Prices and volumes are left out: the shape covers them."""
    numbers = event_numbers(*(surveyed.sample for surveyed in surveys))
    return [
        [
            shape | {name: value for name, value in values.items() if name not in _EXCLUDED}
            for shape, values in zip(surveyed.sample.shape, rows, strict=True)
        ]
        for surveyed, rows in zip(surveys, numbers, strict=True)
    ]
