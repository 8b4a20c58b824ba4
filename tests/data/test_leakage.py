"""Leaks that are planted are found, clean data raises no alarm, and purging drops exactly what it says."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ctxtrain import TrainingPipeline
from ctxtrain.data.check import check_files
from ctxtrain.data.dataset import Inputs, load_dataset
from ctxtrain.data.drift import drift, population_stability
from ctxtrain.data.duplicates import DIFFERENT_TIME, LOOK_ALIKES
from ctxtrain.data.leakage import CONTENT_KINDS, POSITION_KINDS, kinds_not_found
from ctxtrain.data.positions import Spans, common_spans
from ctxtrain.data.profile import MAX_SAMPLED_ROWS, Survey, extent, survey
from ctxtrain.data.separation import overlapping, purged_rows
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.labels import LABELS
from ctxtrain.model.tokenizer import load_tokenizer
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import verdict
from ctxtrain.synthetic.sample import write_sample
from ctxtrain.training.inputs import window_files
from tests.conftest import Amount, MakeConfig
from tests.helpers import Row, bars_of, dated_rows, learnable_rows, make_row, write_rows

pytestmark = pytest.mark.slow

Files = dict[str, list[Row]]
Plant = Callable[[Files, np.random.Generator], None]
RULE_UNCHECKED = (
    "labels that a small decision tree reproduces: too few rows, needs 30 and two classes of at least 5 to fit a tree,"
)
SPLITS = ("train", "val", "test")


def clean_sample(folder: Path, seed: int) -> Files:
    """Simulated windows in time order, no bar in two files; every other seed shows no flags."""
    folder = folder / f"sample_{seed}"
    write_sample(folder, train=90, val=30, test=30, seed=seed, hide_flags=seed % 2 == 1)
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in SPLITS}


def write(folder: Path, files: Files) -> dict[str, Path | None]:
    return {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}


def kinds(folder: Path, files: Files) -> set[str]:
    report = check_files(write(folder, files))
    found = {leak["kind"] for leak in report["leaks"]} | set(report["unchecked"])
    return found | (
        {"bars after the event"} if any("later than the event" in fault for fault in report["faults"]) else set()
    )


def judged(files: Files, rng: np.random.Generator) -> list[Row]:
    return files[str(rng.choice(["val", "test"]))]


def plant_identical_window(files: Files, rng: np.random.Generator) -> None:
    judged(files, rng)[3] = deepcopy(files["train"][int(rng.integers(90))]) | {"id": "another"}


def plant_identical_text(files: Files, rng: np.random.Generator) -> None:
    """Prices and volumes twice as high: other numbers, the same text."""
    row = deepcopy(files["train"][int(rng.integers(90))]) | {"id": "another", "symbol": "OTHER"}
    for bar in bars_of(row):
        for name in ("open", "high", "low", "close", "atr_14"):
            if name in bar:
                bar[name] *= 2
    judged(files, rng)[3] = row


def plant_same_id(files: Files, rng: np.random.Generator) -> None:
    judged(files, rng)[5]["id"] = files["train"][int(rng.integers(90))]["id"]


def plant_shared_bars(files: Files, rng: np.random.Generator) -> None:
    """One to all bars of an event stand at the same places as another event's, in a row of prices of its own."""
    row, other = judged(files, rng)[7], files["train"][int(rng.integers(90))]
    row["symbol"] = other["symbol"]
    bars, others = bars_of(row), bars_of(other)
    for_time = bool(rng.integers(2))
    shift = int(rng.integers(min(len(bars), len(others))))
    if not for_time:
        for one in (bar for rows in files.values() for each in rows for bar in bars_of(each)):
            del one["time"]
    start = np.datetime64(others[shift]["time"].rstrip("Z")) if for_time else None
    for n, bar in enumerate(bars):
        bar["bar_index"] = others[shift]["bar_index"] + n
        if start is not None:
            bar["time"] = str(start + np.timedelta64(60 * n, "s")) + "Z"


def plant_older_rows(files: Files, rng: np.random.Generator) -> None:
    row = files["val"].pop(int(rng.integers(30)))
    later = files["train"].pop(int(rng.integers(45)))
    row["symbol"] = later["symbol"]
    files["train"].append(row)
    files["val"].insert(0, later)


