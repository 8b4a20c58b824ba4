"""TensorBoard, MLflow and Weights & Biases behind one interface.

Input: named scalars at an optimizer step, confusion matrices, files. Output: event files, a run on an MLflow server or
in a database below the run folder, a W&B run. TensorBoard and W&B use Accelerate's trackers. MLflow uses its own
client: Accelerate's tracker needs the library's single active run per process, which can only be closed as finished,
and which contacts an unreachable server again when the process exits.
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


class Backend(Protocol):
    """One tracker with an open run. Any method may raise any exception of its library."""

    @property
    def run_id(self) -> str | None:
        """The id to continue the run in a later process; None if the run folder is enough."""

    def log_scalars(self, kind: str, values: Mapping[str, float], step: int) -> None: ...

    def log_confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        """Log a confusion matrix; `counts[i][j]` windows of class i were predicted as j."""

    def log_final(self, verdict: str, files: Sequence[Path], step: int) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


def open_backend(name: str, folder: Path, run_id: str | None, config: Mapping[str, Any], step: int) -> Backend:
    """Start a run named after the run folder, or continue `run_id` after optimizer step `step`."""
    if name == "tensorboard":
        return TensorBoard(folder, config, step)
    return MLflow(folder, run_id, config) if name == "mlflow" else WandB(folder, run_id, config)


class TensorBoard:
    """Event files in `ctxtrain` below the run folder; a resume marks the events of repeated steps as purged."""

    run_id = None  # the run folder identifies the run

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        is_continued = (folder / PROJECT).exists()
        self.tracker = TensorBoardTracker(PROJECT, folder, **({"purge_step": step + 1} if is_continued else {}))
        self.tracker.start()
        if not is_continued:
            self.tracker.store_init_configuration(dict(config))

    def log_scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self.tracker.log(_prefix_names(kind, values), step=step)

    def log_confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        del epoch
        header = ["label \\ predicted", *LABELS]
        rows = [[label, *map(str, row)] for label, row in zip(LABELS, counts, strict=True)]
        table = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
        self.tracker.log({"epoch/confusion": table}, step=step)

    def log_final(self, verdict: str, files: Sequence[Path], step: int) -> None:
        """Log the paths of the files, because TensorBoard cannot store files."""
        self.tracker.log({"verdict": verdict, "files": "\n".join(f"- `{path}`" for path in files)}, step=step)

    def close(self, outcome: Outcome) -> None:
        del outcome  # event files have no status
        self.tracker.finish()


class MLflow:
    """A run at MLFLOW_TRACKING_URI, or in `mlflow.db` below the run folder if that is not set."""

    def __init__(self, folder: Path, run_id: str | None, config: Mapping[str, Any]) -> None:
        # The default of seven retries with exponential backoff blocks a run for minutes if the server is unreachable.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow
        from mlflow.utils.validation import MAX_PARAMS_TAGS_PER_BATCH

        has_uri = mlflow.is_tracking_uri_set()
        self.client = mlflow.MlflowClient(mlflow.get_tracking_uri() if has_uri else f"sqlite:///{folder}/mlflow.db")
        self.last_steps: dict[str, int] = {}  # kind → last optimizer step in a continued run
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            existing = self.client.get_experiment_by_name(name)
            location = None if has_uri else (folder / "mlflow").as_uri()
            experiment = (
                existing.experiment_id if existing else self.client.create_experiment(name, artifact_location=location)
            )
            self.run_id = self.client.create_run(experiment, run_name=folder.name).info.run_id
            params = [mlflow.entities.Param(key, str(value)) for key, value in config.items()]
            for first in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
                self.client.log_batch(self.run_id, params=params[first : first + MAX_PARAMS_TAGS_PER_BATCH])
        else:
            self.run_id = run_id
            for metric in self.client.get_run(run_id).data.metrics:
                kind, _, name = metric.partition("/")
                if name in ("loss", "macro_f1") and kind not in self.last_steps:
                    self.last_steps[kind] = max(entry.step for entry in self.client.get_metric_history(run_id, metric))
            self.client.update_run(run_id, status="RUNNING")

    def log_scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Log scalars, except of steps that the run already has: MLflow keeps duplicate points after a resume."""
        if step <= self.last_steps.get(kind, -1):
            return
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in _prefix_names(kind, values).items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        table = {"labels": list(LABELS), "rows": "label", "columns": "predicted", "counts": counts, "step": step}
        self.client.log_dict(self.run_id, table, f"confusion/epoch_{epoch}.json")

    def log_final(self, verdict: str, files: Sequence[Path], step: int) -> None:
        del step
        self.client.set_tag(self.run_id, "mlflow.note.content", verdict)
        for path in files:
            self.client.log_artifact(self.run_id, str(path))

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[outcome]
        self.client.set_terminated(self.run_id, status)


class WandB:
    """A W&B run, offline and below the run folder unless WANDB_MODE and WANDB_DIR are set."""

    def __init__(self, folder: Path, run_id: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        self.folder = folder
        # Environment variables take precedence. Without a timeout the last upload may wait forever.
        settings = {"console": "off", "silent": True, "finish_timeout": 600.0, "finish_timeout_raises": True}
        defaults = {name: value for name, value in settings.items() if f"WANDB_{name.upper()}" not in os.environ}
        self.tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            mode=os.environ.get("WANDB_MODE", "offline"),
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(**defaults),
        )
        self.tracker.start()
        self.run_id: str = self.tracker.run.id
        self.tracker.store_init_configuration(dict(config))

    def log_scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self.tracker.log(_prefix_names(kind, values), step=step)

    def log_confusion(self, counts: Sequence[Sequence[int]], epoch: int, step: int) -> None:
        del epoch
        rows = [[label, *row] for label, row in zip(LABELS, counts, strict=True)]
        self.tracker.log_table("epoch/confusion", ["label", *LABELS], rows, step=step)

    def log_final(self, verdict: str, files: Sequence[Path], step: int) -> None:
        del step
        import wandb

        self.tracker.run.summary["verdict"] = verdict
        artifact = wandb.Artifact(f"{PROJECT}-{self.run_id}", type="model")
        for path in files:
            artifact.add_file(str(path))
        self.tracker.run.log_artifact(artifact)

    def close(self, outcome: Outcome) -> None:
        self.tracker.run.finish(exit_code={"finished": 0, "interrupted": 130, "failed": 1}[outcome])


def _prefix_names(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}
