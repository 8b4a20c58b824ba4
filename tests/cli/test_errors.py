"""Bad input at the command line: the exit code, one message that says what was found and what to do, no traceback."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ctxtrain.cli.process import main
from ctxtrain.labels import LABELS
from tests.helpers import bars_of, errors, learnable_rows, make_row, write_rows

OK, USAGE, BAD_DATA, IO_FAULT, INTERRUPTED = 0, 2, 65, 74, 130
Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *words: object) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def refused(capsys: Capture, code: int, *words: object) -> list[str]:
    """The lines of the error with which a command ends."""
    ended, out, err = run(capsys, *words)
    assert ended == code, err
    assert "Traceback" not in out + err
    lines = errors(err)
    assert lines, err
    return lines


def process(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ctxtrain", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """One file for each kind of bad rows, and a good one."""
    backwards = make_row()
    backwards["context_bars"].reverse()
    good = learnable_rows(12, seed=0)
    contents: dict[str, list[Any]] = {
        "good": good,
        "broken": [*good[:5], '{"id": "x", "context_bars": [}', *good[5:]],
        "unknown_label": [*good[:2], make_row("HOLD")],
        "backwards": [good[0], backwards],
        "empty": [],
        "one_class": [make_row("SKIP", seed=seed, flags=False) for seed in range(4)],
    }
    return {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in contents.items()}


@pytest.fixture
def config(tmp_path: Path, files: dict[str, Path]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{train: {files['good']}, val: {files['good']}}}\noutput_dir: {tmp_path}/run\n")
    return path


# Faults of config and usage end with 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "training.epoch is not a config key; did you mean training.epochs?"),
        ("training.epochs=many", 'training.epochs must be a valid integer, got "many".'),
        ("training.learning_rate=-1e-4", "training.learning_rate must be greater than 0, got -0.0001."),
        ("epochs", "An override must have the form section.key=value, got 'epochs'."),
    ],
)
def test_a_config_fault_is_named_with_its_key(capsys: Capture, config: Path, override: str, message: str) -> None:
    assert refused(capsys, USAGE, "train", config, override) == [message]


def test_all_config_faults_come_at_once(capsys: Capture, config: Path) -> None:
    lines = refused(capsys, USAGE, "train", config, "training.epochs=0", "lora.r=0", "zzz=1")
    assert [line.split()[0] for line in lines] == ["lora.r", "training.epochs", "zzz"]


def test_a_missing_config_and_a_folder_that_is_no_run_are_refused(capsys: Capture, tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert refused(capsys, USAGE, "train", missing) == [
        f"{missing}: no such config file. Give the path of a YAML file."
    ]
    assert refused(capsys, USAGE, "export", tmp_path) == [
        f"{tmp_path}: no run folder, it has no config.yaml. Give the output_dir of a run."
    ]
    assert refused(capsys, USAGE, "report", tmp_path) == [
        f"{tmp_path}: no finished run, it has no training_summary.json. Finish it with train --resume."
    ]


def test_a_folder_where_a_file_is_wanted_is_named_as_one(capsys: Capture, tmp_path: Path, config: Path) -> None:
    assert refused(capsys, USAGE, "train", tmp_path) == [
        f"{tmp_path}: a config must be a regular file, got a folder. Give the path of a YAML file."
    ]
    assert refused(capsys, BAD_DATA, "train", config, f"data.val={tmp_path}") == [
        f"{tmp_path}: rows must be in a file, but this is a folder. Give a file, such as rows.jsonl or rows.parquet."
    ]


@pytest.mark.parametrize("command", ["export", "report", "evaluate", "predict", "serve"])
def test_a_folder_of_several_runs_is_named_as_one(
    capsys: Capture, tmp_path: Path, files: dict[str, Path], command: str
) -> None:
    for name in ("seed_1", "seed_0"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    (tmp_path / "runs" / "runs.json").write_text("{}")
    rows = [files["good"]] if command in ("evaluate", "predict") else []
    (line,) = refused(capsys, USAGE, command, tmp_path / "runs", *rows)
    assert line == (
        f"{tmp_path}/runs: must be one run, got a folder of runs: seed_0, seed_1. "
        f"Give one of them, such as {tmp_path}/runs/seed_0."
    )


def test_check_looks_for_faults_of_a_base(
    capsys: Capture, tmp_path: Path, files: dict[str, Path], tiny_base: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "config.json").write_text((base / "config.json").read_text().replace("{", '{"url": "https://a.b",', 1))
    ended, out, _ = run(capsys, "check", files["good"], "--base", base)
    assert ended == 0
    assert "warning: config.json of the base model has references to code or URLs under url" in out
    (base / "tokenizer.json").write_text("{}")
    (line,) = refused(capsys, USAGE, "check", files["good"], "--base", base)
    assert line.startswith("model.base must be a Qwen checkpoint that transformers opens")
    (base / "model.safetensors").unlink()
    (line,) = refused(capsys, USAGE, "check", files["good"], "--base", base)
    assert line.startswith(f"model.base: {base}: model.safetensors is missing")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_missing_model_is_refused(capsys: Capture, tmp_path: Path, files: dict[str, Path], command: str) -> None:
    (line,) = refused(capsys, USAGE, command, tmp_path / "none.zip", files["good"])
    assert line == f"{tmp_path}/none.zip: no such model. Give a run folder, an export folder or a final_model.zip."


def test_bad_numbers_for_the_sample_are_refused_at_once(capsys: Capture, tmp_path: Path) -> None:
    lines = refused(capsys, USAGE, "sample", tmp_path / "s", "--train", 0, "--noise", 2, "--mix", "0.5,0.5")
    assert [line.split()[0] for line in lines] == ["train", "noise", "mix"]
    (line,) = refused(capsys, USAGE, "sample", tmp_path / "s", "--mix", "a,b,c")
    assert line == "mix must be three numbers with commas between, got 'a,b,c'. Use 0.35,0.35,0.30."


def test_a_sample_takes_the_place_of_a_sample_but_of_no_rows_of_ones_own(capsys: Capture, tmp_path: Path) -> None:
    words = ("sample", tmp_path, "--train", 10, "--val", 3, "--test", 3)
    own = (tmp_path / "val.jsonl").write_text("mine")
    (line,) = refused(capsys, USAGE, *words)
    rule = "folder must contain no rows except those of a sample"
    assert line.startswith(f"{rule}, but sample.json does not list the SHA-256 of val.jsonl in {tmp_path}. ")
    assert (tmp_path / "val.jsonl").stat().st_size == own
    (tmp_path / "val.jsonl").unlink()
    assert [run(capsys, *words)[0] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tarin"], "No such command 'tarin'"),
        (["check"], "Missing argument 'TRAIN'"),
        (["check", "a", "--jsn"], "No such option: --jsn"),
        (["sample", "a", "--train", "x"], "Invalid value for '--train': Input should be a valid integer"),
    ],
)
def test_a_usage_error_shows_the_usage(capsys: Capture, words: list[str], message: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == USAGE
    assert message in err
    assert "Usage: ctxtrain" in err
    assert "Traceback" not in out + err


# Bad data ends with 65


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("missing", "", "no such file. Give a file, such as rows.jsonl or rows.parquet."),
        ("broken", ":6:30", "not valid JSON: "),
        ("unknown_label", ":3", 'label must be LONG, SHORT, SKIP in any case, got "HOLD"'),
        ("backwards", ":2", "bars must run oldest first, but bar_index goes from 1028 to 1027 at context_bars[1]"),
        ("empty", "", "the file has no rows; at least one is required"),
    ],
)
def test_bad_rows_are_refused_with_their_place(
    capsys: Capture, tmp_path: Path, files: dict[str, Path], config: Path, name: str, place: str, message: str
) -> None:
    path = tmp_path / f"{name}.jsonl"
    trained = refused(capsys, BAD_DATA, "train", config, f"data.val={path}")
    assert trained[0].startswith(f"{path}{place}: {message}")

    code, out, err = run(capsys, "check", files["good"], path)
    assert (code, errors(err)) == (BAD_DATA, [])
    assert f"{path}{place}: {message}" in out

    code, out, err = run(capsys, "check", files["good"], path, "--json")
    assert (code, errors(err)) == (BAD_DATA, [])
    assert json.loads(out)["faults"] == trained


def test_a_missing_file_with_a_relative_path_is_named_with_the_folder_where_it_was_looked_for(
    capsys: Capture, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (line,) = refused(capsys, BAD_DATA, "train", config, "data.val=good.jsonl")  # it lies beside the config
    assert line == (
        f"good.jsonl: no such file in {tmp_path}/elsewhere, the current folder. "
        "Give a file, such as rows.jsonl or rows.parquet."
    )


def test_the_faults_of_all_files_come_at_once(capsys: Capture, files: dict[str, Path], config: Path) -> None:
    lines = refused(
        capsys, BAD_DATA, "train", config, f"data.train={files['unknown_label']}", f"data.val={files['broken']}"
    )
    assert len(lines) == 2


def test_training_rows_of_one_class_are_refused_and_a_check_says_so(
    capsys: Capture, tmp_path: Path, files: dict[str, Path], config: Path
) -> None:
    (line,) = refused(capsys, BAD_DATA, "train", config, f"data.train={files['one_class']}")
    assert line == "the training rows must have every class, got LONG 0, SHORT 0, SKIP 4. Add rows of LONG, SHORT."
    code, out, err = run(capsys, "check", files["one_class"], files["good"])
    assert (code, errors(err)) == (BAD_DATA, [])
    assert line in out.splitlines()
    assert out.splitlines()[-1].startswith("1 fault, ")
    skips = write_rows(tmp_path / "skips.jsonl", [make_row("SKIP", seed=seed, flags=False) for seed in range(50, 54)])
    code, out, err = run(capsys, "check", files["good"], skips)
    assert (code, errors(err)) == (OK, [])  # where rows only judge, a class may lack


def test_a_run_refused_for_its_rows_starts_with_the_same_command_once_they_are_mended(
    capsys: Capture, files: dict[str, Path], config: Path
) -> None:
    for _ in range(2):  # the second would be refused with 2 if the first had left a run behind
        refused(capsys, BAD_DATA, "train", config, f"data.val={files['broken']}")


def test_a_model_that_is_none_is_refused(capsys: Capture, tmp_path: Path, files: dict[str, Path]) -> None:
    (tmp_path / "model.zip").write_bytes(b"no zip at all")
    (line,) = refused(capsys, BAD_DATA, "evaluate", tmp_path / "model.zip", files["good"])
    assert line.startswith(f"{tmp_path}/model.zip: not a whole zip file ")
    assert line.endswith("Copy or export it again.")
    (line,) = refused(capsys, BAD_DATA, "predict", files["good"].parent, files["good"])
    assert line.endswith("not an export, it has no manifest.json. Give a folder or zip made by export.")


def test_a_file_that_is_no_model_is_refused_with_the_order_of_the_arguments(
    capsys: Capture, tmp_path: Path, files: dict[str, Path], config: Path
) -> None:
    for command, path in (("predict", files["good"]), ("evaluate", files["good"]), ("predict", config)):
        (line,) = refused(capsys, BAD_DATA, command, path, tmp_path)
        assert line == (
            f"{path}: a model must be a run folder, an export folder or a final_model.zip, but this file is not a zip. "
            "Give MODEL first, then DATA."
        )


def test_standard_input_is_read_by_predict_alone(capsys: Capture, files: dict[str, Path]) -> None:
    code, out, _ = run(capsys, "check", files["good"], "-", "--json")
    assert code == BAD_DATA
    (fault,) = json.loads(out)["faults"]
    assert fault == ("-: only predict reads rows from standard input. Give a file, such as rows.jsonl or rows.parquet.")


# A good check


def test_a_check_of_good_files_reports_rows_classes_and_leaks(
    capsys: Capture, tmp_path: Path, files: dict[str, Path]
) -> None:
    rows = [*learnable_rows(10, seed=4), json.loads(files["good"].read_text().splitlines()[3])]
    bars_of(rows[0])[3]["wave_strength"] = 50
    rows[1] |= {"mood": "good", "conditions_met": ["a"]}
    rows[2]["context_bars"][0]["label_reason"] = "a"
    (tmp_path / "val.jsonl.gz").write_bytes(gzip.compress(write_rows(tmp_path / "val.jsonl", rows).read_bytes()))
    code, out, err = run(capsys, "check", files["good"], tmp_path / "val.jsonl.gz", "--json")
    assert (code, errors(err)) == (BAD_DATA, [])  # a run would refuse the leaks
    report = json.loads(out)
    assert report["rows"] == {"train": 12, "val": 11}
    assert report["classes"]["train"] == {"LONG": 4, "SHORT": 4, "SKIP": 4}
    assert (report["faults"], report["fault_total"]) == ([], 0)
    assert report["partial_fields"] == {"train": {}, "val": {}}
    assert report["unused_fields"] == ["bars.label_reason", "conditions_met", "mood"]
    assert report["label_side_fields"] == ["bars.label_reason", "conditions_met"]
    assert report["duplicates"] == {"train": 0, "val": 0}
    assert report["bars"]["val"] == {"shortest": 30, "median": 30, "longest": 30}
    assert report["tokens"]["train"]["rows_cut"] == 0
    parts = report["classes_over_time"]["val"]
    assert [sum(part[label] for label in LABELS) for part in parts] == [3, 2, 2, 2, 2]
    pair = [f"row-3 ({files['good']}:4)", f"row-3 ({tmp_path}/val.jsonl.gz:11)"]
    found = {leak["kind"]: leak for leak in report["leaks"]}
    assert list(found) == ["identical window", "same id", "shared bars"]
    for kind in ("identical window", "same id"):
        assert (found[kind]["files"], found[kind]["count"]) == (["train", "val"], 1)
        assert (found[kind]["examples"], found[kind]["refused"]) == ([pair], True)
    assert (found["shared bars"]["count"], found["shared bars"]["refused"]) == (12, False)

    code, out, err = run(capsys, "check", files["good"], tmp_path / "val.jsonl.gz", "--max-tokens", "70")
    assert (code, errors(err)) == (BAD_DATA, [])
    assert f"leak: 1 × identical window in train and val: {' and '.join(pair)}. Remove these rows from one file" in out
    assert "data.purge=true drops these 12 of 12 train rows." in out
    assert (
        "fields that the model does not read: bars.label_reason (label-side), conditions_met (label-side), mood" in out
    )
    assert re.search(r"^train: 30 to 30 bars, \d+ to \d+ tokens \(median \d+\); \d+ rows longer than 70$", out, re.M)
    assert "warning: not checked: single-field leakage: too few rows, needs 30 training rows" in out
    assert out.splitlines()[-1] == "0 faults, 2 leaks that training refuses, 3 warnings"


def test_a_check_counts_rows_that_stand_twice_in_a_file(capsys: Capture, tmp_path: Path) -> None:
    rows = learnable_rows(10, seed=4)
    again = [row | {"id": f"again-{n}"} for n, row in enumerate(rows[:3])]
    code, out, _ = run(capsys, "check", write_rows(tmp_path / "rows.jsonl", [*rows, *again]))
    assert code == OK
    assert "warning: train: 3 rows with the same window as an earlier row of the file" in out
    _, out, _ = run(capsys, "check", write_rows(tmp_path / "rows.jsonl", [*rows, *again[:1]]))
    assert "warning: train: 1 row with the same window as an earlier row of the file" in out


def test_a_check_counts_all_that_it_tells_its_reader_to_look_at(capsys: Capture, tmp_path: Path) -> None:
    rows = [make_row(LABELS[n % 3], seed=n, flags=False, place=False) for n in range(120)]
    train, val = rows[:60], rows[60:]
    del bars_of(train[0])[3]["delta"]
    for row in val:
        row["current_bar"]["volume"] = 9_000
    write_rows(tmp_path / "train.jsonl", [*train, train[1] | {"id": "again"}])
    code, out, _ = run(capsys, "check", tmp_path / "train.jsonl", write_rows(tmp_path / "val.jsonl", val))
    assert code == OK
    *lines, total = out.splitlines()
    looks = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert [look.split(": ")[0].split(" (")[0] for look in looks] == [
        "not checked",
        "train",
        "val drifts from train",
        "train",
    ]
    assert "train: delta is in 60 rows only; the model reads fields that every row has" in looks
    assert total == f"0 faults, 0 leaks that training refuses, {len(looks)} warnings"


def test_a_check_names_what_later_files_lack(capsys: Capture, tmp_path: Path, files: dict[str, Path]) -> None:
    rows = learnable_rows(10, seed=4)
    del bars_of(rows[0])[3]["delta"]
    code, out, _ = run(capsys, "check", files["good"], write_rows(tmp_path / "val.jsonl", rows))
    assert code == BAD_DATA
    assert f"{tmp_path}/val.jsonl:1: lacks delta, which the model was trained on" in out
    assert "warning: val: delta is in 9 rows only; the model reads fields that every row has" in out
    assert out.splitlines()[-1].startswith("1 fault, 0 leaks that training refuses, ")


def test_a_check_counts_the_faults_that_it_does_not_show(capsys: Capture, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "check", write_rows(tmp_path / "rows.jsonl", ["7"] * 130))
    assert code == BAD_DATA
    assert out.splitlines()[-2:] == [
        "… and 120 more faults: 120 × a row must be a JSON object",
        "130 faults, 0 leaks that training refuses, 0 warnings",
    ]
    _, out, _ = run(capsys, "check", write_rows(tmp_path / "rows.jsonl", ["7"] * 11))
    assert out.splitlines()[-2] == "… and 1 more fault: 1 × a row must be a JSON object"


# Whole processes


def test_a_fault_ends_the_process_with_one_message_and_debug_shows_the_traceback(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    message = f"error: {missing}: no such config file. Give the path of a YAML file.\n"
    done = process("train", missing)
    assert (done.returncode, done.stdout, done.stderr) == (USAGE, "", message)
    done = process("train", missing, "--debug")
    assert done.returncode == USAGE
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith(message)


def test_a_place_that_cannot_be_written_ends_with_74(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = process("sample", tmp_path / "file" / "sample", "--train", 10, "--val", 3, "--test", 3)
    assert done.returncode == IO_FAULT
    (line,) = errors(done.stderr)
    assert line.startswith(f"{tmp_path}/file")
    assert line.endswith(" directory. Give another path and run again; what was finished is whole.")


def test_an_interrupt_ends_with_130_and_without_a_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "ctxtrain", "check", str(pipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        writer = None
        while writer is None and child.poll() is None:  # it opens once the process reads, which then waits for a row
            time.sleep(0.02)
            with suppress(OSError):
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        child.send_signal(signal.SIGINT)
        try:
            _, err = child.communicate(timeout=60)
        finally:
            child.kill()
        if writer is not None:
            os.close(writer)
    assert child.returncode == INTERRUPTED
    assert "Traceback" not in err
