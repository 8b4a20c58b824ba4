"""`report.html`: one self-contained page that says how the run went.

Comes in: the summary of a run. Goes out: a file without scripts or outside requests, filled from `report.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ml.output.files import write_bytes
from ml.output.summary import readable, verdict


def write_report(path: Path, summary: Mapping[str, Any], config_yaml: str) -> None:
    """Fill the page; all values are escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("ml.output").joinpath("report.html.j2").read_text(encoding="utf-8"))
    page = template.render(summary=summary, verdict=verdict(summary), readable=readable, config=config_yaml)
    write_bytes(path, page.encode())
