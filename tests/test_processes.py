"""Two gloo processes do what one does, ragged last batch included, and only the first writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ml import TrainingPipeline
from ml.config import Config
from ml.output.run_folder import RunFolder
from tests.conftest import MakeConfig
from tests.event_files import curve, events_of, scalars, texts

# 54 windows an epoch in steps of 12: the last step has 6, which are two micro-batches, one of them ragged. With an
# accumulation of 3, one process has a micro-batch less than the other in every step but the last.
SETTINGS = ("training.epochs=2", "training.gradient_accumulation=3", "training.learning_rate=0.003")


def torchrun(config: Config, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = folder / "config.yaml"
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "ml", "train", str(file), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_give_the_curve_and_the_choice_of_one(make_config: MakeConfig, tmp_path: Path) -> None:
    one, two = make_config(*SETTINGS, run="one"), make_config(*SETTINGS, "tracking.to=[tensorboard]", run="two")
    expected = TrainingPipeline(one).run()
    assert expected is not None
    done = torchrun(two, tmp_path)
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
    assert done.stderr.count(f"error: {bad}:1: context_bars is missing") == 1
