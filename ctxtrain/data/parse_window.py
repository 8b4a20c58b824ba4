"""Decoded JSON row → window, or the reasons why it is invalid.

Input: the JSON object of an event: a CTX window (`context_bars` + `current_bar`), features alone (`features`) or text
(`context`). Output: a `Window`. Only the fields declared in `row_schema.py` and in `data.fields` are read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ctxtrain.data.bar_order import WindowPosition, locate_bars, locate_event
from ctxtrain.data.bar_values import bar_columns, own_columns, own_faults, price_faults, repair_rounding
from ctxtrain.data.label_side import LabelSide, parse_label_side
from ctxtrain.data.row_schema import (
    BAR_NAMES,
    FEATURES_ROW_FIELDS,
    MAX_BARS,
    MAX_MAGNITUDE,
    MAX_WORD_CHARS,
    MIN_BARS,
    NO_FIELDS,
    OBJECT_FLAGS,
    TEXT_ROW_FIELDS,
    WINDOW_ROW_FIELDS,
    FeaturesRow,
    OwnFields,
    TextRow,
    WindowRow,
    names_prices,
)
from ctxtrain.data.spellings import Changes, known_spelling, normalise_row
from ctxtrain.errors import short_repr

Kind = Literal["window", "features", "text"]

# Text that was meant as a number or as no value, and must not become a category. It is compared without blanks, signs
# of currencies, and marks of thousands.
_NO_WORD = re.compile(
    r"[-+(]?[\d.,;:]*\d[\d.,;:]*[)%]?|[-+]?(nan|inf|infinity|1\.#\w+)|[-+]?\d[\d.,]*e[-+]?\d+|0x[0-9a-f]+"
    r"|#?n/a|null|<na>|nat|-+|\?+|[{}\[\]]+",
    re.IGNORECASE,
)
_BETWEEN_DIGITS = re.compile(r"[\s'_’$€£¥₿−]")
_WINDOW_ROW = TypeAdapter(WindowRow)
_FEATURES_ROW = TypeAdapter(FeaturesRow)
_TEXT_ROW = TypeAdapter(TextRow)


@dataclass(frozen=True, slots=True)
class Window:
    """One event: the last bar of `bars` with its context bars, or `features` alone, or a `text`.

    `bars` maps each numeric field that every bar of the row has to float64 values of shape (bars,), oldest first; flags
    are 0 or 1. `bar_words` holds the own fields that are categories, one word per bar. `features` are numbers,
    `feature_words` are words. `location` is `file:line`, `label` an index into `LABELS`. `position` locates the bars in
    time; the model never reads it. `lacking` maps each field that only some bars have to the number of bars without it,
    and each null feature to 0. `rounded` counts the bars whose high or low had a rounding error and was corrected.
    `changes` names the other spellings that the row was read from, `unread` the fields that no code reads; those of
    bars are prefixed with `bars.`, and features with `features.`. `label_horizon` is the number of bars after the event
    that the label looked at.
    """

    location: str
    id: str | None
    label: int | None
    bars: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    features: dict[str, float] = field(default_factory=dict)
    text: str | None = None
    symbol: str | None = None
    position: WindowPosition = field(default_factory=WindowPosition)
    bar_words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    feature_words: dict[str, str] = field(default_factory=dict)
    lacking: Mapping[str, int] = field(default_factory=dict)
    rounded: int = 0
    changes: Changes = frozenset()
    unread: frozenset[str] = frozenset()
    label_horizon: int | None = None

    @property
    def name(self) -> str:
        return f"{self.id} ({self.location})" if self.id else self.location

    @property
    def kind(self) -> Kind:
        return "text" if self.text is not None else "window" if self.bars else "features"

    @property
    def length(self) -> int:
        """Number of bars."""
        return len(self.bars["close"]) if self.bars else 0


class _Invalid(Exception):
    """A row that breaks rules, by `reasons`."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons


