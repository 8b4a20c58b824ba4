"""An epoch → optimizer steps of micro-batches.

Input: token rows, labels and the row order of an epoch. Output: a plan of `MicroBatch`es that is a pure function of its
arguments, and padded tensors `ids_BT`, `mask_BT`. This is the data loader of the specification. The rows are already
tokenised, so it needs no workers and no torch DataLoader, whose iterators change the global random state.

Legend: N rows, B windows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ctxtrain.data.tokens import Tokens

Ints = NDArray[np.int64]


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


def collate(
    tokens: Tokens, rows: Sequence[int] | Ints, device: torch.device | str = "cpu", labels_N: Ints | None = None
) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest one: `input_ids` and `attention_mask`, int64 of shape (B, T).

    If `labels_N`, of all rows, is given, adds `labels` of the selected rows.
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
