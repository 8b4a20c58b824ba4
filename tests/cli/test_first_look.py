"""What is looked at before a second of imports: names, paths and the kind of a file.

Each mistake ends with the rule, the value and the remedy, and loads neither torch nor transformers.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ctxtrain.data.formats import FORMATS
from ctxtrain.data.sources import require_readable
from ctxtrain.data.window_file import load_windows
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.model.base_name import refuse_unknown_base
from tests.helpers import make_row, write_rows

# Runs each command in one process; prints what it ended with, and which heavy modules were loaded by then.
COMMANDS = """
import json, sys
from ctxtrain.cli.process import main
for words in json.load(open(sys.argv[1])):
    print("COMMAND", file=sys.stderr)
    try:
        main(words)
    except SystemExit as end:
        print("CODE", end.code, file=sys.stderr)
heavy = {"accelerate", "catboost", "pandas", "peft", "sklearn", "tokenizers", "torch", "transformers"}
print("LOADED", sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


def test_mistakes_end_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", [make_row()]))
    csv = tmp_path / "bars.csv"
    csv.write_text("time,open,high,low,close,volume\n2025-01-02 10:00,1,2,0.5,1.5,100\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("a run's")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": {"train": rows, "val": rows}, "output_dir": str(tmp_path / "out")}))
    train = ["train", str(config)]
    mistakes: dict[str, tuple[list[str], int]] = {
        f"error: {tmp_path}/none.yaml: no such config": (["train", f"{tmp_path}/none.yaml"], 2),
        "error: training.lr is not a config key; did you mean training.learning_rate?": ([*train, "training.lr=1"], 2),
        f"error: {tmp_path}/no.jsonl: no such file. Give a file": ([*train, f"data.val={tmp_path}/no.jsonl"], 65),
        f"error: {csv}: rows must be in {FORMATS}, but this is a table with 6 columns": (
            [*train, f"data.train={csv}"], 65
        ),
        "error: model.base must be embedded, a folder with a checkpoint, or a hub id OWNER/NAME, and there is no "
        "folder 'qwen2.5-0.5b'. Did you mean Qwen/Qwen2.5-0.5B?": ([*train, "model.base=qwen2.5-0.5b"], 2),
        f"error: output_dir must be a folder, and {rows} is a file": ([*train, f"output_dir={rows}"], 2),
        f"error: {tmp_path}/no.zip: no such model. Give a run folder": (["predict", f"{tmp_path}/no.zip", rows], 2),
        f"error: {rows}: a model must be a run folder": (["evaluate", rows, f"{tmp_path}/final_model.zip"], 65),
        f"error: {run}: this run has no export yet": (["serve", str(run)], 2),
        "error: min-confidence must be auto or a number from 0 to 1, got 2": (
            ["predict", str(run), rows, "--min-confidence", "2"], 2
        ),
    }  # fmt: skip
    (tmp_path / "words.json").write_text(json.dumps([words for words, _ in mistakes.values()]))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path / "words.json")], capture_output=True, text=True, check=False,
    )  # fmt: skip
    *said, loaded = done.stderr.splitlines()
    assert loaded == "LOADED []"
    assert not (tmp_path / "out").exists()
    parts = "\n".join(said).split("COMMAND\n")[1:]
    for part, (message, (words, code)) in zip(parts, mistakes.items(), strict=True):
        assert part.startswith(message), (words, part)
        assert part.rstrip().endswith(f"CODE {code}"), (words, part)


