"""Windows → text: what changes it, what must not, and how `codec.json` fixes it."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxtrain.data.check import embedded_tokenizer
from ctxtrain.data.codec import PULSES, STATES, Codec
from ctxtrain.data.codec_fitter import CodecFitter, fit_codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import DataError
from ctxtrain.model.embedded import build_tokenizer
from ctxtrain.synthetic.sample import write_sample
from tests.helpers import Row, bars_of, make_row, make_window

TOKENIZER = build_tokenizer()
BAR = re.compile(r"(?P<marks>(?:[A-LN-RT-Za-z]|O\d\d|[MS]\d)*)(?P<digits>\d{7}[\d-])")


def fitted(*rows: Row, kind: Any = "compact") -> Codec:
    return fit_codec(kind, [make_window(row) for row in rows])


def render(row: Row, codec: Codec | None = None) -> str:
    return (codec or fitted(row)).render(make_window(row))


def parts(text: str) -> tuple[list[str], list[str], str]:
    """Marks of each bar, digits of each bar, and the tail."""
    *bars, tail = text.split(" ")
    matches = [BAR.fullmatch(bar) for bar in bars]
    assert all(matches), text
    return [m["marks"] for m in matches if m], [m["digits"] for m in matches if m], tail


def change_bars(row: Row, change: Any) -> Row:
    """A copy of the row with `change(bar)` laid over each bar."""
    row = json.loads(json.dumps(row))
    for bar in bars_of(row):
        bar.update(change(bar))
    return row


def scaled(names: tuple[str, ...], factor: float = 1.0, shift: float = 0.0) -> Any:
    return lambda bar: {name: bar[name] * factor + shift for name in names}


PRICES = ("open", "high", "low", "close")


@pytest.mark.parametrize("kind", ["compact", "json"])
def test_label_side_and_unknown_fields_change_no_token(kind: str) -> None:
    row = make_row(features={"spread": 1.5})
    codec = fitted(row, kind=kind)
    changed = change_bars(row, lambda bar: {"outcome": 9.5, "label": "LONG", "conditions_met": ["bos"], "future": [1]})
    changed |= {
        "label": "SHORT", "label_confidence": 0.99, "label_reason": "target hit", "conditions_met": ["a", "b"],
        "conditions_failed": ["c"], "timeframe": "M5", "metadata": {"label": "SHORT"}, "outcome": 1, "id": "x",
        "symbol": "LONG", "context": "LONG",
    }  # fmt: skip
    assert render(changed, codec) == render(row, codec)
    assert TOKENIZER(render(changed, codec))["input_ids"] == TOKENIZER(render(row, codec))["input_ids"]
    assert render(changed) == render(row)  # they do not reach the fit either


@pytest.mark.parametrize("kind", ["compact", "json"])
def test_time_and_bar_index_change_no_token(kind: str) -> None:
    row = make_row()
    moved = change_bars(row, lambda bar: {"bar_index": bar["bar_index"] + 77, "time": None})
    assert render(moved, fitted(row, kind=kind)) == render(row, fitted(row, kind=kind))


@pytest.mark.parametrize("factor", [0.25, 2.0, 1024.0])
def test_the_unit_of_prices_changes_no_token(factor: float) -> None:
    row = make_row()
    assert render(change_bars(row, scaled((*PRICES, "atr_14"), factor))) == render(row)


@pytest.mark.parametrize("shift", [-500.0, 1000.0])
def test_the_level_of_prices_changes_only_their_share(shift: float) -> None:
    row = make_row()
    text, moved = render(row), render(change_bars(row, scaled(PRICES, shift=shift)))
    assert moved != text
    assert re.sub(r"a\d\d", "a", moved) == re.sub(r"a\d\d", "a", text)


@pytest.mark.parametrize("factor", [0.5, 8.0])
def test_the_unit_of_delta_changes_no_token(factor: float) -> None:
    row = make_row()
    assert render(change_bars(row, scaled(("delta",), factor))) == render(row)


def complete_row() -> Row:
    """A row with every bar field that has a mark of its own."""
    row = make_row()
    missing = [name for name in (*PULSES, *STATES) if name not in row["current_bar"]]
    return change_bars(row, lambda bar: {name: bar["int_dir"] if "dir" in name else bar["fvg_up"] for name in missing})


@pytest.mark.parametrize("name", [*PRICES, "volume", "delta", *PULSES, *STATES])
def test_every_field_of_the_last_bar_can_change_the_text(name: str) -> None:
    row = complete_row()
    other = json.loads(json.dumps(row))
    value = row["current_bar"][name]
    other["current_bar"][name] = {"ext_dir": -value or 1, "int_dir": -value or 1, "htf_dir": -value or 1}.get(
        name, not value if isinstance(value, bool) else 101 - value if name == "wave_strength" else 11 - value
    )
    if name in PRICES:
        low, high = (pick(bar[edge] for bar in bars_of(row)) for pick, edge in ((min, "low"), (max, "high")))
        other["current_bar"] |= {"open": low, "low": low, "close": high, "high": high}
    elif name in ("volume", "delta"):
        other["current_bar"][name] = 100_000
    assert render(other, fitted(row)) != render(row)


def test_each_bar_is_marks_and_eight_digits() -> None:
    row = make_row(bars=37)
    marks, digits, tail = parts(render(row))
    assert len(marks) == len(digits) == 37
    assert all(digit.isdigit() for digit in digits)
    assert re.fullmatch(r"r\d\da\d\dt\d\d\?", tail)


def test_digits_are_levels_of_the_windows_range_and_half_deviations() -> None:
    row = make_row(flags=False, place=False)
    window = make_window(row)
    low, high = window.bars["low"].min(), window.bars["high"].max()
    volume = np.log1p(window.bars["volume"])
    for bar, digits in enumerate(parts(render(row))[1]):
        for start, name in ((0, "high"), (2, "low"), (4, "close")):
            assert int(digits[start : start + 2]) == round(99 * (window.bars[name][bar] - low) / (high - low))
        score = (volume[bar] - volume.mean()) / volume.std()
        assert int(digits[6]) == min(9, max(0, round(2 * score + 5)))
    extremes = [digits for _, digits in zip(*parts(render(row))[:2], strict=True)]
    assert any(digits.startswith("99") for digits in extremes)
    assert any(digits[2:4] == "00" for digits in extremes)


def test_the_first_bar_and_the_event_bar_carry_the_complete_state() -> None:
    marks = parts(render(complete_row()))[0]
    for letters in (marks[0], marks[-1]):
        for written in STATES.values():
            assert sum(mark in letters for mark in written.values()) == 1, letters


def test_a_state_is_written_where_it_changes_and_a_pulse_where_it_is_true() -> None:
    row = make_row(flags=False)
    for i, bar in enumerate(bars_of(row)):
        bar |= {
            "ext_dir": 1 if i < 12 else -1,
            "fvg_up": 20 <= i < 22,
            "sweep_prev_low": i in (3, 4),
            "open": bar["close"],
        }
        bar |= {"open": 2000, "close": 2000, "high": 2001, "low": 1999}
    marks = parts(render(row))[0]
    expected = {0: "Uf", 3: "L", 4: "L", 12: "D", 20: "F", 22: "f", 29: "Df"}
    assert {bar: letters for bar, letters in enumerate(marks) if letters} == expected


def test_an_open_away_from_the_close_before_is_marked() -> None:
    row = make_row(flags=False)
    for bar in bars_of(row):
        bar |= {"open": 2000, "close": 2000, "high": 2050, "low": 1950}
    bars_of(row)[9]["open"] = 2050
    bars_of(row)[15]["open"] = 2002  # two of 99 steps away from the close before
    assert {bar: letters for bar, letters in enumerate(parts(render(row))[0]) if letters} == {9: "O99"}


def test_a_window_without_delta_has_a_dash() -> None:
    digits = parts(render(make_row(delta=False)))[1]
    assert all(re.fullmatch(r"\d{7}-", digit) for digit in digits)


@pytest.mark.parametrize("field", ["delta", "atr_14", "ext_dir", "fvg_retest"])
def test_a_field_that_some_training_rows_lack_is_read_in_none(field: str) -> None:
    full, lacking = make_row(), change_bars(make_row(seed=1), lambda bar: {field: None})
    codec = fitted(full, lacking)
    assert field not in codec.fields
    fitter = CodecFitter()
    for row in (full, lacking):
        fitter.add(make_window(row))
    assert fitter.partial_fields() == {field: 1}
    assert render(full, codec) == render(change_bars(full, lambda bar: {field: None}), codec)


def test_a_row_that_lacks_a_trained_field_is_refused_by_name() -> None:
    codec = fitted(make_row(features={"spread": 1.0}))
    with pytest.raises(DataError) as caught:
        list(codec.render_all([make_window(make_row(features={"spread": 2.0})), make_window(make_row(delta=False))]))
    (fault,) = caught.value.faults
    assert fault == (
        "rows.jsonl:1: lacks delta, features.spread, which the model was trained on; "
        "add it to every bar, or train on rows without it"
    )


def test_features_are_scaled_by_the_middle_and_spread_of_the_training_rows() -> None:
    rows = [make_row(seed=i, features={"b": float(i), "a": 5.0}) for i in range(101)]
    codec = fitted(*rows)
    assert list(codec.features) == ["a", "b"]
    assert codec.features["b"].centre == 50
    assert codec.features["b"].spread == pytest.approx(50 / 1.349)

    def tail(**features: float) -> str:
        return parts(render(make_row(features=features), codec))[2].partition("z")[2]

    assert tail(a=5.0, b=50.0) == "50z50?"
    assert tail(a=5.0, b=50 + 2 * 50 / 1.349, c=3.0) == "50z70?"
    assert tail(a=-1e9, b=1e9) == "00z99?"


def test_text_rows_pass_through_and_do_not_mix_with_windows() -> None:
    text, _ = parse_row({"context": "Trend up.\nLong?", "label": "LONG"}, "a.jsonl:1", labelled=True)
    assert text is not None
    codec = fit_codec("compact", [text])
    assert codec.kind == "text"
    assert codec.render(text) == "Trend up.\nLong?"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the model was trained on text rows, got a window row"):
        codec.render(make_window())
    with pytest.raises(DataError, match=r"a\.jsonl:1: the model was trained on window rows, got a text row"):
        list(fitted(make_row()).render_all([text, make_window()]))


def test_the_json_codec_writes_the_input_fields_as_they_are() -> None:
    row = make_row(features={"spread": 1.5, "age": 3})
    written = orjson.loads(render(row, fitted(row, kind="json")))
    assert written["features"] == {"age": 3.0, "spread": 1.5}
    for bar, given_bar in zip(written["bars"], bars_of(row), strict=True):
        assert bar == {name: value for name, value in given_bar.items() if name not in ("bar_index", "time")}


def test_a_saved_codec_renders_as_the_fitted_one(tmp_path: Path) -> None:
    rows = [make_row(seed=i, features={"spread": 0.1 * i}) for i in range(5)]
    for kind in ("compact", "json"):
        codec = fitted(*rows, kind=kind)
        codec.save(tmp_path / "codec.json")
        loaded = Codec.load(tmp_path / "codec.json")
        assert loaded == codec
        assert list(loaded.render_all(make_window(row) for row in rows)) == [render(row, codec) for row in rows]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"version": 2}, "version"), ({"kind": "csv"}, "kind"), ({"scale": 3}, "scale"), ({"fields": None}, "fields")],
)
def test_a_codec_of_another_version_is_refused(tmp_path: Path, change: Row, named: str) -> None:
    path = tmp_path / "codec.json"
    path.write_bytes(orjson.dumps(orjson.loads(fitted(make_row()).to_json()) | change))
    with pytest.raises(
        DataError, match=rf"codec\.json: not a codec that this version can read \({named}: .*\)\. Export"
    ):
        Codec.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not a codec that this version can read"):
        Codec.load(path)


# Any window


def test_a_market_without_movement_stands_in_the_middle() -> None:
    still = {"open": 2000, "high": 2000, "low": 2000, "close": 2000, "volume": 0, "delta": 0, "atr_14": 0}
    row = change_bars(make_row(flags=False), lambda _: still)
    assert render(row) == " ".join(["50505055"] * 30) + " r00a00t00?"


@pytest.mark.parametrize("bars", [30, 39, 50])
def test_a_volume_and_a_delta_that_never_change_stand_in_the_middle(bars: int) -> None:
    for value in range(1, 200):
        still = {"volume": value, "delta": value / 7}
        row = change_bars(make_row(bars=bars, flags=False), lambda _, still=still: still)
        assert {digits[6:] for digits in parts(render(row))[1]} == {"55"}, value


def test_numbers_of_the_tail_end_at_99() -> None:
    row = make_row(flags=False)
    row["current_bar"] |= {"open": 2000, "high": 2000, "low": 5e-324, "close": 5e-324}
    assert re.fullmatch(r"r\d\da99\?", parts(render(row))[2])


def optional_values(rng: np.random.Generator, count: int) -> dict[str, list[Any]]:
    """A valid value of each optional field for each bar."""
    sizes = 10.0 ** rng.integers(-300, 16, count)
    return {
        **{name: (rng.random(count) < 0.3).tolist() for name in [*PULSES, "fvg_up", "fvg_down", "pb_wave_strength_ok"]},
        **{name: rng.integers(-1, 2, count).tolist() for name in ("ext_dir", "int_dir")},
        "mgann_leg_index": rng.integers(1, 11, count).tolist(),
        "wave_strength": rng.choice([0, 9.99, 10, 55.5, 99.9, 100], count).tolist(),
        "delta": (rng.choice([-1, 1], count) * sizes).tolist(),
        **{name: rng.permutation(sizes).tolist() for name in ("buy_vol", "sell_vol", "atr_14")},
    }


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Windows of any length, optional fields, and prices from a flat market to the largest and smallest numbers."""
    count = draw(st.integers(30, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    picks = draw(st.lists(st.sampled_from([-1e15, -1.0, 0.0, 5e-324, 1e-9, 2000.0, 2000.25, 1e15]), min_size=1))
    noise = draw(st.sampled_from([0.0, 1e-12, 0.5, 1e14]))
    prices = np.sort(np.clip(rng.choice(picks, (count, 4)) + noise * rng.normal(size=(count, 4)), -1e15, 1e15))
    optional = optional_values(rng, count)
    names = draw(st.lists(st.sampled_from(sorted(optional)), unique=True))
    bars = []
    for bar, (low, a, b, high) in enumerate(prices.tolist()):
        ohlc = {"open": a, "high": high, "low": low, "close": b} if rng.random() < 0.5 else {"open": b, "close": a}
        values = {"high": high, "low": low, "volume": 10.0 ** rng.integers(-300, 16)} | ohlc
        bars.append(values | {name: optional[name][bar] for name in names})
    features = draw(st.dictionaries(st.text(max_size=3), st.floats(-1e15, 1e15), max_size=2))
    return make_window({"context_bars": bars[:-1], "current_bar": bars[-1], "features": features})


@given(windows())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_valid_window_becomes_two_tokens_a_bar_and_one_a_mark(window: Window) -> None:
    text = fit_codec("compact", [window]).render(window)
    marks, digits, tail = parts(text)
    assert len(digits) == len(window.bars["close"])
    ids = TOKENIZER(text)["input_ids"]
    assert not set(ids) & set(TOKENIZER.all_special_ids)
    assert TOKENIZER.decode(ids) == text
    letters = sum(len(re.findall(r"O\d\d|[MS]\d|[A-Za-z]", mark)) for mark in marks)
    assert len(ids) == 2 * len(digits) + letters + len(re.findall(r"[a-z]\d\d|\?", tail))


@given(st.lists(windows(), min_size=2, max_size=6))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_windows_that_are_rendered_together_read_as_each_alone(together: list[Window]) -> None:
    codec = fit_codec("compact", together)
    assert list(codec.render_all(together)) == [codec.render(window) for window in together]


def test_windows_of_all_lengths_keep_their_order() -> None:
    together = [make_window(make_row(bars=30 + seed * 7 % 21, seed=seed)) for seed in range(1100)]
    codec = fit_codec("compact", together)
    assert list(codec.render_all(together)) == [codec.render(window) for window in together]


# Windows that one print, rounding or a one-sided delta would make alike


def path(way: float, bars: int = 40, **changes: Any) -> Row:
    """A steady rise (1) or fall (−1) of a tenth a bar, with volumes and deltas of their own."""
    row = make_row(bars=bars, flags=False, place=False)
    for n, bar in enumerate(bars_of(row)):
        close = 100 + way * n / 10
        bar.update({"open": close - way / 10, "high": close + 0.1, "low": close - 0.1, "close": close})
        bar.update({"volume": 100 + n % 7, "delta": (n % 5 - 2) * 10} | changes)
    return row


def printed(row: Row, **prints: dict[int, float]) -> Row:
    """A copy with other values of some fields on some bars."""
    row = json.loads(json.dumps(row))
    for name, of_bar in prints.items():
        for bar, value in of_bar.items():
            bars_of(row)[bar][name] = value
    return row


def distances(a: str, b: str, start: int, end: int) -> np.ndarray:
    """How far the numbers at a place of the bars' digits lie apart, bar by bar."""
    pairs = zip(parts(a)[1], parts(b)[1], strict=True)
    return np.array([abs(int(one[start:end]) - int(other[start:end])) for one, other in pairs])


@pytest.mark.parametrize(
    "prints",
    [
        {"high": {3: 1e5}},
        {"low": {3: 0.0}},
        {"high": {3: 1e5, 17: 3e4, 39: 1e9}},
        {"high": {3: 200.0}, "low": {20: -1e6, 21: 1e-300}},
        {"high": {n: 1e4 + 4 * n for n in range(5)}},
        {"close": {9: 1e5}, "high": {9: 1e5}},
        {"low": dict.fromkeys(range(20, 28), 0.0)},
    ],
)
def test_a_rise_and_a_fall_stay_apart_under_prints_that_are_far_off(prints: dict[str, dict[int, float]]) -> None:
    rise, fall = (render(printed(path(way), **prints)) for way in (1, -1))
    far = {bar for of_bar in prints.values() for bar in of_bar}
    assert {bar for bar, marks in enumerate(parts(rise)[0]) if "X" in marks} == far
    plain = distances(render(path(1)), render(path(-1)), 4, 6)
    near = distances(rise, fall, 4, 6)
    others = [bar for bar in range(40) if bar not in far]
    assert (near[others] >= 0.35 * plain[others] - 1).all()


def without_trades(*bars: int) -> dict[str, dict[int, float]]:
    """Zeros, as some exporters write bars without a trade."""
    return {name: dict.fromkeys(bars, 0.0) for name in (*PRICES, "volume")}


@pytest.mark.parametrize(
    "prints",
    [
        without_trades(*range(1, 40, 2)),
        without_trades(*range(0, 40, 3)),
        without_trades(*(n for n in range(40) if n % 4)),
        {"low": dict.fromkeys((n for n in range(40) if n % 5 < 3), 0.0)},
        {"low": dict.fromkeys(range(40), 0.0)},
        {"high": dict.fromkeys(range(40), 1040.0)},
        {"high": {n: 1e3 + 700.0 * (n * 17 % 40) for n in range(40) if n % 3}},
        without_trades(*range(0, 40, 2)) | {"high": dict.fromkeys(range(1, 40, 4), 1e6)},
    ],
)
def test_a_rise_and_a_fall_stay_apart_where_many_bars_hold_prints_that_are_far_off(
    prints: dict[str, dict[int, float]],
) -> None:
    """So many that the way to them and back is the usual range."""
    rise, fall = (render(printed(path(way), **prints)) for way in (1, -1))
    far = {bar for name, of_bar in prints.items() if name != "volume" for bar in of_bar}
    assert {bar for bar, marks in enumerate(parts(rise)[0]) if "X" in marks} == far
    closed = [bar for bar in range(40) if bar not in prints.get("close", {})]
    near, plain = distances(rise, fall, 4, 6)[closed], distances(render(path(1)), render(path(-1)), 4, 6)[closed]
    assert (near >= 0.35 * plain - 1).all()


def test_one_tick_shows_between_bars_without_a_trade() -> None:
    texts = set()
    for tick in (-0.1, 0.0, 0.1):
        row = path(1)
        for n, bar in enumerate(bars_of(row)):
            bar.update(dict.fromkeys(PRICES, 100 + tick * (n > 20)))
        texts.add(render(printed(row, **without_trades(*range(0, 40, 2)))))
    assert len(texts) == 3


@pytest.mark.parametrize(
    "close",
    [
        [100 + 10 * (n % 2) + 0.3 * (n * 7 % 5) for n in range(40)],  # between two levels, back and forth
        [100 + 10 * (n % 2) + 0.001 * (n == 30) for n in range(40)],  # the same, and one tick
        [100 + 5 * (n * 7 % 11) + 1e-5 * (n % 2) for n in range(40)],
        [0.25 * (n * 7 % 3 - 1) for n in range(40)],  # a spread
        [1e-8 * (2 + n * 7 % 3) for n in range(40)],  # a coin at its smallest ticks
    ],
)
def test_a_market_that_jumps_has_no_prints_that_are_far_off(close: list[float]) -> None:
    row = path(1)
    for bar, price in zip(bars_of(row), close, strict=True):
        bar.update(dict.fromkeys(PRICES, price))
    assert "X" not in render(row)


def test_how_far_a_print_is_off_shows_and_its_window_is_no_ordinary_one() -> None:
    texts = [render(printed(path(1), high={3: price})) for price in (105.0, 200.0, 2e3, 1e5, 1e7)]
    assert len(set(texts)) == 5
    assert ["X" in text for text in texts] == [False, True, True, True, True]


@pytest.mark.parametrize(("name", "mark", "place"), [("volume", "V", 6), ("delta", "Y", 7)])
@pytest.mark.parametrize("bars", [(5,), (5, 6, 30)])
def test_a_wild_flow_leaves_the_others_as_they_read_without_it(
    name: str, mark: str, place: int, bars: tuple[int, ...]
) -> None:
    row = path(1)
    text = render(printed(row, **{name: dict.fromkeys(bars, 1e14)}))
    marks, digits, _ = parts(text)
    assert {bar for bar, letters in enumerate(marks) if mark in letters} == set(bars)
    others = [bar for bar in range(40) if bar not in bars]
    assert len({digits[bar][place] for bar in others}) >= 3
    assert {digits[bar][place] for bar in bars} == {"9"}


@pytest.mark.parametrize("jump", [3.0, 8.0])
def test_real_moves_however_large_are_read_on_the_plain_scale(jump: float) -> None:
    """A gap of more than ten mean true ranges, and a bar of as many."""
    for field in ("open", "high"):
        row = path(1)
        first = 20 if field == "open" else 39
        for bar in bars_of(row)[first:]:
            bar |= {name: bar[name] + jump for name in (PRICES if field == "open" else ("high", "close"))}
        window = make_window(row)
        low, high = window.bars["low"].min(), window.bars["high"].max()
        closes = np.rint(99 * (window.bars["close"] - low) / (high - low))
        assert [int(digits[4:6]) for digits in parts(render(row))[1]] == closes.tolist()
        assert "X" not in render(row)


def test_the_texts_of_the_sample_stay_to_the_letter(tmp_path: Path) -> None:
    write_sample(tmp_path, train=1200, val=400, test=400)
    files = {name: WindowFile(tmp_path / f"{name}.jsonl") for name in ("train", "val", "test")}
    codec = fit_codec("compact", files["train"])
    digest = hashlib.sha256()
    for file in files.values():
        for text in codec.render_all(file):
            digest.update(text.encode() + b"\n")
    assert digest.hexdigest() == (Path(__file__).parents[1] / "golden" / "texts.txt").read_text().strip()


@pytest.mark.parametrize("value", [900.0, 5e-7, 1e12])
@pytest.mark.parametrize("spread", [0.0, 0.001, 0.9])
def test_the_side_of_a_one_sided_delta_shows(value: float, spread: float) -> None:
    bought, sold = (
        printed(path(1), delta={n: side * value + value * spread * (n % 7 - 3) / 3 for n in range(40)})
        for side in (1, -1)
    )
    assert [marks for marks in parts(render(bought))[0] if "b" in marks] == ["b"]
    assert [marks for marks in parts(render(sold))[0] if "s" in marks] == ["s"]
    assert parts(render(bought))[1] == parts(render(sold))[1]  # or the mark would not be needed


@pytest.mark.parametrize(
    "bought",
    [
        [220, -20] * 20,
        [19, 19, 19, -3] * 10,
        [9, -1] * 20,
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 900] * 4,
        [100] * 38 + [-90] * 2,
    ],
)
def test_the_side_shows_where_nine_tenths_are_bought_or_sold(bought: list[float]) -> None:
    """The mean of the first ones is less than their deviation."""
    middle = sum(bought) / 40
    like = [value - 2 * middle for value in bought]  # the same z-scores, and a net as large on the other side
    for values in (bought, [-value for value in bought]):
        text = render(printed(path(1), delta=dict(enumerate(values))))
        assert [set("bs") & set(marks) for marks in parts(text)[0]][-1] == {"b" if sum(values) > 0 else "s"}
    one, other = (render(printed(path(1), delta=dict(enumerate(values)))) for values in (bought, like))
    assert parts(one)[1] == parts(other)[1]
    assert one != other


@pytest.mark.parametrize("bought", [[5, -1] * 20, [0] * 39 + [7], [0] * 40, [3, -1, 4, -2] * 10])
def test_less_than_that_has_no_side_but_a_single_trade_has(bought: list[float]) -> None:
    marks = "".join(parts(render(printed(path(1), delta=dict(enumerate(bought)))))[0])
    assert ("b" in marks, "s" in marks) == (bought[-1] == 7, False)


def test_a_delta_of_both_sides_has_no_side() -> None:
    assert not set("bs") & set("".join(parts(render(path(1)))[0]))


@pytest.mark.parametrize("price", [2.0, 104321.7, 1e-4, 9e14])
def test_rounding_is_no_movement(price: float) -> None:
    still, noisy = path(1), path(1)
    rng = np.random.default_rng(0)
    for bar, other in zip(bars_of(still), bars_of(noisy), strict=True):
        bar.update(dict.fromkeys(PRICES, price) | {"volume": 300.0, "delta": 100.0})
        noise = 1 + 2.3e-16 * rng.integers(-2, 3, 6)
        low, a, b, high = np.sort(price * noise[:4]).tolist()
        other.update({"low": low, "open": b, "close": a, "high": high})
        other.update({"volume": 300.0 * noise[4], "delta": 100.0 * noise[5]})
    assert render(noisy) == render(still)


def test_one_tick_in_a_market_that_stands_still_is_no_wild_print() -> None:
    row = path(1)
    for n, bar in enumerate(bars_of(row)):
        bar.update(dict.fromkeys(PRICES, 104321.7 * (1 + 2.3e-16 * (n % 3 - 1))))
    bars_of(row)[7] |= dict.fromkeys(PRICES, 104322.7)
    for bar in bars_of(row):
        bar |= {"high": max(bar[name] for name in PRICES), "low": min(bar[name] for name in PRICES)}
    assert [digits[:6] for digits in parts(render(row))[1]] == ["000000"] * 7 + ["999999"] + ["000000"] * 32


@pytest.mark.parametrize("values", [[0.0] * 70 + [1.0, 2.0, 3.0] * 10, [5 + n * 1e-16 for n in range(100)]])
def test_neither_a_huge_feature_nor_rounding_decides_how_the_others_are_read(values: list[float]) -> None:
    def tails(*features: float) -> list[str]:
        rows = [make_row(seed=n, features={"a": value}) for n, value in enumerate(features)]
        codec = fitted(*rows)
        return [parts(render(row, codec))[2].partition("z")[2] for row in rows]

    plain, with_one = tails(*values), tails(*values, 1e15)
    assert with_one[-1] == "99?"
    assert len(set(with_one[:-1])) == len(set(plain)) == len(set(np.round(values, 9)))


def test_the_new_marks_are_whole_tokens_of_the_embedded_base() -> None:
    tokenizer = embedded_tokenizer()
    plain = printed(path(1), high={3: 1e9}, volume={4: 1e14}, delta={5: 1e14})
    text = render(plain)
    assert {"X", "V", "Y"} <= set(text)
    one_sided = render(path(1, delta=900))
    for rendered, marks in ((text, 3), (one_sided, 1)):
        opens = len(re.findall(r"O\d\d", rendered))
        tail = len(re.findall(r"[rat]\d\d|\?", parts(rendered)[2]))
        assert len(tokenizer.encode(rendered).ids) == 2 * 40 + opens + marks + tail


@pytest.mark.parametrize(
    ("name", "quiet", "wild"),
    [
        ("volume", [100, 101, 102], [5000 * 2**n for n in range(10)]),
        ("delta", [2, -2], [500, -900, 1500, -3000, 5000, 9000]),
    ],
)
def test_many_wild_values_keep_their_order(name: str, quiet: list[int], wild: list[int]) -> None:
    """A quiet night and then a market that opens: whether it grows or dies away is seen."""
    windows = []
    for tail in (wild, wild[::-1]):
        row = make_row(flags=False, delta=name == "delta")
        values = [quiet[n % len(quiet)] for n in range(30 - len(tail))] + tail
        for bar, value in zip(bars_of(row), values, strict=True):
            bar[name] = value
        windows.append(make_window(row))
    first, second = fit_codec("compact", windows).render_all(windows)
    assert first != second
