"""A result that standard output does not take ends with 74; a reader that goes away costs nothing."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from ctxtrain import TrainingPipeline
from ctxtrain.cli.process import main
from ctxtrain.config.schema import Config
from ctxtrain.labels import LABELS
from ctxtrain.storage.result_file import write_result
from tests.bars import exporters
from tests.conftest import short_run
from tests.helpers import learnable_rows, write_rows
from tests.storage.test_owned_files import pretrain_file

pytestmark = pytest.mark.slow

IO_FAULT = 74
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def commands(
    tiny_base: Path, tiny_rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[object]]:
    """Every command that writes a result to standard output, with what it needs."""
    folder = tmp_path_factory.mktemp("results")
    settings = ("training.epochs=1", "model.max_tokens=64", "training.warmup_steps=0")
    config = short_run(tiny_base, tiny_rows, folder / "run", *settings)
    TrainingPipeline(config).run()
    run, rows = Path(config.output_dir), write_rows(folder / "rows.jsonl", learnable_rows(6, seed=3))
    (folder / "config.yaml").write_text(Config.parse(config.model_dump(mode="json")).to_yaml())
    return {
        "evaluate": ["evaluate", run, rows],
        "evaluate --json": ["evaluate", run, rows, "--json"],
        "check": ["check", rows],
        "check --json": ["check", rows, "--json"],
        "predict": ["predict", run, rows],
        "report": ["report", run],
        "sample": ["sample", folder / "sample", "--train", 4, "--val", 2, "--test", 2],
        "windows": ["windows", exporters.freqtrade_feather(folder, exporters.make_market()), "-o", folder / "windows"],
        "export": ["export", run],
        "train": ["train", folder / "config.yaml", "--resume"],
        "train --json": ["train", folder / "config.yaml", "--resume", "--json"],
        "pretrain": ["pretrain", pretrain_file(folder, output_dir=str(folder / "base"))],
        "--help": ["--help"],
        "predict --help": ["predict", "--help"],
        "--version": ["--version"],
    }


NAMES = [
    *(
        "evaluate",
        "evaluate --json",
        "check",
        "check --json",
        "predict",
        "report",
        "sample",
        "windows",
        "export",
        "train",
    ),
    *("train --json", "pretrain", "--help", "predict --help", "--version"),
]


def empty_base(words: list[object]) -> None:
    if words[0] == "pretrain":
        for path in (Path(str(words[1])).parent / "base").glob("*"):
            path.unlink()


def ends(stdout: IO[str], words: Sequence[object]) -> object:
    """The exit code of a command whose standard output is this stream."""
    before, sys.stdout = sys.stdout, stdout
    try:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
    finally:
        sys.stdout = before
        with suppress(OSError):  # what is still in its buffer has nowhere to go
            stdout.close()
    return end.value.code


# Runs each command in one process up to its first message; prints that, and the heavy modules that were loaded by then.
FIRST_MESSAGES = """
import json, sys
from ctxtrain.cli import commands, data_commands
from ctxtrain.cli.process import main

class Said(BaseException): ...

def announce(message):
    heavy = {"accelerate", "altair", "catboost", "peft", "scipy", "sklearn", "tokenizers", "torch", "transformers"}
    print(json.dumps([message, sorted(heavy & sys.modules.keys())]))
    raise Said

commands.announce = data_commands.announce = announce
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except Said:
        pass
