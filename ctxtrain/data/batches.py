"""Texts → token rows; an epoch → optimizer steps of micro-batches.

Input: texts, labels and the row order of an epoch. Output: a `Tokens` table, a plan of `MicroBatch`es that is a pure
function of its arguments, and padded tensors `ids_BT`, `mask_BT`. This is the data loader of the specification. The
rows are already tokenised in memory, so it needs no workers and no torch DataLoader, whose iterators change the global
random state.

Legend: N rows, B windows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class MicroBatch:
    """Rows that pass through the model together; `index` numbers the micro-batch within its optimizer step.

    `is_counted` is False for a repeated batch that only keeps the processes synchronised.
    """

    index: int
    rows: Ints
    is_counted: bool = True


@dataclass(frozen=True)
class StepPlan:
    """All windows of one optimizer step, and the micro-batches of this process."""

    windows: Ints
    micro_batches: list[MicroBatch]


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
    """The ids that calling the tokenizer returns, without the token offsets, which would add half of the cost."""
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


def collate(
    tokens: Tokens, rows: Sequence[int] | Ints, device: torch.device | str = "cpu", labels_N: Ints | None = None
) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest one: `input_ids` and `attention_mask`, int64 of shape (B, T).

    With `labels_N`, the labels of all rows, it adds `labels`, those of these rows.
    """
    selected = [tokens.row(int(number)) for number in rows]
    ids_BT = np.full((len(selected), max(map(len, selected))), tokens.pad_id, dtype=np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for b, row in enumerate(selected):
        ids_BT[b, : len(row)] = row
        mask_BT[b, : len(row)] = 1
    arrays = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return copy_to_device(arrays if labels_N is None else arrays | {"labels": labels_N[rows]}, torch.device(device))


def copy_to_device(arrays: Mapping[str, Ints], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays of int64 as tensors on the device.

    On a GPU, one copy from pinned memory takes all of them, and the host does not wait for it.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def steps_per_epoch(windows: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps per epoch, including a last, smaller one."""
    return -(-windows // (batch_size * accumulation))


def plan_step(
    order: Ints,
    lengths: Ints,
    step: int,
    *,
    batch_size: int,
    accumulation: int,
    tokens_per_batch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> StepPlan:
    """Plan one optimizer step for one process.

    A step takes the next batch_size × accumulation windows of `order`, sorts them by length to reduce padding, and cuts
    them into micro-batches: of `batch_size` windows, or with `tokens_per_batch` as `cut_by_tokens` does. The process of
    rank m mod `world_size` runs micro-batch m, so windows, loss denominators and dropout are independent of world size.
    A process with one micro-batch less repeats one that is not counted, because all processes exchange gradients in
    their last backward pass.
    """
    size = batch_size * accumulation
    group = order[step * size : (step + 1) * size]
    group = group[np.argsort(lengths[group], kind="stable")]
    if tokens_per_batch is None:
        batches = [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    else:
        batches = cut_by_tokens(group, lengths, tokens_per_batch)
    rounds = -(-len(batches) // world_size)
    micro_batches = [
        MicroBatch(index, batches[index]) if index < len(batches) else MicroBatch(index, batches[-1], is_counted=False)
        for index in range(rank, rounds * world_size, world_size)
    ]
    return StepPlan(group, micro_batches)


def cut_by_tokens(rows: Ints, lengths: Ints, tokens: int, max_rows: int | None = None) -> list[Ints]:
    """Cut rows that are sorted by length, shortest first, into batches of at most `tokens` tokens, padding included.

    A row that is longer is a batch of its own. `max_rows` bounds the rows of a batch too.
    """
    batches, start = [], 0
    for end in range(1, len(rows) + 1):
        is_full = end < len(rows) and (end - start + 1) * lengths[rows[end]] > tokens
        if end == len(rows) or is_full or end - start == max_rows:
            batches.append(rows[start:end])
            start = end
    return batches


def evaluation_batches(lengths: Ints, batch_size: int, tokens_per_batch: int | None = None) -> Iterator[Ints]:
    """Batches of every row once, with rows of similar length together, within both limits."""
    order = np.argsort(lengths, kind="stable")
    if tokens_per_batch is not None:
        yield from cut_by_tokens(order, lengths, tokens_per_batch, batch_size)
        return
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
