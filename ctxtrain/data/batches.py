"""Texts become token rows; an epoch becomes optimizer steps of micro-batches.

Comes in: texts, labels and the row order of an epoch. Goes out: a `Tokens` table, a plan of `MicroBatch`es that is
a pure function of its arguments, and padded tensors `ids_BT`, `mask_BT`. This is the specification's data loader:
the rows are in memory already tokenised, so it needs neither workers nor torch's DataLoader (whose iterators move
the global random state).

Legend: N rows, B windows of a batch, T tokens.
"""

from __future__ import annotations

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
    """Tokenised rows, one after the other in `flat`; row i is flat[ends[i-1]:ends[i]]. `cut` rows lost old tokens."""

    flat: NDArray[np.int32]
    ends: Ints
    pad_id: int
    cut: int

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.ends, prepend=0)

    def row(self, number: int) -> NDArray[np.int32]:
        return self.flat[self.ends[number - 1] if number else 0 : self.ends[number]]


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
    """Tokenise texts, a thousand at a time, keeping the newest `max_tokens` tokens of each.

    Special-token strings inside a text stay text. Raises DataError where the pad id would stand inside a row, since the
    classification head finds the last token by it.
    """
    flat, lengths, pad_id, cut = array("i"), array("q"), tokenizer.pad_token_id, 0
    stream = iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        for text, ids in zip(chunk, _token_ids(chunk, tokenizer), strict=True):
            kept = ids[-max_tokens:]
            if not kept or pad_id in kept:
                raise DataError(
                    f"row {len(lengths) + 1} of the rows given must become at least one token and never the pad token "
                    f"{tokenizer.pad_token!r}, got {text[:60]!r}. Use a base whose tokenizer has its own pad token."
                )
            cut += len(ids) > max_tokens
            lengths.append(len(kept))
            flat.extend(kept)
    return Tokens(np.asarray(flat, dtype=np.int32), np.cumsum(np.array(lengths, dtype=np.int64)), pad_id, cut)


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
