"""The three classes. Their order is the same everywhere: LONG = 0, SHORT = 1, SKIP = 2."""

from typing import Literal

Label = Literal["LONG", "SHORT", "SKIP"]
LABELS: tuple[Label, Label, Label] = ("LONG", "SHORT", "SKIP")
SIMULATED_SUFFIX = "-SIM"  # suffix of the symbols in simulated data (`ctxtrain sample`)
