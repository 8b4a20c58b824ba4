"""A table gives back the windows that were written, and a run parses each row once."""

import hashlib
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain import TrainingPipeline, run_several
from ctxtrain.data import parse_report, parse_window, token_store, tokens
from ctxtrain.data.parse_window import Window
from ctxtrain.data.positions import collect_positions
from ctxtrain.data.table_cache import TableCache
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError
from ctxtrain.evaluation.blocks import assign_blocks
from tests.conftest import MakeConfig
from tests.helpers import Row, dated_rows, make_row, write_rows

pytestmark = pytest.mark.slow


def unlike(count: int) -> list[Row]:
    """Rows with and without flags, features, times, ids and symbols, of several lengths."""
    rows: list[Row] = [*dated_rows(count, seed=1, apart=60)]
    rows += [make_row(seed=n, bars=30 + n % 21, flags=n % 2 == 0) for n in range(count)]
    for n, row in enumerate(rows):
        if n % 3 == 0:
            row["features"] = {"b": n / 7, "a": 1.0} if n % 2 else {}
        if n % 9 == 0:
            row["label_horizon"] = n
        if n % 4 == 0:
            row["id"] = f"ü{n}"
        if n % 6 == 0:
            row["context_bars"][7]["bar_index"] = None
        if n % 7 == 0 and n >= count:
            for number, bar in enumerate([*row["context_bars"], row["current_bar"]]):
                bar["time"] = 5 * number  # of a day, that is no date
        if n % 11 == 0:
            for bar in [*row["context_bars"], row["current_bar"]]:
                del bar["delta"]
                bar |= {"buy_vol": 7.5 + n, "sell_vol": 3.0}
        elif n % 5 == 0:
            row["symbol"] = None
            row["current_bar"]["delta"] = None
    return rows


def fields(window: Window) -> tuple[object, ...]:
    placed = window.position
    return (
        *(window.location, window.id, window.label, window.text, window.symbol, window.label_horizon),
        *(placed.time, placed.index, placed.unit, placed.time_name, placed.event),
        *(list(placed.indices), list(placed.numeric_times)),
        list(window.features.items()),
        [(name, values.dtype, values.tolist()) for name, values in window.bars.items()],
    )


def test_windows_come_back_as_they_were_parsed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", unlike(300))  # more than two batches
    kept = WindowFile(path)
    parsed = [fields(window) for window in kept]
    path.unlink()
    assert [fields(window) for window in kept] == parsed
    assert len({row for row, *_ in parsed}) == 600
    left = kept.without(np.array([0, 299, 599]))
    assert [fields(window) for window in left] == parsed[1:299] + parsed[300:599]
    assert (left.dropped, len(left), kept.dropped, len(kept)) == (3, 597, 0, 600)
    mixed = np.random.default_rng(0).permutation(600)[:90]
    for rows in (mixed, np.sort(mixed), mixed[:1], mixed[:0], np.arange(250, 270)):
        taken = kept.take(rows)
        assert [fields(window) for window in taken] == [parsed[n] for n in rows]
        assert [taken.id(n) for n in range(len(rows))] == [parsed[n][1] for n in rows]
        again = taken.take(np.arange(len(rows))[::-1])
        assert [fields(window) for window in again] == [parsed[n] for n in rows[::-1]]


def test_rows_of_a_table_stand_where_those_of_the_file_do(tmp_path: Path) -> None:
    """bar_index begins anew in each row, so no walk may join rows by it."""
    rows = [make_row(seed=n) for n in range(40)]
    for row in rows:
        for number, bar in enumerate([*row["context_bars"], row["current_bar"]]):
            bar.pop("time", None)
            bar["bar_index"] = number
    kept = WindowFile(write_rows(tmp_path / "rows.jsonl", rows))
    parsed, read = assign_blocks(collect_positions(kept)), assign_blocks(collect_positions(kept))
    assert "bar_index restarts" in parsed.note
    assert (read.note, read.block_N.tolist()) == (parsed.note, parsed.block_N.tolist())


def test_text_rows_and_rows_without_a_label_come_back_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"context": f"Trend {n} ↑"}) + "\n" for n in range(3)))
    kept = WindowFile(path, labelled=False)
    parsed = [fields(window) for window in kept]
    assert [fields(window) for window in kept] == parsed
    assert parsed[2][:4] == (f"{path}:3", None, None, "Trend 2 ↑")


