"""What lets a model know more about the rows that judge it than it will know in the market.

Comes in: a `Survey` by split and, where there are any, digests of the rendered texts. Goes out: findings as plain
values, each with the rows it names and the remedy; and the rows that purging drops.

Purging and embargo: López de Prado, Advances in Financial Machine Learning (2018), section 7.4. Rows whose bars
are also in a window that judges them are dropped from the rows that train; an embargo keeps a distance of more bars.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.duplicates import ANOTHER_TIME, LOOK_ALIKE, Keys, Row, Twins
from ctxtrain.data.positions import Spans, no_common_symbol, spans_of, why_no_spans
from ctxtrain.data.profile import Hashes, Survey
from ctxtrain.labels import LABELS

Ints = NDArray[np.int64]
Finding = dict[str, Any]

BY_PLACE = ("shared bars", "judged on older rows")
TOLD_BY_A_FIELD = "label told by one field"
BY_CONTENT = ("identical window", "identical text", "same id", "two labels for one window", TOLD_BY_A_FIELD)
EXAMPLES = 5
# Share of a class that one field finds, and of the others that it leaves alone: so much is not foresight. A flag that
# is part of the label's own rule stays below 0.85 on simulated rows.
TELLING = 0.9
FEWEST_ROWS, FEWEST_OF_A_CLASS = 30, 5  # fewer cannot show that a field tells the label
MOST_EMBARGO = 2**60  # nanoseconds, 36 years: no sum of it and a time leaves 64 bits
REMEDIES = {
    ANOTHER_TIME: (
        "If the clocks of the two files differ, as by a time zone, these are the same windows: mend the times."
    ),
    LOOK_ALIKE: (
        "So little changes in them that chance may make them equal, and one has no place or another symbol. Give every "
        "bar a time, or remove them from one file if they are the same windows."
    ),
}
REMOVE = "Remove them from one file, or go on with data.allow_leakage=true, which marks every figure."


def find_leaks(surveys: Mapping[str, Survey], texts: Mapping[str, Hashes]) -> list[Finding]:
    """Findings of all kinds, those that are refused first.

    `texts` has 16 bytes of a digest of each row's rendered text, of shape (rows, 2), or is empty.
    """
    spans = _spans(surveys)
    twins = Twins(surveys, spans)
    found: list[Finding] = []
    for pair in combinations(surveys, 2):
        same = twins.pairs(pair, twins.contents)
        found += _twins(pair, "identical window", same, surveys)
        quiet = twins.alike(pair, twins.contents)
        if texts:
            gone = np.zeros(len(surveys[pair[1]]), dtype=np.bool_)
            gone[[row for _, row in same]] = True
            keys = Keys(texts, {pair[1]: gone})
            found += _twins(pair, "identical text", twins.pairs(pair, keys), surveys)
            quiet = twins.alike(pair, keys) | quiet
        found += _same_id(pair, surveys)
        found += _alike(pair, LOOK_ALIKE, [(twin, row) for row, twin in sorted(quiet.items())], surveys)
        found += _alike(pair, ANOTHER_TIME, twins.moved(pair), surveys)
        if spans:
            found += _shared_bars(pair, spans, surveys)
            found += _older(pair, spans, surveys)
    found += _two_labels(surveys, twins)
    found += _telling_fields(surveys["train"])
    return sorted(found, key=lambda finding: not finding["refused"])


def not_found(found: Collection[str], unchecked: Sequence[str]) -> list[str]:
    """The kinds that were looked for in vain, without those that were found."""
    left_out = [what.partition(":")[0] for what in unchecked]
    return [
        kind for kind in (*BY_CONTENT, *BY_PLACE) if kind not in found and not any(kind in what for what in left_out)
    ]


def unchecked(surveys: Mapping[str, Survey]) -> list[str]:
    """What could not be looked for, and after a colon why."""
    missing: list[str] = []
    spans = _spans(surveys)
    places = {name: one.places for name, one in surveys.items()}
    if len(surveys) > 1 and spans is None:
        missing.append(f"{', '.join(BY_PLACE)}: {why_no_spans(places)}")
    if len(surveys) > 1 and spans:
        missing += [
            f"{', '.join(BY_PLACE)} between {first} and {second}: {reason}"
            for (first, second), reason in no_common_symbol(places).items()
        ]
        for split, count in unplaced(spans).items():
            rows = f"{count:,} of {len(surveys[split]):,} {split} rows"
            missing.append(f"where {rows} lie: they lack {spans.scale} on their first or last bar")
    if "train" in surveys:
        labels_N, tellable_N = _tellable(surveys["train"])
        rare = [
            label for c, label in enumerate(LABELS) if c in surveys["train"].labels_N and c not in labels_N[tellable_N]
        ]
        if not len(tellable_N):
            needed = f"{FEWEST_ROWS} training rows, and two classes of {FEWEST_OF_A_CLASS} each"
            missing.append(f"{TOLD_BY_A_FIELD}: it takes {needed}")
        elif rare:
            few = f"fewer than {FEWEST_OF_A_CLASS} of the {len(labels_N):,} training rows looked at"
            missing.append(f"whether a field tells {' or '.join(rare)}: {few}")
    return missing


def overlapping(spans: Spans, name: str, judges: Sequence[str], embargo: int = 0) -> tuple[Ints, list[Row]]:
    """Rows of `name` with a bar in, or within `embargo` bars of, a window of `judges`, each with such a window.

    An embargo of N bars is N times the usual distance of the symbol's bars, so it counts a night or a weekend as time.
    """
    rows, partners = [], []
    for symbol in np.unique(spans.symbol_N[name][spans.placed_N[name]]).tolist():
        own, *others = (_of_symbol(spans, split, symbol) for split in (name, *judges))
        gap = min(MOST_EMBARGO, embargo * round(np.median(spans.bar_N[name][own])))
        judging = list(zip(judges, others, strict=True))
        first = np.concatenate([spans.first_N[judge][chosen] for judge, chosen in judging])
        last = np.concatenate([spans.last_N[judge][chosen] for judge, chosen in judging])
        judge_N = np.repeat(np.arange(len(judging)), [len(chosen) for chosen in others])
        row_N = np.concatenate(others)
        if not len(first):
            continue
        order = np.argsort(first, kind="stable")
        # Of the windows that start before a row ends, the one that ends last overlaps it if any does.
        furthest = np.maximum.accumulate(last[order])
        holder = order[np.maximum.accumulate(np.where(last[order] == furthest, np.arange(len(order)), 0))]
        before = np.searchsorted(first[order], spans.last_N[name][own] + gap, side="right") - 1
        hit = (before >= 0) & (furthest[before] >= spans.first_N[name][own] - gap)
        rows += own[hit].tolist()
        partners += [(judges[judge_N[n]], int(row_N[n])) for n in holder[before[hit]]]
    order = np.argsort(np.array(rows, dtype=np.int64), kind="stable")
    return np.array(rows, dtype=np.int64)[order], [partners[n] for n in order]


def purged_rows(surveys: Mapping[str, Survey], embargo: int) -> dict[str, Ints]:
    """Rows to drop by split: of each split those that share bars with, or lie too near, a later one of the order given.

    Rows without a place may do so too, and go with them. Raises ValueError where there is no scale to place rows on.
    """
    spans = _spans(surveys)
    if spans is None:
        raise ValueError(why_no_spans({name: one.places for name, one in surveys.items()}))
    splits = list(surveys)
    return {
        name: np.union1d(
            overlapping(spans, name, splits[place + 1 :], embargo)[0], np.flatnonzero(~spans.placed_N[name])
        )
        for place, name in enumerate(splits[:-1])
    }


def unplaced(spans: Spans) -> dict[str, int]:
    """How many rows of a file have no place on the scale, where some have none."""
    return {name: int((~placed_N).sum()) for name, placed_N in spans.placed_N.items() if not placed_N.all()}


def told(finding: Finding) -> str:
    """A finding as a line for people."""
    where = " and ".join(finding["files"])
    pairs = "; ".join(" and ".join(pair) for pair in finding["examples"][:2])
    return f"{finding['count']:,} × {finding['kind']} in {where}: {pairs}. {finding['remedy']}"


def _spans(surveys: Mapping[str, Survey]) -> Spans | None:
    return spans_of({name: one.places for name, one in surveys.items()})


def _of_symbol(spans: Spans, name: str, symbol: int) -> Ints:
    return np.flatnonzero((spans.symbol_N[name] == symbol) & spans.placed_N[name])


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
    """Rows whose id stands in both files."""
    first, second = (surveys[name] for name in files)
    rows = {first.file.id(row): row for row in _with_hash_in(first, second)}
    pairs = [(rows[key], row) for row in _with_hash_in(second, first) if (key := second.file.id(row)) in rows]
    names = [[first.names[a], second.names[b]] for a, b in pairs[:EXAMPLES]]
    return [_finding("same id", files, len(pairs), names, REMOVE, refused=True)] if pairs else []


def _with_hash_in(own: Survey, other: Survey) -> list[int]:
    """Rows whose id may be one of the other file's."""
    return np.flatnonzero(np.isin(own.ids_N, other.ids_N) & (own.ids_N != 0)).tolist()


