"""Dynamic batching: windows of concurrent requests share one forward pass.

Input: windows, from the event loop. Output: predictions, computed in one worker thread. Windows that arrive during a
forward pass form the next batch; an idle model waits at most `max_wait` seconds for more windows. If a window has no
valid prediction, only its own request fails.
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

Predict = Callable[[Sequence[Window]], list[Prediction]]


@dataclass(frozen=True, slots=True)
class _QueuedWindow:
    window: Window
    arrived: float  # time of the event loop
    prediction: asyncio.Future[Prediction]


class QueueFull(Exception):
    """The windows of a request exceed the capacity of the queue."""


class Batcher:
    """A queue of at most `capacity` windows, which `run` sends to the model in batches."""

    def __init__(self, predict: Predict, *, max_batch: int, max_wait: float, capacity: int) -> None:
        self._predict = predict
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.capacity = capacity
        self._queue: deque[_QueuedWindow] = deque()
        self._has_windows = asyncio.Event()
        self._batch_ready = asyncio.Event()  # the next forward pass can start without waiting for more windows
        self._waits = True
        self.thread = ThreadPoolExecutor(1, "model")

    def __len__(self) -> int:
        return len(self._queue)

    async def predict(self, windows: Sequence[Window]) -> list[Prediction]:
        """Predictions in the order of the windows. Raises QueueFull, or DataError with the faults of all windows."""
        if len(self._queue) + len(windows) > self.capacity:
            raise QueueFull
        loop = asyncio.get_running_loop()
        queued = [_QueuedWindow(window, loop.time(), loop.create_future()) for window in windows]
        self._queue.extend(queued)
        self._update_events()
        outcomes = await asyncio.gather(*(entry.prediction for entry in queued), return_exceptions=True)
        faults: list[str] = []
        for outcome in outcomes:
            if isinstance(outcome, DataError):
                faults += outcome.faults
            elif isinstance(outcome, BaseException):
                raise outcome
        if faults:
            raise DataError(faults)
        return outcomes  # type: ignore[return-value]  # exceptions were raised above

    def stop_waiting(self) -> None:
        """Predict all windows at once from now on, without waiting for larger batches."""
        self._waits = False
        self._update_events()

    async def run(self) -> None:
        """Predict queued windows in batches until cancelled."""
        while True:
            await self._has_windows.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._queue[0].arrived + self.max_wait):
                    await self._batch_ready.wait()
            batch = [self._queue.popleft() for _ in range(min(self.max_batch, len(self._queue)))]
            self._update_events()
            for entry, outcome in zip(batch, await self._outcomes([entry.window for entry in batch]), strict=True):
                if entry.prediction.done():  # the request was cancelled
                    continue
                if isinstance(outcome, BaseException):
                    entry.prediction.set_exception(outcome)
                else:
                    entry.prediction.set_result(outcome)

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _update_events(self) -> None:
        """Set or clear the events according to the length of the queue."""
        for event, is_set in (
            (self._has_windows, bool(self._queue)),
            (self._batch_ready, not self._waits or len(self._queue) >= self.max_batch),
        ):
            event.set() if is_set else event.clear()

    async def _outcomes(self, windows: Sequence[Window]) -> list[Any]:
        """A prediction or an exception per window. If a batch fails, each of its windows is predicted separately."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self.thread, self._predict, windows)
        (outcome,) = await asyncio.gather(call, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            return outcome
        if len(windows) == 1:
            return [outcome]
        return [(await self._outcomes([window]))[0] for window in windows]
