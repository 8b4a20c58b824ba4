"""Texts → token rows.

Input: texts and a tokenizer. Output: the newest `max_tokens` token ids of each text, one by one or as a `Tokens` table.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from ctxtrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]

CHUNK = 1000  # texts per tokenizer call; signals are handled only between calls


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows; row i is flat[starts[i]:ends[i]]. `truncated` counts the rows that lost their oldest tokens."""

    flat: NDArray[np.int32]
    starts: Ints
    ends: Ints
    pad_id: int
    truncated: int

    @classmethod
    def from_lengths(cls, flat: NDArray[np.int32], lengths: Ints, pad_id: int, truncated: int = 0) -> Tokens:
        """Rows stored one after the other."""
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(flat, ends - lengths, ends, pad_id, truncated)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Ints:
        return self.ends - self.starts

    def row(self, number: int) -> NDArray[np.int32]:
        return self.flat[self.starts[number] : self.ends[number]]

    def digests(self) -> NDArray[np.uint64]:
        """First 16 bytes of the SHA-256 of each row, of shape (rows, 2)."""
        digests_N2 = np.empty((len(self), 2), dtype=np.uint64)
        for n in range(len(self)):
            digests_N2[n] = np.frombuffer(hashlib.sha256(self.row(n).tobytes()).digest()[:16], dtype=">u8")
        return digests_N2


def tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
    """All rows of `token_rows`, in memory."""
    flat, lengths, truncated = array("i"), array("q"), 0
    for ids, is_truncated in token_rows(texts, tokenizer, max_tokens):
        truncated += is_truncated
        lengths.append(len(ids))
        flat.extend(ids)
    lengths_N = np.array(lengths, dtype=np.int64)
    return Tokens.from_lengths(np.asarray(flat, dtype=np.int32), lengths_N, tokenizer.pad_token_id, truncated)


def token_rows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    """Tokenise texts; yield the newest `max_tokens` token ids of each, and whether the text was longer.

    Special-token strings inside a text stay text. Raises DataError if the pad id occurs inside a row, because the
    classification head uses that id to find the last token.
    """
    pad_id, row, stream = tokenizer.pad_token_id, 0, iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        for text, ids in zip(chunk, _token_ids(chunk, tokenizer), strict=True):
            kept, row = ids[-max_tokens:], row + 1
            if not kept or pad_id in kept:
                raise DataError(
                    f"row {row} must become at least one token, none of them the pad token "
                    f"{tokenizer.pad_token!r}, got {text[:60]!r}. Use a base whose tokenizer has a separate pad token."
                )
            yield kept, len(ids) > max_tokens


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    """The same ids as `tokenizer(texts)`. Offsets are not computed; they would cost half as much more."""
    if not tokenizer.is_fast:
        encoding = tokenizer(texts, split_special_tokens=True, return_attention_mask=False, verbose=False)
        return cast(list[list[int]], encoding["input_ids"])
    backend = tokenizer.backend_tokenizer
    if backend.truncation:  # set by an earlier call; writing a setting disturbs threads that tokenise
        backend.no_truncation()
    if backend.padding:
        backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    return (encoding.ids for encoding in backend.encode_batch_fast(texts))
