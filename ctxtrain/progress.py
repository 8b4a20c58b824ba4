"""Progress output of a run: a live progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LINES_PER_EPOCH = 4
MIN_BAR_WIDTH = 5
TIME_LEFT = "0:00:00"  # as wide as the remaining time that rich displays


class Reporter:
    """Prints the progress of a run to a console. Without a console it prints nothing; only the main process has one."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)
        self._best: float | None = None
        self._has_header = False

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin_run(self, message: str) -> None:
        """Print that the next of several runs starts, and begin a new table of epochs."""
        self._best, self._has_header = None, False
        self.say(message)

    def report_resume(self, checkpoint: str, step: int, steps: int, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Print the checkpoint that the run resumes from, and its finished epochs."""
        self.say(f"resuming from {checkpoint} at optimizer step {step} of {steps}")
        for record in epochs:
            self.report_epoch(record, best=self._best is None or record["macro_f1"] > self._best)

    @contextmanager
    def track_epoch(
        self, number: int, epochs: int, steps: int, done: int
    ) -> Iterator[Callable[[float, float, int], None]]:
        """Display one epoch. Call the yielded function with loss, learning rate and number of windows after each step.

        On a terminal the bar covers all epochs, so that it shows the remaining time of the whole run.
        """
        start = time.monotonic()
        seen = 0
        step = done
        best = [] if self._best is None else [f"best macro-F1 {self._best:.3f}"]
        title, total = f"epoch {number}/{epochs}", epochs * steps
        status_width = self.console.width - len(f"{title} {total}/{total} {TIME_LEFT}  ") - MIN_BAR_WIDTH
        with self._bar(title, total, (number - 1) * steps + done) as advance:

            def after_step(loss: float, learning_rate: float, windows: int) -> None:
                nonlocal seen, step
                seen, step = seen + windows, step + 1
                rate = seen / max(time.monotonic() - start, 1e-9)
                at, rates = f"step {step}/{steps}", [f"lr {learning_rate:.2e}", f"{rate:,.0f} windows/s"]
                advance(1, _join_fitting([f"loss {loss:.4f}", *best, *reversed(rates), at], status_width))
                if not self.console.is_terminal and (step % max(1, steps // LINES_PER_EPOCH) == 0 or step == steps):
                    self.say("  ".join([title, at, f"loss {loss:.4f}", *rates]))

            yield after_step

    @contextmanager
    def track_part(self, windows: int, epoch: int, epochs: int, steps: int) -> Iterator[Callable[[], None]]:
        """Display an epoch of a point of the learning curve. Call the yielded function after each step."""
        title = f"learning curve: {windows:,} windows, epoch {epoch} of {epochs}"
        if not self.console.is_terminal:
            self.say(title)
        with self._bar(title, steps, 0) as advance:
            yield lambda: advance(1, "")

    @contextmanager
    def track_rows(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Display a pass over rows. Call the yielded function with the number of rows of each batch."""
        with self._bar(title, total, 0) as advance:
            yield lambda count: advance(count, "")

    def report_epoch(self, record: Mapping[str, Any], best: bool) -> None:
        """Print an epoch as one line of the table of epochs, preceded by the header if it is the first line."""
        if best:
            self._best = record["macro_f1"]
        figures = {
            "epoch done": str(record["epoch"]),
            "train loss": f"{record['train_loss']:.4f}",
            "val loss": f"{record['loss']:.4f}",
            "accuracy": f"{record['accuracy']:.3f}",
            "macro-F1": f"{record['macro_f1']:.3f}",
            **{
                f"{label} F1": "–" if label in record.get("absent", ()) else f"{scores['f1']:.3f}"
                for label, scores in record["per_class"].items()
            },
        }
        gap, mark = "  ", "  best so far"
        narrow = self.console.is_terminal and self.console.width < len(gap.join(figures) + mark)
        if narrow:
            gap, mark = " ", "  best"
        headers = [re.split("[ -]", name) if narrow else [name] for name in figures]
        widths = [max(map(len, [*header, figure])) for header, figure in zip(headers, figures.values(), strict=True)]
        lines = list(zip_longest(*headers, fillvalue="")) if not self._has_header else []
        for cells in [*lines, tuple(figures.values())]:
            line = gap.join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            self.say(f"{line}{mark if best and cells not in lines else ''}")
        self._has_header = True

    @contextmanager
    def _bar(self, title: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(title, total=total, completed=done, status="")
            yield lambda count, status: bar.update(task, advance=count, status=status)


def _join_fitting(parts: Sequence[str], width: int) -> str:
    """Join the first parts that fit into `width` characters."""
    text = ""
    for part in parts:
        if len(text) + len(part) > width:
            break
        text += f"{part}  "
    return text.rstrip()
