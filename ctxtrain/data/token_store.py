"""Token rows on disk: each row is rendered and tokenised once, for any number of runs.

Input: rows of a file, a codec and a tokenizer. Output: `Tokens` with memory-mapped ids, on request those of mirrored
twins too. Folds with different codecs, which is the case for rows with `features`, have separate texts and tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import Codec
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.mirror import twins
from ctxtrain.data.parse_window import Window
from ctxtrain.data.tokens import Tokens, token_rows
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
        return {
            name: self._file(file, codec, tokenizer, max_tokens).tokens(file, codec, tokenizer, max_tokens)
            for name, file in files.items()
        }

    def tokens_with_twins(
        self, file: WindowFile, codec: Codec, tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> Tokens:
        """The tokens of the rows of a file, followed by those of their mirrored twins."""
        store = self._file(file, codec, tokenizer, max_tokens)
        own, twins = (
            store.tokens(file, codec, tokenizer, max_tokens, is_mirrored=is_mirrored) for is_mirrored in (False, True)
        )
        return Tokens(
            twins.flat,  # the column holds both, and was read last for the twins
            np.concatenate([own.starts, twins.starts]),
            np.concatenate([own.ends, twins.ends]),
            own.pad_id,
            own.truncated + twins.truncated,
        )

    def _file(self, file: WindowFile, codec: Codec, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> _TokenFile:
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        key = hashlib.sha256(codec.to_json() + f"{max_tokens} {tokenizer.pad_token_id} {backend}".encode()).digest()
        return self._files.setdefault((file.source_key, key), _TokenFile())


class _Places:
    """Where the token rows of a file lie in a column, by row number; a row without a length is not tokenised yet."""

    def __init__(self) -> None:
        self.start: Ints = np.empty(0, dtype=np.int64)
        self.length: Ints = np.empty(0, dtype=np.int64)
        self.is_truncated = np.empty(0, dtype=np.bool_)

    def make_room(self, rows: int) -> None:
        if (added := rows - len(self.length)) > 0:
            self.start, self.length = np.pad(self.start, (0, added)), np.pad(self.length, (0, added))
            self.is_truncated = np.pad(self.is_truncated, (0, added))


class _TokenFile:
    """Token rows of one file and of its mirrored twins, in the order in which they were requested."""

    def __init__(self) -> None:
        self._flat = DiskColumn("i4")
        self._places = {False: _Places(), True: _Places()}  # by whether the rows are mirrored

    def tokens(
        self,
        file: WindowFile,
        codec: Codec,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        *,
        is_mirrored: bool = False,
    ) -> Tokens:
        rows, places = file.row_numbers(), self._places[is_mirrored]
        places.make_room(int(rows.max(initial=-1)) + 1)
        missing = np.flatnonzero(places.length[rows] == 0)
        windows: Iterable[Window] = file.take(missing) if len(missing) < len(rows) else file
        texts = codec.render_all(twins(windows, codec) if is_mirrored else windows)
        new_rows = DiskColumn(_TOKENISED)
        for ids, is_truncated in token_rows(texts, tokenizer, max_tokens):
            new_rows.append((len(self._flat), len(ids), is_truncated))
            self._flat.extend(ids)
        written, new_numbers = new_rows.array(), rows[missing]
        places.start[new_numbers], places.length[new_numbers] = written["start"], written["length"]
        places.is_truncated[new_numbers] = written["cut"]
        starts_N = places.start[rows]
        return Tokens(
            self._flat.array(),
            starts_N,
            starts_N + places.length[rows],
            tokenizer.pad_token_id,
            int(places.is_truncated[rows].sum()),
        )


def tokens_on_disk(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
    """All rows of `token_rows`, in a column of their own."""
    flat, rows = DiskColumn("i4"), DiskColumn(_TOKENISED)
    for ids, is_truncated in token_rows(texts, tokenizer, max_tokens):
        rows.append((len(flat), len(ids), is_truncated))
        flat.extend(ids)
    written = rows.array()
    return Tokens.from_lengths(
        flat.array(), written["length"].copy(), tokenizer.pad_token_id, int(written["cut"].sum())
    )
