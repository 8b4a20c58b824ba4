"""Rows that nobody vouches for: each is read as it stands, or refused with its place and the reason."""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ctxtrain import TrainingPipeline
from ctxtrain.cli.process import main
from ctxtrain.config.schema import Config
from ctxtrain.data import strict_json
from ctxtrain.data.check import check_files
from ctxtrain.data.row_schema import BAR_FIELDS, Bar
from ctxtrain.data.tokens import tokenise
from ctxtrain.data.walk_forward import cut_folds
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError
from ctxtrain.labels import LABELS
from ctxtrain.model.embedded import build_tokenizer
from ctxtrain.model.tokenizer import load_tokenizer, quiet_transformers
from tests.conftest import Amount, MakeConfig
from tests.helpers import bars_of, dated_rows, errors, learnable_rows, make_row, read, walk, write_rows
from tests.reliability.conftest import Figure
from tests.reliability.harness import write_config
from tests.reliability.json_corpus import ACCEPTED, BLANK, REFUSED, SUITE, SUITE_TWICE, TWICE
from tests.tiny_models import build_tiny

BAD_DATA = 65
GOOD = json.dumps({"context": "Long?", "label": "LONG"}).encode()


def ended(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str]:
    """Exit code and output of a command, without what it says that it is doing; there is no traceback."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return end.value.code, out + "".join(f"error: {line}\n" for line in errors(err))


# JSON


@pytest.mark.promise("E1")
@pytest.mark.parametrize("corpus", [REFUSED, TWICE], ids=["not JSON", "key twice"])
def test_what_is_no_json_is_refused_with_its_column_and_costs_no_other_row(corpus: list[bytes], figure: Figure) -> None:
    for text in corpus:
        reading = read([GOOD, text, GOOD])
        (fault,) = reading.faults
        place, _, reason = fault.partition(": not valid JSON: ")
        file, line, column = place.split(":")
        assert (file, line) == ("rows.jsonl", "2"), text[:80]
        assert 1 <= int(column) <= len(text) + 1, text[:80]
        assert reason, text[:80]
        assert (reading.rows, reading.good) == (3, 2)
    figure("E1", "{} texts that are no JSON or have a key twice", len(corpus))


@pytest.mark.promise("E1")
def test_what_is_json_gets_past_the_parser_as_the_standard_library_reads_it() -> None:
    for text in ACCEPTED:
        assert strict_json.loads(text) == json.loads(text), text[:80]
        assert not any("not valid JSON" in fault for fault in read([text]).faults)


@pytest.mark.promise("E1")
def test_files_of_json_test_suite_are_refused_as_data_and_read_as_the_suite_says(
    tmp_path: Path, figure: Figure
) -> None:
    counts = Counter(name[0] for name in SUITE)
    assert counts == {"n": 188, "y": 95, "i": 35}
    for name, text in SUITE.items():
        path = tmp_path / name
        path.write_bytes(text)
        try:
            value = strict_json.loads(text)
        except ValueError:
            assert name[0] in "ni" or name in SUITE_TWICE, name
            reading = walk(path)
            assert reading.faults or name == BLANK, name
            assert all(fault.startswith(f"{path}:") for fault in reading.faults), name
            assert reading.good == 0, name
        else:
            assert name[0] in "yi", name
            assert value == json.loads(text, parse_int=float), name  # an integer beyond 64 bits is a float
    figure("E1", "{} + {} + {} files of JSONTestSuite (n_, y_, i_)", *(counts[kind] for kind in "nyi"))


@pytest.mark.promise("E1")
def test_all_faults_come_in_one_pass_and_the_first_hundred_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for text in (*REFUSED, *TWICE) if (line := text.replace(b"\n", b"")).strip()]
    path = tmp_path / "rows.jsonl"
    lines.insert(0, json.dumps(make_row()).encode())  # the format is told from the first line
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    reading = walk(path)
    assert reading.rows == len(lines)
    assert reading.fault_total + reading.good == len(lines)
    code, text = ended(capsys, "check", path, "--json")
    assert code == BAD_DATA
    report = json.loads(text)
    listed = len(report["faults"])
    assert listed == len(reading.faults) <= MAX_FAULTS_SHOWN
    assert (listed + sum(report["hidden_faults"].values()), report["fault_total"]) == (reading.fault_total,) * 2


def key_twice(text: str) -> bool:
    """The standard library's answer, pair by pair."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        found |= len({key for key, _ in pairs}) < len(pairs)

    json.loads(text, object_pairs_hook=look)
    return found


