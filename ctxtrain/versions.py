"""Libraries with holes that are known, with which this program does not start, and libraries that are optional.

The pins of pyproject.toml name safe releases too, but pip installs over a pin with no more than a warning.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

from ctxtrain.errors import ConfigError

# The first release without the hole, and what the hole was.
FIRST_SAFE = {
    "torch": ("2.10", "CVE-2026-24747: a checkpoint could corrupt memory"),
    "transformers": ("5.3", "CVE-2026-4372: a config.json could run code"),
    "filelock": ("3.20.3", "CVE-2025-68146 and CVE-2026-22701: a link in place of the lock"),
}


def refuse_known_holes() -> None:
    """Raises ConfigError that names every installed library with a hole. Imports none of them."""
    faults = [
        f"{name} must be {first} or newer ({hole}), got {found}. Install requirements/runtime.txt."
        for name, (first, hole) in FIRST_SAFE.items()
        if Version(found := version(name)) < Version(first)
    ]
    if faults:
        raise ConfigError(faults)


def require_extra(extra: str, *modules: str) -> None:
    """Raises ConfigError that says how to install an optional extra, if a module of it is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed. Run pip install 'ctxtrain[{extra}]'.")
