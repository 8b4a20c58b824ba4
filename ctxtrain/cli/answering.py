"""What the commands that ask a model share: rows with their notes, the least confidence, a bar of progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ctxtrain.errors import ConfigError


def question_of(predictor: Any, rows: Any) -> Any:
    """What a predictor needs of rows; what was dropped or guessed in them is said once, on standard error."""
    question = predictor.read_rows(rows)
    for line in rows.reading.noticed.lines():
        typer.echo(f"note: {line}", err=True)
    return question


def least_confidence(text: str | None) -> Any:
    if text in (None, "auto"):
        return text
    try:
        value: Any = float(str(text))
    except ValueError:
        value = text
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    raise ConfigError(f"min-confidence must be auto or a number from 0 to 1, got {value!r}. Try 0.55.")


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A bar on a terminal's stderr, so that stdout holds results only."""
    from ctxtrain.cli.console import stderr
    from ctxtrain.progress import Reporter

    with Reporter(stderr()).rows(what, total) as advance:
        yield advance
