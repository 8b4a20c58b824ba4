"""What the layers below the first adapter give, computed once a row and kept in a file without a name.

Comes in: a `FastClassifier` and token rows. Goes out: the states that go into its first layer with an adapter. Those
layers, the embeddings included, are frozen and have no dropout, so their output does not change while a run lasts.

Each row goes through them alone, without padding. So its states depend on the base and the row, and not on which other
rows there are, on the process, or on whether the states were kept: a resumed run has the bits of a straight one.

Legend: B rows, T tokens of the longest, D model width.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctxtrain.data.batches import Tokens
from ctxtrain.engine.cpu.training_model import FastClassifier

LEFT_FREE = 1 << 30  # bytes on the disk that are left to checkpoints


class Trunk:
    """The states of rows: read where they were kept, computed where not. The file takes tokens × D × 4 bytes.

    It is in `folder`, or among the system's temporary files. It has no name from the start, so however the process
    ends, the system takes it back. It is read and written, not mapped into memory: then a full or failing disk is an
    OSError, where a mapped page would end the process. Without room for it `say` is told once, and the rows that are
    not kept go through the layers each time.
    """

    def __init__(self, classifier: FastClassifier, folder: str | None, say: Callable[[str], None]) -> None:
        self.classifier = classifier
        self.folder = Path(folder or tempfile.gettempdir())
        self.say = say
        self.keeps = True
        self.file: IO[bytes] | None = None
        self.starts: dict[bytes, int] = {}  # SHA-256 of a row's ids → where its states begin in the file

    def states(self, tokens: Tokens, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Of shape (B, T, D), padded on the right with zeros. Raises OSError if the file cannot be read."""
        picked = [tokens.row(int(number)) for number in rows]
        like = self.classifier.embeddings
        states_BTD = torch.zeros(len(picked), max(map(len, picked)), like.shape[1], dtype=like.dtype)
        for states_TD, row in zip(states_BTD, picked, strict=True):
            self._fill(states_TD[: len(row)], row)
        return states_BTD

    def _fill(self, states_TD: Tensor, row: NDArray[np.int32]) -> None:
        key = hashlib.sha256(row.tobytes()).digest()
        content = states_TD.view(torch.uint8).numpy().data
        if self.file is not None and key in self.starts:
            self.file.seek(self.starts[key])
            if self.file.readinto(content) != content.nbytes:  # type: ignore[attr-defined]  # a file opened as w+b
                raise OSError(errno.EIO, f"states of frozen layers in {self.folder} cannot be read back")
            return
        states_TD.copy_(self.classifier.trunk(torch.from_numpy(row.astype(np.int64))[None])[0])
        if self.keeps:
            self._keep(key, content)

    def _keep(self, key: bytes, content: memoryview) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < LEFT_FREE + content.nbytes:
                self._stop(f"less than {LEFT_FREE / 2**30:g} GB would be left in {self.folder}")
                return
            if self.file is None:
                self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # it lives as long as the trunk
                weakref.finalize(self, self.file.close)
            start = self.file.seek(0, os.SEEK_END)
            self.file.write(content)
            self.file.flush()
            self.starts[key] = start
        except OSError as error:
            # What is full is also needed by checkpoints: give back what was taken.
            with suppress(OSError):
                if self.file is not None:
                    self.file.close()
            self.file = None
            self.starts.clear()
            self._stop(str(error))

    def _stop(self, reason: str) -> None:
        self.keeps = False
        self.say(f"note: what the frozen layers give is not kept but computed again for each step: {reason}")
