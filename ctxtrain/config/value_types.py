"""The kinds of values that a config's keys take, beyond plain numbers and words."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from ctxtrain.labels import LABELS
from ctxtrain.limits import LEAST_NORM, LEAST_RATE, LEAST_WEIGHT, MOST_NORM, MOST_WEIGHT, MOST_WINDOWS


def _class_weights(value: object) -> object:
    if value in ("auto", "none"):
        return value
    if isinstance(value, dict):
        by_label = {str(key).upper(): weight for key, weight in value.items()}
        if sorted(by_label) != sorted(LABELS) or len(value) != len(LABELS):
            raise ValueError(f"must name each of {', '.join(LABELS)} once")
        value = [by_label[label] for label in LABELS]
    if isinstance(value, list) and len(value) == len(LABELS) and all(map(_is_weight, value)):
        return [float(weight) for weight in value]
    numbers = f"three numbers from {LEAST_WEIGHT:.6f} to {MOST_WEIGHT:,.0f}"
    raise ValueError(f"must be auto, none, or {numbers}: [w, w, w] or {{LONG: w, SHORT: w, SKIP: w}}")


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_WEIGHT <= value <= MOST_WEIGHT


def _oversampling_target(value: object) -> object:
    count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_WINDOWS
    if count or value in ("auto", "none"):
        return value
    raise ValueError(f"must be auto, none, or a number of windows per class, at least 1 and at most {MOST_WINDOWS:,}")


def _lora_layers(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"all|last:[1-9][0-9]*", value):
        raise ValueError("must be all or last:N with N at least 1, for example last:6")
    if len(value) > len("last:9999"):
        raise ValueError("must be all or last:N with N at most 9999, for example last:6")
    return value


def _place(value: str) -> str:
    """A path that the system can be asked for; halves of surrogate pairs are no text for pydantic."""
    if "\0" in value:
        raise ValueError("must be a path, and a path has no NUL")
    return value


def _text(value: str) -> str:
    """Text that a file, a name on the network and a library take: whole characters, and no NUL."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be text, and a NUL or half of a surrogate pair is none")
    return value


def distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("must be different seeds")
    return seeds


Weight = Annotated[float, Field(ge=LEAST_WEIGHT, le=MOST_WEIGHT)]
ClassWeights = Annotated[
    Literal["auto", "none"] | list[float],
    BeforeValidator(_class_weights, json_schema_input_type=Literal["auto", "none"] | list[Weight] | dict[str, Weight]),
]
Count = Annotated[int, Field(ge=1, le=MOST_WINDOWS)]
OversamplingTarget = Annotated[
    Literal["auto", "none"] | int,
    BeforeValidator(
        _oversampling_target,
        json_schema_input_type=Literal["auto", "none"] | Count,
    ),
]
LoraLayers = Annotated[str, BeforeValidator(_lora_layers)]


def _at_least(least: float) -> AfterValidator:
    """Zero is refused by the bound that the schema shows; what is next to it counts as zero too."""

    def check(value: float) -> float:
        if 0 < value < least:
            raise ValueError(f"must be at least {least:g}")
        return value

    return AfterValidator(check)


Rate = Annotated[float, Field(gt=0, le=1), _at_least(LEAST_RATE)]
Norm = Annotated[float, Field(gt=0, le=MOST_NORM), _at_least(LEAST_NORM)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_place)]
Text = Annotated[str, AfterValidator(_text)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
