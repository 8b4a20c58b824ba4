"""`metrics.jsonl`: a line per optimizer step and per epoch, without clock times, so that a resumed run's file equals an
unbroken one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from ml.output.files import write_bytes


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def cut_back(self, *, step: int, epoch: int) -> None:
        """Drop the lines after a checkpoint's optimizer step and finished epoch: they are about to be written again."""
        kept = [
            line for line in self.read() if (line["step"] <= step if line["kind"] == "step" else line["epoch"] <= epoch)
        ]
        write_bytes(self.path, b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in kept))

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a last line without its end was cut by a crash and does not count."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        return [orjson.loads(line) for line in lines[:-1]]