KEYS = st.sampled_from([*'ab:{}"\\T-,[ \n', "", "time", 'a":', '":"', "é", "-T:", '\\":'])
BLANKS = st.sampled_from(["", "", "", " ", "\t", "\r", " \n "])


@st.composite
def written(draw: st.DrawFn, value: st.SearchStrategy[str]) -> str:
    """An object or array around values that are written already; keys may repeat, be escaped and stand apart."""
    items = draw(st.lists(value, max_size=4))
    if draw(st.booleans()):
        keys = [draw(text_written(draw(KEYS))) for _ in items]
        items = [f"{key}{draw(BLANKS)}:{draw(BLANKS)}{item}" for key, item in zip(keys, items, strict=True)]
        return "{" + draw(BLANKS) + ",".join(items) + "}"
    return "[" + ",".join(items) + draw(BLANKS) + "]"


@st.composite
def text_written(draw: st.DrawFn, text: str) -> str:
    """A JSON string, some of its characters as escapes."""
    return '"' + "".join(f"\\u{ord(c):04x}" if draw(st.booleans()) else json.dumps(c)[1:-1] for c in text) + '"'


LEAVES = st.one_of(KEYS.flatmap(text_written), st.sampled_from(["1", "true", "null", "-1.5e3", "{}", "[]"]))
DOCUMENTS = st.recursive(LEAVES, written, max_leaves=12)


@pytest.mark.promise("E1", "E2")
def test_a_key_twice_is_found_exactly_where_the_standard_library_finds_it(amount: Amount, figure: Figure) -> None:
    seen: Counter[bool] = Counter()

    @given(DOCUMENTS)
    @settings(max_examples=amount(500, 10_000), deadline=None, derandomize=True, database=None)
    def look(text: str) -> None:
        twice = key_twice(text)
        seen[twice] += 1
        if twice:
            with pytest.raises(orjson.JSONDecodeError, match="duplicate key") as caught:
                strict_json.loads(text.encode())
            assert text[caught.value.pos] == '"'
        else:
            assert strict_json.loads(text.encode()) == json.loads(text)

    look()
    assert min(seen.values()) > 20, seen
    figure("E1", "{} made texts against the standard library, {} with a key twice", seen.total(), seen[True])


@pytest.mark.promise("E1")
def test_a_key_of_a_real_row_that_stands_twice_is_found_wherever_it_is(amount: Amount) -> None:
    for seed in range(amount(20, 300)):
        rng = np.random.default_rng(seed)
        line = (json.dumps if seed % 2 else lambda row: orjson.dumps(row).decode())(make_row(seed=seed))
        assert strict_json.loads(line.encode())["label"] == "LONG"
        members = [i for i in range(len(line)) if line.startswith('": ' if seed % 2 else '":', i)]
        start = line.rindex('"', 0, int(rng.choice(members)))
        key = line[start : line.index(":", start)]
        with pytest.raises(orjson.JSONDecodeError, match="duplicate key"):
            strict_json.loads(f"{line[:start]}{key}: 0, {line[start:]}".encode())


# Rows