def plant_two_labels(files: Files, rng: np.random.Generator) -> None:
    """In one file, under another id."""
    row = deepcopy(files["train"][11]) | {"id": "another"}
    row["label"] = LABELS[(LABELS.index(row["label"]) + int(rng.integers(1, 3))) % 3]
    files["train"].append(row)


def plant_telling_feature(files: Files, rng: np.random.Generator) -> None:
    """The outcome in a feature: a code, a noisy return, or a flag of one class; two rows in a hundred are wrong."""
    form = rng.integers(3)
    for row in (row for rows in files.values() for row in rows):
        label = LABELS.index(row["label"]) if rng.random() > 0.02 else int(rng.integers(3))
        value = (label, [1.0, -1.0, 0.0][label] + 0.15 * rng.normal(), int(label == 1))[form]
        row["features"] = {**(row.get("features") or {}), "signal": float(value), "noise": float(rng.normal())}


def plant_telling_flag(files: Files, rng: np.random.Generator) -> None:
    """A field of the event's bar that was filled in after the outcome."""
    for row in (row for rows in files.values() for row in rows):
        for bar in bars_of(row):
            bar["wave_strength"] = float(rng.integers(40, 60))
        row["current_bar"]["wave_strength"] = {"LONG": 90.0, "SHORT": 10.0, "SKIP": 50.0}[row["label"]]


def plant_later_bar(files: Files, rng: np.random.Generator) -> None:
    """The event is not the last bar: a later one stands in the context."""
    row = judged(files, rng)[int(rng.integers(30))]
    place = int(rng.integers(len(row["context_bars"])))
    time = np.datetime64(row["current_bar"]["time"].rstrip("Z")) + np.timedelta64(60, "s")
    for bar in row["context_bars"][place + 1 :]:
        del bar["time"], bar["bar_index"]
    row["context_bars"][place]["time"] = f"{time}Z"


