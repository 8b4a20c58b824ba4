"""What Prometheus reads at /metrics: requests, passes of the model, predictions, and the process."""

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
    """The metrics of one server; `waiting` tells how many windows are in its queue."""

    def __init__(self, version: str, waiting: Callable[[], float]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else each count has a second line, with its date
        self.registry = own = CollectorRegistry()
        self.requests = Counter("ctxtrain_requests", "Requests by route and status", ["route", "status"], registry=own)
        self.request_seconds = Histogram(
            "ctxtrain_request_seconds", "From headers to answer", ["route"], buckets=SECONDS, registry=own
        )
        self.pass_seconds = Histogram(
            "ctxtrain_pass_seconds", "A pass through the model", buckets=SECONDS, registry=own
        )
        self.pass_windows = Histogram("ctxtrain_pass_windows", "Windows of a pass", buckets=WINDOWS, registry=own)
        self.predictions = Counter("ctxtrain_predictions", "Windows answered, by label", ["label"], registry=own)
        self.abstentions = Counter("ctxtrain_abstentions", "Windows below --min-confidence", registry=own)
        self.confidence = Histogram(
            "ctxtrain_confidence", "Largest probability of a window", buckets=CONFIDENCES, registry=own
        )
        self.draining = Gauge("ctxtrain_draining", "1 once the server stops", registry=own)
        Gauge("ctxtrain_queue_windows", "Windows waiting", registry=own).set_function(waiting)
        Gauge("ctxtrain_model", "The model served", ["version"], registry=own).labels(version).set(1)
        ProcessCollector(registry=own)

    def count(self, predictions: Iterable[Prediction]) -> None:
        for prediction in predictions:
            self.predictions.labels(prediction["label"]).inc()
            self.confidence.observe(prediction["confidence"])
            self.abstentions.inc(prediction.get("abstained", False))

    def text(self) -> bytes:
        return generate_latest(self.registry)
