"""Label horizon and outcome of a row: what is read, what is refused, and that no model sees them."""

import json
from pathlib import Path
from typing import Any

import pytest

from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.profile import survey
from ctxtrain.data.window_file import WindowFile
from ctxtrain.model.embedded import build_tokenizer
from tests.helpers import Row, make_row, walk, write_rows

OUTCOME = {"long_r": 1.5, "short_r": -1.0, "cost": 0.05}


def parsed(row: object, *, labelled: bool = True) -> tuple[Window | None, list[str]]:
    return parse_row(json.loads(json.dumps(row)), "rows.jsonl:1", labelled=labelled)


def valid(row: Row) -> Window:
    window, reasons = parsed(row)
    assert window is not None, reasons
    return window


@pytest.mark.parametrize("kind", ["compact", "json"])
@pytest.mark.parametrize(
    "changes",
    [{"label": "SHORT"}, {"label_horizon": 12}, {"outcome": OUTCOME}],
    ids=lambda changes: next(iter(changes)),
)
def test_label_horizon_and_outcome_change_no_token(kind: Any, changes: Row) -> None:
    row = make_row("LONG", features={"spread": 1.5}, label_horizon=3, outcome={"long_r": -1, "short_r": 2})
    tokenizer, texts = build_tokenizer(), []
    for one in (row, row | changes):
        window = valid(one)
        texts.append(fit_codec(kind, [window]).render(window))  # fitted to the same row: the fit sees no label either
    assert tokenizer(texts[0])["input_ids"] == tokenizer(texts[1])["input_ids"]


@pytest.mark.parametrize("field", ["label_horizon", "outcome"])
def test_null_is_not_given(field: str) -> None:
    assert valid(make_row() | {field: None}).label_horizon is None


@pytest.mark.parametrize(("value", "kind"), [(12, None), (12.0, "whole"), ("12", "text"), (" 12 ", "text")])
def test_a_label_horizon_is_read_as_other_systems_write_it(value: object, kind: str | None) -> None:
    window = valid(make_row(label_horizon=value))
    assert (window.label_horizon, type(window.label_horizon)) == (12, int)
    assert window.changes == ({(kind, "label_horizon", "")} if kind else set())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_horizon": -1}, "label_horizon must be a whole number of bars, 0 to 10,000,000, got -1"),
        ({"label_horizon": 1.5}, "label_horizon must be a whole number of bars, 0 to 10,000,000, got 1.5"),
        ({"label_horizon": True}, "label_horizon must be a whole number of bars, 0 to 10,000,000, got true"),
        ({"label_horizon": 10**7 + 1}, "label_horizon must be a whole number of bars, 0 to 10,000,000, got 10000001"),
        ({"outcome": {"long_r": 1}}, "outcome.short_r is missing"),
        (
            {"outcome": OUTCOME | {"cost": -0.1}},
            "outcome.cost must be a number from 0 to 1,000,000,000, got -0.1",
        ),
        (
            {"outcome": OUTCOME | {"long_r": "big"}},
            'outcome.long_r must be a number from -1,000,000,000 to 1,000,000,000, got "big"',
        ),
        (
            {"outcome": OUTCOME | {"long_r": False}},
            "outcome.long_r must be a number from -1,000,000,000 to 1,000,000,000, got false",
        ),
    ],
)
@pytest.mark.parametrize("row", [make_row(), {"context": "a prompt", "label": "LONG"}], ids=["window", "text"])
def test_label_side_fields_of_another_form_are_refused_where_rows_are_labelled(
    row: Row, changes: Row, message: str
) -> None:
    assert parsed(row | changes) == (None, [message])
    window, reasons = parsed(row | changes, labelled=False)
    assert window is not None
    assert (window.label_horizon, reasons) == (None, [])


def test_all_label_side_faults_of_a_row_are_listed() -> None:
    row = make_row(label_horizon=-1, outcome={"long_r": None}) | {"label": "UP"}
    assert [reason.partition(" ")[0] for reason in parsed(row)[1]] == [
        "label",
        "label_horizon",
        "outcome.long_r",
        "outcome.short_r",
    ]


@pytest.mark.parametrize("outcome", ["WIN", 1.5, {}, {"pnl": 3}])
def test_an_outcome_of_another_system_is_named_as_unread(outcome: object) -> None:
    assert "outcome" in valid(make_row(outcome=outcome)).unread


@pytest.mark.parametrize("text", [False, True])
def test_what_was_read_otherwise_is_said_once_and_an_outcome_is_not_read(text: bool, tmp_path: Path) -> None:
    rows = [{"context": f"prompt {n}", "label": "SKIP"} if text else make_row(seed=n) for n in range(3)]
    rows[1] |= {"label_horizon": 4.0, "outcome": {"long_r": "1", "short_r": -1}}
    report = walk(write_rows(tmp_path / "rows.jsonl", rows))
    assert list(report.notices.lines())[:2] == [
        "text is read as numbers in outcome.long_r (up to 1 of 3 rows)",
        "numbers with a decimal point are read as whole in label_horizon (up to 1 of 3 rows)",
    ]
    assert report.ignored_fields == {"outcome": 1}


def test_a_survey_keeps_the_horizon_of_each_row(tmp_path: Path) -> None:
    rows = [make_row(seed=n) | ({"label_horizon": 5 * n} if n != 1 else {}) for n in range(3)]
    found, _ = survey(WindowFile(write_rows(tmp_path / "rows.jsonl", rows)))
    assert found.horizons_N.tolist() == [0, -1, 10]
