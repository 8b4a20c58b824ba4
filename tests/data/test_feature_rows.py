"""Rows of features without bars, and features that are words, true or false, null, or objects."""

import json
from typing import Any

import numpy as np
import pytest

from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.errors import DataError
from tests.helpers import Row, make_row, make_window, read

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
