"""Two gloo processes do what one does, ragged last batch included, and only the first writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ctxtrain import TrainingPipeline
from ctxtrain.config.schema import Config
from ctxtrain.storage.atomic_files import sha256_file
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import Amount, MakeConfig, short_run
from tests.event_files import curve, events_of, scalars, texts

pytestmark = pytest.mark.slow

# 54 windows per epoch in steps of 12: the last step has 6, which are two micro-batches, one of them ragged. With an
# accumulation of 3, one process has a micro-batch less than the other in every step but the last.
SETTINGS = ("training.epochs=2", "training.gradient_accumulation=3", "training.learning_rate=0.003")


def started(config: Config, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    file = folder / "config.yaml"
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "ctxtrain",
        "train",
        str(file),
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(config: Config, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ended(started(config, folder, *arguments))


@pytest.fixture(scope="module")
def straight(
    tiny_base: Path, tiny_rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, subprocess.CompletedProcess[str]]:
    """A run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    config = short_run(tiny_base, tiny_rows, folder / "run", *SETTINGS, "tracking.to=[tensorboard]")
    return config, torchrun(config, folder)


def test_two_processes_give_the_curve_and_the_choice_of_one(
    make_config: MakeConfig, straight: tuple[Config, subprocess.CompletedProcess[str]]
) -> None:
    one, (two, done) = make_config(*SETTINGS), straight
    expected = TrainingPipeline(one).run()
    assert expected is not None
    assert done.returncode == 0, done.stderr
    summary = json.loads((Path(two.output_dir) / "training_summary.json").read_text())
    mine, theirs = RunFolder(two.output_dir).metrics.read(), RunFolder(one.output_dir).metrics.read()
    assert [line["kind"] for line in mine] == [line["kind"] for line in theirs]  # one writer, each line once
    for line, other in zip(mine, theirs, strict=True):
        for name in ("loss", "learning_rate", "grad_norm", "train_loss", "macro_f1"):
            assert line.get(name, 0) == pytest.approx(other.get(name, 0), abs=1e-5), (line, other)
        assert line.get("windows") == other.get("windows")
    assert [line["windows"] for line in mine if line["kind"] == "step"] == [12, 12, 12, 12, 6] * 2
    assert summary["best"]["epoch"] == expected["best"]["epoch"]
    assert summary["environment"]["processes"] == 2
    events = events_of(two)
    assert curve(two, "step", "loss") == scalars(events, "step/loss")  # the first process tracks, each step once
    assert len(texts(events, "verdict")) == 1
    assert len(re.findall(r"^ {9}2 ", done.stdout, re.MULTILINE)) == 1  # a line of the table of epochs


def test_bad_rows_end_all_processes_with_one_message(make_config: MakeConfig, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"label": "LONG"}\n')
    done = torchrun(make_config(f"data.train={bad}"), tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {bad}:1: a row must have context_bars and current_bar") == 1


@pytest.mark.promise("C4")
def test_a_signal_stops_both_processes_and_the_resumed_run_is_exact(
    make_config: MakeConfig, straight: tuple[Config, subprocess.CompletedProcess[str]], tmp_path: Path, amount: Amount
) -> None:
    """Of a signal to one process the other learns after the step; the launcher hands SIGTERM on to both."""
    for whom in ("one process", "the launcher")[: amount(1, 2)]:
        config = make_config(*SETTINGS, run=whom)
        folder, process = RunFolder(config.output_dir), started(config, tmp_path)
        until_step(2, folder)
        os.kill(process.pid if whom == "the launcher" else second_of(process.pid), signal.SIGTERM)
        stopped = ended(process)
        assert stopped.returncode != 0
        assert stopped.stderr.count("continue with train --resume") == 1, stopped.stderr
        assert not folder.zip.exists()
        assert list((folder.root / "checkpoints").iterdir()) != []
        resumed = torchrun(config, tmp_path, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert sha256_file(folder.zip) == sha256_file(RunFolder(straight[0].output_dir).zip)


def until_step(step: int, folder: RunFolder) -> None:
    end = time.monotonic() + 60
    while sum(line["kind"] == "step" for line in folder.metrics.read()) < step:
        assert time.monotonic() < end
        time.sleep(0.005)


def second_of(launcher: int) -> int:
    """The process of rank 1 among the launcher's."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            environment = (stat.parent / "environ").read_bytes().split(b"\0")
            if int(stat.read_text().rpartition(")")[2].split()[1]) == launcher and b"RANK=1" in environment:
                return int(stat.parent.name)
    raise AssertionError(f"no process of rank 1 below {launcher}")
