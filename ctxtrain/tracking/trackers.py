"""Experiment trackers: TensorBoard, MLflow and Weights & Biases are told what the run folder holds.

Comes in: records of `metrics.jsonl`, the config, the summary. Goes out: to each tracker the numbers of every optimizer
step and epoch, the confusion matrices, the final scores and the finished files.

The run folder is the record and a tracker only a copy of it. So a tracker that fails, however it does, is left out from
there on; that is said once, and the run goes on.
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
from ctxtrain.tracking.backends import Outcome, Tool, open_tool


def require_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for those whose package is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tracking.to must name installed packages, {', '.join(missing)} is not. "
            f"Run pip install {' '.join(missing)}."
        )


class Trackers:
    """The open trackers of a run; without any, every call does nothing."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.tools: dict[str, Tool] = {}

    def open(self, names: Sequence[str], folder: RunFolder, config: Mapping[str, Any], step: int) -> None:
        """Begin the tracker's run, or go on with the one that `tracking.json` names, after optimizer step `step`."""
        for name in names:
            self._guarded(name, partial(self._open, name, folder, flat(config), step))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a step or an epoch, at its optimizer step; with an epoch goes its confusion matrix."""
        kind, step = record["kind"], record["step"]
        self._all(partial(_send, kind, numbers(record), step))
        if "confusion" in record:
            self._all(lambda tool: tool.confusion(record["confusion"], record["epoch"], step))

    def finished(self, summary: Summary, folder: RunFolder) -> None:
        """Send the exported model's scores, the verdict and the files of a run that has come to its end."""
        step = summary.epochs[-1].step
        for kind, scores in (("best", summary.best), ("test", summary.test)):
            if scores:
                self._all(partial(_send, kind, numbers(scores.plain()), step))
        files = [folder.summary, folder.report, folder.zip]
        self._all(lambda tool: tool.final(summary.verdict, files, step))

    def close(self, outcome: Outcome) -> None:
        self._all(lambda tool: tool.close(outcome))
        self.tools = {}

    def _open(self, name: str, folder: RunFolder, config: Mapping[str, Any], step: int) -> None:
        ids = orjson.loads(folder.tracking.read_bytes()) if folder.tracking.exists() else {}
        self.tools[name] = tool = open_tool(name, folder.root.resolve(), ids.get(name), config, step)
        if tool.run_id not in (None, ids.get(name)):
            write_json(folder.tracking, ids | {name: tool.run_id})

    def _all(self, action: Callable[[Tool], None]) -> None:
        for name, tool in list(self.tools.items()):
            self._guarded(name, partial(action, tool))

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        """Anything may come out of a tracker's library, and none of it is worth a run."""
        try:
            action()
        except Exception as error:
            self.tools.pop(name, None)
            why = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"note: {name} is left out from here on, the run goes on without it: {why[:300]}")


@contextmanager
def tracked(
    names: Sequence[str], folder: RunFolder, config: Mapping[str, Any], step: int, say: Callable[[str], None]
) -> Iterator[Trackers]:
    """Open trackers for the block and close them when it ends, with how it ended: finished, interrupted or failed."""
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


def _send(kind: str, values: Mapping[str, float], step: int, tool: Tool) -> None:
    tool.numbers(kind, values, step)


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn of a record, under dotted names."""
    return {name: value for name, value in flat(record).items() if isinstance(value, int | float)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key: value`; trackers know neither nesting nor lists."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result
