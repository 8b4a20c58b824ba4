"""`metrics.jsonl`: a line per optimizer step, trained or skipped, and per epoch, without clock times, so that a resumed
run's file equals an unbroken one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from ml.output.files import needing, sync, write_bytes


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        with needing(self.path, len(content)), self.path.open("ab") as stream:
            stream.write(content)

    def sync(self) -> None:
        """Flush the lines to the disk: a checkpoint counts on the lines of its steps."""
        if self.path.exists():
            sync(self.path)

    def cut_back(self, *, step: int, epoch: int) -> None:
        """Drop the lines after a checkpoint's optimizer step and finished epoch: they are about to be written again."""
        kept = [
            line
            for line in self.read()
            if (line["epoch"] <= epoch if line["kind"] == "epoch" else line["step"] <= step)
        ]
        write_bytes(self.path, b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in kept))

    def read(self) -> list[dict[str, Any]]:
        """All whole lines. What a crash has cut or a power cut has torn, and whatever follows, does not count."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                records.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                break
        return records
