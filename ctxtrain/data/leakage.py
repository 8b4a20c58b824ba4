"""Find leakage: information about evaluation rows that is in the training data but will not be known in the market.

Input: a `Survey` by split and, optionally, digests of the rendered texts. Output: findings as plain values, each with
example rows and a remedy. `separation.py` drops rows that share bars with, or lie too close to, another split.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.duplicates import DIFFERENT_TIME, LOOK_ALIKES, DuplicateFinder, RowKeys
from ctxtrain.data.positions import Spans, common_spans, missing_spans_reason, pairs_without_common_symbol
from ctxtrain.data.profile import Hashes, Survey, event_numbers
from ctxtrain.data.separation import Horizon, count_unpositioned, overlapping, rows_of_symbol, rows_within
from ctxtrain.labels import LABELS

Ints = NDArray[np.int64]
Finding = dict[str, Any]

POSITION_KINDS = ("shared bars", "training on later rows")
SINGLE_FIELD = "single-field leakage"
LABEL_OVERLAP = "overlapping labels"  # not among the kinds above, because it needs a label horizon
CONTENT_KINDS = ("identical window", "identical text", "same id", "two labels for one window", SINGLE_FIELD)
EXAMPLES = 5
# A field is reported if it alone predicts a class with this recall and this specificity, too high for a legitimate
# forecast. On simulated rows, a flag that is part of the labelling rule stays below 0.85.
SINGLE_FIELD_RATE = 0.9
NO_HORIZON = Horizon()
MIN_ROWS, MIN_ROWS_PER_CLASS = 30, 5  # with fewer rows, single-field leakage cannot be detected
REMEDIES = {
    DIFFERENT_TIME: (
        "If the clocks of the two files differ, for example by a time zone, these are the same windows: correct the "
        "times."
    ),
    LOOK_ALIKES: (
        "Their prices change so little that they may be equal by chance, and in each pair one row has no position or "
        "another symbol. Give every bar a time, or remove these rows from one file if they are the same windows."
    ),
}
REMOVE = "Remove these rows from one file, or set data.allow_leakage=true, which marks all results as unreliable."


def find_leaks(
    surveys: Mapping[str, Survey], texts: Mapping[str, Hashes], horizon: Horizon = NO_HORIZON
) -> list[Finding]:
    """Findings of all kinds; those that training refuses come first.

    `texts` holds, by split, 16 bytes of a digest of each rendered text, of shape (rows, 2). It may be empty.
    `horizon` is how far labels look ahead.
    """
    spans = _spans_of_splits(surveys)
    finder = DuplicateFinder(surveys, spans)
    findings: list[Finding] = []
    for pair in combinations(surveys, 2):
        identical = finder.pairs(pair, finder.contents)
        findings += _refused(pair, "identical window", identical, surveys)
        look_alikes = finder.alike(pair, finder.contents)
        if texts:
            is_reported = np.zeros(len(surveys[pair[1]]), dtype=np.bool_)
            is_reported[[row for _, row in identical]] = True
            keys = RowKeys(texts, {pair[1]: is_reported})
            findings += _refused(pair, "identical text", finder.pairs(pair, keys), surveys)
            look_alikes = finder.alike(pair, keys) | look_alikes
        findings += _same_id(pair, surveys)
        findings += _reported(pair, LOOK_ALIKES, [(twin, row) for row, twin in sorted(look_alikes.items())], surveys)
        findings += _reported(pair, DIFFERENT_TIME, finder.moved(pair), surveys)
        if spans:
            findings += _shared_bars(pair, spans, surveys)
            findings += _overlapping_labels(pair, spans, surveys, horizon)
            findings += _later_rows(pair, spans, surveys)
    findings += _two_labels(surveys, finder)
    findings += _single_field_leaks(surveys["train"])
    return sorted(findings, key=lambda finding: not finding["refused"])


def kinds_not_found(found: Collection[str], unchecked: Sequence[str]) -> list[str]:
    """The kinds of leakage that were checked and not found."""
    skipped = [check.partition(":")[0] for check in unchecked]
    return [
        kind
        for kind in (*CONTENT_KINDS, *POSITION_KINDS)
        if kind not in found and not any(kind in check for check in skipped)
    ]


def skipped_checks(surveys: Mapping[str, Survey]) -> list[str]:
    """The checks that were not possible, each as `check: reason`."""
    skipped: list[str] = []
    spans = _spans_of_splits(surveys)
    positions = {name: surveyed.positions for name, surveyed in surveys.items()}
    if len(surveys) > 1 and spans is None:
        skipped.append(f"{', '.join(POSITION_KINDS)}: {missing_spans_reason(positions)}")
    if len(surveys) > 1 and spans:
        skipped += [
            f"{', '.join(POSITION_KINDS)} between {first} and {second}: {reason}"
            for (first, second), reason in pairs_without_common_symbol(positions).items()
        ]
        for split, count in count_unpositioned(spans).items():
            rows = f"{count:,} of {len(surveys[split]):,} {split} rows"
            skipped.append(f"the position of {rows}: their first or last bar has no {spans.scale}")
    if "train" in surveys:
        labels_N, testable_N = _testable_rows(surveys["train"])
        rare = [
            label for c, label in enumerate(LABELS) if c in surveys["train"].labels_N and c not in labels_N[testable_N]
        ]
        if not len(testable_N):
            needed = f"{MIN_ROWS} training rows and two classes of at least {MIN_ROWS_PER_CLASS}"
            skipped.append(f"{SINGLE_FIELD}: too few rows, needs {needed}")
        elif rare:
            few = f"fewer than {MIN_ROWS_PER_CLASS} of the {len(labels_N):,} examined training rows have this label"
            skipped.append(f"fields that reveal {' or '.join(rare)}: {few}")
    return skipped


def describe_finding(finding: Finding) -> str:
    """A finding as one line of text."""
    where = " and ".join(finding["files"])
    pairs = "; ".join(" and ".join(pair) for pair in finding["examples"][:2])
    return f"{finding['count']:,} × {finding['kind']} in {where}: {pairs}. {finding['remedy']}"


def _spans_of_splits(surveys: Mapping[str, Survey]) -> Spans | None:
    return common_spans({name: surveyed.positions for name, surveyed in surveys.items()})


def _finding(
    kind: str,
    files: Sequence[str],
    count: int,
    examples: Sequence[Sequence[str]],
    remedy: str,
    *,
    refused: bool = False,
) -> Finding:
    return {
        "kind": kind,
        "files": list(files),
        "count": count,
        "examples": [list(example) for example in examples[:EXAMPLES]],
        "refused": refused,
        "remedy": remedy,
    }


def _same_id(files: tuple[str, str], surveys: Mapping[str, Survey]) -> list[Finding]:
    """Rows whose id occurs in both files."""
    first, second = (surveys[name] for name in files)
    rows = {first.file.id(row): row for row in _with_hash_in(first, second)}
    pairs = [(rows[key], row) for row in _with_hash_in(second, first) if (key := second.file.id(row)) in rows]
    names = [[first.names[a], second.names[b]] for a, b in pairs[:EXAMPLES]]
    return [_finding("same id", files, len(pairs), names, REMOVE, refused=True)] if pairs else []


def _with_hash_in(survey: Survey, other: Survey) -> list[int]:
    """Rows whose id may occur in the other file, because its hash does."""
    return np.flatnonzero(np.isin(survey.ids_N, other.ids_N) & (survey.ids_N != 0)).tolist()


def _refused(
    files: tuple[str, str], kind: str, pairs: Sequence[tuple[int, int]], surveys: Mapping[str, Survey]
) -> list[Finding]:
    names = [[surveys[files[0]].names[a], surveys[files[1]].names[b]] for a, b in pairs[:EXAMPLES]]
    return [_finding(kind, files, len(pairs), names, REMOVE, refused=True)] if pairs else []


def _reported(
    files: tuple[str, str], kind: str, pairs: Sequence[tuple[int, int]], surveys: Mapping[str, Survey]
) -> list[Finding]:
    names = [[surveys[files[0]].names[a], surveys[files[1]].names[b]] for a, b in pairs[:EXAMPLES]]
    return [_finding(kind, files, len(pairs), names, REMEDIES[kind])] if pairs else []


def _shared_bars(files: tuple[str, str], spans: Spans, surveys: Mapping[str, Survey]) -> list[Finding]:
    rows, partners = overlapping(spans, files[0], [files[1]])
    if not len(rows):
        return []
    remedy = f"data.purge=true drops these {len(rows):,} of {len(surveys[files[0]]):,} {files[0]} rows."
    examples = zip(rows[:EXAMPLES], partners[:EXAMPLES], strict=True)
    names = [[surveys[files[0]].names[row], surveys[other].names[twin]] for row, (other, twin) in examples]
    return [_finding("shared bars", files, len(rows), names, remedy)]


def _overlapping_labels(
    files: tuple[str, str], spans: Spans, surveys: Mapping[str, Survey], horizon: Horizon
) -> list[Finding]:
    """Rows of the first file that share no bar with the second, but whose label, or that of the other row, does."""
    if not horizon.bars:
        return []
    first, second = files
    close = rows_within(surveys, first, [second], horizon.bars)
    for row in overlapping(spans, first, [second])[0].tolist():
        close.pop(row, None)
    if not close:
        return []
    remedy = (
        f"{horizon}, so labels of these rows, out of {len(surveys[first]):,} in {first}, depend on bars of a {second} "
        f"row, or the reverse. Training drops these rows, unless data.purge=false or data.embargo is smaller."
    )
    names = [[surveys[first].names[row], surveys[other].names[twin]] for row, (other, twin) in close.items()][:EXAMPLES]
    return [_finding(LABEL_OVERLAP, files, len(close), names, remedy)]


def _later_rows(files: tuple[str, str], spans: Spans, surveys: Mapping[str, Survey]) -> list[Finding]:
    """Rows of the first file whose event is later than the first event of the second file, by symbol."""
    first, second = files
    count, touching, examples = 0, 0, []
    for symbol in np.intersect1d(spans.symbol_N[first], spans.symbol_N[second]).tolist():
        own_N, other_N = (rows_of_symbol(spans, name, symbol) for name in files)
        if not len(own_N) or not len(other_N):
            continue
        events = np.sort(spans.last_N[second][other_N])
        later = own_N[spans.last_N[first][own_N] > events[0]]
        count += len(later)
        before = np.searchsorted(events, spans.last_N[first][later]) - 1
        distance = spans.first_N[first][later] - events[before]
        touching += int((distance <= 1.5 * spans.bar_N[first][later]).sum())
        oldest = surveys[second].names[other_N[spans.last_N[second][other_N].argmin()]]
        examples += [[surveys[first].names[row], oldest] for row in later[:EXAMPLES]]
    if not count:
        return []
    remedy = (
        f"These rows, out of {len(surveys[first]):,} in {first}, are later than the first {second} row of their "
        f"symbol; {touching:,} of them have no bar between their window and an earlier {second} event. This is correct "
        "only if you hold out blocks of time on purpose. Otherwise split the files by time."
    )
    return [_finding("training on later rows", files, count, examples, remedy)]


def _two_labels(surveys: Mapping[str, Survey], finder: DuplicateFinder) -> list[Finding]:
    """Equal windows with different labels, within one file or in two files."""
    files: dict[str, None] = {}
    examples = []
    for (other, twin), (name, row) in finder.repeated():
        if surveys[other].labels_N[twin] != surveys[name].labels_N[row]:
            files |= dict.fromkeys((other, name))
            examples.append([surveys[other].names[twin], surveys[name].names[row]])
    remedy = "Equal windows must have one label. Keep the rows with the right label, or remove all of them."
    return [_finding("two labels for one window", list(files), len(examples), examples, remedy)] if examples else []


def _single_field_leaks(train: Survey) -> list[Finding]:
    """Fields whose value at the event is enough for a small decision tree to predict a class almost perfectly.

    The tree is scored by five-fold cross-validation. A class is reported if it is predicted for at least 90 % of its
    rows and for at most 10 % of the other rows.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    labels_N, rows = _testable_rows(train)
    if not len(rows):
        return []
    (numbers,) = event_numbers(train.sample)
    labels_N, sampled = labels_N[rows], [numbers[row] for row in rows]
    findings = []
    for name in sorted(set.intersection(*(set(values) for values in sampled))):
        column = np.array([values[name] for values in sampled])
        if (column == column[0]).all():
            continue
        tree = DecisionTreeClassifier(max_leaf_nodes=8, class_weight="balanced", random_state=0)
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        predicted_N = cross_val_predict(tree, column[:, None], labels_N, cv=folds)
        classes = [
            LABELS[c]
            for c in np.unique(labels_N)
            if (predicted_N[labels_N == c] == c).mean() >= SINGLE_FIELD_RATE
            and (predicted_N[labels_N != c] != c).mean() >= SINGLE_FIELD_RATE
        ]
        if classes:
            correct = int((predicted_N == labels_N).sum())
            remedy = f"{name} alone predicts {', '.join(classes)}. Remove it if it is not known at the event."
            example = [[name, f"{correct:,} of {len(labels_N):,} rows predicted correctly from it alone"]]
            findings.append(_finding(SINGLE_FIELD, ["train"], correct, example, remedy) | {"field": name})
    return findings


def _testable_rows(train: Survey) -> tuple[Ints, Ints]:
    """Labels of the sampled rows, and which of them have a class with enough rows; none of them if too few remain."""
    labels_N = train.labels_N[train.sample.rows]
    counts_C = np.bincount(labels_N, minlength=len(LABELS))
    rows = np.flatnonzero(counts_C[labels_N] >= MIN_ROWS_PER_CLASS)
    is_enough = len(rows) >= MIN_ROWS and (counts_C >= MIN_ROWS_PER_CLASS).sum() >= 2
    return labels_N, rows if is_enough else rows[:0]
