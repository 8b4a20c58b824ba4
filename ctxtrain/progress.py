"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere."""

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
SHORTEST_BAR = 5
TIME_LEFT = "0:00:00"


class Reporter:
    """Tells the progress of a run on a console; without one it is silent (every process but the first)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)
        self._best: float | None = None
        self._headed = False

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin(self, message: str) -> None:
        """Say that one of several runs begins; its epochs get a table of their own."""
        self._best, self._headed = None, False
        self.say(message)

    def resuming(self, checkpoint: str, step: int, steps: int, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Where the run goes on, and the epochs that it has behind it."""
        self.say(f"resuming from {checkpoint} at optimizer step {step} of {steps}")
        for record in epochs:
            self.epoch_done(record, best=self._best is None or record["macro_f1"] > self._best)

    @contextmanager
    def epoch(self, number: int, epochs: int, steps: int, done: int) -> Iterator[Callable[[float, float, int], None]]:
        """Show one epoch; the function that it gives takes loss, learning rate and windows of each optimizer step.

        On a terminal one bar stands for the whole run, so that the time left is the run's.
        """
        start = time.monotonic()
        seen = 0
        step = done
        best = [] if self._best is None else [f"best macro-F1 {self._best:.3f}"]
        what, total = f"epoch {number}/{epochs}", epochs * steps
        room = self.console.width - len(f"{what} {total}/{total} {TIME_LEFT}  ") - SHORTEST_BAR
        with self._bar(what, total, (number - 1) * steps + done) as advance:

            def after_step(loss: float, learning_rate: float, windows: int) -> None:
                nonlocal seen, step
                seen, step = seen + windows, step + 1
                rate = seen / max(time.monotonic() - start, 1e-9)
                at, rates = f"step {step}/{steps}", [f"lr {learning_rate:.2e}", f"{rate:,.0f} windows/s"]
                advance(1, _fitting([f"loss {loss:.4f}", *best, *reversed(rates), at], room))
                if not self.console.is_terminal and (step % max(1, steps // LINES_PER_EPOCH) == 0 or step == steps):
                    self.say("  ".join([what, at, f"loss {loss:.4f}", *rates]))

            yield after_step

    @contextmanager
    def rows(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a pass over rows; the function that it gives takes the rows of each batch."""
        with self._bar(what, total, 0) as advance:
            yield lambda count: advance(count, "")

    def epoch_done(self, record: Mapping[str, Any], best: bool) -> None:
        """A line of the table of epochs, under a head that is shown once."""
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
        heads = [re.split("[ -]", name) if narrow else [name] for name in figures]
        widths = [max(map(len, [*head, figure])) for head, figure in zip(heads, figures.values(), strict=True)]
        lines = list(zip_longest(*heads, fillvalue="")) if not self._headed else []
        for cells in [*lines, tuple(figures.values())]:
            line = gap.join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            self.say(f"{line}{mark if best and cells not in lines else ''}")
        self._headed = True

    @contextmanager
    def _bar(self, what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
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
            task = bar.add_task(what, total=total, completed=done, status="")
            yield lambda count, status: bar.update(task, advance=count, status=status)


def _fitting(parts: Sequence[str], room: int) -> str:
    """As many of the parts, from the first, as there is room for."""
    shown = ""
    for part in parts:
        if len(shown) + len(part) > room:
            break
        shown += f"{part}  "
    return shown.rstrip()
