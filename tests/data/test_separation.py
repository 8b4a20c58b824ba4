"""The horizon of labels decides which rows are purged, and a setting that is too small wins with a note."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain.config.schema import Config
from ctxtrain.data.check import check_files
from ctxtrain.data.dataset import read_splits
from ctxtrain.data.separation import Separation
from ctxtrain.data.walk_forward import cut_folds
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.training.inputs import dataset_settings
from tests.helpers import Row, bars_of, dated_rows, make_row, write_rows

APART = 40  # bars from event to event; windows have 30, so a window begins 11 bars after the event before it
TO_NEXT = 11
SAID = "labels look 11 bars ahead (the largest label_horizon of the rows)"


def split_files(folder: Path, horizons: dict[int, Any], rows: list[Row] | None = None) -> dict[str, WindowFile]:
    """Ten rows to train and ten to validate, in time order; `horizons` by row number."""
    rows = rows or dated_rows(20, seed=1, apart=APART)
    for n, horizon in horizons.items():
        rows[n]["label_horizon"] = horizon
    parts = {"train": rows[:10], "val": rows[10:]}
    return {name: WindowFile(write_rows(folder / f"{name}.jsonl", part)) for name, part in parts.items()}


def separated(files: dict[str, WindowFile], *overrides: str) -> tuple[int, Separation]:
    """The number of train rows that remain, and the separation."""
    tree = {"data": {"train": "a", "val": "b"}, "output_dir": "c"}
    settings = dataset_settings(Config.parse(tree, overrides))
    surveys, separation, _ = read_splits(files, settings["purge"], settings["embargo"], settings["label_horizon"])
    return len(surveys["train"]), separation


@pytest.mark.parametrize(("horizon", "kept"), [(TO_NEXT - 1, 10), (TO_NEXT, 9), (TO_NEXT + APART, 8)])
def test_rows_whose_label_looks_into_a_later_split_are_dropped(horizon: int, kept: int, tmp_path: Path) -> None:
    rows, separation = separated(split_files(tmp_path, dict.fromkeys(range(20), horizon)))
    assert (rows, separation.purge, separation.embargo) == (kept, True, horizon)
    assert separation.notes == (
        (
            f"labels look {horizon} bars ahead (the largest label_horizon of the rows); rows that share bars with "
            f"a later split, or are within {horizon} bars of one, are dropped"
        ),
    )


def test_without_a_horizon_nothing_is_dropped_or_said(tmp_path: Path) -> None:
    for horizons in ({}, dict.fromkeys(range(20), 0)):
        rows, separation = separated(split_files(tmp_path, horizons))
        assert (rows, separation.purge, separation.notes) == (10, False, ())


def test_the_largest_horizon_of_any_file_counts_and_rows_without_one_are_counted(tmp_path: Path) -> None:
    rows, separation = separated(split_files(tmp_path, {2: 3, 15: TO_NEXT}))
    assert rows == 9
    assert separation.notes[0].startswith(
        "labels look 11 bars ahead (the largest label_horizon of the 2 of 20 rows that have one); rows"
    )


@pytest.mark.parametrize(
    ("overrides", "kept", "note"),
    [
        (
            ["data.purge=false"],
            10,
            (
                f"{SAID}, but data.purge=false keeps rows whose labels depend on bars of a later split. Set "
                "data.purge=auto to drop them"
            ),
        ),
        (
            ["data.embargo=5"],
            10,
            (
                f"{SAID}, but data.embargo=5 is smaller: it keeps rows whose labels depend on bars of a later split. "
                "Set data.embargo=auto"
            ),
        ),
        (
            [f"data.embargo={TO_NEXT + APART}"],
            8,
            f"{SAID}; rows that share bars with a later split, or are within 51 bars of one, are dropped",
        ),
        (
            ["data.label_horizon=3"],
            10,
            "data.label_horizon=3 is smaller than the largest label_horizon of the rows, 11",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_setting_wins_over_the_rows_and_is_said(overrides: list[str], kept: int, note: str, tmp_path: Path) -> None:
    rows, separation = separated(split_files(tmp_path, dict.fromkeys(range(20), TO_NEXT)), *overrides)
    assert (rows, separation.notes[0]) == (kept, note)


def test_a_horizon_of_the_config_needs_none_in_the_rows(tmp_path: Path) -> None:
    rows, separation = separated(split_files(tmp_path, {}), f"data.label_horizon={TO_NEXT}")
    assert rows == 9
    assert separation.notes[0].startswith("labels look 11 bars ahead (data.label_horizon); rows")


def test_an_embargo_without_a_horizon_purges(tmp_path: Path) -> None:
    assert separated(split_files(tmp_path, {}), f"data.embargo={TO_NEXT}")[0] == 9
    assert separated(split_files(tmp_path, {}), f"data.embargo={TO_NEXT - 1}")[0] == 10


def test_rows_without_positions_train_with_a_note_unless_purging_is_demanded(tmp_path: Path) -> None:
    rows = [make_row(("LONG", "SHORT")[n % 2], seed=n, place=False) for n in range(20)]
    files = split_files(tmp_path, dict.fromkeys(range(20), 3), rows)
    kept, separation = separated(files)
    assert (kept, separation.purge) == (10, False)
    assert separation.notes == (
        (
            "labels look 3 bars ahead (the largest label_horizon of the rows), but rows whose labels depend on bars "
            "of a later split cannot be dropped: some rows have neither time nor bar_index on every bar. Give every "
            "bar a time of one kind"
        ),
    )
    for demand in ("data.purge=true", "data.embargo=3"):
        with pytest.raises(ConfigError, match=r"data\.purge needs the position of each window"):
            separated(files, demand)


def test_a_split_that_cannot_be_purged_says_how_to_keep_the_rows(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"all 10 of train share bars with, or lie within 500 bars of, .*data\.purge=false"
    ):
        separated(split_files(tmp_path, {0: 500}))


def test_bars_are_counted_by_bar_index_over_a_weekend(tmp_path: Path) -> None:
    rows = dated_rows(20, seed=1, apart=APART)
    for row in rows[10:]:
        for bar in bars_of(row):
            bar["time"] = f"{np.datetime64(bar['time'].rstrip('Z')) + np.timedelta64(2, 'D')}Z"
    for row in rows:
        row["label_horizon"] = TO_NEXT
    kept = deepcopy(rows)
    assert separated(split_files(tmp_path, {}, rows))[0] == 9
    for row in kept:
        for bar in bars_of(row):
            del bar["bar_index"]
    assert separated(split_files(tmp_path, {}, kept))[0] == 10  # by time alone, two days are more than 11 bars


@pytest.mark.parametrize(("override", "purged"), [([], 1), (["data.embargo=0"], 0), (["data.purge=false"], 0)])
def test_folds_are_purged_by_the_horizon_too(override: list[str], purged: int, tmp_path: Path) -> None:
    rows = dated_rows(60, seed=1, apart=APART)
    for row in rows:
        row["label_horizon"] = TO_NEXT
    for fold in cut_folds(WindowFile(write_rows(tmp_path / "rows.jsonl", rows)), 2):
        separation = separated(fold, "evaluation.folds=2", *override)
        assert separation[0] == len(fold["train"]) - purged
        assert separation[1].purge is (override != ["data.purge=false"])


def test_check_reports_labels_that_look_into_another_file(tmp_path: Path) -> None:
    for horizon, count in ((TO_NEXT - 1, 0), (TO_NEXT, 1), (TO_NEXT + APART, 2)):
        files = split_files(tmp_path, dict.fromkeys(range(20), horizon))
        report = check_files({name: file.source for name, file in files.items()})
        leaks = [leak for leak in report["leaks"] if leak["kind"] == "overlapping labels"]
        assert [leak["count"] for leak in leaks] == [count] * bool(count)
        assert report["label_horizon"] == {"bars": horizon, "source": "the largest label_horizon of the rows"}
        json.dumps(report)
    (leak,) = leaks
    assert (leak["files"], leak["refused"]) == (["train", "val"], False)
    assert [pair[0] for pair in leak["examples"]] == [
        f"row-{100_000 + n} ({tmp_path}/train.jsonl:{n + 1})" for n in (8, 9)
    ]
    assert leak["remedy"] == (
        "labels look 51 bars ahead (the largest label_horizon of the rows), so labels of these rows, out of 10 in "
        "train, depend on bars of a val row, or the reverse. Training drops these rows, unless data.purge=false or "
        "data.embargo is smaller."
    )


def test_a_row_that_shares_bars_is_not_reported_a_second_time_for_its_label(tmp_path: Path) -> None:
    files = split_files(tmp_path, {0: 3}, dated_rows(20, seed=1, apart=29))
    report = check_files({name: file.source for name, file in files.items()})
    assert [(leak["kind"], leak["count"]) for leak in report["leaks"]] == [("shared bars", 1)]
