"""Send a run to experiment trackers: TensorBoard, MLflow, Weights & Biases.

Input: records of `metrics.jsonl`, the config, the summary. Output, to each tracker: the scalars of each optimizer step
and epoch, the confusion matrices, the final scores and files.

The run folder has all results, and trackers only receive copies. So if a tracker fails, it is disabled with one note
and the run continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import orjson

from ctxtrain.errors import ConfigError, Interrupted
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.storage.atomic_files import write_json
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.tracking.backends import Backend, Outcome, open_backend


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if packages of trackers are not installed; the message lists them."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tracking.to must name installed packages, not installed: {', '.join(missing)}. "
            f"Run pip install {' '.join(missing)}."
        )


class Trackers:
    """The open trackers of a run. Without trackers, every method does nothing."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.backends: dict[str, Backend] = {}

    def open(self, names: Sequence[str], folder: RunFolder, config: Mapping[str, Any], step: int) -> None:
        """Start a run in each tracker, or continue the one that `tracking.json` names after optimizer step `step`."""
        for name in names:
            self._guard(name, partial(self._open, name, folder, flatten(config), step))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the scalars of a step or an epoch, and the confusion matrix of an epoch, under its optimizer step."""
        kind, step = record["kind"], record["step"]
        self._for_each(partial(_log_scalars, kind, scalars(record), step))
        if "confusion" in record:
            self._for_each(lambda backend: backend.log_confusion(record["confusion"], record["epoch"], step))

    def log_summary(self, summary: Summary, folder: RunFolder) -> None:
        """Send the scores of the exported model, the verdict and the files of a finished run."""
        step = summary.epochs[-1].step
        for kind, scores in (("best", summary.best), ("test", summary.test)):
            if scores:
                self._for_each(partial(_log_scalars, kind, scalars(scores.to_dict()), step))
        files = [folder.summary, folder.report, folder.zip]
        self._for_each(lambda backend: backend.log_final(summary.verdict, files, step))

    def close(self, outcome: Outcome) -> None:
        self._for_each(lambda backend: backend.close(outcome))
        self.backends = {}

    def _open(self, name: str, folder: RunFolder, config: Mapping[str, Any], step: int) -> None:
        ids = orjson.loads(folder.tracking.read_bytes()) if folder.tracking.exists() else {}
        self.backends[name] = backend = open_backend(name, folder.root.resolve(), ids.get(name), config, step)
        if backend.run_id not in (None, ids.get(name)):
            write_json(folder.tracking, ids | {name: backend.run_id})

    def _for_each(self, action: Callable[[Backend], None]) -> None:
        for name, backend in list(self.backends.items()):
            self._guard(name, partial(action, backend))

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Run an action. If it fails, disable the tracker, because no error of a tracker may end the run."""
        try:
            action()
        except Exception as error:
            self.backends.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"note: {name} failed and is disabled, the run continues without it: {reason[:300]}")


@contextmanager
def open_trackers(
    names: Sequence[str], folder: RunFolder, config: Mapping[str, Any], step: int, say: Callable[[str], None]
) -> Iterator[Trackers]:
    """Open trackers for the block, and close them with the outcome of the block: finished, interrupted or failed."""
    trackers = Trackers(say)
    trackers.open(names, folder, config, step)
    outcome: Outcome = "failed"
    try:
        yield trackers
        outcome = "finished"
    except Interrupted:
        outcome = "interrupted"
        raise
    finally:
        trackers.close(outcome)


def _log_scalars(kind: str, values: Mapping[str, float], step: int, backend: Backend) -> None:
    backend.log_scalars(kind, values, step)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, by dotted name as in `per_class.LONG.f1`."""
    return {name: value for name, value in flatten(record).items() if isinstance(value, int | float)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Replace nesting by dotted keys, and lists by text, because trackers support neither nesting nor lists."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flatten(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result
