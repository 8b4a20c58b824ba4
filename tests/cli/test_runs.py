"""Runs from the command line: how they end, and what a person sees meanwhile."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ctxtrain.cli.console import interval_text, print_metrics, print_summary
from ctxtrain.cli.process import main
from ctxtrain.config.schema import Config
from ctxtrain.evaluation.metrics import evaluate_logits
from ctxtrain.labels import LABELS
from ctxtrain.progress import Reporter
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.storage.metrics_log import Scores
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.train import TrainingPipeline
from tests.conftest import MakeConfig, short_run
from tests.helpers import dated_rows, errors, write_rows
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.slow

SHORT = ("training.epochs=1", "training.warmup_steps=0")


def ends(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


def file_of(config: Config, tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return str(tmp_path / "config.yaml")


def test_missed_targets_end_with_3_when_they_are_required(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs[red]" / "a[/b]"  # no markup for the terminal
    config = make_config(*SHORT, "targets.accuracy=1.0", "training.learning_rate=1e-9", f"output_dir={folder}")
    assert ends("train", file_of(config, tmp_path), "--require-targets") == 3
    shown = capfd.readouterr().out
    assert f"{folder}/final_model.zip\n" in shown
    assert "accuracy" in shown.split("missed on 20 validation windows")[1]
    assert (Path(config.output_dir) / "final_model.zip").exists()
    assert ends("train", file_of(config, tmp_path), "--resume") == 0


def test_met_targets_end_with_0_and_say_so(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("accuracy", "macro_f1", "long_precision", "short_precision", "long_recall", "short_recall")
    config = make_config(*SHORT, *(f"targets.{name}=0" for name in names))
    assert ends("train", file_of(config, tmp_path), "--require-targets", "--resume") == 0
    shown = capfd.readouterr().out
    assert f"note: {config.output_dir} has no checkpoint to resume from; the run starts from the beginning\n" in shown
    assert "All 6 targets reached on 20 validation windows; all of them may be luck." in shown
    assert "These rows were also used to choose the epoch, so the scores are optimistic." in shown
    assert "\x1b" not in shown  # no terminal, no escapes
    assert "epoch 1/1  step 7/7  loss " in shown
    assert "epoch done  train loss " in shown


def test_a_folder_in_use_ends_with_75(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(*SHORT)
    with RunFolder(config.output_dir).lock():
        assert ends("train", file_of(config, tmp_path)) == 75
    assert f"process {os.getpid()} on" in capfd.readouterr().err


def test_divergence_ends_with_70_and_names_the_rows(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = build_tiny(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][0] = 3e38  # infinite for tokens whose embedding is not 0 there
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:, 0] = 0
    embeddings[AutoTokenizer.from_pretrained(base)("?")["input_ids"], 0] = 1  # the end of every window
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert ends("train", file_of(make_config(*SHORT, f"model.base={base}"), tmp_path)) == 70
    (message,) = errors(capfd.readouterr().err)
    assert message.startswith("a step needs a finite loss and gradient, but optimizer step 1 has loss nan")
    assert "train.jsonl:" in message
    assert "Traceback" not in message


def test_sigterm_ends_with_143_and_the_run_goes_on_where_it_stopped(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("training.epochs=2", "training.batch_size=1", "training.gradient_accumulation=4")
    command = [sys.executable, "-m", "ctxtrain", "train", file_of(config, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = RunFolder(config.output_dir).metrics
    while process.poll() is None and len(metrics.read()) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143, message
    assert "continue with train --resume" in message
    done = len(metrics.read())
    assert ends("train", file_of(config, tmp_path), "--resume") == 0
    steps = [line["step"] for line in metrics.read() if line["kind"] == "step"]
    assert steps == list(range(1, 29))
    assert done < 28
    assert json.loads((Path(config.output_dir) / "training_summary.json").read_text())["best"]["rows"] == 20


def test_a_terminal_shows_a_live_bar_and_a_pipe_plain_lines() -> None:
    shown = {}
    for terminal in (True, False):
        stream = io.StringIO()
        reporter = Reporter(Console(file=stream, force_terminal=terminal, width=120))
        with reporter.track_epoch(1, 2, steps=4, done=0) as after_step:
            for _ in range(4):
                after_step(0.5, 1e-3, 8)
        with reporter.track_rows("validation", 10) as advance:
            advance(10)
        shown[terminal] = stream.getvalue()
    assert "\x1b[" in shown[True]
    assert "epoch 1/2" in shown[True]
    assert "validation" in shown[True]
    assert "\x1b" not in shown[False]
    lines = shown[False].splitlines()
    assert [line.split("  ")[1] for line in lines] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert all("loss 0.5000  lr 1.00e-03" in line for line in lines)


def record(epoch: int, macro_f1: float) -> dict[str, Any]:
    per_class = {label: {"f1": 0.5} for label in LABELS}
    losses = {"train_loss": 0.25, "loss": 0.5}
    return {"epoch": epoch, **losses, "accuracy": 0.7, "macro_f1": macro_f1, "per_class": per_class}


def test_epochs_are_lines_of_one_table_and_the_bar_names_the_best_so_far() -> None:
    stream = io.StringIO()
    reporter = Reporter(Console(file=stream, force_terminal=True, width=140))
    reporter.report_resume("checkpoint_epoch_2.pt", 8, 12, [record(1, 0.6), record(2, 0.55)])
    with reporter.track_epoch(3, 3, steps=4, done=0) as after_step:
        after_step(0.5, 1e-3, 8)
        time.sleep(0.2)  # the bar is drawn ten times a second
    reporter.report_epoch(record(3, 0.58), best=False)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in stream.getvalue().splitlines()]
    head = "epoch done  train loss  val loss  accuracy  macro-F1  LONG F1  SHORT F1  SKIP F1"
    assert lines.count(head) == 1
    table = [line.split() for line in lines if re.match(r"[123] ", line)]
    assert [row[0] for row in table] == ["1", "2", "3"]
    assert table[0] == ["1", "0.2500", "0.5000", "0.700", "0.600", "0.500", "0.500", "0.500", "best", "so", "far"]
    assert "best" not in table[1] + table[2]
    assert any("step 1/4" in line and "9/12" in line and "best macro-F1 0.600" in line for line in lines)


def test_each_of_several_runs_has_a_table_and_a_best_of_its_own() -> None:
    stream = io.StringIO()
    reporter = Reporter(Console(file=stream, width=140))
    for run, macro_f1 in (("seed_1", 0.9), ("seed_2", 0.4)):
        reporter.begin_run(run)
        reporter.report_resume("checkpoint_epoch_1.pt", 4, 4, [record(1, macro_f1)])
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == [
        "seed_1",
        "resuming",
        "epoch",
        "1",
        "seed_2",
        "resuming",
        "epoch",
        "1",
    ]
    assert lines[3].endswith("best so far")
    assert lines[7].endswith("best so far")


def rows_shown(shown: str, *cells: str) -> list[str]:
    """The lines that hold these cells next to each other."""
    row = r"[ │┃]+".join(map(re.escape, cells))
    return [line for line in shown.splitlines() if re.search(rf"(?<![\w.]){row}(?![\w.])", line)]


@pytest.mark.parametrize("width", [120, 80, 79, 70, 60, 30])
def test_no_figure_of_a_table_is_cut_however_narrow_the_terminal(
    narrow_run: dict[str, Any], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_summary(Summary.model_validate(narrow_run), "runs/narrow")
    shown, best = capsys.readouterr().out, narrow_run["best"]
    tables: list[list[tuple[str, ...]]] = [
        [(row["metric"], f"{row['value']:.3f}", interval_text(row["interval"])) for row in narrow_run["targets"]],
        [
            (
                *(f"{row[name]:.3f}" for name in ("macro_f1", "accuracy", "nll")),
                f"{row['difference']['macro_f1']['value']:+.3f}",
                interval_text(row["difference"]["macro_f1"]["interval"]),
            )
            for row in narrow_run["baselines"]["scores"].values()
        ],
        [(label, f"{best['per_class'][label]['precision']:.3f}") for label in LABELS],
        [tuple(map(str, row)) for row in best["confusion"]],
        [tuple(f"→ {label}" for label in LABELS), ("precision", "recall", "F1", "windows")],
    ]
    for cells in chain.from_iterable(tables):
        lines = rows_shown(shown, *cells)
        assert lines, (cells, shown)
        assert width < 60 or max(map(len, lines)) <= width
    assert "…" not in shown
    names = ["extra trees", "boosting"] if width < 90 else ["extremely randomised trees", "gradient boosting"]
    scores = narrow_run["baselines"]["scores"]
    for name, own in zip(names, (scores["extra_trees"], scores["gradient_boosting"]), strict=True):
        assert rows_shown(shown, name, f"{own['macro_f1']:.3f}") or width < 70, shown


def test_the_verdicts_stand_under_their_name_in_words_that_are_not_mistaken(
    narrow_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    verdicts = {"met": "met", "met, may be luck": "met (luck?)", "missed": "missed"}
    targets = [row | {"verdict": list(verdicts)[n % 3]} for n, row in enumerate(narrow_run["targets"])]
    print_summary(Summary.model_validate(narrow_run | {"targets": targets}), "runs/narrow")
    shown = capsys.readouterr().out
    assert rows_shown(shown, "metric", "value", "95 %", "target", "verdict", "priority")
    for row in targets:
        assert rows_shown(shown, f"{row['target']:.2f}", verdicts[row["verdict"]], row["priority"]), shown


@pytest.fixture(scope="module")
def narrow_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run on rows of many days that has predicted every class."""
    folder = tmp_path_factory.mktemp("narrow")
    rows = {
        name: str(write_rows(folder / f"{name}.jsonl", dated_rows(count, seed, apart=1440)))
        for seed, (name, count) in enumerate({"train": 46, "val": 20}.items(), start=1)
    }
    config = short_run(tiny_base, rows, folder / "run")
    summary = TrainingPipeline(config).run()
    assert summary
    assert np.array(summary["best"]["confusion"]).sum(axis=0).all()
    return summary


