"""What TensorBoard's own reader finds in the event files of a run, beside what the run's log holds."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctxtrain.config.schema import Config
from ctxtrain.storage.run_folder import RunFolder


def curve(config: Config, kind: str, name: str) -> list[tuple[int, float]]:
    lines = RunFolder(config.output_dir).metrics.read()
    return [(line["step"], line[name]) for line in lines if line["kind"] == kind]


def events_of(config: Config) -> EventAccumulator:
    events = EventAccumulator(str(Path(config.output_dir) / "ctxtrain"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, Any]]:
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]


def texts(events: EventAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]
