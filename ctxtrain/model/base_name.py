"""Checks the value of `model.base` before heavy libraries are imported.

Input: the value. Output: nothing, or a ConfigError with the remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

from ctxtrain.config.sections import EMBEDDED_BASE
from ctxtrain.errors import ConfigError

GGUF = "Use the safetensors checkpoint that it was converted from; GGUF holds quantised numbers that cannot be trained"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_QWEN = re.compile(r"qwen(?P<version>[\d.]*)-(?P<size>[\d.]+b)(?P<more>(-[a-z0-9]+)*)", re.IGNORECASE)
_ACTIVE = re.compile(r"a[\d.]+b", re.IGNORECASE)  # parameters that are active in a mixture of experts


def refuse_unknown_base(base: str) -> None:
    """Raise ConfigError unless the value is `embedded`, a folder, or has the form of a hub id."""
    path = Path(base)
    if base == EMBEDDED_BASE or path.is_dir():
        return
    if path.suffix == ".gguf" and not path.exists():
        raise ConfigError(f"model.base must be the folder of a checkpoint, and there is no file {base!r}. {GGUF}.")
    if path.exists():
        remedy = GGUF if path.suffix == ".gguf" else "Give the folder of an unpacked checkpoint"
        raise ConfigError(f"model.base must be the folder of a checkpoint, {base!r} is a file. {remedy}.")
    if _HUB_ID.fullmatch(base) and not base.startswith("."):
        return
    suggestion = _suggest_hub_id(base)
    remedy = f"Did you mean {suggestion}?" if suggestion else "Give such a folder, or an id as Qwen/Qwen2.5-0.5B."
    rule = f"must be {EMBEDDED_BASE}, a folder with a checkpoint, or a hub id OWNER/NAME"
    raise ConfigError(f"model.base {rule}, and there is no folder {base!r}. {remedy}")


def _suggest_hub_id(name: str) -> str | None:
    """The hub id that a short name means: qwen2.5-0.5b → Qwen/Qwen2.5-0.5B."""
    match = _QWEN.fullmatch(name)
    if match is None:
        return None
    parts = match["more"].split("-")[1:]
    more = "".join(f"-{part.upper() if _ACTIVE.fullmatch(part) else part.capitalize()}" for part in parts)
    return f"Qwen/Qwen{match['version']}-{match['size'].upper()}{more}"
