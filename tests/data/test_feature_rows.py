"""Rows of features without bars, and features that are words, true or false, null, or objects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ctxtrain.data.check import check_files
from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.time_units import bar_length
from ctxtrain.data.window_file import load_windows
from ctxtrain.errors import DataError
from tests.helpers import Row, dated_rows, make_row, make_window, read, write_rows

# A row of a labeller that writes engineered features only.
EVENT: Row = {
    "id": "6E-M1-20251123-12345",
    "features": {
        "ext_dir": 1,
        "ext_choch_down": True,
        "mgann_leg_index": 2,
        "mgann_leg_first_fvg": True,
        "wave_strength": 0.71,
        "atr": 0.00025,
        "session": "London",
    },
    "label": "long",
}


def feature_row(seed: int = 0, **features: Any) -> Row:
    rng = np.random.default_rng(seed)
    values = {
        "wave_strength": float(rng.random()),
        "ext_dir": int(rng.integers(-1, 2)),
        "fvg_up": bool(rng.random() < 0.5),
        "session": str(rng.choice(["Asia", "London", "NY"])),
    }
    return {"id": f"e{seed}", "features": values | features, "label": "SKIP"}


def window_of(row: Row) -> Window:
    window, reasons = parse_row(json.loads(json.dumps(row)), "rows.jsonl:1", labelled=True)
    assert window is not None, reasons
    return window


def test_numbers_flags_and_words_of_a_row_without_bars_are_read() -> None:
    window = window_of(EVENT)
    assert window.kind == "features"
    assert window.features == {
        "ext_dir": 1,
        "ext_choch_down": 1,
        "mgann_leg_index": 2,
        "mgann_leg_first_fvg": 1,
        "wave_strength": 0.71,
        "atr": 0.00025,
    }
    assert window.feature_words == {"session": "London"}
    assert window.unread == frozenset()


def test_its_text_is_a_score_for_each_number_and_a_character_for_each_word() -> None:
    windows = [window_of(feature_row(seed)) for seed in range(30)]
    codec = fit_codec("compact", windows)
    assert list(codec.features) == ["ext_dir", "fvg_up", "wave_strength"]
    text = codec.render(windows[0])
    scores = [(windows[0].features[name] - scale.centre) / scale.spread for name, scale in codec.features.items()]
    place = codec.feature_words["session"].words.index(windows[0].feature_words["session"])
    assert text == "".join(f"z{round(score * 10 + 50):02d}" for score in scores) + f"p{place}?"
    assert codec.render(window_of(feature_row(0, session="Sydney"))).endswith("p-?")
    assert codec.unseen_words(window_of(feature_row(0, session="Sydney"))) == ["features.session"]


def test_the_json_codec_writes_features_as_they_are() -> None:
    windows = [window_of(feature_row(seed)) for seed in range(3)]
    written = json.loads(fit_codec("json", windows).render(windows[1]))
    expected = feature_row(1)["features"]
    assert written == {"bars": [], "features": {**expected, "fvg_up": float(expected["fvg_up"])}}


def test_an_event_is_placed_by_the_time_of_its_row_under_any_usual_name() -> None:
    for name in ("time", "timestamp_utc", "Timestamp"):
        window = window_of(feature_row() | {name: "2025-11-23T10:30:00Z", "timeframe": "M5"})
        assert window.position.event == "2025-11-23T10:30:00+00:00"
        assert window.position.time is not None
        assert window.position.time.step == 300 * 10**9
        assert window.unread == frozenset()
    assert window_of(feature_row()).position.time is None
    _, reasons = parse_row(feature_row() | {"time": "soon"}, "rows.jsonl:1", labelled=True)
    assert reasons == ['time must be ISO 8601 text or a number, got "soon"']


def test_windows_can_have_words_too() -> None:
    rows = [make_row(seed=seed, features={"session": word, "rsi": 1.0 * seed}) for seed, word in enumerate("abca")]
    codec = fit_codec("compact", [make_window(row) for row in rows])
    assert codec.feature_words["session"].words == ["a", "b", "c"]
    assert codec.render(make_window(rows[2])).endswith("p2?")


def test_objects_and_arrays_are_unread_and_blank_text_is_missing() -> None:
    window = window_of(feature_row(reason=["a"], gap={"high": 1}, note=" "))
    assert window.unread == {"features.reason", "features.gap"}
    assert window.lacking == {"features.note": 0}


def test_an_object_flag_is_true_and_null_is_false() -> None:
    name = "mgann_leg_first_fvg"
    assert window_of(feature_row(mgann_leg_first_fvg={"high": 1.1, "low": 1.0})).features[name] == 1
    absent = window_of(feature_row(mgann_leg_first_fvg=None))
    assert absent.features[name] == 0
    assert absent.changes >= {("object", f"features.{name}", "")}
    row = make_row()
    for bar in [*row["context_bars"], row["current_bar"]]:
        bar[name] = None
    row["current_bar"][name] = {"high": 1.1, "low": 1.0, "type": "bullish"}
    window = make_window(row)
    assert window.bars[name].tolist() == [0] * 29 + [1]
    assert window.changes == {("object", name, "")}


def test_a_feature_that_is_a_word_in_one_row_and_a_number_in_another_is_refused_with_both_places() -> None:
    rows = [feature_row(0), feature_row(1, session=3)]
    (fault,) = read([json.dumps(row).encode() for row in rows]).faults
    assert fault == (
        "rows.jsonl:1: features.session must be a number in all rows of a file, or a word in all of them, but here it "
        "is a word, and a number at rows.jsonl:2"
    )


def test_a_file_of_windows_and_rows_without_bars_is_refused() -> None:
    (fault,) = read([json.dumps(row).encode() for row in (make_row(), feature_row())]).faults
    mixed = "mixes window rows (context_bars) and rows of features without bars"
    assert fault == f"rows.jsonl:2: {mixed}; a file must have one kind of row"


def test_rows_without_bars_must_share_a_feature() -> None:
    rows = [{"features": {"a": 1.0}, "label": "LONG"}, {"features": {"b": 1.0}, "label": "LONG"}]
    with pytest.raises(DataError, match="must have a feature that every training row has"):
        fit_codec("compact", [window_of(row) for row in rows])


def test_words_and_other_ids_are_said_once_with_their_rows() -> None:
    rows = [feature_row(0), feature_row(1) | {"id": None, "event_id": "x"}, feature_row(2) | {"id": 7.0}]
    lines = list(read([json.dumps(row).encode() for row in rows]).notices.lines())
    assert lines == [
        "true and false are read as 1 and 0 in the features fvg_up (up to 3 of 3 rows)",
        "event_id is read as the id (1 of 3 rows)",
        "numbers with a decimal point are read as whole in id (up to 1 of 3 rows)",
        "features.session is a word in 3 of 3 rows, and is read as a category",
    ]


@pytest.mark.parametrize(
    "text",
    ["4\u00a0100,5", "\u22125", "\uff11\uff12", "$5", "(5.2)", "1;5", "0x10", "1.#IND", "N/A", "NULL", "{}", "--"],
)
def test_text_that_is_a_number_in_another_notation_or_no_value_is_no_category(text: str) -> None:
    _, reasons = parse_row(feature_row(price=text), "rows.jsonl:1", labelled=True)
    assert [reason.partition(",")[0] for reason in reasons] == ["features.price must be a number"]


@pytest.mark.parametrize("text", ["London", "5m", "Q1", "no_touch", "long/short", "sp\u00e4t", "none", "R&D"])
def test_words_with_digits_and_marks_are_categories(text: str) -> None:
    assert window_of(feature_row(kind=text)).feature_words["kind"] == text


def test_a_row_whose_bars_have_another_name_is_refused_even_if_it_has_features() -> None:
    bars = make_row()["context_bars"]
    for name, value in (("bars", bars), ("contextBars", bars), ("bar", bars[0])):
        _, reasons = parse_row(feature_row() | {name: value}, "rows.jsonl:1", labelled=True)
        assert reasons == [f"{name} holds bars, but only context_bars and current_bar are read"]


def test_null_fields_of_a_row_are_not_given() -> None:
    nulls = {"context_bars": None, "current_bar": None, "context": None}
    assert window_of(feature_row() | nulls).kind == "features"
    assert make_window(make_row() | {"context": None, "features": None}).kind == "window"
    text, _ = parse_row({"context": "up?", "features": None, "label": "LONG"}, "a:1", labelled=True)
    assert text is not None
    assert text.kind == "text"


def test_a_feature_of_another_kind_than_in_training_is_named_with_its_value() -> None:
    codec = fit_codec("compact", [window_of(feature_row(seed)) for seed in range(5)])
    assert codec.fault(window_of(feature_row(wave_strength="high"))) == (
        'features.wave_strength must be a number, as in the training rows, got "high"'
    )
    assert codec.fault(window_of(feature_row(session=5))) == (
        "features.session must be a word, as in the training rows, got 5"
    )


def test_empty_features_are_named() -> None:
    _, reasons = parse_row({"features": {}, "label": "LONG"}, "rows.jsonl:1", labelled=True)
    assert reasons == ["features must have at least one entry, got none"]


@pytest.mark.parametrize("event_id", [{"a": 1}, 1.5, True])
def test_an_event_id_that_is_no_id_is_unread(event_id: object) -> None:
    row = feature_row() | {"id": None, "event_id": event_id}
    window = window_of(row)
    assert window.id is None
    assert window.unread == {"event_id"}


@pytest.mark.parametrize(
    ("timeframe", "minutes"),
    [
        ("M5", 5),
        ("5m", 5),
        ("5 minutes", 5),
        ("1 hour", 60),
        ("H4", 240),
        ("D", 1440),
        (15, 15),
        ("1M", 0),
        ("tick", 0),
    ],
)
def test_a_timeframe_is_the_bar_length_of_a_row_without_bars(timeframe: object, minutes: int) -> None:
    assert bar_length(timeframe) == minutes * 60 * 10**9


def test_a_time_that_cannot_be_read_is_said() -> None:
    reading = read([json.dumps(feature_row() | {"timestamp": "03/04/2025 10:00"}).encode()])
    assert any(line.startswith("timestamp is not used as the time") for line in reading.notices.lines())


def test_null_means_false_in_parquet_too_where_it_does_in_json(tmp_path: Path) -> None:
    rows = [make_row(seed=seed) for seed in range(3)]
    for n, row in enumerate(rows):
        for place, bar in enumerate([*row["context_bars"], row["current_bar"]]):
            bar["mgann_leg_first_fvg"] = {"high": 1.0} if place % 7 == n else None
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    texts = [
        list(fit_codec("compact", windows).render_all(windows))
        for windows in (load_windows(lines), load_windows(tmp_path / "rows.parquet"))
    ]
    assert texts[0] == texts[1]
    assert all("T" in text for text in texts[0])


def leaky(count: int, seed: int, hint: Callable[[str], Any]) -> list[Row]:
    rows = dated_rows(count, seed, apart=60)
    for n, row in enumerate(rows):
        row["label"] = ("LONG", "SHORT", "SKIP")[n % 3]
        row["features"] = {"hint": hint(row["label"])}
    return rows


def test_a_word_that_reveals_the_label_is_found_and_its_rule_printed(tmp_path: Path) -> None:
    words = {"LONG": "buy", "SHORT": "sell", "SKIP": "wait"}
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", leaky(count, seed, words.__getitem__))
        for seed, (name, count) in enumerate({"train": 120, "val": 60}.items())
    }
    report = check_files(files)
    assert [leak["field"] for leak in report["leaks"] if leak["kind"] == "single-field leakage"] == [
        f"features.hint = {word}" for word in ("buy", "sell", "wait")
    ]
    rule = report["label_rule"]
    assert rule["share"] == 1
    assert [line.rpartition(" ")[2] for line in rule["lines"]] == ["LONG", "SHORT", "SKIP"]
    assert "features.hint = sell" in rule["lines"][1]


def test_drift_of_words_is_measured(tmp_path: Path) -> None:
    names = {"train": ("London", "NY"), "val": ("Tokyo", "Sydney")}
    files = {}
    for seed, (name, words) in enumerate(names.items()):
        rows = dated_rows(60, seed, apart=60)
        for n, row in enumerate(rows):
            row["features"] = {"session": words[n % 2]}
        files[name] = write_rows(tmp_path / f"{name}.jsonl", rows)
    shifted = {entry["feature"] for entry in check_files(files)["drift"]["val"] if entry["shifted"]}
    assert {"features.session = London", "features.session = NY"} <= shifted


def test_rows_of_few_states_are_no_duplicates(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def states(count: int, **fields: Any) -> list[Row]:
        return [
            {"features": {"dir": int(rng.integers(-1, 2)), "leg": int(rng.integers(4))}, **fields}
            | {"label": ("LONG", "SHORT", "SKIP")[n % 3]}
            for n in range(count)
        ]

    files = {name: write_rows(tmp_path / f"{name}.jsonl", states(40)) for name in ("train", "val")}
    report = check_files(files)
    assert [leak for leak in report["leaks"] if leak["refused"]] == []
    assert report["duplicates"] == {"train": 0, "val": 0}
