"""The model of a server with its queue: what the routes share.

Comes in: bodies of requests. Goes out: predictions. Parsing has a thread and the model has one, so that the event loop
only waits; its state (`draining`, `open`) is touched in the loop's thread alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from ctxtrain.data.codec import Codec
from ctxtrain.data.parse_window import BAR_FIELDS, MAX_BARS, Window, parse_row
from ctxtrain.errors import DataError
from ctxtrain.export.predictor import MinConfidence, Prediction, Predictor
from ctxtrain.serve.batching import Batcher, QueueFull
from ctxtrain.serve.metrics import Metrics
from ctxtrain.serve.refusals import draining, no_window, queue_full


@dataclass(frozen=True)
class Limits:
    """`max_batch` and `queue` count windows, `max_wait` is in seconds."""

    max_batch: int = 32
    max_wait: float = 0.002
    max_body_bytes: int = 1 << 20
    queue: int = 256


class Service:
    def __init__(self, predictor: Predictor, limits: Limits, min_confidence: MinConfidence) -> None:
        self.predictor = predictor
        self.limits = limits
        self.min_confidence = min_confidence
        self.batcher = Batcher(
            self._answer, max_batch=limits.max_batch, max_wait=limits.max_wait, capacity=limits.queue
        )
        self.metrics = Metrics(predictor.version, self.batcher.__len__)
        self.open = 0  # requests admitted and not answered
        self.draining = False
        self.started = time.monotonic()
        self._parser = ThreadPoolExecutor(1, "parser")

    def warm_up(self) -> None:
        """Answer windows before the port opens, so that no request pays for what happens only once in a thread.

        Raises ConfigError for a `min_confidence` that the export cannot give.
        """
        window = warm_window(self.predictor.codec)
        for count in (1, self.limits.max_batch):
            passed = self.batcher.thread.submit(
                self.predictor.predict_windows, [window] * count, min_confidence=self.min_confidence
            )
            passed.result()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Let a request in, or raise Refusal. So many bodies at most are in memory."""
        if self.draining:
            raise draining()
        if self.open >= self.limits.queue + self.limits.max_batch:
            raise queue_full(len(self.batcher))
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def parse(self, read: Callable[..., list[Window]], body: bytes, *arguments: int) -> list[Window]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._parser, read, body, self.predictor.codec, *arguments)

    async def predict(self, windows: Sequence[Window]) -> list[Prediction]:
        """Raises Refusal where the queue has no room, or the model no finite answer."""
        try:
            predictions = await self.batcher.predict(windows)
        except QueueFull:
            raise queue_full(len(self.batcher)) from None
        except DataError as error:
            raise no_window(error.faults, error.total) from None
        self.metrics.count(predictions)
        return predictions

    def drain(self) -> None:
        """Take no more windows, and answer at once those that wait."""
        self.draining = True
        self.metrics.draining.set(1)
        self.batcher.hurry()

    @property
    def drained(self) -> bool:
        return self.draining and not self.open

    def close(self) -> None:
        self.batcher.close()
        self._parser.shutdown(cancel_futures=True)

    def _answer(self, windows: Sequence[Window]) -> list[Prediction]:
        """Runs in the model's thread."""
        with self.metrics.pass_seconds.time():
            predictions = self.predictor.predict_windows(windows, min_confidence=self.min_confidence)
        self.metrics.pass_windows.observe(len(windows))
        return predictions


def warm_window(codec: Codec) -> Window:
    """A window of the longest kind, with everything the codec reads."""
    bar = dict.fromkeys(BAR_FIELDS, 1)
    features = {name: scale.centre for name, scale in codec.features.items()}
    row = {"context_bars": [bar] * (MAX_BARS - 1), "current_bar": bar, "features": features}
    window, faults = parse_row({"context": "warm"} if codec.kind == "text" else row, "warm-up", labelled=False)
    assert window is not None, faults
    return window
