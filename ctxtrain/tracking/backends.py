"""TensorBoard, MLflow and Weights & Biases behind one interface.

Comes in: names with numbers at an optimizer step, a confusion matrix, files. Goes out: event files, a run on an MLflow
server or in a database below the run folder, a W&B run. The first and the last go through Accelerate's trackers.
MLflow goes through its client: Accelerate's tracker uses the library's one active run per process, which can be
closed as finished only, and which asks a server that is gone again when the process ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate.tracking import TensorBoardTracker, WandBTracker

from ctxtrain.labels import LABELS

Outcome = Literal["finished", "interrupted", "failed"]
PROJECT = "ctxtrain"


class Tool(Protocol):
    """One tracker with an open run. Any method may raise what its library raises."""

    @property
    def run_id(self) -> str | None:
        """What a later process needs to continue the run, besides the run folder."""

    def numbers(self, kind: str, values: Mapping[str, float], step: int) -> None: ...

    def confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        """`counts[i][j]` windows of class i were predicted as j."""

    def final(self, verdict: str, files: Sequence[Path], step: int) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


def open_tool(name: str, folder: Path, run_id: str | None, config: Mapping[str, Any], step: int) -> Tool:
    """Begin a run of the run folder's name, or continue `run_id`, where optimizer steps up to `step` are behind it."""
    if name == "tensorboard":
        return TensorBoard(folder, config, step)
    return MLflow(folder, run_id, config) if name == "mlflow" else WandB(folder, run_id, config)


class TensorBoard:
    """Event files in `ctxtrain` below the run folder; events of steps that are done again are struck out there."""

    run_id = None  # the folder is the run

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        continued = (folder / PROJECT).exists()
        self.tracker = TensorBoardTracker(PROJECT, folder, **({"purge_step": step + 1} if continued else {}))
        self.tracker.start()
        if not continued:
            self.tracker.store_init_configuration(dict(config))

    def numbers(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self.tracker.log(_named(kind, values), step=step)

    def confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        del epoch
        head = ["label \\ predicted", *LABELS]
        rows = [[label, *map(str, row)] for label, row in zip(LABELS, counts, strict=True)]
        table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
        self.tracker.log({"epoch/confusion": table}, step=step)

    def final(self, verdict: str, files: Sequence[Path], step: int) -> None:
        """TensorBoard keeps no files, so it is told where they are."""
        self.tracker.log({"verdict": verdict, "files": "\n".join(f"- `{path}`" for path in files)}, step=step)

    def close(self, outcome: Outcome) -> None:
        del outcome  # event files have no word for it
        self.tracker.finish()


class MLflow:
    """A run at MLFLOW_TRACKING_URI, or in `mlflow.db` below the run folder if that is not set."""

    def __init__(self, folder: Path, run_id: str | None, config: Mapping[str, Any]) -> None:
        # The library's seven retries, each after twice the wait, hold a run up for minutes when a server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow
        from mlflow.utils.validation import MAX_PARAMS_TAGS_PER_BATCH

        elsewhere = mlflow.is_tracking_uri_set()
        self.client = mlflow.MlflowClient(mlflow.get_tracking_uri() if elsewhere else f"sqlite:///{folder}/mlflow.db")
        self.behind: dict[str, int] = {}  # kind → last optimizer step that the run has, for a run that is continued
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self.client.get_experiment_by_name(name)
            place = None if elsewhere else (folder / "mlflow").as_uri()
            experiment = found.experiment_id if found else self.client.create_experiment(name, artifact_location=place)
            self.run_id = self.client.create_run(experiment, run_name=folder.name).info.run_id
            params = [mlflow.entities.Param(key, str(value)) for key, value in config.items()]
            for first in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
                self.client.log_batch(self.run_id, params=params[first : first + MAX_PARAMS_TAGS_PER_BATCH])
        else:
            self.run_id = run_id
            for metric in self.client.get_run(run_id).data.metrics:
                kind, _, name = metric.partition("/")
                if name in ("loss", "macro_f1") and kind not in self.behind:
                    self.behind[kind] = max(entry.step for entry in self.client.get_metric_history(run_id, metric))
            self.client.update_run(run_id, status="RUNNING")

    def numbers(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """A history takes every point it is given, so steps that a continued run does again are not sent again."""
        if step <= self.behind.get(kind, -1):
            return
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in _named(kind, values).items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        table = {"labels": list(LABELS), "rows": "label", "columns": "predicted", "counts": counts, "step": step}
        self.client.log_dict(self.run_id, table, f"confusion/epoch_{epoch}.json")

    def final(self, verdict: str, files: Sequence[Path], step: int) -> None:
        del step
        self.client.set_tag(self.run_id, "mlflow.note.content", verdict)
        for path in files:
            self.client.log_artifact(self.run_id, str(path))

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[outcome]
        self.client.set_terminated(self.run_id, status)


class WandB:
    """A W&B run, offline and below the run folder unless WANDB_MODE and WANDB_DIR say otherwise."""

    def __init__(self, folder: Path, run_id: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        self.folder = folder
        # What the environment sets is left to the library. Without a limit the last upload may wait for ever.
        settings = {"console": "off", "silent": True, "finish_timeout": 600.0, "finish_timeout_raises": True}
        ours = {name: value for name, value in settings.items() if f"WANDB_{name.upper()}" not in os.environ}
        self.tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            mode=os.environ.get("WANDB_MODE", "offline"),
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(**ours),
        )
        self.tracker.start()
        self.run_id: str = self.tracker.run.id
        self.tracker.store_init_configuration(dict(config))

    def numbers(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self.tracker.log(_named(kind, values), step=step)

    def confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        del epoch
        rows = [[label, *row] for label, row in zip(LABELS, counts, strict=True)]
        self.tracker.log_table("epoch/confusion", ["label", *LABELS], rows, step=step)

    def final(self, verdict: str, files: Sequence[Path], step: int) -> None:
        del step
        import wandb

        self.tracker.run.summary["verdict"] = verdict
        artifact = wandb.Artifact(f"{PROJECT}-{self.run_id}", type="model")
        for path in files:
            artifact.add_file(str(path))
        self.tracker.run.log_artifact(artifact)

    def close(self, outcome: Outcome) -> None:
        self.tracker.run.finish(exit_code={"finished": 0, "interrupted": 130, "failed": 1}[outcome])


def _named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}
