"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_PER_EPOCH = 4


class Reporter:
    """Tells the progress of a run on a console; without one it is silent (every process but the first)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)
        self._best: float | None = None
        self._headed = False

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

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
        best = "" if self._best is None else f"  best macro-F1 {self._best:.3f}"
        with self._bar(f"epoch {number}/{epochs}", epochs * steps, (number - 1) * steps + done) as advance:

            def after_step(loss: float, learning_rate: float, windows: int) -> None:
                nonlocal seen, step
                seen, step = seen + windows, step + 1
                rate = seen / max(time.monotonic() - start, 1e-9)
                status = f"loss {loss:.4f}  lr {learning_rate:.2e}  {rate:,.0f} windows/s"
                advance(1, f"step {step}/{steps}  {status}{best}")
                if not self.console.is_terminal and (step % max(1, steps // LINES_PER_EPOCH) == 0 or step == steps):
                    self.say(f"epoch {number}/{epochs}  step {step}/{steps}  {status}")

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
            "train loss": record["train_loss"],
            "val loss": record["loss"],
            "accuracy": record["accuracy"],
            "macro-F1": record["macro_f1"],
            **{f"{label} F1": scores["f1"] for label, scores in record["per_class"].items()},
        }
        if not self._headed:
            self.say("epoch done  " + "  ".join(figures))
            self._headed = True
        cells = [f"{value:{len(name)}.{4 if 'loss' in name else 3}f}" for name, value in figures.items()]
        self.say(f"{record['epoch']:10}  {'  '.join(cells)}{'  best so far' if best else ''}")

    @contextmanager
    def _bar(self, what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(what, total=total, completed=done, status="")
            yield lambda count, status: bar.update(task, advance=count, status=status)
