"""Token rows on disk: each row is rendered and tokenised once, for any number of runs.

Input: rows of a file, a codec and a tokenizer. Output: `Tokens` with memory-mapped ids. Folds with different codecs,
which is the case for rows with `features`, have separate texts and tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.batches import Tokens, token_rows
from ctxtrain.data.codec import Codec
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.window_file import WindowFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]

_TOKENISED = [("start", "i8"), ("length", "i8"), ("cut", "?")]


class TokenStore:
    """Token rows by file, codec, tokenizer and `max_tokens`."""

    def __init__(self) -> None:
        self._files: dict[tuple[object, bytes], _TokenFile] = {}

    def tokens(
        self, files: Mapping[str, WindowFile], codec: Codec, tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> dict[str, Tokens]:
        """The tokens of files that were read before. Raises DataError for rows that the codec refuses."""
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        key = hashlib.sha256(codec.to_json() + f"{max_tokens} {tokenizer.pad_token_id} {backend}".encode()).digest()
        return {name: self._file(file, key).tokens(file, codec, tokenizer, max_tokens) for name, file in files.items()}

    def _file(self, file: WindowFile, key: bytes) -> _TokenFile:
        return self._files.setdefault((file.source_key, key), _TokenFile())


class _TokenFile:
    """Token rows of one file, in the order in which they were requested."""

    def __init__(self) -> None:
        self._flat = DiskColumn("i4")
        self._start: Ints = np.empty(0, dtype=np.int64)
        self._length: Ints = np.empty(0, dtype=np.int64)  # 0 for a row that is not tokenised yet
        self._is_truncated = np.empty(0, dtype=np.bool_)

    def tokens(self, file: WindowFile, codec: Codec, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
        rows = file.row_numbers()
        added = int(rows.max(initial=-1)) + 1 - len(self._length)
        if added > 0:
            self._start, self._length = np.pad(self._start, (0, added)), np.pad(self._length, (0, added))
            self._is_truncated = np.pad(self._is_truncated, (0, added))
        missing = np.flatnonzero(self._length[rows] == 0)
        texts = codec.render_all(file.take(missing) if len(missing) < len(rows) else file)
        new_rows = DiskColumn(_TOKENISED)
        for ids, is_truncated in token_rows(texts, tokenizer, max_tokens):
            new_rows.append((len(self._flat), len(ids), is_truncated))
            self._flat.extend(ids)
        written, new_numbers = new_rows.array(), rows[missing]
        self._start[new_numbers], self._length[new_numbers] = written["start"], written["length"]
        self._is_truncated[new_numbers] = written["cut"]
        starts_N = self._start[rows]
        return Tokens(
            self._flat.array(),
            starts_N,
            starts_N + self._length[rows],
            tokenizer.pad_token_id,
            int(self._is_truncated[rows].sum()),
        )
