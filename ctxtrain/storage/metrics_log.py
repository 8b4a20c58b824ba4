"""`metrics.jsonl`: a line per optimizer step, trained or skipped, and per epoch, without clock times, so that a resumed
run's file equals an unbroken one's.

A checkpoint keeps the SHA-256 of the lines up to it. So a resume knows whether they are all there, once and unchanged;
what a crash leaves behind them, whole lines and torn ones, is dropped, for it is about to be written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, create_model

from ctxtrain.errors import DataError
from ctxtrain.evaluation.metrics import METRICS, Metric
from ctxtrain.labels import LABELS, Label
from ctxtrain.regular_files import read_regular
from ctxtrain.storage.atomic_files import needing, sync, write_bytes
from ctxtrain.storage.validated import Part, refuse_unlike

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

Share = Annotated[float, Field(ge=0, le=1)]
REMEDY = (
    "Put back the file as the run left it, or move it away: then the run goes on, and the file lacks the lines before"
)


class ClassScores(Part):
    precision: Share
    recall: Share
    f1: Share
    support: NonNegativeInt


class Measured(Part):
    """A number for each of some metrics."""

    def value(self, metric: str) -> float:
        """That of a metric, by its name in the registry."""
        return float(getattr(self, metric))


def overall(metrics: Iterable[Metric]) -> type[Measured]:
    """A schema with a number for each metric, in its range."""
    fields: dict[str, Any] = {
        metric.name: (Annotated[float, Field(ge=metric.lowest, le=metric.highest)], ...) for metric in metrics
    }
    return create_model("Overall", __base__=Measured, **fields)


if TYPE_CHECKING:
    Overall = Measured  # mypy does not take a class that is made
else:
    Overall = overall(METRICS)


class Scores(Overall):
    """What `evaluate_logits` of `metrics.py` gives."""

    per_class: dict[Label, ClassScores] = Field(min_length=len(LABELS), max_length=len(LABELS))
    confusion: list[Annotated[list[NonNegativeInt], Field(min_length=len(LABELS), max_length=len(LABELS))]] = Field(
        min_length=len(LABELS), max_length=len(LABELS)
    )
    rows: PositiveInt
    absent: list[Label]


class EpochRecord(Scores):
    epoch: PositiveInt
    step: PositiveInt
    train_loss: float
    loss: float


class StepLine(Part):
    kind: Literal["step"]
    step: PositiveInt
    epoch: PositiveInt
    loss: float
    learning_rate: NonNegativeFloat
    grad_norm: NonNegativeFloat
    windows: PositiveInt


class SkipLine(Part):
    kind: Literal["skip"]
    step: PositiveInt
    epoch: PositiveInt
    why: str
    rows: list[str]
    windows: PositiveInt


class EpochLine(EpochRecord):
    kind: Literal["epoch"]


LINE: TypeAdapter[Any] = TypeAdapter(Annotated[StepLine | SkipLine | EpochLine, Field(discriminator="kind")])


@dataclass
class _Order:
    """Steps and epochs go up by one from line to line; the first may be any, if the file was moved away before."""

    first: int = 0
    step: int = 0
    epoch: int = 0

    def take(self, line: Mapping[str, Any], place: str, remedy: str = REMEDY) -> None:
        """Raises DataError for a line that stands twice, or after one that is missing."""
        what = "epoch" if line["kind"] == "epoch" else "step"
        last, number = (self.epoch, line["epoch"]) if what == "epoch" else (self.step, line["step"])
        if last and number <= last:
            raise DataError(f"{place}: {what} {number} stands twice, {what} {last} was before it. {remedy}.")
        if last and number > last + 1:
            raise DataError(f"{place}: {what} {number} follows {what} {last}, so lines are missing. {remedy}.")
        if what == "epoch":
            self.epoch = number
        else:
            self.first, self.step = self.first or number, number


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest: Hash | None = None

    @property
    def sha256(self) -> str:
        """Of all lines so far."""
        return self._so_far().hexdigest()

    def _so_far(self) -> Hash:
        if self._digest is None:
            self._digest = hashlib.sha256(read_regular(self.path) if self.path.exists() else b"")
        return self._digest

    def append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content, digest = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE), self._so_far()
        with needing(self.path, len(content)), self.path.open("ab") as stream:
            stream.write(content)
        digest.update(content)

    def sync(self) -> None:
        """Flush the lines to the disk: a checkpoint counts on the lines of its steps."""
        if self.path.exists():
            sync(self.path)

    def behind(self, *, step: int, epoch: int, sha256: str = "") -> tuple[bytes, list[str]]:
        """The lines up to an optimizer step and a finished epoch, and what is to be said of the others.

        `sha256` is of these lines, where a checkpoint knows it. Raises DataError, with the line, unless all of them are
        there, once and whole. If none is, the file was moved away.
        """
        order, kept, late, damaged = _Order(), bytearray(), 0, 0
        for place, content in self._lines():
            try:
                line = _parsed(content, place)
            except DataError:
                if order.step < step or order.epoch < epoch:
                    raise
                damaged += 1  # after a power cut, what no checkpoint counts on is as the disk has it
                continue
            if (line["epoch"] <= epoch) if line["kind"] == "epoch" else (line["step"] <= step):
                order.take(line, place)
                kept += content + b"\n"
            else:
                late += 1
        if late or damaged:
            torn = f", {damaged} of them damaged," if damaged else ""
            counted = f"{late + damaged} line{'s' if late + damaged > 1 else ''}"
            notes = [f"{self.path}: {counted} after optimizer step {step}{torn} dropped; they are written again"]
        else:
            notes = []
        return bytes(kept), notes + self._lost(order, kept, step, epoch, sha256)

    def _lost(self, order: _Order, kept: bytearray, step: int, epoch: int, sha256: str) -> list[str]:
        """What is to be said of lines that are gone. Raises DataError if those that are there are not the run's."""
        if kept:
            if order.step < step or order.epoch < epoch:
                raise DataError(
                    f"{self.path}: must have every line up to optimizer step {step} and epoch {epoch}, it ends at step "
                    f"{order.step} and epoch {order.epoch}. {REMEDY}."
                )
            if sha256 and hashlib.sha256(kept).hexdigest() != sha256:
                raise DataError(
                    f"{self.path}: its lines up to optimizer step {step} are not those that the checkpoint was saved "
                    f"with. {REMEDY}."
                )
        lost = order.first - 1 if kept else step
        return [f"{self.path}: lacks the lines of {lost:,} optimizer steps up to step {lost}"] if lost > 0 else []

    def restart(self, content: bytes) -> None:
        """Let the file hold these lines alone."""
        write_bytes(self.path, content)
        self._digest = hashlib.sha256(content)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a last one that a crash has cut does not count. Raises DataError with the faulty line."""
        remedy = "Put back the file as the run left it, or move it away: then the report is without its curves"
        order, records = _Order(), []
        for place, content in self._lines():
            line = _parsed(content, place, remedy)
            order.take(line, place, remedy)
            records.append(line)
        return records

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """Each whole line with its place."""
        try:
            content = read_regular(self.path)
        except FileNotFoundError:
            return
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            yield f"{self.path}:{number}", line


def _parsed(content: bytes, place: str, remedy: str = REMEDY) -> dict[str, Any]:
    try:
        line = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{place}:{error.colno}: not valid JSON: {error.msg}. {remedy}.") from None
    refuse_unlike(LINE, line, place, remedy)
    return line  # type: ignore[no-any-return]  # as JSON is
