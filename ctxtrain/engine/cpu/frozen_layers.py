"""Outputs of the layers below the first adapter, computed once per row and cached in an unnamed file.

Input: a `FastClassifier` and token rows. Output: the states that enter its first layer with an adapter. The layers
below it and the embeddings are frozen and have no dropout, so their output stays the same during a run.

Each row passes through these layers alone, without padding. So its states depend only on the base model and the row:
not on other rows, the process, or whether the states come from the cache. A resumed run is therefore bit for bit the
same as an uninterrupted one.

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

from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.cpu.training_model import FastClassifier

MIN_FREE_BYTES = 1 << 30  # disk space left for checkpoints


class FrozenStateCache:
    """Reads the states of rows from the cache file, or computes and stores them. It takes tokens × D × 4 bytes.

    The file lies in `folder`, or among the system's temporary files. It never has a name, so the system removes it
    however the process ends. The file is read and written, not memory-mapped: a full or failing disk then raises
    OSError, where a mapped page would kill the process. If there is no space, `say` receives one note, and rows outside
    the cache pass through the layers each time.
    """

    def __init__(self, classifier: FastClassifier, folder: str | None, say: Callable[[str], None]) -> None:
        self.classifier = classifier
        self.folder = Path(folder or tempfile.gettempdir())
        self.say = say
        self.accepts_rows = True
        self.file: IO[bytes] | None = None
        self.offsets: dict[bytes, int] = {}  # SHA-256 of a row's ids → where its states begin in the file

    def states(self, tokens: Tokens, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """States of shape (B, T, D), padded on the right with zeros. Raises OSError if the file cannot be read."""
        id_rows = [tokens.row(int(number)) for number in rows]
        like = self.classifier.embeddings
        states_BTD = torch.zeros(len(id_rows), max(map(len, id_rows)), like.shape[1], dtype=like.dtype)
        for states_TD, row in zip(states_BTD, id_rows, strict=True):
            self._read_or_compute(states_TD[: len(row)], row)
        return states_BTD

    def _read_or_compute(self, states_TD: Tensor, row: NDArray[np.int32]) -> None:
        key = hashlib.sha256(row.tobytes()).digest()
        content = states_TD.view(torch.uint8).numpy().data
        if self.file is not None and key in self.offsets:
            self.file.seek(self.offsets[key])
            if self.file.readinto(content) != content.nbytes:  # type: ignore[attr-defined]  # a file opened as w+b
                raise OSError(errno.EIO, f"cached states of frozen layers in {self.folder} cannot be read back")
            return
        states_TD.copy_(self.classifier.frozen_states(torch.from_numpy(row.astype(np.int64))[None])[0])
        if self.accepts_rows:
            self._store(key, content)

    def _store(self, key: bytes, content: memoryview) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < MIN_FREE_BYTES + content.nbytes:
                self._stop_storing(f"less than {MIN_FREE_BYTES / 2**30:g} GB would be left in {self.folder}")
                return
            if self.file is None:
                self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # it lives as long as the cache
                weakref.finalize(self, self.file.close)
            start = self.file.seek(0, os.SEEK_END)
            self.file.write(content)
            self.file.flush()
            self.offsets[key] = start
        except OSError as error:
            # Checkpoints need the disk too: free the space of the cache.
            with suppress(OSError):
                if self.file is not None:
                    self.file.close()
            self.file = None
            self.offsets.clear()
            self._stop_storing(str(error))

    def _stop_storing(self, reason: str) -> None:
        self.accepts_rows = False
        self.say(f"note: outputs of the frozen layers are computed at each step instead of cached: {reason}")
