"""Shared by commands: options, messages on standard error, a progress bar, rows for a model, results as JSON."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxtrain.errors import ConfigError
from ctxtrain.labels import LABELS
from ctxtrain.memory import annotate_memory_errors
from ctxtrain.streams import print_line, write_stdout

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Run folder, export folder or final_model.zip.")]
MinConfidence = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|auto",
        help="Call a less confident row SKIP, and mark it abstained; auto takes the export's thresholds.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16",
        help="Number type of the answers; auto is that of the export, or float32 where that is faster.",
    ),
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="OUT.jsonl", help="Instead of standard output, which is -.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def announce(message: str) -> None:
    """Print a line on standard error at once, so that a command says what it does before seconds of imports.

    Of several processes only the first does.
    """
    if os.environ.get("RANK", "0") == "0":
        print_line(sys.stderr, message)


def start_fresh_process() -> None:
    """Start the process that will check the export, so that it imports torch while this one does."""
    if "WORLD_SIZE" not in os.environ:
        from ctxtrain.export.fresh_process import fresh_process

        fresh_process.start()


def open_model(path: Path, dtype: str) -> Any:
    """The `Predictor` of an export; what its dtype costs is printed on standard error."""
    from ctxtrain.export.predictor import load_model

    predictor = load_model(path, dtype=dtype)  # type: ignore[arg-type]  # it refuses other names
    for note in predictor.notes:
        announce(f"note: {note}")
    return predictor


def encode_rows(predictor: Any, rows: Any) -> Any:
    """The `EncodedBatch` of rows; what was dropped or guessed in them is printed once, on standard error."""
    from ctxtrain.data.levels import unseen_word_lines

    announce(f"reading {rows.source.name}")
    batch = predictor.encode_rows(rows)
    for line in (*rows.report.notices.lines(), *unseen_word_lines(batch.unseen_words, len(batch.ids))):
        announce(f"note: {line}")
    return batch


def score_rows(predictor: Any, batch: Any) -> Any:
    """Uncalibrated logits of an `EncodedBatch`, shape (N, 3), with a progress bar."""
    announce(f"scoring {len(batch.ids):,} rows")
    with annotate_memory_errors("while evaluating"), progress("scoring", len(batch.ids)) as advance:
        return predictor.token_logits(batch.tokens, advance)


def parse_min_confidence(text: str | None) -> Any:
    """None, `auto`, or a number from 0 to 1. Raises ConfigError for anything else."""
    if text in (None, "auto"):
        return text
    try:
        value: Any = float(str(text))
    except ValueError:
        value = text
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    raise ConfigError(f"min-confidence must be auto or a number from 0 to 1, got {value!r}. Try 0.55.")


def parse_fields(text: str | None) -> dict[str, Any]:
    """The fields of `rsi=number,session=category`, as in `data.fields`. Raises ConfigError."""
    from ctxtrain.config.value_types import FIELD_KINDS

    parts = [part.partition("=") for part in text.split(",")] if text else []
    for name, _, kind in parts:
        if not name.strip() or kind.strip() not in FIELD_KINDS:
            rule = f"fields must be names with one of the kinds {', '.join(FIELD_KINDS)}"
            raise ConfigError(f"{rule}, got {text!r}. Use rsi=number,session=category.")
    fields = {name.strip(): kind.strip() for name, _, kind in parts}
    if len(fields) < len(parts):
        raise ConfigError(f"fields must name each field once, got {text!r}. Leave one of them out.")
    return fields


def parse_mix(text: str) -> tuple[float, ...]:
    """Shares of LONG, SHORT and SKIP. Raises ConfigError if they are not numbers."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ConfigError(f"mix must be three numbers with commas between, got {text!r}. Use 0.35,0.35,0.30.") from None


def count_labels(predictions: Iterable[Any], counts: Counter[str]) -> Iterator[Any]:
    """Pass predictions on, and count them by label and as `abstained`."""
    for prediction in predictions:
        counts[prediction["label"]] += 1
        counts["abstained"] += prediction.get("abstained", False)
        yield prediction


def describe_counts(counts: Counter[str]) -> str:
    """As in `400 predictions: 131 LONG, 140 SHORT, 129 SKIP (12 of them because confidence was too low)`."""
    classes = {label: counts[label] for label in LABELS}
    text = ", ".join(f"{count:,} {label}" for label, count in classes.items())
    abstained = counts["abstained"]
    return f"{sum(classes.values()):,} predictions: {text}" + (
        f" ({abstained:,} of them because confidence was too low)" if abstained else ""
    )


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A progress bar on standard error, if that is a terminal; yields a function that takes the rows of each batch."""
    from ctxtrain.cli.console import stderr
    from ctxtrain.progress import Reporter

    with Reporter(stderr()).track_rows(what, total) as advance:
        yield advance


def print_json(value: object) -> None:
    """Write a value to standard output as indented JSON."""
    from ctxtrain.storage.atomic_files import to_json

    write_stdout(to_json(value))
