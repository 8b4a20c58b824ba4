"""Windows of concurrent requests go through the model together.

Comes in: windows, from the event loop. Goes out: predictions, computed in one worker thread. While a pass runs, what
arrives waits and makes the next one; an idle model waits at most `max_wait` seconds for company. A window that cannot
be answered fails alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ctxtrain.data.parse_window import Window
from ctxtrain.errors import DataError
from ctxtrain.export.predictor import Prediction

Answer = Callable[[Sequence[Window]], list[Prediction]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    window: Window
    arrived: float  # on the loop's clock
    prediction: asyncio.Future[Prediction]


class QueueFull(Exception):
    """The queue has no room for the windows of a request."""


class Batcher:
    """A queue of at most `capacity` windows in front of the model; `run` empties it."""

    def __init__(self, answer: Answer, *, max_batch: int, max_wait: float, capacity: int) -> None:
        self.answer = answer
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.capacity = capacity
        self._queue: deque[_Waiting] = deque()
        self._filled = asyncio.Event()  # somebody waits
        self._enough = asyncio.Event()  # a pass need not wait for more
        self._hurried = False
        self.thread = ThreadPoolExecutor(1, "model")

    def __len__(self) -> int:
        return len(self._queue)

    async def predict(self, windows: Sequence[Window]) -> list[Prediction]:
        """Predictions in the order of the windows. Raises QueueFull, or DataError with the fault of every window."""
        if len(self._queue) + len(windows) > self.capacity:
            raise QueueFull
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(window, loop.time(), loop.create_future()) for window in windows]
        self._queue.extend(waiting)
        self._signal()
        outcomes = await asyncio.gather(*(one.prediction for one in waiting), return_exceptions=True)
        faults: list[str] = []
        for outcome in outcomes:
            if isinstance(outcome, DataError):
                faults += outcome.faults
            elif isinstance(outcome, BaseException):
                raise outcome
        if faults:
            raise DataError(faults)
        return outcomes  # type: ignore[return-value]  # the failures are out

    def hurry(self) -> None:
        """From now on no window waits for company."""
        self._hurried = True
        self._signal()

    async def run(self) -> None:
        """Answer what waits, until cancelled."""
        while True:
            await self._filled.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._queue[0].arrived + self.max_wait):
                    await self._enough.wait()
            batch = [self._queue.popleft() for _ in range(min(self.max_batch, len(self._queue)))]
            self._signal()
            for one, outcome in zip(batch, await self._outcomes([one.window for one in batch]), strict=True):
                if one.prediction.done():  # its request was given up
                    continue
                if isinstance(outcome, BaseException):
                    one.prediction.set_exception(outcome)
                else:
                    one.prediction.set_result(outcome)

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _signal(self) -> None:
        """Set the events to what the queue holds."""
        for event, on in (
            (self._filled, bool(self._queue)),
            (self._enough, self._hurried or len(self._queue) >= self.max_batch),
        ):
            event.set() if on else event.clear()

    async def _outcomes(self, windows: Sequence[Window]) -> list[Any]:
        """A prediction or an exception for each window: where a pass fails, each window gets a pass of its own."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self.thread, self.answer, windows)
        (outcome,) = await asyncio.gather(call, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            return outcome
        if len(windows) == 1:
            return [outcome]
        return [(await self._outcomes([window]))[0] for window in windows]
