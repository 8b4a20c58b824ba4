"""C: one process per run folder, readers beside it, and signals anywhere in a run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ctxtrain.config.schema import Config
from ctxtrain.errors import ConfigError, Interrupted
from ctxtrain.runtime import catch_signals
from ctxtrain.storage import checkpoint
from ctxtrain.storage.checkpoint import CheckpointFolder
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import Amount
from tests.reliability.conftest import Figure, NewTrial
from tests.reliability.harness import Server, Trial, results, same
from tests.reliability.server import PHASES

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CODES = {143, 130, 138}
EARLY = {"placing", "summary"}  # from there on a run is as good as done


def stopped_well(root: Path, code: int, said: str) -> None:
    """Nothing of an export is there, and what was trained is in a checkpoint that loads."""
    folder = RunFolder(root)
    assert code in CODES, said
    assert "continue with train --resume" in said
    left = sorted(path.name for path in root.iterdir())
    assert set(left) <= {"run.lock", "config.yaml", "metrics.jsonl", "checkpoints"}, left
    steps = [line["step"] for line in folder.metrics.read()]
    found = CheckpointFolder(root / "checkpoints", 2).find_resume_point(7, lambda _: None)
    assert (found is None) == (not steps)
    if found:
        assert checkpoint.load(found)["state"]["step"] == steps[-1]


@pytest.mark.promise("C4")
def test_signals_at_random_instants_leave_a_checkpoint_and_no_export(
    shard: int, new_trial: NewTrial, expected: dict[str, Any], amount: Amount, figure: Figure
) -> None:
    start = time.monotonic()
    new_trial("span").finish()
    span = 1.1 * (time.monotonic() - start)
    instants, sent, runs = random.Random(shard), 0, 0
    while sent < amount(1, 50):
        trial, runs = new_trial(f"run{runs}"), runs + 1
        while True:
            child = trial.train()
            while not (trial.root / "run.owner").exists() and child.running():
                time.sleep(0.001)
            time.sleep(instants.uniform(0, span))
            os.kill(child.pid, instants.choice(SIGNALS))
            ended = child.wait()
            if ended.code == 0 or (trial.root / "training_summary.json").exists():
                break
            sent += 1
            stopped_well(trial.root, ended.code, ended.said)
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
    figure("C4", "{} signals at random instants", sent)


@pytest.mark.promise("C4")
@pytest.mark.parametrize("library", [None, OSError("cannot be loaded")], ids=["swallows", "raises its own"])
def test_a_signal_is_not_lost_in_a_library_that_catches_everything(library: Exception | None) -> None:
    def load() -> None:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Exception:  # noqa: BLE001
            if library:
                raise library from None

    with pytest.raises(Interrupted), catch_signals() as request, request.interrupt_immediately():
        load()


@pytest.mark.promise("C4")
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_part_of_a_run_ends_it_there(
    phase: str, late_trial: NewTrial, expected: dict[str, Any], amount: Amount, figure: Figure
) -> None:
    for number in SIGNALS[: amount(1, 3)]:
        trial = late_trial(f"signal{number}")
        before = RunFolder(trial.root).metrics.read()
        ended = trial.train(signal_in=(phase, 1), number=number).wait()
        if phase in EARLY:
            assert ended.code == 0
        else:
            assert ended.code == 128 + number, ended.said
            stopped_well(trial.root, ended.code, ended.said)
            epochs = [line for line in RunFolder(trial.root).metrics.read() if line["kind"] == "epoch"]
            assert ended.phases[-1] == phase  # and nothing after it
            done = phase in ("merging", "calibration", "reopening", "packing")
            assert len(epochs) == 3 if done else len(epochs) == 2
            if phase in ("reading", "tokenising", "building", "resuming", "training"):
                assert len(RunFolder(trial.root).metrics.read()) <= len(before) + 1
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
    figure("C4", "{} signals in {} parts of a run", amount(1, 3), 1)


@pytest.mark.promise("C4")
def test_a_signal_at_any_call_of_an_export_leaves_nothing_of_it(
    late_trial: NewTrial, late_events: list[list[str]], expected: dict[str, Any], amount: Amount, figure: Figure
) -> None:
    first, last = (
        next(i for i, event in enumerate(late_events, 1) if event[0] == kind and event[1].startswith(".export."))
        for kind in ("mkdir", "rename")
    )
    points = [*range(first + 1, last, (last - first) // amount(2, 30)), last - 1]
    for point in points:
        trial = late_trial(f"at{point}")
        ended = trial.train(signal_at=[point], number=signal.SIGTERM).wait()
        stopped_well(trial.root, ended.code, ended.said)
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
    figure("C4", "{} at calls of an export", len(points))


@pytest.mark.promise("C5")
@pytest.mark.parametrize("phase", ["training", "reopening"])
def test_a_signal_to_the_whole_process_group_loses_nothing(
    phase: str, late_trial: NewTrial, expected: dict[str, Any], figure: Figure
) -> None:
    trial = late_trial("run")
    ended = trial.train(signal_in=(phase, 1), number=signal.SIGTERM, group=True).wait()
    stopped_well(trial.root, ended.code, ended.said)
    trial.finish()
    same(results(trial.root), expected)
    figure("C5", "{} signals to the group", 1)


@pytest.mark.promise("C5")
def test_more_signals_during_a_save_change_nothing(
    late_trial: NewTrial, late_events: list[list[str]], expected: dict[str, Any], amount: Amount, figure: Figure
) -> None:
    saves = [i for i, (_, path) in enumerate(late_events, 1) if path.startswith("checkpoints/.checkpoint_step_21")]
    points = saves[:: -(-len(saves) // amount(2, len(saves)))]
    for point in points:
        trial = late_trial(f"at{point}")
        ended = trial.train(signal_at=[point, point + 1, point + 2], number=signal.SIGTERM).wait()
        assert ended.code == 143, ended.said
        stopped_well(trial.root, ended.code, ended.said)
        assert (trial.root / "checkpoints" / "checkpoint_step_21.pt").exists()
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
    figure("C5", "{} saves with three signals each", len(points))


@pytest.mark.promise("C5")
def test_a_run_outlives_its_terminal(
    late_trial: NewTrial, late_events: list[list[str]], expected: dict[str, Any], figure: Figure
) -> None:
    trial = late_trial("hangup")
    ended = trial.train(signal_at=list(range(1, len(late_events), 5)), number=signal.SIGHUP).wait()
    assert ended.code == 0, ended.said
    same(results(trial.root), expected)
    for how in ("closed", "broken"):
        trial = late_trial(how)
        assert trial.train(output_is=how).wait().code == 0
        same(results(trial.root), expected)
    figure("C5", "{} runs without a reader", 3)


@pytest.mark.promise("C5")
def test_the_command_with_its_streams_closed_ends_with_its_code(tmp_path: Path) -> None:
    command = f"{sys.executable} -m ctxtrain train {tmp_path}/missing.yaml"
    for closing in ("<&- >&- 2>&-", "2>/dev/full"):
        assert subprocess.run(f"{command} {closing}", shell=True, check=False).returncode == 2


@pytest.mark.promise("C1")
def test_of_processes_that_race_for_a_folder_one_wins_and_the_others_name_it(
    shard: int, server: Server, tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    rounds = amount(4, 125)
    child = server.start(str(tmp_path / "runs"), str(rounds), root=tmp_path, call="tests.reliability.rivals:races")
    ended = child.wait()
    assert ended.code == 0, ended.said
    figure("C1", "{} races of 4 processes, 1 winner each, taken over after each kill", rounds)


@pytest.mark.promise("C1")
def test_a_second_command_ends_with_75_and_changes_nothing(undisturbed: Trial, new_trial: NewTrial) -> None:
    trial = new_trial("run")
    trial.finish()
    before = {path: path.stat().st_mtime_ns for path in trial.root.rglob("*")}
    with RunFolder(trial.root).lock():
        owned = {path: path.stat().st_mtime_ns for path in trial.root.rglob("*")}
        ended = trial.train().wait()
        assert ended.code == 75
        assert f"process {os.getpid()} on " in ended.said
        after = {path: path.stat().st_mtime_ns for path in trial.root.rglob("*")}
        lock = trial.root / "run.lock"
        assert {path for path in after if after[path] != owned.get(path)} <= {lock}
        assert lock.read_bytes() == b""
    assert before.keys() == set(trial.root.rglob("*"))


@pytest.mark.promise("C2")
def test_readers_beside_a_run_see_whole_files_only(
    server: Server, undisturbed: Trial, tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    reads = amount(60, 1000)
    words = [str(undisturbed.root / "export"), str(tmp_path / "run"), str(reads)]
    ended = server.start(*words, root=tmp_path, call="tests.reliability.rivals:reads").wait()
    assert ended.code == 0, ended.said
    figure("C2", "{} reads of the newest checkpoint and of the zip, all whole", reads)


NAMES = (
    "config.yaml", "metrics.jsonl", "final_model.zip", "best_model.safetensors", "training_summary.json",
    "report.html", "export", "checkpoints/checkpoint_epoch_1.pt",
)  # fmt: skip


@pytest.mark.promise("C3")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_files_that_a_run_would_write_is_refused(
    name: str, undisturbed: Trial, tmp_path: Path, figure: Figure
) -> None:
    from ctxtrain import TrainingPipeline

    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("someone's")
    config = Config.load(undisturbed.config, [f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="another output_dir"):
        TrainingPipeline(config).run()
    assert file.read_text() == "someone's"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        file.relative_to(tmp_path / "run").parts[0],
        "run.lock",
    }
    figure("C3", "{} names refused", 1)


@pytest.mark.promise("C3")
def test_files_of_others_stay_as_they_are(
    undisturbed: Trial, new_trial: NewTrial, expected: dict[str, Any], figure: Figure
) -> None:
    trial = new_trial("run")
    others = ["notes.txt", ".hidden", "checkpoints/checkpoint_best.pt", "checkpoints/.mine.tmp", "exported/model.zip"]
    for name in others:
        (trial.root / name).parent.mkdir(parents=True, exist_ok=True)
        (trial.root / name).write_text(name)
    words = ["train", str(trial.config), f"output_dir={trial.root}"]
    ended = trial.server.start(*words, root=trial.root).wait()
    assert ended.code == 0, ended.said
    for name in others:
        assert (trial.root / name).read_text() == name
        (trial.root / name).unlink()
    (trial.root / "exported").rmdir()
    same(results(trial.root), expected)
    figure("C3", "{} files of others untouched", len(others))
