"""Rows as other systems spell them give the windows of the documented form, and each change is said once per file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxtrain.data.notices import Notices
from ctxtrain.data.parse_window import Window, parse_row
from tests.helpers import Row, bars_of, make_row, walk, write_rows


def parsed(row: Row) -> Window:
    window, reasons = parse_row(json.loads(json.dumps(row)), "rows.jsonl:1", labelled=True)
    assert window is not None, reasons
    return window


def renamed(row: Row, spell: Callable[[str], str]) -> Row:
    result: Row = json.loads(json.dumps(row))
    for bar in bars_of(result):
        for name in list(bar):
            bar[spell(name)] = bar.pop(name)
    return result


SHORT = {"open": "o", "high": "h", "low": "l", "close": "c", "volume": "v"}
SPELLINGS: dict[str, Callable[[str], str]] = {
    "first letters": lambda name: SHORT.get(name, name),
    "capital first letters": lambda name: SHORT[name].upper() if name in SHORT else name,
    "capitalised": lambda name: name if name in ("time", "bar_index") else name.capitalize(),
    "upper case": lambda name: name if name in ("time", "bar_index") else name.upper(),
    "vol": lambda name: "Vol" if name == "volume" else name,
}


def same_numbers(found: Window, expected: Window) -> bool:
    equal = {name: values.tolist() for name, values in found.bars.items()}
    return (equal, found.features, found.position) == (
        {name: values.tolist() for name, values in expected.bars.items()},
        expected.features,
        expected.position,
    )


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_names_of_fields_give_the_same_window_and_are_not_reported_as_unread(name: str) -> None:
    row = make_row(seed=3)
    other = renamed(row, SPELLINGS[name])
    window = parsed(other)
    assert same_numbers(window, parsed(row))
    assert window.unread == set()


def as_text(value: Any) -> Any:
    return value if isinstance(value, bool) or not isinstance(value, int | float) else f" {value}"


VALUES: dict[str, Callable[[str, Any], Any]] = {
    "text": lambda name, value: value if name == "time" else as_text(value),
    "floats": lambda name, value: float(value) if isinstance(value, int) else value,
    "text of floats": lambda name, value: str(float(value)) if name != "time" else value,
}


@pytest.mark.parametrize("name", VALUES)
def test_numbers_that_are_text_and_whole_numbers_with_a_point_give_the_same_window(name: str) -> None:
    row = make_row(seed=4, features={"a": 1.5, "b": 2})
    other: Row = json.loads(json.dumps(row))
    for bar in bars_of(other):
        bar |= {field: VALUES[name](field, value) for field, value in bar.items()}
    other["features"] = {field: VALUES[name](field, value) for field, value in other["features"].items()}
    assert same_numbers(parsed(other), parsed(row))


def test_features_may_be_true_and_false() -> None:
    window = parsed(make_row(features={"trend": True, "gap": False, "score": 0.5}))
    assert window.features == {"trend": 1.0, "gap": 0.0, "score": 0.5}


def test_the_documented_name_is_taken_where_both_are_given_and_the_other_stays_unread() -> None:
    row = make_row(seed=5)
    for bar in bars_of(row):
        bar |= {"Close": 1.0, "o": 2.0}
    window = parsed(row)
    assert same_numbers(window, parsed(make_row(seed=5)))
    assert window.unread == {"bars.Close", "bars.o"}


def test_a_field_that_only_some_context_bars_spell_otherwise_is_read() -> None:
    row = make_row(seed=6)
    other: Row = json.loads(json.dumps(row))
    for name, spelled in (("delta", "Delta"), ("close", "C"), ("ext_bos", "EXT_BOS")):
        other["context_bars"][4][spelled] = other["context_bars"][4].pop(name)
    assert same_numbers(parsed(other), parsed(row))
    assert parsed(other).lacking == {}


@pytest.mark.parametrize("null_first", [True, False])
def test_null_counts_as_not_given_beside_another_spelling(null_first: bool) -> None:
    row = make_row(seed=7)
    other: Row = json.loads(json.dumps(row))
    for bar in bars_of(other):
        close = bar.pop("close")
        bar.update({"close": None, "c": close} if null_first else {"c": close, "close": None})
    assert same_numbers(parsed(other), parsed(row))


def test_a_fault_names_the_field_and_the_value_as_the_row_has_them() -> None:
    row = renamed(make_row(), SPELLINGS["capitalised"])
    row["context_bars"][3]["Open"] = "abc"
    row["current_bar"]["Close"] = "1e400"
    _, reasons = parse_row(row, "rows.jsonl:1", labelled=True)
    assert reasons == [
        'context_bars[3].Open must be a valid number, got "abc"',
        'current_bar.Close must be a valid number, got "1e400"',
    ]


@pytest.mark.parametrize("text", ["", "1,5", "1 500", "0x10", "nan", "inf", "1_000", "\uff11"])
def test_text_that_is_no_plain_number_is_refused(text: str) -> None:
    row = make_row()
    row["current_bar"]["close"] = text
    window, reasons = parse_row(row, "rows.jsonl:1", labelled=True)
    assert window is None
    assert reasons == [f"current_bar.close must be a valid number, got {json.dumps(text, ensure_ascii=False)}"]


def test_each_change_is_said_once_with_the_number_of_rows_also_from_a_kept_table(tmp_path: Path) -> None:
    rows = [make_row(seed=seed, flags=False) for seed in range(4)]
    rows += [renamed(row, SPELLINGS["first letters"]) for row in rows[:3]]
    rows[0]["features"] = {"trend": True}
    for bar in bars_of(rows[1]):
        bar["delta"] = str(bar["delta"])
    notices = walk(write_rows(tmp_path / "rows.jsonl", rows)).notices
    lines = [
        "true and false are read as 1 and 0 in the features trend (up to 1 of 7 rows)",
        "c, h, l, o, v in bars are read as close, high, low, open, volume (up to 3 of 7 rows)",
        "text is read as numbers in delta (up to 1 of 7 rows)",
    ]
    assert [line for line in notices.lines() if "read as" in line] == lines
    again = Notices.from_dict(json.loads(json.dumps(notices.to_dict())))
    assert [line for line in again.lines() if "read as" in line] == lines