NUMBER: list[Any] = ["1,5", True, [], {}, 1e16, -1e16, "", "NaN"]
QUANTITY = [*NUMBER, -1, -1e-9]
FLAG = ["yes", 2, -1, 1.5, [], {}, "wahr"]
WRONG: dict[str, list[Any]] = dict.fromkeys(Bar.__annotations__, FLAG)
WRONG |= dict.fromkeys(("open", "high", "low", "close", "delta"), NUMBER)
WRONG |= dict.fromkeys(("volume", "buy_vol", "sell_vol", "atr_14"), QUANTITY)
DIRECTION = ["up", "2", 2, -2, 0.5, [], {}]
WRONG |= dict.fromkeys(("ext_dir", "int_dir", "htf_dir"), DIRECTION)
WRONG |= {"fvg_penetration": NUMBER, "fvg_quality": NUMBER, "mgann_wave_strength": QUANTITY}
WRONG["mgann_leg_first_fvg"] = ["yes", 2, -1, 1.5, []]
WRONG["mgann_leg_index"] = [-1, 11, 1.5, "three", "11", True, []]
WRONG["wave_strength"] = [-1, 101, "50 %", "101", True, [], {}]
WRONG["bar_index"] = ["1st", "1.5", 1.5, True, []]
WRONG["time"] = ["noon", True, [], {}, "2025-13-01"]
WRONG_IN_ROW: dict[str, list[Any]] = {
    "label": [None, "", " LONG", "HOLD", "LONG,SHORT", 1, 1.0, True, ["LONG"], {"LONG": 1}, "L\u041eNG", "long\0"],
    "id": [1.5, True, [], {}],
    "symbol": [1, True, [], {}],
    "features": [[1], "a", 1, {"a": "1,5"}, {"a": "nan"}, {"a": "7 %"}, {"a": 1e16}, {"a": "x" * 65}],
    "context_bars": [None, {}, "bars", 1, [None] * 29, ["x"] * 30, [[]] * 40],
    "current_bar": [None, [], "bar", 1, {}],
}


def mutations() -> Iterator[tuple[str, object]]:
    """Rows that each break one rule, with the words that their fault must name."""
    for seed, (name, values) in enumerate(WRONG.items()):
        for value in values:
            row = make_row(seed=seed)
            bars_of(row)[7 * seed % 30][name] = value
            yield name, row
    for name in ("open", "high", "low", "close"):
        for index in (0, 28, 29):
            missing, null = make_row(), make_row()
            del bars_of(missing)[index][name]
            bars_of(null)[index][name] = None
            yield from ((name, missing), (name, null))
    for name in ("bar_index", "time"):
        for first in range(0, 28, 4):
            row = make_row()
            bars = bars_of(row)
            bars[first][name], bars[first + 1][name] = bars[first + 1][name], bars[first][name]
            yield name, row
    yield from ((name, make_row() | {name: value}) for name, values in WRONG_IN_ROW.items() for value in values)
    yield from (("20 to 256 bars", make_row(bars=bars)) for bars in (2, 3, 18, 19, 257, 258, 300, 400))
    texts: list[object] = ["", " \n\t", None, 1, True, [], {}, 1.5]
    yield from (("context", {"context": value, "label": "LONG"}) for value in texts)
    odd: list[object] = [None, True, 1, 1.5, '"LONG"', [], [1], ["LONG", "SHORT"]]
    yield from (("JSON object", value) for value in odd)


