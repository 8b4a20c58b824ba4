"""A table gives back the windows that were written, and a run parses each row once."""

import json
from pathlib import Path

import numpy as np
import pytest

from ctxtrain import TrainingPipeline, run_several
from ctxtrain.data import formats, schema
from ctxtrain.data.formats import WindowFile
from ctxtrain.data.schema import Window
from ctxtrain.evaluation.blocks import blocks_of
from tests.conftest import MakeConfig
from tests.helpers import Row, dated_rows, make_row, write_rows


def unlike(count: int) -> list[Row]:
    """Rows with and without flags, features, times, ids and symbols, of several lengths."""
    rows: list[Row] = [*dated_rows(count, seed=1, apart=60)]
    rows += [make_row(seed=n, bars=30 + n % 21, flags=n % 2 == 0) for n in range(count)]
    for n, row in enumerate(rows):
        if n % 3 == 0:
            row["features"] = {"b": n / 7, "a": 1.0} if n % 2 else {}
        if n % 4 == 0:
            row["id"] = f"ü{n}"
        if n % 6 == 0:
            row["context_bars"][7]["bar_index"] = None
        if n % 7 == 0 and n >= count:
            for number, bar in enumerate([*row["context_bars"], row["current_bar"]]):
                bar["time"] = 5 * number  # of a day, that is no date
        if n % 5 == 0:
            row["symbol"] = None
            row["current_bar"]["delta"] = None
    return rows


def fields(window: Window) -> tuple[object, ...]:
    placed = window.placed
    return (
        *(window.place, window.id, window.label, window.text, window.symbol),
        *(placed.time, placed.index, placed.unit, placed.time_name, placed.event),
        *(list(placed.indices), list(placed.counts)),
        list(window.features.items()),
        [(name, values.dtype, values.tolist()) for name, values in window.bars.items()],
    )


def test_windows_come_back_as_they_were_parsed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", unlike(300))  # more than two batches
    kept = WindowFile(path, keep=True)
    parsed = [fields(window) for window in kept]
    path.unlink()
    assert [fields(window) for window in kept] == parsed
    assert len({row for row, *_ in parsed}) == 600
    kept.drop([0, 299, 599])
    assert [fields(window) for window in kept] == parsed[1:299] + parsed[300:599]


def test_rows_of_a_table_stand_where_those_of_the_file_do(tmp_path: Path) -> None:
    """bar_index begins anew in each row, so no walk may join rows by it."""
    rows = [make_row(seed=n) for n in range(40)]
    for row in rows:
        for number, bar in enumerate([*row["context_bars"], row["current_bar"]]):
            bar.pop("time", None)
            bar["bar_index"] = number
    kept = WindowFile(write_rows(tmp_path / "rows.jsonl", rows), keep=True)
    parsed, read = blocks_of(kept), blocks_of(kept)
    assert "bar_index begins anew" in parsed.note
    assert (read.note, read.block_N.tolist()) == (parsed.note, parsed.block_N.tolist())


def test_text_rows_and_rows_without_a_label_come_back_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"context": f"Trend {n} ↑"}) + "\n" for n in range(3)))
    kept = WindowFile(path, labelled=False, keep=True)
    parsed = [fields(window) for window in kept]
    assert [fields(window) for window in kept] == parsed
    assert parsed[2][:4] == (f"{path}:3", None, None, "Trend 2 ↑")


def test_numbers_of_a_table_are_views_of_its_file(tmp_path: Path) -> None:
    kept = WindowFile(write_rows(tmp_path / "rows.jsonl", [make_row(seed=1)]), keep=True)
    list(kept)
    (window,) = kept
    close = window.bars["close"]
    assert not close.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        close[0] = np.pi


@pytest.mark.parametrize("seeds", [[], [0, 1]])
def test_a_run_parses_each_row_once(seeds: list[int], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    parse = schema.parse_row

    def counted(row: object, place: str, *, labelled: bool) -> tuple[Window | None, list[str]]:
        places.append(place)
        return parse(row, place, labelled=labelled)

    monkeypatch.setattr(formats, "parse_row", counted)
    config = make_config("training.epochs=1", *([f"training.seeds={seeds}"] if seeds else []))
    assert run_several(config) if seeds else TrainingPipeline(config).run()
    assert len(places) == len(set(places)) == 46 + 20
