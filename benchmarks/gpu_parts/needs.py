"""What this machine lacks: packages that are missing or of another version than pyproject.toml asks for.

Imports the standard library alone, so that it works on any machine.
"""

from __future__ import annotations

import os
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "transformers", "peft", "accelerate", "triton", "bitsandbytes", "flash-attn")


def requirements() -> dict[str, str]:
    """The package's dependencies: name → requirement, as `orjson` → `orjson>=3.10`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.split(r"[\[=<>!~ ]", line)[0]: line for line in project["dependencies"]}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if installed(name) is None]


def other_versions() -> dict[str, str]:
    """Installed packages outside pyproject.toml's ranges: name → "2.11.0, ours is ==2.13.0"."""
    if installed("packaging") is None:
        return {}
    from packaging.requirements import Requirement

    found = {}
    for name, line in requirements().items():
        wanted, present = Requirement(line).specifier, installed(name)
        if present is not None and not wanted.contains(present, prereleases=True):
            found[name] = f"{present}, ours is {wanted}"
    return found


def describe(device: str) -> dict[str, Any]:
    """The first line of the check: what is here, what is missing, and the command that installs it."""
    wanted = requirements()
    lacking = missing(tuple(wanted))
    found: dict[str, Any] = {
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: there for name in SHOWN if (there := installed(name))},
        "missing": lacking,
        "other_versions": other_versions(),
    }
    if lacking:
        found["install"] = "pip install " + " ".join(f"'{wanted[name]}'" for name in lacking)
    return found
