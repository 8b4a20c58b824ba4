"""Calls in several threads, and the batches in which many rows are answered."""

import threading

import numpy as np
import pytest
import torch

from ctxtrain.engine.reference import batches_by_length
from ctxtrain.runtime import thread_map
from tests.helpers import threads_of_a_new_thread


def test_what_a_call_raises_ends_the_others_and_leaves_the_threads_as_they_were(two_threads: None) -> None:
    begun = []

    def fail(number: int) -> None:
        begun.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"), thread_map(2) as run:  # noqa: PT012
        for _ in run(fail, range(100_000)):
            pytest.fail("the first call has no result")
    assert len(begun) < 100_000
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker")]


def test_threads_of_torch_are_divided_between_workers() -> None:
    torch.set_num_threads(5)
    try:
        with thread_map(2) as run:
            assert list(run(lambda _: torch.get_num_threads(), range(6))) == [2] * 6
    finally:
        torch.set_num_threads(1)


def test_batches_hold_every_row_once_and_no_more_tokens_than_they_may() -> None:
    lengths = np.random.default_rng(0).integers(1, 700, 300)
    lengths[7] = 5000
    batches = batches_by_length(lengths, 1000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    assert all(len(rows) * lengths[rows].max() <= 1000 for rows in batches if len(rows) > 1)
    assert all((len(rows) + 1) * lengths[rows].max() > 1000 for rows in batches[:-1]), (
        "a batch has as many rows as may be"
    )
