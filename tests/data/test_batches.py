"""Texts → tokens → steps of micro-batches."""

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ctxtrain.data.batches import StepPlan, collate, cut_by_tokens, evaluation_batches, plan_step, steps_per_epoch
from ctxtrain.data.tokens import tokenise
from ctxtrain.errors import DataError
from ctxtrain.model.embedded import build_tokenizer

Ints = NDArray[np.int64]
TEXTS = ["99005050 ?", "50494950 U99005050 r10?", "?", "a bar said: 99005050 and then nothing more"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def plans(order: Ints, lengths: Ints, batch: int, accumulation: int, processes: int) -> list[list[StepPlan]]:
    """The plan of each process for each step of an epoch."""
    return [
        [
            plan_step(
                order, lengths, step, batch_size=batch, accumulation=accumulation, rank=process, world_size=processes
            )
            for process in range(processes)
        ]
        for step in range(steps_per_epoch(len(order), batch, accumulation))
    ]


# Tokens


def test_each_row_has_the_tokens_of_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenise(TEXTS, tokenizer, max_tokens=100)
    assert len(tokens) == len(TEXTS)
    assert tokens.truncated == 0
    for number, text in enumerate(TEXTS):
        assert tokens.row(number).tolist() == tokenizer(text)["input_ids"]
        assert tokens.lengths[number] == len(tokens.row(number))


def test_what_a_tokenizer_was_last_called_with_changes_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [*TEXTS, f"{tokenizer.pad_token}?"]
    expected = tokenise(texts, tokenizer, max_tokens=100)
    tokenizer(texts, padding="max_length", truncation=True, max_length=3, split_special_tokens=False)
    again = tokenise(texts, tokenizer, max_tokens=100)
    assert again.flat.tolist() == expected.flat.tolist()
    assert again.ends.tolist() == expected.ends.tolist()


def test_a_tokenizer_that_is_written_in_python_serves() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokens = tokenise(TEXTS, tokenizer, max_tokens=100)
    for number, text in enumerate(TEXTS):
        assert tokens.row(number).tolist() == tokenizer(text)["input_ids"]


@pytest.mark.promise("E6")
def test_too_long_rows_keep_their_newest_tokens_and_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    whole, cut = (tokenise(TEXTS, tokenizer, max_tokens=limit) for limit in (100, 6))
    assert cut.lengths.tolist() == [min(6, length) for length in whole.lengths]
    assert cut.truncated == (whole.lengths > 6).sum() == 2
    for number in range(len(TEXTS)):
        assert cut.row(number).tolist() == whole.row(number).tolist()[-6:]


def test_no_texts_give_no_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenise([], tokenizer, max_tokens=8)) == 0


@pytest.mark.parametrize("pattern", ["{}LONG?", "LONG {} now?", "LONG?{}", "{}", "{}{}"])
def test_text_that_spells_a_special_token_never_becomes_one(tokenizer: PreTrainedTokenizerFast, pattern: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "sep_token": "<|im_end|>"})
    assert len(tokenizer.all_special_tokens) == 3
    texts = [pattern.replace("{}", special) for special in tokenizer.all_special_tokens]
    tokens = tokenise(texts, tokenizer, max_tokens=100)
    for number, text in enumerate(texts):
        assert not set(tokens.row(number).tolist()) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(tokens.row(number)) == text


def test_a_text_that_holds_the_pad_token_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "?"
    with pytest.raises(
        DataError, match=r"row 2 .* none of them the pad token '\?', got 'Long\?'\. Use a base whose tokenizer"
    ):
        tokenise(["Long", "Long?"], tokenizer, max_tokens=100)


def test_a_text_without_tokens_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="must become at least one token"):
        tokenise(["a", ""], tokenizer, max_tokens=100)