@pytest.mark.promise("E1")
def test_each_broken_rule_is_named_in_its_line_and_all_of_them_at_once(
    tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    broken = list(mutations())
    assert len(broken) >= 300
    broken = broken[:: amount(4, 1)]
    path = write_rows(tmp_path / "rows.jsonl", [row for pair in broken for row in (make_row(), pair[1])])
    faults: dict[int, list[str]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):  # one by one: all faults are shown
        for fault in read([line]).faults:
            faults.setdefault(number, []).append(fault.removeprefix("rows.jsonl:1: "))
    for number, (words, row) in enumerate(broken):
        assert 2 * number + 1 not in faults
        reasons = faults.get(2 * number + 2, [])
        assert any(words in reason for reason in reasons), (words, reasons, str(row)[:200])
    reading = walk(path)
    assert reading.fault_total == sum(map(len, faults.values()))
    assert (reading.rows, reading.good) == (2 * len(broken), len(broken))
    assert len(reading.faults) == min(MAX_FAULTS_SHOWN, reading.fault_total - reading.hidden.total())
    shown = str(DataError(reading.faults, total=reading.fault_total)).splitlines()
    assert len(shown) == len(reading.faults) + bool(reading.hidden)
    figure("E1", "{} rows that break a rule", len(broken))


def changed(draw: st.DrawFn) -> bytes:
    """A valid line with a few bytes cut, put in or changed."""
    line = bytearray(draw(st.sampled_from([json.dumps(make_row(seed=seed)).encode() for seed in range(3)] + [GOOD])))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(line)))
        line[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(line)


@pytest.mark.promise("E1", "F7")
def test_any_bytes_are_read_or_refused_by_line_and_column(amount: Amount, figure: Figure) -> None:
    @given(st.one_of(st.binary(max_size=200), st.composite(changed)(), st.text(max_size=100).map(str.encode)))
    @settings(max_examples=amount(500, 10_000), deadline=None, derandomize=True, database=None)
    def look(data: bytes) -> None:
        reading = read(data.splitlines(keepends=True))
        refused = {match[1] for fault in reading.faults if (match := re.match(r"rows\.jsonl:(\d+):", fault))}
        assert reading.fault_total < MAX_FAULTS_SHOWN
        assert reading.rows == reading.good + len(refused) or "use one kind of row" in reading.faults[-1]
        assert reading.good or reading.faults

    look()
    figure("F7", "{} lines", amount(500, 10_000))


@pytest.mark.promise("E1", "F7")
def test_any_bytes_in_a_file_end_in_a_reading_or_a_data_error(tmp_path: Path, amount: Amount, figure: Figure) -> None:
    packed = gzip.compress(GOOD * 3)
    for seed in range(amount(100, 3_000)):
        rng = np.random.default_rng(seed)
        content = bytearray(packed if seed % 2 else rng.bytes(int(rng.integers(0, 60))))
        for place in rng.integers(0, max(1, len(content)), 1 + seed % 3):
            content[place : place + 1] = rng.bytes(1)
        path = tmp_path / f"rows.jsonl{'.gz' if seed % 4 else ''}"
        path.write_bytes(content[: rng.integers(0, len(content) + 1)] if seed % 5 == 0 else content)
        report = check_files({"train": path})  # a file that cannot be read at all is one fault of it
        assert report["rows"]["train"] or report["faults"]
        assert all(str(path) in fault for fault in report["faults"])
    figure("F7", "{} data files", amount(100, 3_000))


ROW = GOOD.decode()
LABEL = ":1: label must be LONG, SHORT, SKIP in any case, got"
BAD = "not valid JSON"
BARS = json.dumps(make_row())
SECOND = b'"open": 1, '
OPEN_TWICE = BARS.encode().replace(b'"volume"', SECOND + b'"volume"', 1)
HUGE_NUMBER = BARS.replace('"volume": ', '"volume": 1e400, "x": ', 1).encode()
LONG_LINE = b'{"context": "100 MB", "label": "LONG"}'
NAMED: dict[str, tuple[bytes, str | None]] = {  # the file, and what its fault says after its path; None is no fault
    "key twice": (GOOD[:-1] + b', "label": "SHORT"}', f":1:39: {BAD}: duplicate key 'label' in an object"),
    "key twice, escaped": (GOOD[:-1] + b', "lab\\u0065l": "SHORT"}', f":1:39: {BAD}: duplicate key 'label'"),
    "key twice in a bar": (OPEN_TWICE, f":1:{OPEN_TWICE.index(SECOND) + 1}: {BAD}: duplicate key 'open'"),
    "NaN": (b'{"context": NaN}', f":1:13: {BAD}"),
    "Infinity": (b'{"context": Infinity}', f":1:13: {BAD}"),
    "-Infinity": (b'{"context": -Infinity}', f":1:14: {BAD}"),
    "1e999": (b'{"context": 1e999}', f":1:13: {BAD}"),
    "-1e999": (b'{"context": -1e999}', f":1:13: {BAD}"),
    "1e400 in a bar": (HUGE_NUMBER, f":1:{HUGE_NUMBER.index(b'1e400') + 1}: {BAD}"),
    "lone surrogate": (b'{"context": "\\ud800", "label": "LONG"}', f":1:14: {BAD}"),
    "low surrogate first": (b'{"context": "\\udc00\\ud800"}', f":1:14: {BAD}"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, f":1:1: {BAD}"),
    "UTF-16": (ROW.encode("utf-16"), f":1:1: {BAD}"),
    "UTF-16 without a mark": (ROW.encode("utf-16-le"), f":1:2: {BAD}"),
    "UTF-32": (ROW.encode("utf-32-le"), f":1:2: {BAD}"),
    "Latin-1": (b'{"context": "caf\xe9", "label": "LONG"}', ":1:"),
    "NUL between": (GOOD + b"\0", f":1:38: {BAD}"),
    "NUL in text": (b'{"context": "a\0b", "label": "LONG"}', f":1:15: {BAD}"),
    "NUL as an escape": (b'{"context": "a\\u0000b", "label": "LONG"}', None),
    "line ends CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", None),
    "line ends CR alone": (GOOD + b"\r" + GOOD, f":1:39: {BAD}"),
    "blank lines between": (b"\n \n" + GOOD + b"\n\t\n", None),
    "no end of the last line": (GOOD + b"\n" + GOOD, None),
    "last line cut": (GOOD + b"\n" + GOOD[:-9], f":2:29: {BAD}"),
    "last line cut in a letter": (GOOD + b"\n" + '{"context": "π'.encode()[:-1], ":2:"),
    "two rows on a line": (GOOD + GOOD, f":1:38: {BAD}"),
    "a comma after a row": (GOOD + b",", f":1:38: {BAD}"),
    "one array of rows": (b"[" + GOOD + b"]", None),
    "an array among lines": (b"[" + GOOD + b"]\n" + GOOD, ":1: a row must be a JSON object"),
    "a row over two lines": (GOOD.replace(b", ", b",\n"), f":1:21: {BAD}"),
    "100 MB in a line": (LONG_LINE, f":1:1: {BAD}: a row may have at most 16 MiB, got 95 MiB"),
    "nested 100,000 deep": (b'{"context": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":1:"),
    "a label that is true": (b'{"context": "a", "label": true}', f"{LABEL} true"),
    'a label that is "1"': (b'{"context": "a", "label": "1"}', f'{LABEL} "1"'),
    "a label that is 1": (b'{"context": "a", "label": 1}', f"{LABEL} 1"),
    "a label that is 1.0": (b'{"context": "a", "label": 1.0}', f"{LABEL} 1.0"),
    "an unknown label": (b'{"context": "a", "label": "HOLD"}', f'{LABEL} "HOLD"'),
    "no label": (b'{"context": "a"}', ":1: label is missing"),
    "empty text": (b'{"context": "", "label": "LONG"}', ":1: context "),
    "blank text": (b'{"context": " \\u00a0\\t", "label": "LONG"}', ":1: context must contain text, got only blanks"),
    "no rows": (b"", ": the file has no rows"),
    "blank lines alone": (b"\n\n \n", ": the file has no rows"),
    "both shapes": (GOOD + b"\n" + BARS.encode(), ":2: mixes text rows (context) and window rows"),
    "digits beyond a double": (b'{"context": "a", "label": "LONG", "n": 123456789012345678901234567890}', None),
    "letters outside the plane": ('{"context": "\U0001f600", "label": "LONG"}'.encode(), None),
}


@pytest.mark.promise("E2")
@pytest.mark.parametrize("name", NAMED)
def test_what_files_get_wrong_has_a_name(name: str, tmp_path: Path, figure: Figure) -> None:
    content, fault = NAMED[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.replace(b"100 MB", b"a" * 100_000_000))
    reading = walk(path)
    if fault is None:
        assert reading.faults == []
        assert reading.good == content.count(b'"label"')
    else:
        assert len(reading.faults) == 1 + name.endswith("two lines"), reading.faults
        assert reading.faults[0].startswith(f"{path}{fault}"), reading.faults
        assert len(reading.faults[0]) < 400
    figure("E2", "{} named cases", 1)


# Counts


@pytest.mark.promise("E3")
def test_every_row_is_a_window_or_refused_in_every_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], amount: Amount, figure: Figure
) -> None:
    bad: list[Callable[[], object]] = [lambda: make_row("UP"), lambda: make_row(bars=4), lambda: "[]"]
    bad.append(lambda: '{"id": ')
    for seed in range(amount(5, 50)):
        rng = np.random.default_rng(seed)
        written: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        paths = []
        for split in ("train", "val", "test"):
            rows: list[object] = [*learnable_rows(int(rng.integers(3, 12)), seed=seed)]
            for place in rng.integers(0, len(rows), int(rng.integers(0, 5))):
                rows.insert(int(place), bad[int(rng.integers(len(bad)))]())
                refused[split] += 1
            written[split] = len(rows)
            paths.append(write_rows(tmp_path / f"{split}.jsonl", rows))
        code, text = ended(capsys, "check", *paths, "--json")
        report = json.loads(text)
        assert code == (BAD_DATA if refused.total() else 0)
        assert report["rows"] == dict(written)
        kept = {split: sum(classes.values()) for split, classes in report["classes"].items()}
        assert {split: kept[split] + refused[split] for split in kept} == dict(written)
        assert (
            len({fault.split(": ")[0].split(":")[1] + fault.split(":")[0] for fault in report["faults"]})
            == refused.total()
        )
    figure("E3", "{} sets of three files", amount(5, 50))


