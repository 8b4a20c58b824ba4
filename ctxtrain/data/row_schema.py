"""The fields of a row and of a bar, with their types: an allow-list.

Only the fields declared here, and the bar fields that the config key `data.fields` declares, are read. Label-derived
fields such as `conditions_met` cannot reach the model, because no code reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Required

from pydantic import Field, Strict, WithJsonSchema
from typing_extensions import TypedDict

from ctxtrain.config.value_types import FieldKind
from ctxtrain.data.time_units import time_names
from ctxtrain.errors import ConfigError, short_repr

MIN_BARS, MAX_BARS = 20, 256
MAX_MAGNITUDE = 1e15  # beyond any market; small enough that sums of squares do not overflow
MAX_OWN_FIELDS = 20
MAX_WORD_CHARS = 64
WORD_PATTERN = "[A-Za-z\u00aa-\u02af\u0370-\u1fff]"  # a letter, which numbers in any notation but 1e5 and nan lack

Number = Annotated[float, Strict(), Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE, allow_inf_nan=False)]
Quantity = Annotated[float, Strict(), Field(ge=0, le=MAX_MAGNITUDE, allow_inf_nan=False)]
Flag = Literal[True, False, 0, 1] | None
Direction = Literal[-1, 0, 1] | None
WholeNumber = Annotated[int, Strict(), Field(ge=-int(MAX_MAGNITUDE), le=int(MAX_MAGNITUDE))]
# Typed Any because `bar_order.py` and `_parse_id` validate them.
Time = Annotated[Any, WithJsonSchema({"type": ["string", "number", "null"], "description": "ISO 8601, or a number"})]
RowId = Annotated[Any, WithJsonSchema({"type": ["string", "integer", "null"]})]
# Typed Any because `parse_window.py` sorts them into numbers and words, and leaves out objects and arrays.
FeatureValue = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": -MAX_MAGNITUDE, "maximum": MAX_MAGNITUDE},
                {"type": "string", "maxLength": MAX_WORD_CHARS, "pattern": WORD_PATTERN},
                {"type": ["boolean", "null"]},
            ]
        }
    ),
]

OwnFields = Mapping[str, FieldKind]  # bar fields that the user declares, by name
NO_FIELDS: OwnFields = MappingProxyType({})


# Other names of bar fields, in lower case.
SPELLINGS = {
    "o": "open",
    "h": "high",
    "l": "low",
    "c": "close",
    "v": "volume",
    "vol": "volume",
    "buy_volume": "buy_vol",
    "sell_volume": "sell_vol",
    "atr": "atr_14",
    "has_fvg_bull": "fvg_up",
    "has_fvg_bear": "fvg_down",
}


class Bar(TypedDict, total=False):
    """One market bar of a row. A null field counts as missing."""

    open: Required[Number]
    high: Required[Number]
    low: Required[Number]
    close: Required[Number]
    volume: Quantity | None
    bar_index: WholeNumber | None
    time: Time
    delta: Number | None
    buy_vol: Quantity | None
    sell_vol: Quantity | None
    atr_14: Quantity | None
    ext_dir: Direction
    int_dir: Direction
    htf_dir: Direction
    ext_bos: Flag
    ext_bos_up: Flag
    ext_bos_down: Flag
    ext_choch: Flag
    ext_choch_up: Flag
    ext_choch_down: Flag
    int_bos: Flag
    int_bos_up: Flag
    int_bos_down: Flag
    int_choch: Flag
    int_choch_up: Flag
    int_choch_down: Flag
    sweep_prev_high: Flag
    sweep_prev_low: Flag
    fvg_up: Flag
    fvg_down: Flag
    fvg_retest: Flag
    fvg_penetration: Number | None
    fvg_quality: Number | None
    pb_wave_strength_ok: Flag
    mgann_leg_index: Annotated[int, Strict(), Field(ge=0, le=10)] | None
    # Null is not missing: it says that the leg has no gap. An object describes the gap.
    mgann_leg_first_fvg: Annotated[
        Literal[True, False, 0, 1],
        WithJsonSchema({"anyOf": [{"enum": [True, False, 0, 1]}, {"type": ["object", "null"]}]}),
    ]
    mgann_wave_strength: Quantity | None
    wave_strength: Annotated[float, Strict(), Field(ge=0, le=100, allow_inf_nan=False)] | None


class WindowRow(TypedDict, total=False):
    """A row that contains bars."""

    context_bars: Required[Annotated[list[Bar], Field(min_length=MIN_BARS - 1, max_length=MAX_BARS - 1)]]
    current_bar: Required[Bar]
    id: RowId
    symbol: Annotated[str, Strict()] | None
    features: dict[str, FeatureValue] | None


class FeaturesRow(TypedDict, total=False):
    """A row that contains features and no bars."""

    features: Required[Annotated[dict[str, FeatureValue], Field(min_length=1)]]
    id: RowId
    symbol: Annotated[str, Strict()] | None
    time: Time
    timeframe: Any


class TextRow(TypedDict, total=False):
    """A row that contains a custom prompt."""

    context: Required[Annotated[str, Strict(), Field(min_length=1, pattern=r"\S")]]
    id: RowId


OBJECT_FLAGS = frozenset({"mgann_leg_first_fvg"})  # an object is true, null is false
ORDER_FIELDS = ("bar_index", "time")  # used to order the bars; never read by the model
BAR_FIELDS = tuple(name for name in Bar.__annotations__ if name not in ORDER_FIELDS)
BAR_NAMES = frozenset(Bar.__annotations__)
PRICES = ("open", "high", "low", "close")
# Bar fields that are numbers without a fixed range. Their levels are scaled by the training rows.
SCALED_FIELDS = ("fvg_penetration", "fvg_quality", "mgann_wave_strength")
# Bar fields that are no flags, directions or whole numbers.
DIRECTIONS = frozenset({"ext_dir", "int_dir", "htf_dir"})
MEASURES = frozenset({*PRICES, "volume", "delta", "buy_vol", "sell_vol", "atr_14", "wave_strength", *SCALED_FIELDS})
_EVERY_ROW = {"label", "label_horizon", "timeframe", "metadata"}
WINDOW_ROW_FIELDS = _EVERY_ROW | WindowRow.__annotations__.keys()
TEXT_ROW_FIELDS = _EVERY_ROW | TextRow.__annotations__.keys() | {"symbol"}
FEATURES_ROW_FIELDS = _EVERY_ROW | FeaturesRow.__annotations__.keys()
ROW_FIELDS = WINDOW_ROW_FIELDS | TEXT_ROW_FIELDS | FEATURES_ROW_FIELDS
# Known to be derived from the label. They are not declared above, so the model cannot read them; `check` reports them.
LABEL_DERIVED_FIELDS = frozenset({"label_confidence", "label_reason", "conditions_met", "conditions_failed", "outcome"})


def names_prices(names: Iterable[object]) -> bool:
    """Whether at least three of the four prices are among the names, in a usual spelling, as in a bar."""
    lower = {name.lower() for name in names if isinstance(name, str)}
    return len({SPELLINGS.get(name, name) for name in lower} & {*PRICES}) >= 3


def check_own_fields(own: OwnFields) -> None:
    """Raise ConfigError if `data.fields` declares a field that has another meaning, or too many.

    Names are compared without case and surrounding blanks.
    """
    label_side = LABEL_DERIVED_FIELDS | {"label", "label_horizon"}
    others = ROW_FIELDS | {"event_id"}
    faults = []
    for name in own:
        plain, start = name.strip().lower(), f"data.fields must not declare {short_repr(name)}"
        if plain in BAR_NAMES or plain in SPELLINGS:
            faults.append(f"{start}: this bar field is read as {SPELLINGS.get(plain, plain)}. Leave it out.")
        elif plain in label_side:
            faults.append(f"{start}: it follows from the label. Leave it out.")
        elif plain in others or time_names([name.strip()]):
            faults.append(f"{start}: it has another meaning. Rename the field.")
        elif not plain or plain != name.lower() or "." in name:
            faults.append(f"{start}: a name must have no points and no blanks at its ends. Rename the field.")
    if len(own) > MAX_OWN_FIELDS:
        faults.append(f"data.fields may declare at most {MAX_OWN_FIELDS} fields, got {len(own)}. Choose the best ones.")
    if faults:
        raise ConfigError(faults)