def parse_row(
    row: object, location: str, *, labelled: bool, own: OwnFields = NO_FIELDS
) -> tuple[Window | None, list[str]]:
    """Convert one decoded row into a window, or into the reasons why it is invalid.

    `own` are the bar fields that `data.fields` declares.
    """
    if not isinstance(row, dict):
        return None, [f"a row must be a JSON object, got {short_repr(row)}"]
    side = parse_label_side(row) if labelled else LabelSide()
    row_id, id_changes, faults = _parse_id(row)
    reasons, outside = [*side.reasons, *faults], side.changes | id_changes
    common: dict[str, Any] = {"location": location, "id": row_id, "label": side.label, "label_horizon": side.horizon}
    try:
        if row.get("context_bars") is not None or row.get("current_bar") is not None:
            window = _parse_bars(row, own, outside, common)
        elif row.get("context") is not None:
            text = _TEXT_ROW.validate_python(row)["context"]
            unread = row.keys() - TEXT_ROW_FIELDS - _names(outside)
            window = Window(**common, text=text, changes=outside, unread=frozenset(unread))
        elif row.get("features") is not None:
            window = _parse_features(row, outside, common)
        else:
            raise _Invalid(["a row must have context_bars and current_bar, or features, or context; it has none"])
    except ValidationError as error:
        return None, reasons + [_explain(detail) for detail in error.errors(include_url=False)]
    except _Invalid as error:
        return None, reasons + error.reasons
    return (None, reasons) if reasons else (window, [])


def _parse_bars(row: dict[str, Any], own: OwnFields, outside: Changes, common: dict[str, Any]) -> Window:
    """A row with bars; `outside` is what was changed in the other fields of the row."""
    unknown = _unknown_fields(row) - own.keys()
    validated, row, changes = _validate_window(row, unknown, own)
    bars, raw_bars = [*validated["context_bars"], validated["current_bar"]], [*row["context_bars"], row["current_bar"]]
    rounded = repair_rounding(bars)
    position, faults = locate_bars(raw_bars, BAR_NAMES | own.keys())
    if reasons := price_faults(bars) + faults:
        raise _Invalid(reasons)
    columns, lacking = bar_columns(bars)
    own_numbers, own_words, own_lacking = own_columns(raw_bars, own)
    features, words, feature_lacking, unread_features = _sort_features(validated.get("features") or {})
    read_as_others = {found for kind, found, _ in changes if kind == "name"}
    unread_in_bars = unknown - read_as_others - {position.time_name}
    return Window(
        **common,
        bars=columns | own_numbers,
        features=features,
        symbol=(validated.get("symbol") or "").strip() or None,
        position=position,
        bar_words=own_words,
        feature_words=words,
        lacking=position.lacking | lacking | own_lacking | feature_lacking,
        rounded=rounded,
        changes=changes | outside,
        unread=unread_features
        | (row.keys() - WINDOW_ROW_FIELDS - _names(outside))
        | {f"bars.{name}" for name in unread_in_bars},
    )


def _parse_features(row: dict[str, Any], outside: Changes, common: dict[str, Any]) -> Window:
    """A row without bars: its position is the time of the event, if the row has one."""
    if others := [name for name, value in row.items() if name != "features" and _holds_bars(value)]:
        raise _Invalid([f"{name} holds bars, but only context_bars and current_bar are read" for name in others])
    row, changes = normalise_row(row)
    validated = _FEATURES_ROW.validate_python(row)
    position, faults = locate_event(row, FEATURES_ROW_FIELDS - {"time"})
    features, words, lacking, unread = _sort_features(validated["features"])
    if not features and not words:
        faults.append("features must have at least one number or word, got only null, arrays and objects")
    if faults:
        raise _Invalid(faults)
    read = FEATURES_ROW_FIELDS | {position.time_name} | _names(outside)
    return Window(
        **common,
        features=features,
        symbol=(validated.get("symbol") or "").strip() or None,
        position=position,
        feature_words=words,
        lacking=lacking,
        changes=changes | outside,
        unread=unread | (row.keys() - read),
    )