@pytest.mark.promise("E3")
def test_a_split_without_a_class_stops_a_run_or_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    rows = learnable_rows(20, seed=1)
    whole, lacking = tmp_path / "whole.jsonl", tmp_path / "lacking.jsonl"
    write_rows(whole, rows)
    write_rows(lacking, [row for row in rows if row["label"] != "SHORT"])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{train: {lacking}, val: {whole}}}\nmodel: {{base: {tiny_base}}}\noutput_dir: {tmp_path}/run\n"
    )
    code, text = ended(capsys, "train", config)
    assert code == BAD_DATA
    assert "the training rows must have every class, got LONG 6, SHORT 0, SKIP 8. Add rows of SHORT." in text


# Text that spells special tokens


NAMES: tuple[str, ...] = (
    "im_start",
    "im_end",
    "object_ref_start",
    "object_ref_end",
    "box_start",
    "box_end",
    "quad_start",
    "quad_end",
)
NAMES += ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad", "fim_prefix", "repo_name", "file_sep")
SPECIAL = ["<|endoftext|>", *(f"<|{name}|>" for name in NAMES)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The embedded tokenizer with Qwen's special tokens, opened as a run opens it."""
    folder = build_tiny(tmp_path_factory.mktemp("tokenizer"), "qwen3")
    made = build_tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.save_pretrained(folder)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(made))
        model.save_pretrained(folder)
    opened = load_tokenizer(str(folder))
    assert set(opened.convert_tokens_to_ids(SPECIAL)) == set(opened.all_special_ids)
    assert len(opened.all_special_ids) == len(SPECIAL)
    return opened


