"""The state that the routes share: the model, its queue and the limits.

Input: bodies of requests. Output: predictions. Parsing and the model have one thread each, so the event loop never
blocks. Only the thread of the event loop changes the state (`is_draining`, `open_requests`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ctxtrain.data.codec import Codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.row_schema import BAR_FIELDS, MAX_BARS
from ctxtrain.errors import DataError
from ctxtrain.export.predictor import MinConfidence, Prediction, Predictor
from ctxtrain.serve.batching import Batcher, QueueFull
from ctxtrain.serve.metrics import Metrics
from ctxtrain.serve.refusals import invalid_window, queue_full, server_draining


@dataclass(frozen=True)
class Limits:
    """Limits of a server. `max_batch` and `queue` are numbers of windows, `max_wait` is in seconds."""

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
            self._predict_batch, max_batch=limits.max_batch, max_wait=limits.max_wait, capacity=limits.queue
        )
        self.metrics = Metrics(predictor.version, predictor.dtype, self.batcher.__len__)
        self.open_requests = 0
        self.is_draining = False
        self.started = time.monotonic()
        self._parser = ThreadPoolExecutor(1, "parser")

    def warm_up(self) -> None:
        """Predict windows before the server starts, because the first forward passes of a thread are slow.

        Raises ConfigError for an invalid `min_confidence`, or for "auto" if the export has no thresholds.
        """
        window = warm_up_window(self.predictor.codec)
        for count in (1, self.limits.max_batch):
            forward_pass = self.batcher.thread.submit(
                self.predictor.predict_windows, [window] * count, min_confidence=self.min_confidence
            )
            forward_pass.result()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as open, or raise Refusal. This bounds the number of bodies in memory."""
        if self.is_draining:
            raise server_draining()
        if self.open_requests >= self.limits.queue + self.limits.max_batch:
            raise queue_full(len(self.batcher))
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    async def parse(self, read: Callable[..., list[Window]], body: bytes, *arguments: int) -> list[Window]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._parser, read, body, self.predictor.codec, *arguments)

    async def predict(self, windows: Sequence[Window]) -> list[Prediction]:
        """Predictions of windows, in order. Raises Refusal if the queue is full or the logits are not finite."""
        try:
            predictions = await self.batcher.predict(windows)
        except QueueFull:
            raise queue_full(len(self.batcher)) from None
        except DataError as error:
            raise invalid_window(error.faults, error.total) from None
        self.metrics.count(predictions)
        return predictions

    def drain(self) -> None:
        """Accept no more windows, and predict the queued ones at once."""
        self.is_draining = True
        self.metrics.draining.set(1)
        self.batcher.stop_waiting()

    @property
    def is_drained(self) -> bool:
        return self.is_draining and not self.open_requests

    def close(self) -> None:
        self.batcher.close()
        self._parser.shutdown(cancel_futures=True)

    def _predict_batch(self, windows: Sequence[Window]) -> list[Prediction]:
        """One forward pass. Runs in the thread of the model."""
        with self.metrics.pass_seconds.time():
            predictions = self.predictor.predict_windows(windows, min_confidence=self.min_confidence)
        self.metrics.pass_windows.observe(len(windows))
        self.metrics.unknown_words.inc(sum(bool(self.predictor.codec.unseen_words(window)) for window in windows))
        return predictions


def warm_up_window(codec: Codec) -> Window:
    """A window of maximum length with every field that the codec reads."""
    words = {name: known.words[0] for name, known in codec.feature_words.items()}
    features: dict[str, Any] = {name: scale.centre for name, scale in codec.features.items()} | words
    bar = dict.fromkeys((*BAR_FIELDS, *codec.own_fields), 1)
    rows: dict[str, dict[str, Any]] = {
        "window": {"context_bars": [bar] * (MAX_BARS - 1), "current_bar": bar, "features": features},
        "features": {"features": features},
        "text": {"context": "warm"},
    }
    window, faults = parse_row(rows[codec.rows], "warm-up", labelled=False, own=codec.own_fields)
    assert window is not None, faults
    return window
