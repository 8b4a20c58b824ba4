"""Token rows of files on disk: each row is rendered and tokenised once, however many runs read it.

Comes in: rows of a file, a codec and a tokenizer. Goes out: `Tokens`, whose ids are memory-mapped. Folds whose codecs
differ, as those of rows with `features` do, have texts and tokens of their own.
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

_MADE = [("start", "i8"), ("length", "i8"), ("cut", "?")]


class TokenStore:
    """Token rows by file, codec, tokenizer and longest text."""

    def __init__(self) -> None:
        self._files: dict[tuple[object, bytes], _TokenFile] = {}

    def tokens(
        self, files: Mapping[str, WindowFile], codec: Codec, tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> dict[str, Tokens]:
        """The tokens of files that were walked before. Raises DataError for rows that the codec refuses."""
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        how = hashlib.sha256(codec.to_json() + f"{max_tokens} {tokenizer.pad_token_id} {backend}".encode()).digest()
        return {
            name: self._files.setdefault((file.whole, how), _TokenFile()).tokens(file, codec, tokenizer, max_tokens)
            for name, file in files.items()
        }


class _TokenFile:
    """Token rows of one file, one after the other as they were asked for."""

    def __init__(self) -> None:
        self._flat = DiskColumn("i4")
        self._start: Ints = np.empty(0, dtype=np.int64)
        self._length: Ints = np.empty(0, dtype=np.int64)  # 0 for a row that was not asked for
        self._is_cut = np.empty(0, dtype=np.bool_)

    def tokens(self, file: WindowFile, codec: Codec, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
        rows = file.row_numbers()
        more = int(rows.max(initial=-1)) + 1 - len(self._length)
        if more > 0:
            self._start, self._length = np.pad(self._start, (0, more)), np.pad(self._length, (0, more))
            self._is_cut = np.pad(self._is_cut, (0, more))
        missing = np.flatnonzero(self._length[rows] == 0)
        texts = codec.render_all(file.take(missing) if len(missing) < len(rows) else file)
        made = DiskColumn(_MADE)
        for ids, is_cut in token_rows(texts, tokenizer, max_tokens):
            made.append((len(self._flat), len(ids), is_cut))
            self._flat.extend(ids)
        found, chosen = made.array(), rows[missing]
        self._start[chosen], self._length[chosen], self._is_cut[chosen] = found["start"], found["length"], found["cut"]
        starts_N = self._start[rows]
        return Tokens(
            self._flat.array(),
            starts_N,
            starts_N + self._length[rows],
            tokenizer.pad_token_id,
            int(self._is_cut[rows].sum()),
        )
