"""The three classes, in the order that they have everywhere: LONG = 0, SHORT = 1, SKIP = 2."""

from typing import Literal

Label = Literal["LONG", "SHORT", "SKIP"]
LABELS: tuple[Label, Label, Label] = ("LONG", "SHORT", "SKIP")
SIMULATED = "-SIM"  # ends the symbols of `ctxtrain sample`
