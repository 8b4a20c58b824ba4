"""Refuse library versions with known vulnerabilities, and report missing optional packages.

pyproject.toml requires safe releases too, but pip only warns when it installs another version over a pin.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

from ctxtrain.errors import ConfigError

# The first release without the vulnerability, and what the vulnerability was.
FIRST_SAFE_VERSIONS = {
    "torch": ("2.10", "CVE-2026-24747: a checkpoint could corrupt memory"),
    "transformers": ("5.3", "CVE-2026-4372: a config.json could run code"),
    "filelock": ("3.20.3", "CVE-2025-68146 and CVE-2026-22701: a link in place of the lock"),
}


def require_safe_versions() -> None:
    """Raises ConfigError that lists the installed libraries with a known vulnerability. Imports none of them."""
    faults = [
        f"{name} must be {first_safe} or newer ({vulnerability}), got {installed}. Install requirements/runtime.txt."
        for name, (first_safe, vulnerability) in FIRST_SAFE_VERSIONS.items()
        if Version(installed := version(name)) < Version(first_safe)
    ]
    if faults:
        raise ConfigError(faults)


def require_extra(extra: str, *modules: str) -> None:
    """Raises ConfigError with the pip command for an optional extra, if one of its modules is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed. Run pip install 'ctxtrain[{extra}]'.")
