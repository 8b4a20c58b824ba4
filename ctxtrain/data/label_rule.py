"""Find labels that need no model: a small decision tree on the values of the event reproduces them.

Input: a `Survey` by split, whose sampled rows are read. Output: the rule as lines of text, with the share of labels
that it reproduces on rows it was not fitted on; or None.

The tree reads the fields of the event bar, its close minus its open, and the features. Levels such as prices are inputs
too: if a threshold on them holds on later rows, the labels follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, floor, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.profile import Survey, event_numbers
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Bounds = dict[int, tuple[float, float]]  # by column: the value is above the first number and at most the second

DEPTH = 4
MIN_SHARE = 0.98  # of the labels, and of the labels of each class on average
FIT_SHARE = 0.7  # of the training rows, if there are no validation rows to judge on
MIN_ROWS, MIN_ROWS_PER_CLASS = 30, 5  # for each of fitting and judging; fewer rows prove nothing
# Leaves of fewer rows follow single wrong labels. A rare class of a rule may have no more rows than that.
MIN_ROWS_PER_LEAF = 3
MAX_DIGITS = 15


@dataclass(frozen=True)
class LabelRule:
    """A rule that reproduces labels.

    `share` is the share of the `rows` judged rows whose label it reproduces, `recall` that of each class, and
    `judged_on` says which rows these are. `lines` are the rule: conditions and a class, and the class of all others.
    """

    share: float
    rows: int
    judged_on: str
    recall: dict[str, float]
    lines: list[str]

    def __str__(self) -> str:
        by_class = ", ".join(f"{label} {_percent(share)}" for label, share in self.recall.items())
        return (
            f"a decision tree of depth {DEPTH} on the values at the event reproduces {_percent(self.share)} of the "
            f"labels of {self.rows:,} {self.judged_on} that it was not fitted on ({by_class}). A rule is exact and "
            "needs no model; a model trained on these labels measures the rule, not the market"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_label_rule(surveys: Mapping[str, Survey]) -> LabelRule | None:
    """The rule of a tree fitted to training rows, if it reproduces the labels of later rows.

    It is judged on validation rows, or without 30 of them on the last 30 % of the training rows. It must reproduce more
    than 98 % of all labels and of those of each class on average, so predicting the most common class is not enough.
    Of the sizes of the tree up to depth 4, the smallest of those that reproduce most is the rule.
    Raises ValueError with the reason if the rows are too few to say.
    """
    from sklearn.tree import DecisionTreeClassifier

    names, fitted_NF, fitted_N, judged_NF, judged_N, judged_on = _split_sample(surveys)
    counts_C, judged_C = (np.bincount(labels, minlength=len(LABELS)) for labels in (fitted_N, judged_N))
    tested = np.flatnonzero((counts_C >= MIN_ROWS_PER_CLASS) & (judged_C >= MIN_ROWS_PER_CLASS))
    if min(len(fitted_N), len(judged_N)) < MIN_ROWS or len(tested) < 2:
        raise ValueError(
            f"too few rows, needs {MIN_ROWS} and two classes of at least {MIN_ROWS_PER_CLASS} to fit a tree, and as "
            f"many {judged_on} to judge it"
        )
    if not names:
        return None
    is_tested = np.isin(fitted_N, tested)
    fitted_NF, fitted_N = fitted_NF[is_tested], fitted_N[is_tested]
    classifier = DecisionTreeClassifier(
        max_depth=DEPTH, min_samples_leaf=MIN_ROWS_PER_LEAF, class_weight="balanced", random_state=0
    ).fit(fitted_NF, fitted_N)
    tree = classifier.tree_
    class_K = classifier.classes_[tree.value[:, 0].argmax(axis=1)]
    passes_NK = classifier.decision_path(judged_NF).toarray().astype(np.bool_)  # rows by nodes of the tree
    best, least = None, MIN_SHARE
    splits = _splits(tree)
    for size in range(1, len(splits) + 1):  # the tree of the best splits only: more may follow single wrong labels
        ends = np.array(_ends(tree, splits[:size]))
        is_right_N = class_K[ends[passes_NK[:, ends].argmax(axis=1)]] == judged_N
        share = float(is_right_N.mean())
        recall: dict[str, float] = {LABELS[c]: float(is_right_N[judged_N == c].mean()) for c in tested}
        if (reproduced := min(share, float(np.mean(list(recall.values()))))) > least:
            least, lines = reproduced, describe_tree(tree, class_K, splits[:size], names, fitted_NF)
            best = LabelRule(share, len(judged_N), judged_on, recall, lines)
    return best


def _splits(tree: Any) -> list[int]:
    """The nodes of a tree that divide rows, in the order of growth: the one that separates the classes best is next."""

    def gain(node: int) -> float:
        impurity_K = tree.weighted_n_node_samples * tree.impurity
        return float(impurity_K[node] - impurity_K[tree.children_left[node]] - impurity_K[tree.children_right[node]])

    splits: list[int] = []
    while candidates := [node for node in _ends(tree, splits) if tree.children_left[node] >= 0]:
        splits.append(max(candidates, key=gain))
    return splits


def _ends(tree: Any, splits: Sequence[int]) -> list[int]:
    """The last nodes of a tree that divides rows only at `splits`."""
    children = [int(child[node]) for node in splits for child in (tree.children_left, tree.children_right)]
    return [node for node in (0, *children) if node not in splits]


def _percent(share: float) -> str:
    """Rounded down, so that only a share of 1 is 100 %."""
    return f"{floor(1000 * share) / 10:.1f} %"


def _split_sample(surveys: Mapping[str, Survey]) -> tuple[list[str], Floats, Ints, Floats, Ints, str]:
    """Fields of every sampled row, values and labels of the rows to fit, the same of the rows to judge; their name."""
    splits = [surveys["train"]]
    if "val" in surveys and len(surveys["val"]) >= MIN_ROWS:
        splits.append(surveys["val"])
    numbers = event_numbers(*(survey.sample for survey in splits))
    fields = [set(values) for rows in numbers for values in rows]
    names = sorted(set.intersection(*fields)) if fields else []
    values = [np.array([[row[name] for name in names] for row in rows]) for rows in numbers]
    if {"open", "close"} <= set(names):
        opened, closed = names.index("open"), names.index("close")
        values = [np.column_stack([part, part[:, closed] - part[:, opened]]) for part in values]
        names = [*names, "close - open"]
    labels = [survey.labels_N[survey.sample.rows] for survey in splits]
    if len(splits) == 2:
        return names, values[0], labels[0], values[1], labels[1], "val rows"
    positions = splits[0].positions
    rows = np.array(splits[0].sample.rows, dtype=np.int64)
    is_dated = positions.kind == "dates" and positions.time.known.all()
    order = np.argsort(positions.time.last[rows], kind="stable") if is_dated else np.arange(len(rows))
    first, later = np.split(order, [round(FIT_SHARE * len(order))])
    return names, values[0][first], labels[0][first], values[0][later], labels[0][later], "later train rows"


def describe_tree(tree: Any, class_K: Ints, splits: Sequence[int], names: list[str], values_NF: Floats) -> list[str]:
    """A tree that divides rows only at `splits`, as `if … then CLASS` lines and the class of all other rows.

    `class_K` is the class of each node. The class with the most conditions is the last one, in a tie SKIP.
    """
    conditions: dict[int, list[Bounds]] = {}
    for label, bounds in _leaves(tree, class_K, splits, 0, {}):
        conditions.setdefault(label, []).append(bounds)
    other = max(conditions, key=lambda label: (len(conditions[label]), label))
    lines = [
        f"if {' and '.join(_condition(names[f], values_NF[:, f], bounds[f]) for f in sorted(bounds))} "
        f"then {LABELS[label]}"
        for label in sorted(conditions)
        if label != other
        for bounds in conditions[label]
    ]
    return [*lines, f"else {LABELS[other]}"]


def _leaves(tree: Any, class_K: Ints, splits: Sequence[int], node: int, bounds: Bounds) -> list[tuple[int, Bounds]]:
    """The class and the bounds of each leaf; two branches that end in one class are one leaf."""
    if node not in splits:
        return [(int(class_K[node]), bounds)]
    column, threshold = int(tree.feature[node]), float(tree.threshold[node])
    low, high = bounds.get(column, (-inf, inf))
    left, right = int(tree.children_left[node]), int(tree.children_right[node])
    leaves = _leaves(tree, class_K, splits, left, bounds | {column: (low, threshold)})
    leaves += _leaves(tree, class_K, splits, right, bounds | {column: (threshold, high)})
    return [(leaves[0][0], bounds)] if len({label for label, _ in leaves}) == 1 else leaves


def _condition(name: str, column: Floats, bounds: tuple[float, float]) -> str:
    """Bounds of a field as text. Whole numbers have whole bounds, and a single possible value is named."""
    low, high = bounds
    if (column == np.rint(column)).all():
        least, most = (floor(low) + 1 if low > -inf else -inf), (floor(high) if high < inf else inf)
        possible = np.unique(column[(column >= least) & (column <= most)])
        if len(possible) == 1:
            if " = " in name:  # the indicator of a word
                return name if possible[0] else name.replace(" = ", " ≠ ", 1)
            return f"{name} = {possible[0]:.0f}"
        if low > -inf and high < inf:
            return f"{least} ≤ {name} ≤ {most}"
        return f"{name} ≥ {least}" if low > -inf else f"{name} ≤ {most}"
    below, above = (_shortest(bound, column) if abs(bound) < inf else "" for bound in bounds)
    if below and above:
        return f"{below} < {name} ≤ {above}"
    return f"{name} > {below}" if below else f"{name} ≤ {above}"


def _shortest(threshold: float, column: Floats) -> str:
    """The threshold with as few digits as divide the values in the same way."""
    low, high = column[column <= threshold].max(initial=-inf), column[column > threshold].min(initial=inf)
    for digits in range(1, MAX_DIGITS):
        text = f"{threshold:.{digits}g}"
        if low <= float(text) < high:
            return f"{float(text):,}".removesuffix(".0") if ceil(abs(float(text))) < 10**15 else text
    return repr(threshold)
