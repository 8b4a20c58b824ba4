"""`ctxtrain windows`, and what follows it: check, train, predict.

python -m pytest tests/cli/test_windows_command.py
"""

import json
from pathlib import Path

import pytest

from ctxtrain.cli.process import main
from tests.bars import exporters
from tests.helpers import errors


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_the_command_says_what_it_told_from_the_file_and_what_comes_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = exporters.metatrader(tmp_path, exporters.make_market())
    out = tmp_path / "out"
    assert call("windows", path, "-o", out, "--time-zone", "Europe/Athens", "--events", "fvg_retest") == 0
    printed = capfd.readouterr()
    first, *notes = printed.err.splitlines()
    assert first == "reading 1 file of bars"
    assert notes[0] == f"note: {path}: text separated by tabs, with column names, decimal point"
    assert all(note.startswith("note: ") for note in notes)
    assert notes[-1] == "note: bars: 5 minutes, the most common step"
    *lines, following = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "bars    2,657 of M5, gaps 2 (longest 37 bars), duplicates 0"
    assert [line.split()[0] for line in lines[-3:]] == ["train", "val", "test"]
    assert following == f"next: ctxtrain check {out}/train.jsonl {out}/val.jsonl {out}/test.jsonl"
    assert call(*following.split()[2:]) == 0


def test_wrong_options_end_with_2_and_wrong_data_with_65(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = exporters.metatrader(tmp_path, exporters.make_market(300))
    assert call("windows", path, "-o", tmp_path / "out", "--bars", "10", "--events", "0") == 2
    assert [line.split()[0] for line in errors(capfd.readouterr().err)] == ["events", "bars"]
    assert call("windows", tmp_path / "none.csv", "-o", tmp_path / "out") == 65
    assert "none.csv: no such file" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_windows_of_bars_are_checked_trained_on_and_predicted(
    tmp_path: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exporters.interactive_brokers(tmp_path, exporters.make_market())
    assert (
        call("windows", "GC.csv", "-o", "data", "--events", "20", "--bars", "20", "--structure", "--higher", "3") == 0
    )
    assert call("check", "data/train.jsonl", "data/val.jsonl", "data/test.jsonl") == 0
    config = {
        "data": {"train": "data/train.jsonl", "val": "data/val.jsonl", "test": "data/test.jsonl", "purge": True},
        "model": {"base": str(tiny_base)},
        "training": {"epochs": 1, "warmup_steps": 0, "batch_size": 16, "gradient_accumulation": 1},
        "output_dir": "run",
    }
    Path("config.yaml").write_text(json.dumps(config))
    assert call("train", "config.yaml", "--quiet") == 0
    assert call("predict", "run/final_model.zip", "data/test.jsonl", "-o", "predictions.jsonl") == 0
    rows = Path("data/test.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [prediction["id"] for prediction in predictions] == [json.loads(row)["id"] for row in rows]
    capfd.readouterr()
    assert call("predict", "run/final_model.zip", "data/test.jsonl", "-o", "data/test.jsonl") == 2
    assert call("predict", "run/final_model.zip", "data/test.jsonl", "-o", "data/windows.json") == 2
    assert "belongs to the set of windows" in capfd.readouterr().err
