"""The trackers hold what the run folder holds, and none of them costs a run; read back with their own readers."""

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctxtrain import TrainingPipeline
from ctxtrain.config.schema import Config
from ctxtrain.errors import ConfigError, Interrupted
from ctxtrain.progress import Reporter
from ctxtrain.tracking.trackers import require_trackers
from tests.conftest import MakeConfig, Needs
from tests.event_files import curve, events_of, scalars, texts

pytestmark = pytest.mark.slow

SHORT = ("training.epochs=2", "model.max_tokens=200")
STEPS = 14


class Broken(Exception):
    pass


class Watcher(Reporter):
    """Keeps what is said, and acts when an epoch is done or after an optimizer step."""

    def __init__(self, *, after_epoch: Any = None, fail_at_step: int | None = None) -> None:
        super().__init__(Console(file=io.StringIO(), width=10_000))
        self.said: list[str] = []
        self.after_epoch = after_epoch
        self.fail_at_step = fail_at_step

    def say(self, message: str) -> None:
        self.said.append(message)

    def report_epoch(self, record: Mapping[str, Any], best: bool) -> None:
        del best
        if self.after_epoch and record["epoch"] == 1:
            self.after_epoch()

    @contextmanager
    def track_epoch(self, number: int, epochs: int, steps: int, done: int) -> Iterator[Any]:
        assert number <= epochs
        count = (number - 1) * steps + done

        def after_step(*_: object) -> None:
            nonlocal count
            count += 1
            if count == self.fail_at_step:
                raise Broken

        yield after_step

    @property
    def left_out(self) -> list[str]:
        return [line for line in self.said if "failed and is disabled" in line]


def train(config: Config, reporter: Watcher | None = None, *, resume: bool = False) -> Watcher:
    reporter = reporter or Watcher()
    assert TrainingPipeline(config, resume=resume, reporter=reporter).run() is not None
    return reporter


def break_off_and_resume(config: Config) -> Watcher:
    """Fails after optimizer step 10; the newest checkpoint is that of step 7, so the resumed run does 8 to 10 again."""
    with pytest.raises(Broken):
        TrainingPipeline(config, reporter=Watcher(fail_at_step=10)).run()
    return train(config, resume=True)


def summary_of(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "training_summary.json").read_text())


# TensorBoard


def test_tensorboard_holds_the_curves_the_config_the_confusion_and_the_scores(make_config: MakeConfig) -> None:
    config = make_config(*SHORT, "tracking.to=[tensorboard]")
    assert train(config).left_out == []
    events, summary = events_of(config), summary_of(config)
    for kind, name in (("step", "loss"), ("step", "learning_rate"), ("epoch", "macro_f1"), ("epoch", "train_loss")):
        assert curve(config, kind, name) == scalars(events, f"{kind}/{name}")
    assert len(events.Scalars("step/loss")) == STEPS
    tables = texts(events, "epoch/confusion")
    for table, epoch in zip(tables, summary["epochs"], strict=True):
        rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        assert rows[0] == ["label \\ predicted", "LONG", "SHORT", "SKIP"]
        assert [[int(cell) for cell in row[1:]] for row in rows[2:]] == epoch["confusion"]
    assert scalars(events, "best/macro_f1") == [(STEPS, summary["best"]["macro_f1"])]
    assert "targets" in texts(events, "verdict")[0]
    assert str(Path(config.output_dir) / "final_model.zip") in texts(events, "files")[0]
    (hparams,) = (Path(config.output_dir) / "ctxtrain").glob("*/events.*")
    plugin = EventAccumulator(str(hparams)).Reload().SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert b"training.learning_rate" in plugin.content


def test_tensorboard_strikes_out_the_steps_that_a_resumed_run_does_again(make_config: MakeConfig) -> None:
    config = make_config(*SHORT, "tracking.to=[tensorboard]")
    break_off_and_resume(config)
    events = events_of(config)
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, STEPS + 1))
    assert curve(config, "step", "loss") == scalars(events, "step/loss")
    assert curve(config, "epoch", "macro_f1") == scalars(events, "epoch/macro_f1")
    assert len(list((Path(config.output_dir) / "ctxtrain").glob("*/events.*"))) == 1  # the config, once


