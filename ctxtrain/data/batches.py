"""Texts become token rows; an epoch becomes optimizer steps of micro-batches.

Comes in: texts, labels and the row order of an epoch. Goes out: a `Tokens` table, a plan of `MicroBatch`es that is
a pure function of its arguments, and padded tensors `ids_BT`, `mask_BT`. This is the specification's data loader:
the rows are in memory already tokenised, so it needs neither workers nor torch's DataLoader (whose iterators move
the global random state).

Legend: N rows, B windows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ctxtrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]

CHUNK = 1000  # texts that the tokenizer is given at a time; a signal waits for the end of a call


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows; row i is flat[starts[i]:ends[i]]. `cut` rows lost their oldest tokens."""

    flat: NDArray[np.int32]
    starts: Ints
    ends: Ints
    pad_id: int
    cut: int

    @classmethod
    def of_lengths(cls, flat: NDArray[np.int32], lengths: Ints, pad_id: int, cut: int = 0) -> Tokens:
        """Rows that stand one after the other."""
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(flat, ends - lengths, ends, pad_id, cut)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Ints:
        return self.ends - self.starts

    def row(self, number: int) -> NDArray[np.int32]:
        return self.flat[self.starts[number] : self.ends[number]]

    def digests(self) -> NDArray[np.uint64]:
        """16 bytes of a SHA-256 of each row, of shape (rows, 2)."""
        found = np.empty((len(self), 2), dtype=np.uint64)
        for n in range(len(self)):
            found[n] = np.frombuffer(hashlib.sha256(self.row(n).tobytes()).digest()[:16], dtype=">u8")
        return found


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together, the `index`-th of their step.

    `counts` is False for a repeat that only keeps the processes in step.
    """

    index: int
    rows: Ints
    counts: bool = True


@dataclass(frozen=True)
class StepPlan:
    """The windows of one optimizer step, and the micro-batches of it that fall to this process."""

    windows: Ints
    micro_batches: list[MicroBatch]


def tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
    """All rows of `token_rows`, in memory."""
    flat, lengths, cut = array("i"), array("q"), 0
    for ids, is_cut in token_rows(texts, tokenizer, max_tokens):
        cut += is_cut
        lengths.append(len(ids))
        flat.extend(ids)
    lengths_N = np.array(lengths, dtype=np.int64)
    return Tokens.of_lengths(np.asarray(flat, dtype=np.int32), lengths_N, tokenizer.pad_token_id, cut)


def token_rows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    """Tokenise texts, a thousand at a time: the newest `max_tokens` tokens of each, and whether there were more.

    Special-token strings inside a text stay text. Raises DataError where the pad id would stand inside a row, since the
    classification head finds the last token by it.
    """
    pad_id, row, stream = tokenizer.pad_token_id, 0, iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        for text, ids in zip(chunk, _token_ids(chunk, tokenizer), strict=True):
            kept, row = ids[-max_tokens:], row + 1
            if not kept or pad_id in kept:
                raise DataError(
                    f"row {row} of the rows given must become at least one token and never the pad token "
                    f"{tokenizer.pad_token!r}, got {text[:60]!r}. Use a base whose tokenizer has its own pad token."
                )
            yield kept, len(ids) > max_tokens


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    """What calling the tokenizer gives; but a call asks for the place of each token, too, which costs half as much."""
    if not tokenizer.is_fast:
        encoding = tokenizer(texts, split_special_tokens=True, return_attention_mask=False, verbose=False)
        return cast(list[list[int]], encoding["input_ids"])
    backend = tokenizer.backend_tokenizer
    if backend.truncation:  # of an earlier call; to change a setting disturbs threads that tokenise
        backend.no_truncation()
    if backend.padding:
        backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    return (encoding.ids for encoding in backend.encode_batch_fast(texts))


def collate(tokens: Tokens, rows: Sequence[int] | Ints, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest of them: `input_ids` and `attention_mask`, both int64 of shape (B, T)."""
    picked = [tokens.row(int(number)) for number in rows]
    ids_BT = np.full((len(picked), max(map(len, picked))), tokens.pad_id, dtype=np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for b, row in enumerate(picked):
        ids_BT[b, : len(row)] = row
        mask_BT[b, : len(row)] = 1
    return {
        "input_ids": torch.from_numpy(ids_BT).to(device),
        "attention_mask": torch.from_numpy(mask_BT).to(device),
    }


def steps_per_epoch(windows: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps of an epoch; a last, smaller group is a step too."""
    return -(-windows // (batch_size * accumulation))


def plan_step(
    order: Ints,
    lengths: Ints,
    step: int,
    *,
    batch_size: int,
    accumulation: int,
    process: int = 0,
    processes: int = 1,
) -> StepPlan:
    """Plan one optimizer step for one of several processes.

    A step takes the next batch_size × accumulation windows of `order`, sorts them by length against padding and cuts
    them into micro-batches; micro-batch m belongs to process m mod `processes`. So windows, denominators and dropout do
    not depend on the number of processes. Processes with one micro-batch less repeat one that does not count, because
    gradients are exchanged in the last backward pass of each.
    """
    size = batch_size * accumulation
    group = order[step * size : (step + 1) * size]
    group = group[np.argsort(lengths[group], kind="stable")]
    batches = [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    rounds = -(-len(batches) // processes)
    mine = [
        MicroBatch(index, batches[index]) if index < len(batches) else MicroBatch(index, batches[-1], counts=False)
        for index in range(process, rounds * processes, processes)
    ]
    return StepPlan(group, mine)


def evaluation_batches(lengths: Ints, batch_size: int) -> Iterator[Ints]:
    """Every row once, rows of like length together."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
