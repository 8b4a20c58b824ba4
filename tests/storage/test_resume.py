"""A run that was stopped and continued ends with the bits of one that was not, in processes as users start them.

tests/reliability stops runs everywhere, by the hundred, in forks of one process.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxtrain import Config, TrainingPipeline
from ctxtrain.errors import DataError, Interrupted
from ctxtrain.progress import Reporter
from ctxtrain.storage import checkpoint
from ctxtrain.storage.atomic_files import append_checksum, sha256_file
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import MakeConfig

pytestmark = pytest.mark.slow

FILES = ("final_model.zip", "metrics.jsonl", "best_model.safetensors")
Unbroken = Callable[[MakeConfig], Config]
SETTINGS = ("training.epochs=2", "training.gradient_accumulation=2", "checkpoints.every_steps=3")


class Signaller(Reporter):
    """Sends this process a signal after an optimizer step."""

    def __init__(self, after: int, number: int) -> None:
        super().__init__()
        self.after, self.number = after, number

    @contextmanager
    def track_epoch(
        self, number: int, _epochs: int, steps: int, done: int
    ) -> Iterator[Callable[[float, float, int], None]]:
        step = (number - 1) * steps + done

        def after_step(_loss: float, _learning_rate: float, _windows: int) -> None:
            nonlocal step
            step += 1
            if step == self.after:
                os.kill(os.getpid(), self.number)

        yield after_step


def fingerprints(config: Config) -> dict[str, str]:
    return {name: sha256_file(Path(config.output_dir) / name) for name in FILES}


def numbers(tree: Any) -> Any:
    """The tensors of a nested state."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items() if isinstance(value, dict | torch.Tensor)}
    return tree


def final_checkpoint(config: Config) -> dict[str, Any]:
    return checkpoint.load(Path(config.output_dir) / "checkpoints" / "checkpoint_epoch_2.pt")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """One run from start to end, made once."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"

    def make(make_config: MakeConfig) -> Config:
        config = make_config(*SETTINGS, f"output_dir={folder}")
        if not folder.exists():
            TrainingPipeline(config).run()
        return config

    return make


@pytest.mark.parametrize(
    ("stops", "number"),
    [
        ([7], signal.SIGTERM),  # the last step of an epoch: before its evaluation
        ([6], signal.SIGUSR1),  # at a checkpoint within an epoch
    ],
)
def test_a_stopped_run_saves_and_resumes_to_the_same_bits(
    unbroken: Unbroken, make_config: MakeConfig, stops: list[int], number: int
) -> None:
    expected, config = unbroken(make_config), make_config(*SETTINGS)
    for resume, stop in enumerate(stops):
        with pytest.raises(
            Interrupted, match=f"stopped at optimizer step {stop} of 14; continue with train --resume"
        ) as e:
            TrainingPipeline(config, resume=bool(resume), reporter=Signaller(stop, number)).run()
        assert e.value.exit_code == 128 + number
        assert not RunFolder(config.output_dir).export.exists()
    torch.rand(3)  # what ran before must not matter
    TrainingPipeline(config, resume=True).run()
    assert fingerprints(config) == fingerprints(expected)
    mine, theirs = final_checkpoint(config), final_checkpoint(expected)
    assert mine["state"] == theirs["state"]
    assert mine["learner"]["schedule"] == theirs["learner"]["schedule"]
    for part in ("weights", "optimizer"):
        torch.testing.assert_close(numbers(mine["learner"][part]), numbers(theirs["learner"][part]), rtol=0, atol=0)


def test_a_killed_process_resumes_to_the_same_bits(unbroken: Unbroken, make_config: MakeConfig, tmp_path: Path) -> None:
    expected, config = unbroken(make_config), make_config(*SETTINGS)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "ctxtrain", "train", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    TrainingPipeline(config, resume=True).run()
    assert fingerprints(config) == fingerprints(expected)


def test_a_resumed_run_without_a_checkpoint_starts_anew(unbroken: Unbroken, make_config: MakeConfig) -> None:
    expected, config = unbroken(make_config), make_config(*SETTINGS)
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "metrics.jsonl").write_text('{"kind":"step","step":1,"epoch":1}\n{"kind":"st')
    TrainingPipeline(config, resume=True).run()
    assert fingerprints(config) == fingerprints(expected)


def test_a_checkpoint_holds_nothing_that_runs(unbroken: Unbroken, make_config: MakeConfig) -> None:
    path = Path(unbroken(make_config).output_dir) / "checkpoints" / "checkpoint_epoch_1.pt"
    payload = torch.load(path, weights_only=True)
    assert payload["format"] == checkpoint.FORMAT

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch harmed",)

    with path.with_name("checkpoint_epoch_9.pt").open("w+b") as stream:
        torch.save({"format": checkpoint.FORMAT, "state": Harm()}, stream)
        append_checksum(stream)
    with pytest.raises(DataError, match="not a readable checkpoint"):
        checkpoint.load(path.with_name("checkpoint_epoch_9.pt"))
    path.with_name("checkpoint_epoch_9.pt").unlink()
    assert not Path("harmed").exists()