def test_a_tracker_that_cannot_begin_is_said_once_and_costs_nothing(make_config: MakeConfig) -> None:
    config = make_config(*SHORT, "tracking.to=[tensorboard]")
    root = Path(config.output_dir)
    root.mkdir()
    (root / "ctxtrain").write_text("where the event files should go")
    (said,) = train(config).left_out
    assert said.startswith("note: tensorboard failed and is disabled, the run continues without it: ")
    assert len(curve(config, "step", "loss")) == STEPS


def test_a_tracker_that_is_not_installed_is_named_with_the_way_to_get_it() -> None:
    expected = r"tracking\.to must name installed packages, not installed: no_such_one\. Run pip install no_such_one\."
    with pytest.raises(ConfigError, match=expected):
        require_trackers(["tensorboard", "no_such_one"])


# MLflow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real server with SQLite and artifacts below the folder, in a process group of its own."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError(log.read_text())
        yield f"http://127.0.0.1:{port}", server
    finally:
        end(server)


def end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as (uri, _):
        yield uri


@pytest.fixture
def mlflow_there(needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(find_spec("mlflow") is not None, "MLflow; make test-trackers installs it")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def mlflow_uri(mlflow_there: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    uri: str = request.getfixturevalue("server_uri")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def the_run(uri: str, name: str) -> tuple[Any, Any]:
    """Client and the only run of that name in the experiment `ctxtrain`."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ctxtrain")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return client, run


def history(client: Any, run: Any, metric: str) -> list[tuple[int, float]]:
    return [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, metric)]


def test_mlflow_holds_the_curves_the_config_the_confusion_and_the_files(
    make_config: MakeConfig, mlflow_uri: str, tmp_path: Path
) -> None:
    config = make_config(*SHORT, "tracking.to=[mlflow]", run="whole")
    assert train(config).left_out == []
    client, run = the_run(mlflow_uri, "whole")
    summary = summary_of(config)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.01"
    assert run.data.params["data.train"] == config.data.train
    assert "targets" in run.data.tags["mlflow.note.content"]
    for kind, name in (("step", "loss"), ("step", "grad_norm"), ("epoch", "macro_f1"), ("epoch", "train_loss")):
        assert history(client, run, f"{kind}/{name}") == curve(config, kind, name)
    assert history(client, run, "best/macro_f1") == [(STEPS, summary["best"]["macro_f1"])]
    got = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    for epoch in summary["epochs"]:
        table = json.loads((got / f"confusion/epoch_{epoch['epoch']}.json").read_text())
        assert table["counts"] == epoch["confusion"]
        assert table["labels"] == ["LONG", "SHORT", "SKIP"]
    assert hashlib.sha256((got / "final_model.zip").read_bytes()).hexdigest() == summary["files"]["final_model.zip"]
    for name in ("training_summary.json", "report.html"):
        assert (got / name).read_bytes() == (Path(config.output_dir) / name).read_bytes()


def test_mlflow_continues_a_broken_run_and_takes_no_step_twice(make_config: MakeConfig, mlflow_uri: str) -> None:
    config = make_config(*SHORT, "tracking.to=[mlflow]", run="broken")
    with pytest.raises(Broken):
        TrainingPipeline(config, reporter=Watcher(fail_at_step=10)).run()
    client, run = the_run(mlflow_uri, "broken")
    assert run.info.status == "FAILED"
    assert [step for step, _ in history(client, run, "step/loss")] == list(range(1, 11))
    assert train(config, resume=True).left_out == []
    client, again = the_run(mlflow_uri, "broken")
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    assert history(client, again, "step/loss") == curve(config, "step", "loss")
    assert history(client, again, "epoch/macro_f1") == curve(config, "epoch", "macro_f1")


def test_mlflow_calls_an_interrupted_run_killed(make_config: MakeConfig, mlflow_uri: str) -> None:
    config = make_config(*SHORT, "tracking.to=[mlflow]", run="interrupted")
    with pytest.raises(Interrupted):
        train(config, Watcher(after_epoch=lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert the_run(mlflow_uri, "interrupted")[1].info.status == "KILLED"


def test_a_server_that_dies_in_the_middle_costs_no_step(
    make_config: MakeConfig, mlflow_there: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config(*SHORT, "tracking.to=[mlflow, tensorboard]")
    with mlflow_server(tmp_path) as (uri, server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        (said,) = train(config, Watcher(after_epoch=lambda: end(server))).left_out
    assert said.startswith("note: mlflow failed and is disabled, the run continues without it: ")
    assert summary_of(config)["files"]["final_model.zip"]
    assert curve(config, "step", "loss") == scalars(events_of(config), "step/loss")  # the others do not suffer


# mlflow 3.17.2 asks sqlalchemy 2.1.9 for a way of loading that is on its way out
@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy:DeprecationWarning")
def test_mlflow_without_an_address_writes_below_the_run_folder(
    make_config: MakeConfig, mlflow_there: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(*SHORT, "tracking.to=[mlflow]")
    assert train(config).left_out == []
    assert list((tmp_path / "here").iterdir()) == []
    client, run = the_run(f"sqlite:///{config.output_dir}/mlflow.db", "run")
    assert history(client, run, "step/loss") == curve(config, "step", "loss")
    (archive,) = Path(config.output_dir, "mlflow").rglob("final_model.zip")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == summary_of(config)["files"]["final_model.zip"]


# Weights & Biases


@pytest.fixture
def wandb_there(needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(find_spec("wandb") is not None, "Weights & Biases; make test-trackers installs it")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def wandb_records(file: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log format after 7 bytes, W&B's own messages within.

    The package brings a reader only inside its compiled service.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, records, parts = file.read_bytes(), 7, [], b""
    assert content.startswith(b":W&B")
    while place < len(content):
        left = 32_768 - place % 32_768
        if left < 7:  # too short for a header: the block ends
            place += left
            continue
        size, piece = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if piece in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["_step"], row[name]) for row in rows if name in row]


def test_wandb_offline_holds_the_curves_the_config_the_confusion_and_the_files(
    make_config: MakeConfig, wandb_there: None
) -> None:
    config = make_config(*SHORT, "tracking.to=[wandb]")
    assert train(config).left_out == []
    (folder,) = Path(config.output_dir, "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    records, summary = wandb_records(file), summary_of(config)
    rows = wandb_history(records)
    for kind, name in (("step", "loss"), ("epoch", "macro_f1"), ("epoch", "train_loss")):
        assert points(rows, f"{kind}/{name}") == curve(config, kind, name)
    assert points(rows, "best/macro_f1") == [(STEPS, summary["best"]["macro_f1"])]
    settings = {
        item.key or "/".join(item.nested_key): item.value_json
        for record in records
        for item in [*record.run.config.update, *record.config.update]
    }
    assert json.loads(settings["training.learning_rate"]) == 0.01
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.display_name) == ("ctxtrain", "run")
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    counts = [[row[1:] for row in table["data"]] for table in tables]
    assert sorted(counts) == sorted(epoch["confusion"] for epoch in summary["epochs"])
    (model,) = [record.artifact for record in records if record.artifact.type == "model"]
    assert {entry.path for entry in model.manifest.contents} == {
        "training_summary.json",
        "report.html",
        "final_model.zip",
    }
    assert records[-1].WhichOneof("record_type") in ("exit", "final", "footer")
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_wandb_continues_a_broken_run_under_its_id(make_config: MakeConfig, wandb_there: None) -> None:
    config = make_config(*SHORT, "tracking.to=[wandb]")
    assert break_off_and_resume(config).left_out == []
    files = sorted(
        Path(config.output_dir, "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    )
    first, second = (wandb_records(file) for file in files)
    assert len({file.name for file in files}) == 1  # run-ID.wandb
    exits = [[record.exit.exit_code for record in part if record.HasField("exit")] for part in (first, second)]
    assert exits == [[1], [0]]
    assert points(wandb_history(first), "step/loss") == curve(config, "step", "loss")[:10]
    assert points(wandb_history(second), "step/loss") == curve(config, "step", "loss")[7:]