OTHER_FORMATS: dict[str, tuple[bytes, str]] = {
    "binance": (
        b"1499040000000,0.01634,0.8,0.0157,0.0158,148976.1,1499644799999,2434.2,308\n",
        "a table with 9 columns",
    ),
    "metatrader": (b"<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\n", "a table with 6 columns, like CSV"),
    "quoted": (b'"Date";"Open";"High";"Low";"Close"\n"01.02.2025";"1,5"', "a table with 5 columns, like CSV"),
    "ninjatrader": (b"20250102 100000;1.5;2.5;1.0;2.0;17\n", "a table with 6 columns, like CSV"),
    "decimal commas": (b"01.02.2025;1,5;2,5;1,0;2,0\n", "a table with 5 columns, like CSV"),
    "bars": (b"Date|Open price|High price|Low price|Close price\n", "a table with 5 columns, like CSV"),
    "after a comment": (b"sep=;\n\n# bars\ntime;open;high;low\n", "a table with 4 columns, like CSV"),
    "exponents": (b"1e5,2e5,1e5,2E5\n", "a table with 4 columns, like CSV"),
    "gzip": (gzip.compress(b"time,open,high,low,close\n" * 2000), "a table with 5 columns, like CSV"),
    "html in lower case": (b"<!doctype html>", "an HTML page"),
    "klines": (b'[[1499040000000,"0.0163","0.8","0.0157","0.0158","148976.1"],', "arrays of numbers"),
    "old feather": (b"FEA1\0\0", "a Feather file of version 1"),
    "excel": (b"PK\3\4\x14\0", "a zip archive or an Excel file. Unpack it, or write its rows as JSON lines"),
    "xz": (b"\xfd7zXZ\0", "compressed by xz. Unpack it, or compress it by gzip"),
    "tar": (gzip.compress(b"rows.jsonl".ljust(257, b"\0") + b"ustar"), "a tar archive"),
    "a table of rows": (b"id,label,context_bars\n7,LONG,[]\n", "a table with 3 columns, like CSV. Write its rows"),
    "html": (b"<!DOCTYPE html>", "an HTML page"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_file_of_another_format_is_named_once_with_the_remedy(name: str, tmp_path: Path) -> None:
    content, what = OTHER_FORMATS[name]
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_windows(path)
    (fault,) = refused.value.faults
    assert fault.startswith(
        f"{path}: rows must be in JSON lines, a JSON array, Parquet or Arrow (plain, .gz or .zst), but this is {what}"
    )


WRITE: dict[str, Callable[[Path], object]] = {
    "numbers in a text": lambda path: path.write_text('{"context": "1, 2, 3, 4, 5, 6", "label": "LONG"}\n'),
    "names of bar fields first": lambda path: path.write_text('{"open": 1, "high": 2, "low": 3, "close": 4}\n'),
    "a byte order mark": lambda path: path.write_text('\ufeff{"x": [1, 2, 3, 4, 5, 6]}\n', encoding="utf-8"),
    "a text": lambda path: path.write_text('"2024-01-01,open,high,low,close"\n'),
    "an array": lambda path: path.write_text('[{"x": [1, 2, 3, 4, 5, 6]}]\n'),
    "nothing": lambda path: path.write_bytes(b""),
    "blank lines": lambda path: path.write_bytes(b"\n\n{}\n"),
}


@pytest.mark.parametrize("name", WRITE)
def test_json_is_never_taken_for_another_format(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / "rows")
    require_readable(tmp_path / "rows")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("Qwen3-1.7B-base", "Qwen/Qwen3-1.7B-Base"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("QWEN3-8B", "Qwen/Qwen3-8B"),
        ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B"),
    ],
)
def test_a_qwen_without_its_owner_is_recognised(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no folder '{given}'\. Did you mean {meant}\?$"):
        refuse_unknown_base(given)


def test_what_a_base_may_be_passes(tmp_path: Path) -> None:
    for base in ("embedded", str(tmp_path), "Qwen/Qwen2.5-0.5B", "someone/my_qwen.v2"):
        refuse_unknown_base(base)
    with pytest.raises(ConfigError, match=r"there is no file 'models/q\.gguf'\. Use the safetensors checkpoint"):
        refuse_unknown_base("models/q.gguf")
    for base in ("./models/qwen", "/nowhere/qwen", "models/qwen/x", "embeded"):
        with pytest.raises(ConfigError, match=r"Give such a folder, or an id as Qwen/Qwen2\.5-0\.5B\.$"):
            refuse_unknown_base(base)