def test_numbers_of_a_table_are_views_of_its_file(tmp_path: Path) -> None:
    kept = WindowFile(write_rows(tmp_path / "rows.jsonl", [make_row(seed=1)]))
    list(kept)
    (window,) = kept
    close = window.bars["close"]
    assert not close.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        close[0] = np.pi


@pytest.mark.parametrize(
    "how",
    [(), ("training.seeds=[0,1]",), ("evaluation.folds=2",), ("evaluation.folds=2", "training.seeds=[0,1]")],
    ids=["one run", "seeds", "folds", "folds and seeds"],
)
def test_rows_are_parsed_and_tokenised_once(
    how: tuple[str, ...], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the real functions. Rows of folds have no features here, so that one codec fits all folds."""
    places: list[str] = []
    parse, texts, tokenise = parse_window.parse_row, Counter[str](), tokens.token_rows

    def counted(row: object, place: str, **settings: Any) -> tuple[Window | None, list[str]]:
        places.append(place)
        return parse(row, place, **settings)

    def counting(of: Iterable[str], *settings: Any) -> Any:
        def seen() -> Iterator[str]:
            for text in of:
                texts[text] += 1
                yield text

        return tokenise(seen(), *settings)

    monkeypatch.setattr(parse_report, "parse_row", counted)
    monkeypatch.setattr(token_store, "token_rows", counting)
    folds = "evaluation.folds=2" in how
    more = (f"data.train={write_rows(tmp_path / 'dated', dated_rows(72, 3, apart=60))}",) if folds else ()
    config = make_config("training.epochs=1", "training.warmup_steps=0", *how, *more)
    assert run_several(config) if how else TrainingPipeline(config).run()
    assert len(places) == len(set(places)) == (72 if folds else 46 + 20)
    assert set(texts.values()) == {1}


def test_one_fold_can_be_run_alone_and_is_the_one_of_all(make_config: MakeConfig, tmp_path: Path) -> None:
    dated = write_rows(tmp_path / "dated", dated_rows(72, 3, apart=60))
    keys = (f"data.train={dated}", "evaluation.folds=2", "training.epochs=1", "training.warmup_steps=0")
    every, alone = make_config(*keys, run="all"), make_config(*keys, "evaluation.fold=2", run="alone")
    run_several(every)
    TrainingPipeline(alone).run()
    first, second = Path(every.output_dir) / "fold_2", Path(alone.output_dir)
    assert (first / "best_model.safetensors").read_bytes() == (second / "best_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"^evaluation\.fold must be one of evaluation\.folds, got 3 of 2\. Set both"):
        make_config(*keys, "evaluation.fold=3")
    with pytest.raises(ConfigError, match="got 1 of None"):
        make_config("evaluation.fold=1")


# Tables that are kept between runs


def cached(path: Path, folder: Path) -> tuple[list[tuple[object, ...]], WindowFile]:
    file = WindowFile(path, cache=TableCache(folder))
    return [fields(window) for window in file], file


def test_a_kept_table_is_found_by_content_and_gives_the_same_rows_and_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", unlike(300)[:300])
    first, file = cached(path, tmp_path / "cache")
    moved = path.rename(tmp_path / "moved.jsonl")
    monkeypatch.setattr(parse_report, "parse_row", None)  # nothing is parsed from here on
    again, other = cached(moved, tmp_path / "cache")
    assert [row[1:] for row in again] == [row[1:] for row in first]
    assert again[7][0] == f"{moved}:8"
    assert list(other.report.notices.lines()) == list(file.report.notices.lines())
    assert other.report.ignored_fields == file.report.ignored_fields
    assert (other.report.rows, other.report.good, other.sha256()) == (300, 300, file.sha256())
    assert other.report.notices.incomplete() == file.report.notices.incomplete()


def test_a_changed_file_and_unlabelled_rows_are_not_taken_for_the_kept_table(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [make_row(seed=1), make_row(seed=2)])
    cached(path, tmp_path / "cache")
    write_rows(path, [make_row(seed=1), make_row("SHORT", seed=2)])
    rows, _ = cached(path, tmp_path / "cache")
    assert [row[2] for row in rows] == [0, 1]
    bare = WindowFile(path, labelled=False, cache=TableCache(tmp_path / "cache"))
    assert [window.label for window in bare] == [None, None]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 3


@pytest.mark.parametrize(
    "how", ["cut", "other", "a page of zeros", "no note", "cut note", "null note", "more in the note"]
)
def test_a_kept_table_that_is_not_whole_is_made_again(how: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", unlike(5)[:5])
    first, _ = cached(path, tmp_path / "cache")
    (table,) = (tmp_path / "cache").glob("*.arrow")
    (note,) = (tmp_path / "cache").glob("*.json")
    whole = table.read_bytes()
    if how == "cut":
        table.write_bytes(whole[:-100])
    elif how == "other":
        table.write_bytes(b"x" * len(whole))
    elif how == "a page of zeros":
        table.write_bytes(whole[:4096] + bytes(4096) + whole[8192:])
    elif how == "no note":
        note.unlink()
    elif how == "null note":
        note.write_text(json.dumps(json.loads(note.read_text()) | {"reading": None}))
    elif how == "more in the note":
        beside = json.loads(note.read_text())
        beside["reading"]["noticed"]["more"] = 1
        note.write_text(json.dumps(beside))
    else:
        note.write_bytes(note.read_bytes()[:20])
    assert cached(path, tmp_path / "cache")[0] == first
    assert table.read_bytes() == whole
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".arrow", ".json"]


def test_faulty_rows_are_named_each_time_and_no_table_of_them_is_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [make_row(seed=1), {"label": "LONG"}])
    for _ in range(2):
        _, file = cached(path, tmp_path / "cache")
        assert file.report.fault_total > 0
        assert list((tmp_path / "cache").iterdir()) == []


def test_rows_of_a_pipe_are_read_and_not_kept(tmp_path: Path) -> None:
    content = write_rows(tmp_path / "rows.jsonl", unlike(5)[:5]).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["/bin/sh", "-c", f"cat > {tmp_path / 'pipe'}"], stdin=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        with (tmp_path / "pipe").open("rb"):
            writer.stdin.write(content)
            writer.stdin.close()
            file = WindowFile(tmp_path / "pipe", cache=TableCache(tmp_path / "cache"))
            digest = file.sha256()  # asked first, as where a run that has ended is looked for
            assert len(list(file)) == 5
    assert digest == hashlib.sha256(content).hexdigest()
    assert list((tmp_path / "cache").iterdir()) == []


def test_tables_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    cached(write_rows(tmp_path / "rows.jsonl", [make_row(seed=1)]), tmp_path / "cache")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "cache").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize("place", ["run", "run/tables", "run/export", "base", "runs", "output"])
def test_tables_lie_in_no_run_no_export_and_no_base(
    place: str, make_config: MakeConfig, tmp_path: Path, tiny_base: Path
) -> None:
    folder = tmp_path / "x"
    if place.startswith("run/") or place == "run":
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "config.yaml").touch()
        (folder / "run" / "run.lock").touch()
        (folder / "run" / "export").mkdir()
        (folder / "run" / "tables").mkdir()
    elif place == "base":
        shutil.copytree(tiny_base, folder / "base")
    elif place == "runs":
        (folder / "runs").mkdir(parents=True)
        (folder / "runs" / "runs.json").touch()
    config = make_config(f"data.cache={folder / place}")
    if place == "output":
        config = config.model_copy(update={"output_dir": str(folder / "output")})
    with pytest.raises(
        ConfigError,
        match=r"^data\.cache must be outside of output_dir, runs, exports and bases, but .* is in .*\. Give another",
    ):
        TrainingPipeline(config).run()
    assert not list(folder.rglob("*.arrow"))


def test_a_run_that_has_ended_is_not_made_again_for_another_cache(make_config: MakeConfig, tmp_path: Path) -> None:
    keys = ("training.seeds=[1,2]", "training.epochs=1")
    report = run_several(make_config(*keys))
    config = make_config(*keys, f"data.cache={tmp_path / 'cache'}")
    finished = (Path(config.output_dir) / "seed_1" / "final_model.zip").stat()
    assert run_several(config, resume=True) == report
    assert (Path(config.output_dir) / "seed_1" / "final_model.zip").stat() == finished


def test_a_run_with_data_cache_is_the_same_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = make_config("training.epochs=1", run="without")
    TrainingPipeline(without).run()
    zips = [(Path(without.output_dir) / "final_model.zip").read_bytes()]
    for run in ("first", "second"):
        config = make_config("training.epochs=1", f"data.cache={tmp_path / 'cache'}", run=run)
        TrainingPipeline(config).run()
        zips.append((Path(config.output_dir) / "final_model.zip").read_bytes())
        monkeypatch.setattr(parse_report, "parse_row", None)
    assert zips[0] == zips[1] == zips[2]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"^data\.cache must be a writable folder, got .*/file: "):
        TrainingPipeline(make_config(f"data.cache={tmp_path / 'file'}", run="third")).run()
