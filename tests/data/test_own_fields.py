"""Bar fields that the user declares: numbers, flags, counts and categories, from the row to the text."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain import TrainingPipeline
from ctxtrain.data.codec import LEVEL_LETTERS, Codec
from ctxtrain.data.codec_fitter import CodecFitter, fit_codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.row_schema import MAX_OWN_FIELDS, OwnFields, check_own_fields
from ctxtrain.data.table_cache import TableCache
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError
from tests.conftest import MakeConfig
from tests.helpers import Row, bars_of, make_row, write_rows

OWN: OwnFields = {"rsi": "number", "armed": "flag", "touches": "count", "session": "category"}


def own_row(seed: int = 0, **changes: Any) -> Row:
    rng = np.random.default_rng(seed)
    row = make_row(seed=seed, flags=False)
    for i, bar in enumerate(bars_of(row)):
        bar.update(rsi=float(rng.uniform(20, 80)), armed=bool(i % 7 == 3), touches=int(rng.poisson(3)))
        bar.update(session=("Asia", "London", "NY")[i // 10])
        bar.update(changes)
    return row


def window_of(row: Row, own: OwnFields = OWN) -> Window:
    window, reasons = parse_row(json.loads(json.dumps(row)), "rows.jsonl:1", labelled=True, own=own)
    assert window is not None, reasons
    return window


def marks_of(text: str, name: str, codec: Codec) -> list[str]:
    """The marks of a declared field on each bar, "" where none is written."""
    letter = re.escape(LEVEL_LETTERS[list(codec.levels).index(name)])
    return ["".join(re.findall(rf"{letter}(.)", bar)) for bar in text.split(" ")[:-1]]


def test_a_declared_field_is_read_and_any_other_is_named_as_unread() -> None:
    row = own_row()
    window = window_of(row, {"rsi": "number"})
    assert window.bars["rsi"].tolist() == [bar["rsi"] for bar in bars_of(row)]
    assert window.unread == {"bars.armed", "bars.touches", "bars.session"}
    assert window_of(row).unread == frozenset()


def test_a_number_is_a_digit_in_half_deviations_of_the_training_rows_and_exact_at_the_end() -> None:
    windows = [window_of(own_row(seed)) for seed in range(40)]
    codec = fit_codec("compact", windows, OWN)
    scale = codec.levels["rsi"].scale
    assert scale is not None
    scores = (windows[0].bars["rsi"] - scale.centre) / scale.spread
    text = codec.render(windows[0])
    digits = [str(int(np.clip(np.rint(2 * score + 5), 0, 9))) for score in scores]
    written = marks_of(text, "rsi", codec)
    assert [mark for mark in written if mark] == [d for i, d in enumerate(digits) if written[i]]
    assert all(mark or digits[i] == digits[i - 1] for i, mark in enumerate(written))
    assert f"z{round(scores[-1] * 10 + 50):02d}" in text.split(" ")[-1]


@pytest.mark.parametrize(("count", "mark"), [(0, "0"), (1, "1"), (4, "4"), (6, "5"), (9, "6"), (24, "8"), (10**9, "9")])
def test_small_counts_are_exact_and_large_ones_are_ranges(count: int, mark: str) -> None:
    codec = fit_codec("compact", [window_of(own_row(seed)) for seed in range(5)], OWN)
    assert marks_of(codec.render(window_of(own_row(touches=count))), "touches", codec)[-1] == mark


def test_a_category_is_the_place_of_its_word_among_the_most_common_and_other_words_are_one() -> None:
    codec = fit_codec("compact", [window_of(own_row()), window_of(own_row(1, session="NY"))], OWN)
    words = codec.levels["session"].words
    assert words is not None
    assert words.words == ["NY", "Asia", "London"]
    unknown = window_of(own_row(session="Sydney"))
    assert set(marks_of(codec.render(unknown), "session", codec)) == {"-", ""}
    assert codec.unseen_words(unknown) == ["session"]
    assert codec.unseen_words(window_of(own_row())) == []
    written = marks_of(codec.render(window_of(own_row())), "session", codec)
    assert [(bar, mark) for bar, mark in enumerate(written) if mark] == [(0, "1"), (10, "2"), (20, "0"), (29, "0")]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["compact", "json"])
def test_every_declared_field_of_the_last_bar_can_change_the_text(name: str, kind: Any) -> None:
    row = own_row()
    codec = fit_codec(kind, [window_of(row), window_of(own_row(1))], OWN)
    other = json.loads(json.dumps(row))
    other["current_bar"][name] = {"rsi": 1e6, "armed": True, "touches": 900, "session": "Asia"}[name]
    assert codec.render(window_of(other)) != codec.render(window_of(row))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rsi", "high", "a number of at most 1e+15"),
        ("rsi", 1e16, "a number of at most 1e+15"),
        ("armed", 2, "true, false, 0 or 1"),
        ("touches", -1, "a whole number, 0 to 1e+15"),
        ("touches", 1.5, "a whole number, 0 to 1e+15"),
        ("session", " ", "a word of at most 64 characters, or a whole number"),
        ("session", 1.5, "a word of at most 64 characters, or a whole number"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_bar(name: str, value: Any, rule: str) -> None:
    row = own_row()
    bars_of(row)[3][name] = value
    _, reasons = parse_row(row, "rows.jsonl:1", labelled=True, own=OWN)
    assert reasons == [f"context_bars[3].{name} must be {rule}, got {json.dumps(value)}"]


def test_numbers_as_text_and_whole_floats_are_read_and_said() -> None:
    row = own_row()
    plain = window_of(row)
    for bar in bars_of(row):
        bar |= {"rsi": repr(bar["rsi"]), "armed": str(bar["armed"]).lower(), "touches": float(bar["touches"])}
    window = window_of(row)
    assert {name: values.tolist() for name, values in window.bars.items()} == {
        name: values.tolist() for name, values in plain.bars.items()
    }
    assert window.changes == {("text", "rsi", ""), ("text", "armed", ""), ("whole", "touches", "")}


def test_a_field_that_a_bar_lacks_counts_as_missing_in_the_row() -> None:
    row = own_row()
    bars_of(row)[4]["rsi"] = None
    window = window_of(row)
    assert "rsi" not in window.bars
    assert window.lacking == {"rsi": 1}
    assert "rsi" not in fit_codec("compact", [window, window_of(own_row(1))], OWN).fields


def test_a_table_and_a_cache_keep_declared_fields_and_depend_on_the_declaration(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [own_row(seed) for seed in range(3)])
    cache = TableCache(tmp_path / "cache")
    first = list(WindowFile(path, own=OWN, cache=cache))
    again = list(WindowFile(path, own=OWN, cache=cache))
    assert [window.bar_words for window in again] == [window.bar_words for window in first]
    assert [window.bars["rsi"].tolist() for window in again] == [window.bars["rsi"].tolist() for window in first]
    assert not any("rsi" in window.bars for window in WindowFile(path, cache=cache))
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_a_saved_codec_renders_declared_fields_as_the_fitted_one(tmp_path: Path) -> None:
    codec = fit_codec("compact", [window_of(own_row(seed)) for seed in range(5)], OWN)
    codec.save(tmp_path / "codec.json")
    loaded = Codec.load(tmp_path / "codec.json")
    assert loaded.own_fields == OWN
    assert loaded.render(window_of(own_row())) == codec.render(window_of(own_row()))


def test_words_that_training_rows_lack_are_counted() -> None:
    train, val = ([own_row(seed, session=word) for seed in range(2)] for word in ("NY", "Sydney"))
    fitters = []
    for rows in (train, val):
        fitter = CodecFitter(OWN)
        for row in rows:
            fitter.add(window_of(row))
        fitters.append(fitter)
    codec = fitters[0].fit("compact")
    assert fitters[0].differences(codec) == []
    assert fitters[1].differences(codec) == [
        "session has 60 values outside its 1 known word (Sydney); all are read as one unknown word"
    ]


def test_a_declared_field_that_no_training_row_has_ends_the_run_at_once(make_config: MakeConfig) -> None:
    pipeline = TrainingPipeline(make_config("data.fields={rsi: number}"))
    with pytest.raises(DataError, match=r"data\.fields declares rsi, but no window of train has it on every bar"):
        pipeline.load_data()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("delta", "this bar field is read as delta"),
        (" Open", "this bar field is read as open"),
        ("v", "this bar field is read as volume"),
        ("Label_Reason", "it follows from the label"),
        ("label", "it follows from the label"),
        ("OUTCOME", "it follows from the label"),
        ("event_id", "it has another meaning"),
        ("Timestamp", "it has another meaning"),
        ("features.x", "a name must have no points and no blanks at its ends"),
        ("", "a name must have no points and no blanks at its ends"),
    ],
)
def test_a_name_with_another_meaning_cannot_be_declared(name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_own_fields({name: "category"})
    (fault,) = caught.value.faults
    assert fault.startswith(f"data.fields must not declare {json.dumps(name)}: {reason}.")


def test_too_many_fields_cannot_be_declared() -> None:
    with pytest.raises(ConfigError, match=f"at most {MAX_OWN_FIELDS} fields, got 21"):
        check_own_fields({f"f{n}": "number" for n in range(21)})


def test_a_row_to_predict_is_parsed_with_the_fields_that_the_codec_dropped_too() -> None:
    rows = [own_row(0), own_row(1, rsi=None)]
    codec = fit_codec("compact", [window_of(row) for row in rows], OWN)
    assert "rsi" not in codec.fields
    assert codec.own_fields == OWN


def test_a_category_may_be_a_whole_number_and_a_float_that_is_one() -> None:
    whole, as_float = window_of(own_row(session=7)), window_of(own_row(session=7.0))
    assert whole.bar_words["session"] == as_float.bar_words["session"] == ("7",) * 30
    assert ("whole", "session", "") in as_float.changes


def test_wave_strength_from_0_to_1_is_not_read_as_percent() -> None:
    rows = [make_row(seed=seed) for seed in range(20)]
    percent = fit_codec("compact", [window_of(row, {}) for row in rows])
    for row in rows:
        for bar in bars_of(row):
            bar["wave_strength"] /= 100
    share = fit_codec("compact", [window_of(row, {}) for row in rows])
    assert "wave_strength" in share.levels
    assert "wave_strength" not in percent.levels
    low, high = ({"wave_strength": value} for value in (0.1, 0.9))
    texts = []
    for value in (low, high):
        row = make_row()
        row["current_bar"] |= value
        for bar in row["context_bars"]:
            bar["wave_strength"] = 0.5
        texts.append(share.render(window_of(row, {})))
    assert texts[0] != texts[1]


def test_rows_with_wave_strength_on_another_scale_than_the_training_rows_are_named() -> None:
    percent, share = CodecFitter(), CodecFitter()
    for seed in range(5):
        row = make_row(seed=seed)
        percent.add(window_of(row, {}))
        for bar in bars_of(row):
            bar["wave_strength"] /= 100
        share.add(window_of(row, {}))
    rule = "wave_strength is from 0 to {} here, but from 0 to {} in the training rows"
    assert share.differences(percent.fit("compact")) == [rule.format(1, 100)]
    assert percent.differences(share.fit("compact")) == [rule.format(100, 1)]
    assert share.differences(share.fit("compact")) == []