"""


def test_every_command_says_what_it_does_before_it_loads_a_library_that_takes_long(
    commands: dict[str, list[object]],
) -> None:
    names = [
        "evaluate",
        "check",
        "predict",
        "report",
        "sample",
        "windows",
        "export",
        "train",
        "train --json",
        "pretrain",
    ]
    words = json.dumps([[str(word) for word in commands[name]] for name in names])
    done = subprocess.run([sys.executable, "-c", FIRST_MESSAGES, words], capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [message.split()[0] for message, _ in said] == [
        *("loading", "checking", "loading", "writing", "simulating", "reading", "exporting", "training", "training"),
        "pretraining",
    ], done.stderr
    assert [heavy for _, heavy in said] == [[]] * len(names)


def test_predict_says_how_many_rows_it_wrote_of_each_class_and_where(
    commands: dict[str, list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit):
        main([*map(str, commands["predict"]), "-o", str(out), "--min-confidence", "0.999"])
    labels = Counter(json.loads(line)["label"] for line in out.read_text().splitlines())
    abstained = sum(json.loads(line)["abstained"] for line in out.read_text().splitlines())
    counts = ", ".join(f"{labels[label]} {label}" for label in LABELS)
    last = capsys.readouterr().err.splitlines()[-1]
    said = f"{out}: {labels.total()} predictions: {counts} ({abstained} of them because confidence was too low)"
    assert last == said
    assert abstained


@pytest.mark.promise("B10")
@pytest.mark.parametrize("name", NAMES)
def test_a_result_that_a_full_disk_does_not_take_ends_with_74(
    name: str, commands: dict[str, list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    empty_base(commands[name])
    assert ends(FULL.open("w"), commands[name]) == IO_FAULT
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "No space left on device. Make room or give access and run again; what was finished is whole." in line
    assert "Traceback" not in err


@pytest.mark.promise("B10")
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_that_goes_away_costs_nothing(
    name: str, commands: dict[str, list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    empty_base(commands[name])
    reading, writing = os.pipe()
    os.close(reading)
    assert ends(os.fdopen(writing, "w"), commands[name]) == (1 if name.endswith("--help") else 0)  # that is click's own
    assert "error: " not in capsys.readouterr().err


@pytest.mark.parametrize(("stdout", "code"), [("/dev/full", IO_FAULT), (os.devnull, 0)])
def test_a_whole_process_ends_as_the_command_does(stdout: str, code: int, commands: dict[str, list[object]]) -> None:
    with Path(stdout).open("wb") as stream:
        command = [sys.executable, "-m", "ctxtrain", *map(str, commands["check"])]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code
    said = "error: standard output: No space left on device. Make room or give access and run again; "
    last = f"{said}what was finished is whole.\n" if code else ""
    assert done.stderr == f"checking {', '.join(map(str, commands['check'][1:]))}\n{last}"


def in_shell(words: Sequence[object], redirection: str) -> tuple[int, str]:
    """Exit code and stderr of a command in a shell."""
    command = f"{sys.executable} -m ctxtrain {' '.join(map(str, words))} {redirection}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_closed_streams_of_a_whole_process(commands: dict[str, list[object]], tmp_path: Path) -> None:
    code, err = in_shell(commands["predict"], ">&-")
    assert (code, "standard output: Bad file descriptor" in err) == (IO_FAULT, True), err
    model = commands["predict"][1]
    code, err = in_shell(["predict", model, "-", "-o", tmp_path / "out.jsonl"], "<&-")
    assert (code, err) == (
        65,
        "error: standard input is closed. Pipe the rows in, or give a file.\n",
    )


def test_a_closed_standard_input_is_told_before_the_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    closed = (tmp_path / "empty").open("w+")
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as end:
            main(["predict", str(tmp_path / "none.zip"), "-"])
        said = "error: standard input is closed. "
        assert (end.value.code, capsys.readouterr().err.startswith(said)) == (65, True)


def test_progress_that_nobody_takes_costs_nothing(
    commands: dict[str, list[object]], monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    stream = FULL.open("w")
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in commands["train --json"]])
    assert end.value.code == 0
    assert capsysbinary.readouterr().out.startswith(b"{")
    with suppress(OSError):
        stream.close()


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="nothing reads this pipe"):
        write_result(tmp_path / "pipe", b"x")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_result(tmp_path / "pipe", b"x")
    assert os.read(reader, 2) == b"x"
    os.close(reader)
