"""Value types of config keys, beyond plain numbers and words."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from ctxtrain.labels import LABELS
from ctxtrain.limits import (
    MAX_CLASS_WEIGHT,
    MAX_GRAD_NORM,
    MAX_WINDOWS,
    MIN_CLASS_WEIGHT,
    MIN_GRAD_NORM,
    MIN_LEARNING_RATE,
    MIN_PART,
)

FieldKind = Literal["number", "flag", "count", "category"]  # of a bar field that the user declares
ExportDtype = Literal["float32", "bfloat16"]
CheckDevice = Literal["auto", "cpu", "cuda"]
FIELD_KINDS: tuple[FieldKind, ...] = get_args(FieldKind)


def _parse_weights(value: object) -> object:
    if value in ("auto", "none"):
        return value
    if isinstance(value, dict):
        by_label = {str(key).upper(): weight for key, weight in value.items()}
        if sorted(by_label) != sorted(LABELS) or len(value) != len(LABELS):
            raise ValueError(f"must name each of {', '.join(LABELS)} once")
        value = [by_label[label] for label in LABELS]
    if isinstance(value, list) and len(value) == len(LABELS) and all(map(_is_weight, value)):
        return [float(weight) for weight in value]
    numbers = f"three numbers from {MIN_CLASS_WEIGHT:.6f} to {MAX_CLASS_WEIGHT:,.0f}"
    raise ValueError(f"must be auto, none, or {numbers}: [w, w, w] or {{LONG: w, SHORT: w, SKIP: w}}")


def _is_weight(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return MIN_CLASS_WEIGHT <= value <= MAX_CLASS_WEIGHT


def _check_oversampling_target(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WINDOWS
    if is_count or value in ("auto", "none"):
        return value
    raise ValueError(f"must be auto, none, or a number of windows per class, at least 1 and at most {MAX_WINDOWS:,}")


def _check_embargo(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_WINDOWS
    if is_count or value == "auto":
        return value
    raise ValueError(f"must be auto, or a number of bars, at least 0 and at most {MAX_WINDOWS:,}")


def _check_switch(value: object) -> object:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError("must be auto, true or false")


def _check_lora_layers(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"all|last:[1-9][0-9]*", value):
        raise ValueError("must be all or last:N with N at least 1, for example last:6")
    if len(value) > len("last:9999"):
        raise ValueError("must be all or last:N with N at most 9999, for example last:6")
    return value


def _check_path(value: str) -> str:
    """A path without NUL. Pydantic itself refuses lone surrogates."""
    if "\0" in value:
        raise ValueError("must be a path without NUL characters")
    return value


def _check_text(value: str) -> str:
    """Text that files, network names and libraries accept: no NUL and no lone surrogates."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be text without NUL characters or lone surrogates")
    return value


def require_distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("must be different seeds")
    return seeds


def require_ascending(sizes: list[int]) -> list[int]:
    if sorted(set(sizes)) != sizes:
        raise ValueError("must be numbers that ascend strictly, for example [100, 300]")
    return sizes


Weight = Annotated[float, Field(ge=MIN_CLASS_WEIGHT, le=MAX_CLASS_WEIGHT)]
ClassWeights = Annotated[
    Literal["auto", "none"] | list[float],
    BeforeValidator(_parse_weights, json_schema_input_type=Literal["auto", "none"] | list[Weight] | dict[str, Weight]),
]
Count = Annotated[int, Field(ge=1, le=MAX_WINDOWS)]
OversamplingTarget = Annotated[
    Literal["auto", "none"] | int,
    BeforeValidator(
        _check_oversampling_target,
        json_schema_input_type=Literal["auto", "none"] | Count,
    ),
]
Bars = Annotated[int, Field(ge=0, le=MAX_WINDOWS)]
Embargo = Annotated[
    Literal["auto"] | int, BeforeValidator(_check_embargo, json_schema_input_type=Literal["auto"] | Bars)
]
Switch = Annotated[
    Literal["auto"] | bool, BeforeValidator(_check_switch, json_schema_input_type=Literal["auto"] | bool)
]
LoraLayers = Annotated[str, BeforeValidator(_check_lora_layers)]


def _require_at_least(minimum: float) -> AfterValidator:
    """Refuse values between 0 and the minimum; the bound > 0 in the JSON schema refuses 0 itself."""

    def check(value: float) -> float:
        if 0 < value < minimum:
            raise ValueError(f"must be at least {minimum:g}")
        return value

    return AfterValidator(check)


LearningRate = Annotated[float, Field(gt=0, le=1), _require_at_least(MIN_LEARNING_RATE)]
GradNorm = Annotated[float, Field(gt=0, le=MAX_GRAD_NORM), _require_at_least(MIN_GRAD_NORM)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
Text = Annotated[str, AfterValidator(_check_text)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
PartSize = Annotated[int, Strict(), Field(ge=MIN_PART, le=MAX_WINDOWS)]
