"""`metrics.jsonl`: one line per optimizer step (trained or skipped) and one per epoch.

Lines contain no clock times, so the file of a resumed run equals that of an uninterrupted run. A checkpoint stores the
SHA-256 of the lines before it, and a resume verifies that they are complete and unchanged. Later lines, including
partial ones after a crash, are dropped, because the resumed run writes them again.
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
from ctxtrain.storage.atomic_files import annotate_write_errors, sync, write_bytes
from ctxtrain.storage.validated import StoredModel, check_schema

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

Share = Annotated[float, Field(ge=0, le=1)]
REMEDY = "Restore the file as the run left it, or move it away to resume without the earlier lines"


class ClassScores(StoredModel):
    precision: Share
    recall: Share
    f1: Share
    support: NonNegativeInt


class MetricValues(StoredModel):
    """One number per metric."""

    def value(self, metric: str) -> float:
        """The number of a metric, by its name in the metric registry."""
        return float(getattr(self, metric))


def metric_schema(metrics: Iterable[Metric]) -> type[MetricValues]:
    """Create a schema with one number per metric, within the range of the metric."""
    fields: dict[str, Any] = {
        metric.name: (Annotated[float, Field(ge=metric.lowest, le=metric.highest)], ...) for metric in metrics
    }
    return create_model("Overall", __base__=MetricValues, **fields)


if TYPE_CHECKING:
    Overall = MetricValues  # mypy does not support dynamic base classes
else:
    Overall = metric_schema(METRICS)


class Scores(Overall):
    """The result of `evaluate_logits` in `evaluation/metrics.py`."""

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


class StepLine(StoredModel):
    kind: Literal["step"]
    step: PositiveInt
    epoch: PositiveInt
    loss: float
    learning_rate: NonNegativeFloat
    grad_norm: NonNegativeFloat
    windows: PositiveInt


class SkipLine(StoredModel):
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
class _LineOrder:
    """Checks that steps and epochs increase by one from line to line.

    The first line may have any number, because the file may have been moved away during the run.
    """

    first: int = 0
    step: int = 0
    epoch: int = 0

    def add(self, line: Mapping[str, Any], place: str, remedy: str = REMEDY) -> None:
        """Advance to the next line. Raises DataError if it is a duplicate or if lines before it are missing."""
        unit = "epoch" if line["kind"] == "epoch" else "step"
        last, number = (self.epoch, line["epoch"]) if unit == "epoch" else (self.step, line["step"])
        if last and number <= last:
            raise DataError(f"{place}: {unit} {number} is a duplicate, it comes after {unit} {last}. {remedy}.")
        if last and number > last + 1:
            raise DataError(f"{place}: {unit} {number} follows {unit} {last}, so lines are missing. {remedy}.")
        if unit == "epoch":
            self.epoch = number
        else:
            self.first, self.step = self.first or number, number


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest: Hash | None = None

    @property
    def sha256(self) -> str:
        """The SHA-256 of all lines so far."""
        return self._running_digest().hexdigest()

    def _running_digest(self) -> Hash:
        if self._digest is None:
            self._digest = hashlib.sha256(read_regular(self.path) if self.path.exists() else b"")
        return self._digest

    def append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content, digest = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE), self._running_digest()
        with annotate_write_errors(self.path, len(content)), self.path.open("ab") as stream:
            stream.write(content)
        digest.update(content)

    def sync(self) -> None:
        """Flush the lines to the disk. A checkpoint requires the lines of its steps."""
        if self.path.exists():
            sync(self.path)

    def lines_up_to(self, *, step: int, epoch: int, sha256: str = "") -> tuple[bytes, list[str]]:
        """The lines up to an optimizer step and a finished epoch, and notes about all other lines.

        `sha256` is the digest of these lines, or "" if the checkpoint has none. Raises DataError with the line number
        unless each line is present once and intact. A missing file is allowed: the user may move it away.
        """
        order, kept, late, damaged = _LineOrder(), bytearray(), 0, 0
        for place, content in self._lines():
            try:
                line = _parse_line(content, place)
            except DataError:
                if order.step < step or order.epoch < epoch:
                    raise
                damaged += 1  # lines after the checkpoint were not flushed, so a power cut may damage them
                continue
            if (line["epoch"] <= epoch) if line["kind"] == "epoch" else (line["step"] <= step):
                order.add(line, place)
                kept += content + b"\n"
            else:
                late += 1
        if late or damaged:
            damage = f", {damaged} of them damaged," if damaged else ""
            counted = f"{late + damaged} line{'s' if late + damaged > 1 else ''}"
            notes = [f"{self.path}: {counted} after optimizer step {step}{damage} dropped; they are written again"]
        else:
            notes = []
        return bytes(kept), notes + self._check_kept(order, kept, step, epoch, sha256)

    def _check_kept(self, order: _LineOrder, kept: bytearray, step: int, epoch: int, sha256: str) -> list[str]:
        """Notes about missing lines. Raises DataError if the kept lines are not those of the run."""
        if kept:
            if order.step < step or order.epoch < epoch:
                raise DataError(
                    f"{self.path}: must have every line up to optimizer step {step} and epoch {epoch}, it ends at step "
                    f"{order.step} and epoch {order.epoch}. {REMEDY}."
                )
            if sha256 and hashlib.sha256(kept).hexdigest() != sha256:
                raise DataError(
                    f"{self.path}: its lines up to optimizer step {step} changed after the checkpoint was saved. "
                    f"{REMEDY}."
                )
        missing = order.first - 1 if kept else step
        return (
            [f"{self.path}: lacks the lines of {missing:,} optimizer steps up to step {missing}"] if missing > 0 else []
        )

    def replace_lines(self, content: bytes) -> None:
        """Replace the whole file."""
        write_bytes(self.path, content)
        self._digest = hashlib.sha256(content)

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a partial last line after a crash is ignored. Raises DataError with the faulty line."""
        remedy = "Restore the file as the run left it, or move it away to get a report without curves"
        order, records = _LineOrder(), []
        for place, content in self._lines():
            line = _parse_line(content, place, remedy)
            order.add(line, place, remedy)
            records.append(line)
        return records

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """Each complete line with its location."""
        try:
            content = read_regular(self.path)
        except FileNotFoundError:
            return
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            yield f"{self.path}:{number}", line


def _parse_line(content: bytes, place: str, remedy: str = REMEDY) -> dict[str, Any]:
    try:
        line = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{place}:{error.colno}: not valid JSON: {error.msg}. {remedy}.") from None
    check_schema(LINE, line, place, remedy)
    return line  # type: ignore[no-any-return]  # JSON is untyped