@pytest.mark.parametrize(
    ("labels", "called", "rows", "said"),
    [
        (
            [0, 0, 0],
            [0, 1, 0],
            [("LONG", "1.000", "0.667", "0.800", "3"), ("SHORT", "0.000", "–", "–", "0"), ("SKIP", "–", "–", "–", "0")],
            [f"no {label} windows: its F1 counts as 0 in macro-F1" for label in ("SHORT", "SKIP")],
        ),
        (
            [0, 1, 1],
            [0, 0, 0],
            [("LONG", "0.333", "1.000", "0.500", "1"), ("SHORT", "–", "0.000", "0.000", "2")],
            ["no SKIP windows: its F1 counts as 0 in macro-F1", "no SHORT predictions: its precision counts as 0"],
        ),
        ([0, 1, 2], [0, 1, 2], [("SKIP", "1.000", "1.000", "1.000", "1")], []),
    ],
)
def test_a_score_that_is_not_defined_is_shown_as_none_and_said_to_count_0(
    labels: list[int],
    called: list[int],
    rows: list[tuple[str, ...]],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_metrics(Scores.model_validate(evaluate_logits(np.eye(3)[called] * 5, np.array(labels))))
    shown = capsys.readouterr().out
    for cells in rows:
        assert rows_shown(shown, *cells), (cells, shown)
    assert shown.splitlines()[-len(said) - 1].startswith("accuracy ")
    assert shown.splitlines()[len(shown.splitlines()) - len(said) :] == said


def test_an_epoch_shows_no_f1_of_a_class_without_validation_rows() -> None:
    stream = io.StringIO()
    Reporter(Console(file=stream)).report_epoch(record(1, 0.6) | {"absent": ["SHORT"]}, best=False)
    assert stream.getvalue().splitlines()[1].split()[-3:] == ["0.500", "–", "0.500"]


def test_a_narrow_terminal_shows_the_epochs_and_the_bar_with_whole_figures() -> None:
    stream = io.StringIO()
    reporter = Reporter(Console(file=stream, force_terminal=True, width=60))
    reporter.report_epoch(record(299, 0.6), best=True)
    with reporter.track_epoch(300, 300, steps=400, done=0) as after_step:
        after_step(0.5, 1e-3, 8)
        time.sleep(0.2)  # the bar is drawn ten times a second
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= 60
    (row,) = [line.split() for line in lines if line.strip().startswith("299 ")]
    assert row == ["299", "0.2500", "0.5000", "0.700", "0.600", "0.500", "0.500", "0.500", "best"]
    (heads,) = [line.split() for line in lines if "macro" in line]
    assert heads == ["epoch", "train", "val", "accuracy", "macro", *LABELS]
    bars = [line for line in lines if "119601/120000" in line]
    assert any("epoch 300/300" in bar and "loss 0.5000" in bar for bar in bars), lines
    assert not any("…" in line for line in lines)


def test_quiet_and_json_leave_standard_output_to_the_result(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config("training.epochs=1")
    assert ends("train", file_of(config, tmp_path), "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["best"]["epoch"] == 1
    assert "epoch 1/1  step 7/7" in err
    other = make_config("training.epochs=1", run="quiet")
    assert ends("train", file_of(other, tmp_path), "--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_without_a_console_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.say("nobody sees this")
    with reporter.track_epoch(1, 1, steps=1, done=0) as after_step:
        after_step(0.1, 0.1, 1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