@pytest.mark.promise("E4")
def test_the_order_of_lines_decides_nothing_about_folds(tmp_path: Path, amount: Amount, figure: Figure) -> None:
    """The windows of all splits are equal byte for byte, so all that follows is; events of two symbols coincide."""
    rows = dated_rows(40, seed=1, apart=7)
    rows += [row | {"symbol": "OTHER"} for row in dated_rows(40, seed=2, apart=7)]
    shuffles = amount(4, 20)
    found: set[tuple[int, str, bytes]] = set()
    for seed in range(shuffles):
        order = np.random.default_rng(seed).permutation(len(rows))
        file = WindowFile(write_rows(tmp_path / "rows.jsonl", [rows[n] for n in order]))
        for number, fold in enumerate(cut_folds(file, 3)):
            for name, own in fold.items():
                content = b"".join(values.tobytes() for window in own for values in window.bars.values())
                found.add((number, name, content))
    assert len(found) == 9
    figure("E4", "{} orders of a file, the same folds byte for byte", shuffles)


@pytest.mark.promise("E5")
def test_text_that_spells_a_special_token_stays_text_wherever_it_stands(
    tokenizer: PreTrainedTokenizerBase, figure: Figure
) -> None:
    special = set(tokenizer.all_special_ids)
    for token in SPECIAL:
        texts = [token, f"{token} up", f"Trend {token} up", f"Trend up {token}", f"a{token}{token}b"]
        rows = tokenise(texts, tokenizer, 512)
        for number, text in enumerate(texts):
            ids = rows.row(number).tolist()
            assert not special & set(ids), text
            assert tokenizer.decode(ids) == text
    assert special & set(tokenizer("<|im_end|>", split_special_tokens=False)["input_ids"]), (
        "or this test proves nothing"
    )
    figure("E5", "{} special tokens in 5 places each", len(SPECIAL))