def _holds_bars(value: object) -> bool:
    """Whether a field is a bar or a list of bars, by the names of its entries."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and names_prices(first)


def _names(changes: Changes) -> set[str]:
    """The fields of a row that were read under another name."""
    return {found for kind, found, _ in changes if kind == "id"}


def _sort_features(
    features: Mapping[str, Any],
) -> tuple[dict[str, float], dict[str, str], dict[str, int], frozenset[str]]:
    """Numbers, words, the null ones (each with 0), and the objects and arrays, which no code reads.

    Raises _Invalid for a number out of range or a word that is too long.
    """
    numbers: dict[str, float] = {}
    words: dict[str, str] = {}
    null: dict[str, int] = {}
    unread, reasons = set(), []
    for name, value in features.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            null[f"features.{name}"] = 0
        elif isinstance(value, int | float):
            if not abs(value) <= MAX_MAGNITUDE:
                reasons.append(f"features.{name} must be a number of at most {MAX_MAGNITUDE:g}, got {value!r}")
            else:
                numbers[name] = value
        elif isinstance(value, str):
            if len(value) > MAX_WORD_CHARS or _is_no_word(value):
                reasons.append(
                    f"features.{name} must be a number, with a point and no other marks, or a word of at most "
                    f"{MAX_WORD_CHARS} characters, got {short_repr(value)}"
                )
            words[name] = value.strip()
        else:
            unread.add(f"features.{name}")
    if reasons:
        raise _Invalid(reasons)
    return numbers, words, null, frozenset(unread)


def _is_no_word(text: str) -> bool:
    """Whether a text is a number in another notation, or a mark for a missing value."""
    plain = _BETWEEN_DIGITS.sub("", unicodedata.normalize("NFKC", text))
    return not plain or _NO_WORD.fullmatch(plain) is not None


def _unknown_fields(row: Mapping[str, Any]) -> frozenset[str]:
    """Fields of the bars that `Bar` does not declare; the row may be invalid."""
    current, others = row.get("current_bar"), row.get("context_bars")
    bars = [*(others if isinstance(others, list) else ()), current]
    return frozenset[str]().union(*(bar for bar in bars if isinstance(bar, dict))) - BAR_NAMES


def _validate_window(
    row: dict[str, Any], unknown: frozenset[str], own: OwnFields
) -> tuple[Any, dict[str, Any], Changes]:
    """The validated row, the row as read, and what was changed to read it. Raises _Invalid."""
    features = row.get("features")
    is_documented = not any(known_spelling(name) for name in unknown) and not (
        isinstance(features, dict) and any(isinstance(v, str | bool) or k in OBJECT_FLAGS for k, v in features.items())
    )
    if is_documented:
        try:
            validated = _WINDOW_ROW.validate_python(row)
            if not own or not own_faults([*row["context_bars"], row["current_bar"]], own):
                return validated, row, frozenset()
        except ValidationError:
            pass
    row, changes = normalise_row(row, own)
    try:
        validated = _WINDOW_ROW.validate_python(row)
    except ValidationError as error:
        raise _Invalid([_explain(detail, changes) for detail in error.errors(include_url=False)]) from None
    if faults := own_faults([*row["context_bars"], row["current_bar"]], own):
        raise _Invalid(faults)
    return validated, row, changes


def _parse_id(row: Mapping[str, Any]) -> tuple[str | None, Changes, list[str]]:
    """The id, from `event_id` if the row has no `id`, what was changed to read it, and the faults."""
    changes = set()
    name = "id"
    if row.get("id") is None and isinstance(row.get("event_id"), str | int) and row["event_id"] not in (True, False):
        name = "event_id"
        changes.add(("id", name, "id"))
    value = row.get(name)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # beyond, floats skip whole numbers
        changes.add(("whole", name, ""))
        value = int(value)
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return (None if value is None else str(value)), frozenset(changes), []
    return None, frozenset(), [f"{name} must be text or a whole number, got {short_repr(value)}"]


def _explain(detail: ErrorDetails, changes: Changes = frozenset()) -> str:
    """One pydantic error as `path rule, got value`; fields have the names of the row before the `changes`."""
    path, given = "", {field: found for kind, found, field in changes if kind == "name"}
    for part in (given.get(str(part), part) for part in detail["loc"]):
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] == "too_short" and detail["loc"] == ("features",):
        return "features must have at least one entry, got none"
    if detail["type"] in ("too_short", "too_long"):
        return (
            f"a window must have {MIN_BARS} to {MAX_BARS} bars, current_bar included, "
            f"got {detail['ctx']['actual_length'] + 1}"
        )
    if detail["type"] == "string_pattern_mismatch":
        return f"{path} must contain text, got only blanks"
    rule = detail["msg"].replace("Input should be", "must be")
    for python_name, json_name in (
        ("True, False", "true, false"),
        ("dictionary", "object"),
        ("list", "array"),
    ):
        rule = rule.replace(python_name, json_name)
    return f"{path} {rule}, got {short_repr(detail['input'])}"