def test_rows_are_padded_on_the_right_to_the_longest(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenise(TEXTS, tokenizer, max_tokens=100)
    batch = collate(tokens, [2, 1, 0])
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    assert ids_BT.shape == mask_BT.shape == (3, tokens.lengths[1])
    assert ids_BT.dtype == mask_BT.dtype == torch.int64
    for b, number in enumerate([2, 1, 0]):
        length = tokens.lengths[number]
        assert ids_BT[b, :length].tolist() == tokens.row(number).tolist()
        assert set(ids_BT[b, length:].tolist()) <= {tokens.pad_id}
        assert mask_BT[b].tolist() == [1] * length + [0] * (ids_BT.shape[1] - length)


# Steps


SIZES = list(product([1, 2, 5, 8], [1, 2, 3, 4], [1, 2, 3, 4]))


@pytest.fixture(scope="module", params=[1, 7, 24, 61])
def epoch(request: pytest.FixtureRequest) -> tuple[Ints, Ints]:
    """An order of windows in which some come twice, and the lengths of the rows."""
    rng = np.random.default_rng(request.param)
    order = rng.permutation(np.concatenate([np.arange(request.param), rng.integers(0, request.param, 5)]))
    return order, rng.integers(1, 90, request.param)


def test_an_epoch_covers_each_window_of_the_order_exactly_once(epoch: tuple[Ints, Ints]) -> None:
    order, lengths = epoch
    for batch, accumulation, processes in SIZES:
        trained: list[int] = []
        for step in plans(order, lengths, batch, accumulation, processes):
            counted = [rows for plan in step for micro in plan.micro_batches if micro.is_counted for rows in micro.rows]
            assert sorted(counted) == sorted(step[0].windows)
            trained += counted
        assert sorted(trained) == sorted(order), (batch, accumulation, processes)


def test_a_step_takes_the_next_windows_of_the_order_whatever_the_processes(epoch: tuple[Ints, Ints]) -> None:
    order, lengths = epoch
    for batch, accumulation, processes in SIZES:
        size = batch * accumulation
        for number, step in enumerate(plans(order, lengths, batch, accumulation, processes)):
            for plan in step:
                assert sorted(plan.windows) == sorted(order[number * size : (number + 1) * size])
                assert plan.windows.tolist() == step[0].windows.tolist()


def test_micro_batches_are_the_same_for_any_number_of_processes(epoch: tuple[Ints, Ints]) -> None:
    order, lengths = epoch
    for batch, accumulation, processes in SIZES:
        alone = plans(order, lengths, batch, accumulation, 1)
        for (single,), step in zip(alone, plans(order, lengths, batch, accumulation, processes), strict=True):
            counted = {
                micro.index: micro.rows.tolist() for plan in step for micro in plan.micro_batches if micro.is_counted
            }
            assert counted == {micro.index: micro.rows.tolist() for micro in single.micro_batches}
            assert all(len(rows) <= batch for rows in counted.values())


def test_all_processes_have_as_many_rounds_and_only_repeats_that_do_not_count(epoch: tuple[Ints, Ints]) -> None:
    order, lengths = epoch
    for batch, accumulation, processes in SIZES:
        for step in plans(order, lengths, batch, accumulation, processes):
            rounds = {len(plan.micro_batches) for plan in step}
            assert len(rounds) == 1
            needed = -(-len(step[0].windows) // batch)
            assert rounds == {-(-needed // processes)}
            for process, plan in enumerate(step):
                for micro in plan.micro_batches:
                    assert micro.index % processes == process
                    assert micro.is_counted == (micro.index < needed)
                    assert len(micro.rows) > 0


def test_windows_of_like_length_share_a_micro_batch() -> None:
    lengths = np.array([5, 90, 6, 91, 7, 92])
    plan = plan_step(np.arange(6), lengths, 0, batch_size=3, accumulation=2)
    assert [micro.rows.tolist() for micro in plan.micro_batches] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("limit", [1, 60, 90, 400, 10_000])
def test_micro_batches_cut_by_tokens_hold_the_same_windows_within_the_limit(
    epoch: tuple[Ints, Ints], limit: int
) -> None:
    order, lengths = epoch
    for step in range(steps_per_epoch(len(order), 4, 3)):
        usual = plan_step(order, lengths, step, batch_size=4, accumulation=3)
        for processes in (1, 2, 4):
            counted: dict[int, list[int]] = {}
            for rank in range(processes):
                plan = plan_step(
                    order, lengths, step, batch_size=4, accumulation=3, tokens_per_batch=limit, rank=rank,
                    world_size=processes,
                )  # fmt: skip
                counted |= {micro.index: micro.rows.tolist() for micro in plan.micro_batches if micro.is_counted}
                assert plan.windows.tolist() == usual.windows.tolist()
            batches = [counted[index] for index in range(len(counted))]
            assert [row for rows in batches for row in rows] == usual.windows.tolist()
            for rows, following in zip(batches, [*batches[1:], None], strict=True):
                assert len(rows) == 1 or len(rows) * lengths[rows].max() <= limit
                if following:  # a batch is as large as it can be
                    assert (len(rows) + 1) * lengths[following[0]] > limit


def test_a_limit_of_rows_holds_beside_that_of_tokens() -> None:
    lengths = np.array([2, 2, 2, 3, 9])
    batches = cut_by_tokens(np.arange(5), lengths, 6, 2)
    assert [rows.tolist() for rows in batches] == [[0, 1], [2, 3], [4]]
    assert [rows.tolist() for rows in evaluation_batches(lengths, 2, 6)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("windows", "steps"), [(1, 1), (32, 1), (33, 2), (64, 2), (1000, 32)])
def test_a_smaller_last_group_is_a_step_too(windows: int, steps: int) -> None:
    assert steps_per_epoch(windows, batch_size=8, accumulation=4) == steps


def test_evaluation_takes_every_row_once_with_rows_of_like_length_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 23)
    batches = list(evaluation_batches(lengths, 5))
    assert sorted(np.concatenate(batches)) == list(range(23))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert (np.diff(lengths[np.concatenate(batches)]) >= 0).all()