MEASURED = """
import sys, time
from pathlib import Path
from ctxtrain.cli.process import main
try:
    main(sys.argv[1:])
finally:  # ru_maxrss would begin with the parent's peak
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    print(f"MEASURED {peak >> 10} {time.process_time():.0f}")
"""


@pytest.mark.promise("E6")
def test_a_large_file_with_a_fault_in_its_last_line_takes_little_memory_and_a_minute(
    tiny_base: Path, make_config: MakeConfig, tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    number, volume = '"number"', 987654321
    texts = []
    for seed, label in zip(range(60), cycle(LABELS), strict=False):
        row = make_row(label, 50, seed, id="number")
        row["current_bar"]["volume"] = volume
        texts.append(json.dumps(row))
    megabytes, rows, written = amount(25, 1000), 0, 0
    path, val = tmp_path / "rows.jsonl", write_rows(tmp_path / "val.jsonl", learnable_rows(20, seed=2))
    with path.open("w") as stream:
        for text in cycle(texts):
            rows += 1
            written += stream.write(text.replace(number, f'"row {rows}"').replace(str(volume), str(rows)) + "\n")
            if written > megabytes * 1_000_000:
                break
        stream.write(texts[0][:-30] + "\n")
    tree = {"data": {"train": str(path), "val": str(val)}, "model": {"base": str(tiny_base)}, "output_dir": "run"}
    config = write_config(Config.parse(tree), tmp_path / "config.yaml")
    settings = make_config("training.epochs=1", run="finished")
    TrainingPipeline(settings).run()
    model = settings.output_dir
    for most, *words in (
        (600, "check", path),
        (600, "train", config),
        (700, "evaluate", model, path),  # the tokens of all rows
        (700, "predict", model, path),
    ):
        command = [sys.executable, "-c", MEASURED, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == BAD_DATA, done.stderr
        assert (
            f"{path}:{rows + 1}:{len(texts[0]) - 29}: not valid JSON: unexpected end of data"
            in done.stdout + done.stderr
        )
        peak, seconds = map(int, done.stdout.rpartition("MEASURED ")[2].split())
        assert peak <= most, words
        assert seconds <= 60, words
        figure(
            "E6",
            f"{words[0]} {{}} MB with a fault in the last line: {{}} MB at the peak, {{}} s",
            megabytes,
            peak,
            seconds,
        )


def test_the_mutations_reach_every_field() -> None:
    assert {words for words, _ in mutations()} >= set(BAR_FIELDS) | {"bar_index", "time"}