def _twins(
    files: tuple[str, str], kind: str, pairs: Sequence[tuple[int, int]], surveys: Mapping[str, Survey]
) -> list[Finding]:
    names = [[surveys[files[0]].names[a], surveys[files[1]].names[b]] for a, b in pairs[:EXAMPLES]]
    return [_finding(kind, files, len(pairs), names, REMOVE, refused=True)] if pairs else []


def _alike(
    files: tuple[str, str], kind: str, pairs: Sequence[tuple[int, int]], surveys: Mapping[str, Survey]
) -> list[Finding]:
    names = [[surveys[files[0]].names[a], surveys[files[1]].names[b]] for a, b in pairs[:EXAMPLES]]
    return [_finding(kind, files, len(pairs), names, REMEDIES[kind])] if pairs else []


def _shared_bars(files: tuple[str, str], spans: Spans, surveys: Mapping[str, Survey]) -> list[Finding]:
    rows, partners = overlapping(spans, files[0], [files[1]])
    if not len(rows):
        return []
    remedy = f"data.purge=true drops these {len(rows):,} of {len(surveys[files[0]]):,} {files[0]} events."
    examples = zip(rows[:EXAMPLES], partners[:EXAMPLES], strict=True)
    names = [[surveys[files[0]].names[row], surveys[other].names[twin]] for row, (other, twin) in examples]
    return [_finding("shared bars", files, len(rows), names, remedy)]


