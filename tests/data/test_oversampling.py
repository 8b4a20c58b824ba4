"""Oversampling and class weights."""

import random
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from ctxtrain.data.class_weights import class_weights
from ctxtrain.data.oversampling import class_counts, epoch_rows, oversampled_counts
from ctxtrain.errors import DataError

Ints = NDArray[np.int64]


def labels_with(*counts: int) -> Ints:
    labels = np.repeat(np.arange(3), counts)
    return np.random.default_rng(5).permutation(labels)


def rows_of(labels_N: Ints, target: int, seed: int = 0, epoch: int = 0) -> Ints:
    return epoch_rows(labels_N, oversampled_counts(class_counts(labels_N), target), seed, epoch)


def test_the_specifications_example_gives_400_of_each() -> None:
    labels_N = labels_with(350, 350, 300)
    counts_C = oversampled_counts(class_counts(labels_N), 400)
    assert counts_C.tolist() == [400, 400, 400]
    rows = epoch_rows(labels_N, counts_C, seed=0, epoch=0)
    assert class_counts(labels_N[rows]).tolist() == [400, 400, 400]
    assert set(rows.tolist()) == set(range(1000))


@pytest.mark.parametrize(
    ("counts", "target", "max_repeat", "raised"),
    [
        ([350, 350, 300], "auto", None, [350, 350, 350]),
        ([10, 200, 3], "auto", None, [200, 200, 200]),
        ([10, 200, 3], "none", None, [10, 200, 3]),
        ([10, 200, 3], 50, None, [50, 200, 50]),  # a number raises, and lowers nothing
        ([10, 200, 3], 1, None, [10, 200, 3]),
        ([10, 200, 3], "auto", 4.0, [40, 200, 12]),
        ([10, 200, 3], "auto", 1.5, [15, 200, 4]),
        ([10, 200, 3], "auto", 1.0, [10, 200, 3]),
        ([10, 200, 3], 500, 2.0, [20, 400, 6]),
        ([10, 200, 3], "auto", 1000.0, [200, 200, 200]),
        ([10, 200, 3], "auto", 1e20, [200, 200, 200]),
        ([100, 200, 3], "auto", 1.15, [115, 200, 3]),  # in floating point the product is 114.99999999999999
    ],
)
def test_classes_are_raised_to_the_target_within_max_repeat(
    counts: list[int], target: int, max_repeat: float | None, raised: list[int]
) -> None:
    counts_C = oversampled_counts(np.array(counts), target, max_repeat)
    assert counts_C.tolist() == raised
    labels_N = labels_with(*counts)
    rows = epoch_rows(labels_N, counts_C, seed=3, epoch=1)
    assert class_counts(labels_N[rows]).tolist() == raised
    assert set(rows.tolist()) == set(range(sum(counts)))


def test_without_oversampling_every_row_comes_once_in_random_order() -> None:
    rows = rows_of(labels_with(20, 30, 40), 1)
    assert sorted(rows.tolist()) == list(range(90))
    assert rows.tolist() != list(range(90))


def test_extra_rows_are_drawn_with_replacement() -> None:
    rows = rows_of(labels_with(300, 400, 300), 400)
    assert max(Counter(rows.tolist()).values()) >= 3  # a row itself, and twice among the 100 extra ones


def test_an_epoch_is_drawn_from_seed_and_epoch_alone() -> None:
    labels_N = labels_with(20, 60, 40)
    rows = rows_of(labels_N, 60, seed=7, epoch=2)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  # the global state must not matter
    rows_of(labels_N, 60, seed=7, epoch=0)
    state = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert rows_of(labels_N, 60, seed=7, epoch=2).tolist() == rows.tolist()
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]  # noqa: NPY002


def test_another_epoch_or_seed_draws_other_rows_in_another_order() -> None:
    labels_N = labels_with(20, 60, 40)
    draws = [rows_of(labels_N, 60, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(draw) for draw in draws}) == 6
    assert len({tuple(sorted(draw)) for draw in draws}) == 6


@pytest.mark.parametrize(
    ("counts", "named"), [([5, 0, 3], "SHORT"), ([4, 0, 0], "SHORT, SKIP"), ([0, 0, 0], "LONG, SHORT, SKIP")]
)
def test_training_rows_without_a_class_are_refused(counts: list[int], named: str) -> None:
    with pytest.raises(DataError) as caught:
        oversampled_counts(np.array(counts))
    found = f"LONG {counts[0]}, SHORT {counts[1]}, SKIP {counts[2]}"
    assert str(caught.value) == f"the training rows must have every class, got {found}. Add rows of {named}."


def test_counts_name_classes_that_no_row_has() -> None:
    assert class_counts([0, 0, 1]).tolist() == [2, 1, 0]
    assert class_counts([]).tolist() == [0, 0, 0]


def test_auto_weights_are_inverse_frequency_with_mean_1() -> None:
    weights = class_weights(np.array([100, 200, 400]), "auto")
    assert np.mean(weights) == pytest.approx(1, abs=1e-15)
    assert weights[0] / weights[1] == pytest.approx(2)
    assert weights[0] / weights[2] == pytest.approx(4)


def test_fully_oversampled_classes_weigh_one_each() -> None:
    assert class_weights(oversampled_counts(np.array([350, 200, 30])), "auto") == pytest.approx([1, 1, 1], abs=1e-15)


def test_weights_take_what_max_repeat_left() -> None:
    after = oversampled_counts(np.array([100, 400, 400]), "auto", max_repeat=2.0)
    assert after.tolist() == [200, 400, 400]
    assert class_weights(after, "auto") == pytest.approx([1.5, 0.75, 0.75])


def test_explicit_weights_are_used_as_they_are() -> None:
    assert class_weights(np.array([1, 2, 3]), [2.0, 0.5, 1.0]) == [2.0, 0.5, 1.0]
    assert class_weights(np.array([1, 2, 3]), "none") == [1.0, 1.0, 1.0]
