"""Prometheus metrics of a server: requests, forward passes, predictions and the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from ctxtrain.export.predictor import Prediction

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONFIDENCES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """The metrics of one server. `waiting` returns the number of windows in the queue."""

    def __init__(self, version: str, dtype: str, waiting: Callable[[], float]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter has a second line with its creation time
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ctxtrain_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "ctxtrain_request_seconds",
            "Seconds from headers to response",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.pass_seconds = Histogram(
            "ctxtrain_pass_seconds", "Seconds of a forward pass", buckets=SECONDS, registry=registry
        )
        self.pass_windows = Histogram(
            "ctxtrain_pass_windows", "Windows in a forward pass", buckets=WINDOWS, registry=registry
        )
        self.predictions = Counter("ctxtrain_predictions", "Predictions by label", ["label"], registry=registry)
        self.unknown_words = Counter(
            "ctxtrain_unknown_words", "Rows with a word that no training row has", registry=registry
        )
        self.abstentions = Counter("ctxtrain_abstentions", "Predictions below --min-confidence", registry=registry)
        self.confidence = Histogram(
            "ctxtrain_confidence", "Largest probability of a prediction", buckets=CONFIDENCES, registry=registry
        )
        self.draining = Gauge("ctxtrain_draining", "1 while the server drains", registry=registry)
        Gauge("ctxtrain_queue_windows", "Windows in the queue", registry=registry).set_function(waiting)
        model = Gauge(
            "ctxtrain_model", "Version and dtype of the served model", ["version", "dtype"], registry=registry
        )
        model.labels(version, dtype).set(1)
        ProcessCollector(registry=registry)

    def count(self, predictions: Iterable[Prediction]) -> None:
        for prediction in predictions:
            self.predictions.labels(prediction["label"]).inc()
            self.confidence.observe(prediction["confidence"])
            self.abstentions.inc(prediction.get("abstained", False))

    def text(self) -> bytes:
        return generate_latest(self.registry)