def _older(files: tuple[str, str], spans: Spans, surveys: Mapping[str, Survey]) -> list[Finding]:
    """Rows of the first file whose event is later than one of the second, by symbol."""
    first, second = files
    count, touching, examples = 0, 0, []
    for symbol in np.intersect1d(spans.symbol_N[first], spans.symbol_N[second]).tolist():
        own, other = (_of_symbol(spans, name, symbol) for name in files)
        if not len(own) or not len(other):
            continue
        events = np.sort(spans.last_N[second][other])
        later = own[spans.last_N[first][own] > events[0]]
        count += len(later)
        before = np.searchsorted(events, spans.last_N[first][later]) - 1  # the last event before the row's own
        distance = spans.first_N[first][later] - events[before]
        touching += int((distance <= 1.5 * spans.bar_N[first][later]).sum())
        oldest = surveys[second].names[other[spans.last_N[second][other].argmin()]]
        examples += [[surveys[first].names[row], oldest] for row in later[:EXAMPLES]]
    if not count:
        return []
    remedy = (
        f"That many of {len(surveys[first]):,} {first} events are later than the first {second} event of their "
        f"symbol; {touching:,} of their windows start less than a bar after a {second} event. "
        "Fine where blocks of time are held out; but the market knows the past only: for that, order the files by time."
    )
    return [_finding("judged on older rows", files, count, examples, remedy)]


def _two_labels(surveys: Mapping[str, Survey], twins: Twins) -> list[Finding]:
    """Windows that are the same and labelled differently, wherever they stand."""
    files: dict[str, None] = {}
    examples = []
    for (other, twin), (name, row) in twins.repeated():
        if surveys[other].labels_N[twin] != surveys[name].labels_N[row]:
            files |= dict.fromkeys((other, name))
            examples.append([surveys[other].names[twin], surveys[name].names[row]])
    remedy = "One window has one outcome: keep the right label, or drop the rows."
    return [_finding("two labels for one window", list(files), len(examples), examples, remedy)] if examples else []


def _telling_fields(train: Survey) -> list[Finding]:
    """Fields whose value at the event predicts all classes, or one of them, almost perfectly, in a small tree.

    Cross-validated over five folds: a class is told if 90 % of its rows are called so, and 90 % of the others are not.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    labels_N, rows = _tellable(train)
    if not len(rows):
        return []
    labels_N, seen = labels_N[rows], [train.sample.values[row] for row in rows]
    found = []
    for name in sorted(set.intersection(*(set(values) for values in seen))):
        column = np.array([values[name] for values in seen])
        if (column == column[0]).all():
            continue
        tree = DecisionTreeClassifier(max_leaf_nodes=8, class_weight="balanced", random_state=0)
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        called_N = cross_val_predict(tree, column[:, None], labels_N, cv=folds)
        classes = [
            LABELS[c]
            for c in np.unique(labels_N)
            if min((called_N[labels_N == c] == c).mean(), (called_N[labels_N != c] != c).mean()) >= TELLING
        ]
        if classes:
            right = int((called_N == labels_N).sum())
            remedy = f"{name} tells {', '.join(classes)} on its own; leave it out if it is not known at the event."
            example = [[name, f"{right:,} of {len(labels_N):,} rows called rightly from it alone"]]
            found.append(_finding(TOLD_BY_A_FIELD, ["train"], right, example, remedy) | {"field": name})
    return found


def _tellable(train: Survey) -> tuple[Ints, Ints]:
    """Labels of the sampled rows, and which of the rows have a class that is frequent enough; none if too few do."""
    labels_N = train.labels_N[train.sample.rows]
    counts_C = np.bincount(labels_N, minlength=len(LABELS))
    rows = np.flatnonzero(counts_C[labels_N] >= FEWEST_OF_A_CLASS)
    enough = len(rows) >= FEWEST_ROWS and (counts_C >= FEWEST_OF_A_CLASS).sum() >= 2
    return labels_N, rows if enough else rows[:0]
