"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_PER_EPOCH = 4


class Reporter:
    """Tells the progress of a run on a console; without one it is silent (every process but the first)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def epoch(self, number: int, epochs: int, steps: int, done: int) -> Iterator[Callable[[float, float, int], None]]:
        """Show one epoch; the function that it gives takes loss, learning rate and windows of each optimizer step."""
        start = time.monotonic()
        seen = 0
        step = done
        with self._bar(f"epoch {number}/{epochs}", steps, done) as advance:

            def after_step(loss: float, learning_rate: float, windows: int) -> None:
                nonlocal seen, step
                seen, step = seen + windows, step + 1
                rate = seen / max(time.monotonic() - start, 1e-9)
                status = f"loss {loss:.4f}  lr {learning_rate:.2e}  {rate:,.0f} windows/s"
                advance(1, status)
                if not self.console.is_terminal and (step % max(1, steps // LINES_PER_EPOCH) == 0 or step == steps):
                    self.say(f"epoch {number}/{epochs}  step {step}/{steps}  {status}")

            yield after_step

    @contextmanager
    def rows(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a pass over rows; the function that it gives takes the rows of each batch."""
        with self._bar(what, total, 0) as advance:
            yield lambda count: advance(count, "")

    def epoch_done(self, record: Mapping[str, Any], best: bool) -> None:
        self.say(
            f"epoch {record['epoch']} done  train loss {record['train_loss']:.4f}  val loss {record['loss']:.4f}  "
            f"accuracy {record['accuracy']:.3f}  macro-F1 {record['macro_f1']:.3f}{'  best so far' if best else ''}"
        )

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