PLANTED: dict[str, tuple[Plant, ...]] = {
    "identical window": (plant_identical_window,),
    "identical text": (plant_identical_text,),
    "same id": (plant_same_id,),
    "shared bars": (plant_shared_bars,),
    "training on later rows": (plant_older_rows,),
    "two labels for one window": (plant_two_labels,),
    "single-field leakage": (plant_telling_feature, plant_telling_flag),
    "bars after the event": (plant_later_bar,),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_each_kind_of_leak_is_found_wherever_it_is_planted(kind: str, tmp_path: Path, amount: Amount) -> None:
    missed = []
    for seed in range(amount(3, 100)):
        files, rng = clean_sample(tmp_path, seed), np.random.default_rng(seed)
        PLANTED[kind][seed % len(PLANTED[kind])](files, rng)
        if kind not in (found := kinds(tmp_path, files)):
            missed.append((seed, found))
    assert missed == []


def test_clean_data_raises_no_alarm(tmp_path: Path, amount: Amount) -> None:
    alarms = {seed: kinds(tmp_path, clean_sample(tmp_path, seed)) for seed in range(amount(3, 100))}
    assert {seed: found for seed, found in alarms.items() if found} == {}


def test_a_rare_class_and_a_field_that_says_little_raise_no_alarm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [make_row("SKIP" if n % 20 else ("LONG", "SHORT")[n // 20 % 2], seed=n) for n in range(240)]
    for row in rows:
        row["features"] = {"signal": float(rng.normal()) + (row["label"] == "LONG")}
    assert check_files({"train": write_rows(tmp_path / "train.jsonl", rows)})["leaks"] == []


def test_a_prompt_that_spells_its_label_is_found(tmp_path: Path) -> None:
    rows = [{"context": f"window {n}: {LABELS[n % 3].lower()}", "label": LABELS[n % 3]} for n in range(60)]
    (leak,) = check_files({"train": write_rows(tmp_path / "train.jsonl", rows)})["leaks"][:1]
    assert (leak["kind"], leak["field"]) == ("single-field leakage", "the word LONG in context")


def still(row: Row, price: float = 2.0, *, trades: int = 0) -> Row:
    """A halted market: one price and no volume, but for some bars that trade a lot at it."""
    row = json.loads(json.dumps(row))
    for n, bar in enumerate(bars_of(row)):
        bar.update(dict.fromkeys(("open", "high", "low", "close"), price) | {"volume": 40 * (0 < n <= trades)})
        bar.pop("delta", None)
    return row


def anonymous(rows: list[Row]) -> list[Row]:
    return [row | {"id": None} for row in rows]


def by_content(folder: Path, files: Files) -> dict[str, int]:
    report = check_files(write(folder, {name: anonymous(rows) for name, rows in files.items()}))
    kinds = (*CONTENT_KINDS[:-1], DIFFERENT_TIME)
    return {leak["kind"]: leak["count"] for leak in report["leaks"] if leak["kind"] in kinds}


@pytest.mark.parametrize("trades", [0, 2])
@pytest.mark.parametrize("placed_by", ["time", "bar_index"])
def test_a_market_that_looks_alike_at_different_times_is_no_leak(placed_by: str, trades: int, tmp_path: Path) -> None:
    rows = [still(row, trades=trades) for row in dated_rows(12, seed=1, apart=60)]
    for bar in (bar for row in rows for bar in bars_of(row)):
        del bar["bar_index" if placed_by == "time" else "time"]
    files = {"train": rows[:8], "val": [still(row, 2.0 if n else 2.5, trades=trades) for n, row in enumerate(rows[8:])]}
    assert by_content(tmp_path, files) == {}
    assert check_files(write(tmp_path, files))["duplicates"] == {"train": 0, "val": 0}


def test_a_market_that_stands_still_is_evidence_only_where_both_rows_say_when(tmp_path: Path) -> None:
    rows = [still(row) for row in dated_rows(12, seed=1, apart=60)]
    same = {"train": rows[:8], "val": [*rows[8:], rows[3]]}
    assert by_content(tmp_path, same) == {"identical window": 1}
    other = {"train": rows[:8], "val": [*rows[8:], rows[3] | {"symbol": "ES"}]}
    assert by_content(tmp_path, other) == {}
    for bar in (bar for rows in same.values() for row in rows for bar in bars_of(row)):
        bar.pop("time", None)
        bar.pop("bar_index", None)
    assert by_content(tmp_path, same) == {}
    assert check_files(write(tmp_path, same))["duplicates"] == {"train": 0, "val": 0}


@pytest.mark.parametrize("placeless", ["train", "val", "both"])
def test_windows_that_move_are_the_same_where_one_does_not_say_when(placeless: str, tmp_path: Path) -> None:
    rows = dated_rows(12, seed=1, apart=60)
    twin = json.loads(json.dumps(rows[3]))
    for row, name in ((rows[3], "train"), (twin, "val")):
        for bar in bars_of(row) if placeless in (name, "both") else []:
            bar.update(time=None, bar_index=None)
    assert by_content(tmp_path, {"train": rows[:8], "val": [*rows[8:], twin]}) == {"identical window": 1}


@pytest.mark.parametrize(
    ("minutes", "kind"), [(1, "identical window"), (29, "identical window"), (300, DIFFERENT_TIME)]
)
def test_busy_windows_that_are_equal_are_the_same_unless_a_clock_puts_them_far_apart(
    minutes: int, kind: str, tmp_path: Path
) -> None:
    """Bars may carry the time of their open in one file and of their close in another, or the time of two zones."""
    rows = dated_rows(12, seed=1, apart=600)
    twin = json.loads(json.dumps(rows[3]))
    for bar in bars_of(twin):
        bar["time"] = f"{np.datetime64(bar['time'].rstrip('Z')) + np.timedelta64(minutes, 'm')}Z"
    files = {"train": rows[:8], "val": [*rows[8:], twin]}
    assert by_content(tmp_path, files) == {kind: 1}
    assert [
        leak["refused"]
        for leak in check_files(write(tmp_path, {name: anonymous(rows) for name, rows in files.items()}))["leaks"]
        if leak["kind"] == kind
    ] == [kind != DIFFERENT_TIME]


def ticked(row: Row, *ticks: int, price: float = 1.0) -> Row:
    """A market that stands still but for single ticks, each there and back again."""
    row = still(row, price) | {"label": "SKIP"}
    for n in ticks:
        bars_of(row)[n].update(dict.fromkeys(("open", "high", "low", "close"), price + 0.01))
    return row


@pytest.mark.parametrize("ticks", [(29,), (7,), (7, 20)])
@pytest.mark.parametrize("placeless", [True, False])
def test_quiet_windows_that_are_equal_by_chance_are_told_and_not_refused(
    ticks: tuple[int, ...], placeless: bool, tmp_path: Path
) -> None:
    """Months apart where one row has no time, or of pegged symbols at one time."""
    rows = dated_rows(12, seed=1, apart=600)
    files = {"train": [*rows[:7], ticked(rows[7], *ticks)], "val": [*rows[8:11], ticked(rows[11], *ticks)]}
    if placeless:
        files["val"][3]["context_bars"][0].update(time=None, bar_index=None)
    else:
        files["val"][3] = ticked(rows[7], *ticks) | {"symbol": "DAI"}
    report = check_files(write(tmp_path, {name: anonymous(rows) for name, rows in files.items()}))
    (leak,) = report["leaks"]
    assert (leak["kind"], leak["count"], leak["refused"]) == (LOOK_ALIKES, 1, False)
    assert "train.jsonl:8" in leak["examples"][0][0]
    assert "val.jsonl:4" in leak["examples"][0][1]
    assert report["duplicates"] == {"train": 0, "val": 0}
    with_more = {
        name: [ticked(row, 3, 11, *ticks) if row is rows[-1] else row for row in rows] for name, rows in files.items()
    }
    assert by_content(tmp_path, with_more) == {"identical window": 1}


def test_quiet_windows_of_one_text_alone_are_told_and_not_refused_either(tmp_path: Path) -> None:
    rows = dated_rows(12, seed=1, apart=600)
    twin = ticked(rows[11], 7)
    for bar in bars_of(twin):
        bar |= {"time": None, "bar_index": None, "open": 2 * bar["open"], "high": 2 * bar["high"]}
        bar |= {"low": 2 * bar["low"], "close": 2 * bar["close"]}
    files = {"train": [*rows[:7], ticked(rows[7], 7)], "val": [*rows[8:11], twin]}
    (leak,) = check_files(write(tmp_path, {name: anonymous(rows) for name, rows in files.items()}))["leaks"]
    assert (leak["kind"], leak["count"], leak["refused"]) == (LOOK_ALIKES, 1, False)


def overlapped(folder: Path, **symbols: Any) -> dict[str, Any]:
    """The report on files whose windows share bars, each with symbols of its own, one after the other."""
    rows = dated_rows(40, seed=1, apart=10)
    files: Files = {"train": rows[:30], "val": rows[30:]}
    for name, own in symbols.items():
        files[name] = [row | {"symbol": own[n % len(own)]} for n, row in enumerate(files[name])]
    return check_files(write(folder, {name: anonymous(rows) for name, rows in files.items()}))


@pytest.mark.parametrize(("train", "val"), [("GC", "gc "), ("gc-sim ", "GC-SIM"), (None, ""), ("", "  "), ("ÉS", "és")])
def test_a_symbol_is_one_however_it_is_spelt(train: str | None, val: str | None, tmp_path: Path) -> None:
    report = overlapped(tmp_path, train=[train], val=[val])
    assert {leak["kind"]: leak["count"] for leak in report["leaks"]}["shared bars"] == 2
    assert [what for what in report["unchecked"] if "symbol" in what] == []
    one, other = (train or "").strip(), (val or "").strip()
    told = [f"symbols that differ only in case are treated as one: {one} = {other}"] if one != other else []
    assert report["noticed"]["val"] == told


@pytest.mark.parametrize(
    ("train", "val", "reason"),
    [
        (["GC"], ["GCZ5"], "no symbol is in both (train: GC; val: GCZ5)"),
        (["GC"], [None], "no row of val has a symbol, but rows of train have (GC)"),
        ([" "], ["ES", "GC"], "no row of train has a symbol, but rows of val have (ES, GC)"),
    ],
)
def test_files_without_a_common_symbol_are_said_to_hide_shared_bars(
    train: list[str | None], val: list[str | None], reason: str, tmp_path: Path
) -> None:
    report = overlapped(tmp_path, train=train, val=val)
    assert not {leak["kind"] for leak in report["leaks"]} & set(POSITION_KINDS)
    said = f"shared bars, training on later rows between train and val: {reason}. Use the same symbol for a market"
    assert [what for what in report["unchecked"] if what.startswith(said)]
    assert set(kinds_not_found([], report["unchecked"])) & {"shared bars", "training on later rows"} == set()


def test_a_symbol_that_training_rows_do_not_have_is_said(tmp_path: Path) -> None:
    report = overlapped(tmp_path, train=["GC"], val=["GC", "GC", "GCZ5"])
    assert report["noticed"]["val"] == [
        (
            "3 of 10 rows have a symbol that no row of train has (GCZ5): "
            "bars that they share with its rows are not detected"
        )
    ]


def test_files_that_are_placed_by_different_fields_are_told_apart(tmp_path: Path) -> None:
    rows = dated_rows(12, seed=1, apart=60)
    for n, row in enumerate(rows):
        for bar in bars_of(row):
            del bar["bar_index" if n < 8 else "time"]
    paths = write(tmp_path, {"train": rows[:8], "val": rows[8:]})
    why = "no field gives positions in every file: train has time; val has bar_index"
    assert check_files(paths)["unchecked"][0] == f"shared bars, training on later rows: {why}"
    with pytest.raises(ValueError, match=why):
        purged_rows({name: survey(WindowFile(path))[0] for name, path in paths.items() if path}, 0)


def test_one_text_and_two_labels_at_different_times_are_no_leak(tmp_path: Path) -> None:
    rows = dated_rows(12, seed=1, apart=60)
    quiet = [still(rows[n], trades=2) | {"label": label} for n, label in ((1, "LONG"), (2, "SHORT"), (9, "SKIP"))]
    doubled = still(rows[10], 4.0, trades=2)  # another window, the same text
    files = {"train": [*rows[3:9], *quiet[:2]], "val": [rows[11], quiet[2], doubled]}
    assert by_content(tmp_path, files) == {}
    for bar, other in zip(bars_of(doubled), bars_of(quiet[0]), strict=True):
        bar["time"], bar["bar_index"] = other["time"], other["bar_index"]
    assert by_content(tmp_path, files) == {"identical text": 1}
    files["train"].append(quiet[0] | {"label": "SKIP"})
    assert by_content(tmp_path, files) == {"identical text": 1, "two labels for one window": 1}


def test_what_cannot_be_looked_for_is_said(tmp_path: Path) -> None:
    files = {name: [make_row(place=False, seed=n) for n in rows] for name, rows in (("train", (1, 2)), ("val", (3,)))}
    report = check_files(write(tmp_path, files))
    assert report["unchecked"] == [
        "shared bars, training on later rows: some rows have neither time nor bar_index on every bar",
        "single-field leakage: too few rows, needs 30 training rows and two classes of at least 5",
        f"{RULE_UNCHECKED} and as many later train rows to judge it",
    ]
    assert kinds_not_found([], report["unchecked"]) == list(CONTENT_KINDS[:-1])


def test_a_field_that_tells_the_label_is_found_beside_a_class_too_rare_to_look_at(tmp_path: Path) -> None:
    rows = [make_row("LONG" if n < 4 else ("SHORT", "SKIP")[n % 2], seed=n) for n in range(120)]
    for row in rows:
        row["features"] = {"signal": float(LABELS.index(row["label"]))}
    report = check_files({"train": write_rows(tmp_path / "train.jsonl", rows)})
    assert [(leak["kind"], leak["field"]) for leak in report["leaks"]] == [("single-field leakage", "features.signal")]
    assert report["unchecked"] == [
        "fields that reveal LONG: fewer than 5 of the 120 examined training rows have this label"
    ]


def placed(symbol: str, first: int, bars: int, seed: int, day: int = 0) -> Row:
    """A window by bar_index only. A bar of a symbol and a day has its prices by its number, as in a market."""
    row = make_row(bars=bars, seed=seed, place=False, symbol=symbol, id=f"{symbol}-{day}-{first}-{seed}")
    for n, bar in enumerate(bars_of(row)):
        close = 2000 + (first + n) % 71 + 100 * day
        bar |= {"bar_index": first + n, "open": close, "high": close + 2, "low": close - 2, "close": close}
    return row


def spans(surveys: dict[str, Survey]) -> Spans:
    found = common_spans({name: one.positions for name, one in surveys.items()})
    assert found is not None
    return found


def random_surveys(folder: Path, seed: int) -> dict[str, Survey]:
    rng = np.random.default_rng(seed)
    return {
        name: survey(
            WindowFile(
                write_rows(
                    folder / f"{name}.jsonl",
                    [
                        placed(str(rng.choice(["A", "B"])), int(rng.integers(600)), int(rng.integers(30, 51)), n)
                        for n in range(12)
                    ],
                )
            )
        )[0]
        for name in ("train", "val", "test")
    }


@pytest.mark.parametrize("embargo", [0, 1, 17, 100])
def test_purging_drops_what_a_comparison_bar_by_bar_drops(embargo: int, tmp_path: Path) -> None:
    hits = 0
    for seed in range(5):
        surveys = random_surveys(tmp_path, seed)
        where = spans(surveys)
        bars = {
            name: [
                {(symbol, int(bar)) for bar in np.arange(first - reach, last + 1 + reach)}
                for symbol, first, last in zip(
                    where.symbol_N[name], where.first_N[name], where.last_N[name], strict=True
                )
            ]
            for name, one in surveys.items()
            for reach in [embargo if name == "train" else 0]
        }
        expected = [
            row
            for row, own in enumerate(bars["train"])
            if any(own & other for name in ("val", "test") for other in bars[name])
        ]
        rows, partners = overlapping(where, "train", ["val", "test"], embargo)
        assert rows.tolist() == purged_rows(surveys, embargo)["train"].tolist() == expected
        for row, partner in zip(rows, partners, strict=True):
            name, place = partner
            assert bars["train"][row] & bars[name][place]
        hits += len(expected)
    assert hits >= 5
    assert hits < 60 or embargo == 100  # and there nothing is left


def test_a_window_inside_a_longer_one_does_not_hide_it(tmp_path: Path) -> None:
    files = {"train": [placed("A", 45, 30, 0)], "val": [placed("A", 0, 50, 1), placed("A", 5, 30, 2)]}
    surveys = {name: survey(WindowFile(path))[0] for name, path in write(tmp_path, files).items() if path}
    rows, partners = overlapping(spans(surveys), "train", ["val"])
    assert (rows.tolist(), partners) == ([0], [("val", 0)])


def tokenised(config: Any, **changes: Any) -> Any:
    tokenizer = load_tokenizer("embedded", None)
    inputs = Inputs(window_files(config))
    settings: Any = {"codec": "compact", "max_tokens": 512, "oversampling": "auto"}
    settings |= {"max_repeat": None, "weights": "auto"}
    return load_dataset(inputs, tokenizer, **settings, **changes)


def test_a_purged_run_trains_without_the_dropped_rows_and_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = learnable_rows(46, seed=1)
    for n, row in enumerate(rows):
        for place, bar in enumerate(bars_of(row)):
            bar |= {"bar_index": 100 * n + place, "time": f"2025-03-{1 + n // 24:02d}T{n % 24:02d}:{place:02d}:00Z"}
    files = {"train": rows[:36], "val": deepcopy(rows[36:])}
    for bar, other in zip(bars_of(files["val"][0]), bars_of(rows[5]), strict=True):
        bar["time"] = other["time"]  # the sixth training window's bars
    paths = write(tmp_path, files)
    config = make_config(*(f"data.{name}={path}" for name, path in paths.items()))
    assert len(tokenised(config).names["train"]) == 36
    near = tokenised(config, purge=True, embargo=31)  # windows lie 31 bars apart
    assert len(near.names["train"]) == 36 - 3  # its own and its neighbours
    purged = config.model_copy(update={"data": config.data.model_copy(update={"purge": True})})
    pipeline = TrainingPipeline(purged)
    summary = pipeline.run()
    assert summary is not None
    assert summary["data"]["purged"] == {"train": 1, "val": 0}
    assert summary["data"]["rows"]["train"] == 35
    assert sum(summary["data"]["before_oversampling"].values()) == 35
    assert rows[5]["id"] not in " ".join(pipeline.data.names["train"])
    assert any(note.startswith("1 of 36 train rows are dropped") for note in pipeline.data.notes())
    assert [leak["kind"] for leak in summary["data"]["leaks"] if leak["kind"] == "shared bars"] == []


def test_purging_needs_places_and_leaves_rows(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [make_row(LABELS[n % 3], seed=n) for n in range(12)]  # all at the same time
    config = make_config(
        f"data.train={write_rows(tmp_path / 'a', rows)}", f"data.val={write_rows(tmp_path / 'b', rows)}"
    )
    with pytest.raises(DataError, match=r"data\.purge must leave rows, but all 12 of train share bars"):
        tokenised(config, purge=True)
    rows = [make_row(LABELS[n % 3], seed=n, place=False) for n in range(12)]
    write_rows(tmp_path / "a", rows)
    with pytest.raises(ConfigError, match=r"data\.purge needs the position of each window"):
        tokenised(config, purge=True)


def test_leaked_rows_are_refused_or_mark_every_figure(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = learnable_rows(46, seed=1)
    paths = write(tmp_path, {"train": rows, "val": [*learnable_rows(19, seed=2), rows[3]]})
    config = make_config(*(f"data.{name}={path}" for name, path in paths.items()))
    with pytest.raises(DataError) as refused:
        TrainingPipeline(config).load_data()
    assert [fault.partition(":")[0] for fault in refused.value.faults] == [
        "1 × identical window in train and val",
        "1 × same id in train and val",
    ]
    assert not Path(config.output_dir, "checkpoints").exists()
    data = config.data.model_copy(update={"allow_leakage": True})
    summary = TrainingPipeline(config.model_copy(update={"data": data})).run()
    assert summary is not None
    leaked = "1 × identical window in train and val; 1 × same id in train and val"
    for figures in (summary["best"], *summary["epochs"], *summary["targets"]):
        assert figures["leaked"] == leaked
    assert summary["targets_judged_on"] == f"validation rows (LEAKED: {leaked})"
    card = Path(config.output_dir, "export", "README.md").read_text()
    assert f"**Do not believe any figure here: rows are in two files ({leaked}).**" in card
    assert (
        f"rows are in two files ({leaked})."
        in yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["dataset"]["name"]
    )
    said = f"Do not believe any figure here: rows are in two files ({leaked})."
    assert summary["verdict"] == verdict(Summary.model_validate(summary))
    assert summary["verdict"].startswith(said)


# Drift


def test_the_stability_index_is_its_formula_and_grows_with_the_shift() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=4000)
    psi, bins = population_stability(np.array([0.0] * 60 + [1.0] * 40), np.array([0.0] * 30 + [1.0] * 70))
    p, q = np.array([60.5, 40.5]) / 101, np.array([30.5, 70.5]) / 101
    assert bins == 2
    assert psi == pytest.approx(float(((q - p) * np.log(q / p)).sum()))
    values = [population_stability(first, rng.normal(shift, size=1000))[0] for shift in (0.0, 0.5, 1.0)]
    assert values[0] < 0.03 < values[1] < values[2]
    same = [population_stability(first, rng.normal(size=400))[0] for _ in range(40)]
    assert np.mean(same) == pytest.approx(9 * (1 / 4000 + 1 / 400), rel=0.3)


def test_drift_names_the_features_that_moved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(seed=n, features={"still": float(rng.normal()), "moved": float(rng.normal())}) for n in range(200)]
    for row in rows[120:]:
        row["features"]["moved"] += 3
        for bar in bars_of(row):
            bar["volume"] *= 5
    paths = write(tmp_path, {"train": rows[:120], "val": rows[120:]})
    found = drift(*(survey(WindowFile(path))[0] for path in paths.values() if path))
    assert {entry["feature"] for entry in found if entry["shifted"]} == {"features.moved", "mean volume"}
    assert [entry["psi"] for entry in found] == sorted((entry["psi"] for entry in found), reverse=True)


def test_a_sample_of_events_stays_small_and_even(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ctxtrain.data.profile.MAX_SAMPLED_ROWS", 8)
    assert MAX_SAMPLED_ROWS > 8
    path = write_rows(tmp_path / "rows.jsonl", [make_row(bars=30, seed=n) for n in range(37)])
    sample = survey(WindowFile(path))[0].sample
    assert sample.rows == list(range(0, 37, sample.stride))
    assert len(sample.rows) == len(sample.values) == len(sample.shape) <= 8


def test_a_file_says_its_symbols_and_its_first_and_last_event(tmp_path: Path) -> None:
    rows = dated_rows(3, seed=1, apart=60) + [row | {"symbol": "ES"} for row in dated_rows(1, seed=2, apart=60)]
    found = extent(survey(WindowFile(write_rows(tmp_path / "rows.jsonl", rows)))[0])
    assert found["symbols"] == ["ES", "GC"]
    assert found["first_event"] == "2025-03-03T00:29:00+00:00"
    assert found["last_event"] == "2025-03-03T02:29:00+00:00"
    rows.append(make_row(place=False))
    found = extent(survey(WindowFile(write_rows(tmp_path / "rows.jsonl", rows)))[0])
    assert found["first_event"] is found["last_event"] is None
