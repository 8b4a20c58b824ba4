"""What may be believed of a score: blocks, intervals, calibration, and answers only when sure."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import beta
from sklearn.metrics import brier_score_loss, precision_recall_fscore_support

from benchmarks.bench_coverage import EVEN, HIGHEST, LOWEST, RARE, SCORES, Setting, cover, independent
from ctxtrain.data.parse_window import Window
from ctxtrain.data.positions import collect_positions
from ctxtrain.evaluation.blocks import MIN_BLOCKS, ONE_BLOCK, assign_blocks, time_blocks
from ctxtrain.evaluation.bootstrap import block_sums, difference_intervals, score_intervals, weighted_sums
from ctxtrain.evaluation.calibration import TemperatureScaler, assign_folds, reliability_table
from ctxtrain.evaluation.metric_formulas import ScoredRows, confusion_scores, expected_calibration_error, log_losses
from ctxtrain.evaluation.metrics import evaluate_logits
from ctxtrain.evaluation.selective import abstain, choose_thresholds, min_confidence_by_class, risk_coverage
from tests.helpers import make_row, make_window

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def judged(logits_NC: Floats, labels_N: Ints) -> ScoredRows:
    predicted_NC = np.eye(3)[logits_NC.argmax(axis=1)]
    return ScoredRows(labels_N, softmax(logits_NC, axis=1), predicted_NC, log_losses(logits_NC, labels_N))


def drawn(rows: int, seed: int, signal: float = 1.5) -> tuple[Floats, Ints]:
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, 3, rows)
    return signal * np.eye(3)[labels_N] + rng.normal(0, 1, (rows, 3)), labels_N


# Blocks


def days(*values: str) -> NDArray[np.datetime64]:
    return np.array(values, dtype="datetime64[D]")


def test_windows_that_share_bars_or_a_session_are_one_block_also_by_a_chain() -> None:
    first, last = np.array([0.0, 10, 21, 30, 0, 90]), np.array([10.0, 20, 29, 40, 10, 99])
    day = days("2025-01-01", "2025-01-01", "2025-01-02", "2025-01-03", "2025-01-01", "2025-01-02")
    symbols = ["GC", "GC", "GC", "GC", "ES", "GC"]
    nowhere = np.full(6, np.datetime64("NaT"), dtype="datetime64[D]")
    # 0 and 1 touch at bar 10; 2 and 5 share a day; the other symbol shares nothing with them.
    assert time_blocks(symbols, first, last, day).tolist() == [0, 0, 1, 2, 3, 1]
    assert time_blocks(symbols, first, last, nowhere).tolist() == [0, 0, 1, 2, 3, 4]
    last[1] = 25  # now 1 reaches into 2, which shares its day with 5
    assert time_blocks(symbols, first, last, day).tolist() == [0, 0, 0, 1, 2, 0]
    unknown = np.full(6, np.nan)
    assert time_blocks(symbols, unknown, unknown, nowhere).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_order_of_windows_does_not_change_who_is_together() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4000, 200).astype(float)
    symbols = rng.choice(["A", "B"], 200).tolist()
    day = np.datetime64("2025-01-01") + (first // 1000).astype(int)
    blocks = time_blocks(symbols, first, first + 30, day)
    order = rng.permutation(200)
    again = time_blocks([symbols[i] for i in order], first[order], first[order] + 30, day[order])
    together = blocks[order][:, None] == blocks[order][None, :]
    assert (together == (again[:, None] == again[None, :])).all()
    assert 2 <= blocks.max() + 1 <= 8


def windows_on(moments: list[str], place: bool = True) -> list[Window]:
    windows = []
    for moment in moments:
        row = make_row(flags=False, place=False)
        for i, bar in enumerate([*row["context_bars"], row["current_bar"]]):
            if place:
                bar["time"] = str(np.datetime64(moment, "m") + i)
        windows.append(make_window(row))
    return windows


def test_blocks_of_windows_say_what_they_are_and_what_is_wrong_with_them() -> None:
    moments = [f"2025-03-{day:02d}T10:00" for day in range(1, 21) for _ in range(2)]
    many = assign_blocks(collect_positions(windows_on(moments)))
    assert (many.count, many.trusted) == (20, True)
    few = assign_blocks(collect_positions(windows_on([f"2025-03-{day:02d}T10:00" for day in range(1, MIN_BLOCKS)])))
    assert few.doubt == f"the windows cover {MIN_BLOCKS - 1} independent periods; use {MIN_BLOCKS} or more"
    one = assign_blocks(collect_positions(windows_on([f"2025-03-03T10:{minute:02d}" for minute in range(30)])))
    assert (one.count, one.doubt) == (30, ONE_BLOCK)
    assert assign_folds(one.fold_groups).max() == 0  # rows of a single block stay in one fold
    assert assign_folds(few.fold_groups).max() == 4
    placeless = assign_blocks(collect_positions(windows_on(["2025-03-03T10:00"] * 30, place=False)))
    assert (placeless.count, placeless.trusted) == (30, True)
    assert placeless.note == "single rows, treated as independent: rows have no usable time or bar_index"


def test_windows_on_every_bar_through_many_nights_are_cut_by_day() -> None:
    start = np.datetime64("2025-03-03T00:00", "m")
    chain = assign_blocks(collect_positions(windows_on([str(start + 25 * i) for i in range(12 * 57)])))
    assert (chain.count, chain.trusted) == (12, True)
    assert "cut at midnight UTC" in chain.note


# Intervals


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_a_confusion_matrix_are_those_of_scikit_learn(seed: int) -> None:
    logits_NC, labels_N = drawn(60, seed)
    labels_N[labels_N == seed % 4] = 0  # a class may be absent
    called_N = logits_NC.argmax(axis=1)
    found = confusion_scores(np.array(evaluate_logits(logits_NC, labels_N)["confusion"], dtype=float))
    precision, recall, f1, _ = precision_recall_fscore_support(labels_N, called_N, labels=[0, 1, 2], zero_division=0)
    assert np.allclose([found["precision"], found["recall"], found["f1"]], [precision, recall, f1], atol=1e-15)
    assert np.isclose(found["macro_f1"], f1.mean())
    assert found["accuracy"] == (labels_N == called_N).mean()


def test_the_columns_that_are_resampled_add_up_to_the_scores() -> None:
    logits_NC, labels_N = drawn(300, 4)
    metrics = evaluate_logits(logits_NC, labels_N)
    total = block_sums(judged(logits_NC, labels_N), np.arange(300) % 7).sum(axis=0)
    assert total[:9].reshape(3, 3).tolist() == metrics["confusion"]
    assert total[9] == 300
    assert np.isclose(total[10] / 300, metrics["nll"])
    assert np.isclose(total[11] / 300, metrics["brier"])
    assert np.isclose(np.abs(total[12:]).sum() / 300, metrics["ece"])
    by_class = [brier_score_loss(labels_N == c, softmax(logits_NC, axis=1)[:, c]) for c in range(3)]
    assert np.isclose(metrics["brier"], sum(by_class))


def test_weights_are_fixed_by_the_seed_and_spread_as_exponential_draws_do() -> None:
    sums_GK = np.random.default_rng(0).normal(1, 1, (6000, 2))  # more blocks than are weighted at a time
    totals_RK = weighted_sums(sums_GK, seed=3)
    assert (totals_RK == weighted_sums(sums_GK, seed=3)).all()
    assert (totals_RK != weighted_sums(sums_GK, seed=4)).any()
    assert np.allclose(totals_RK.mean(axis=0), sums_GK.sum(axis=0), rtol=0.01)
    assert np.allclose(totals_RK.var(axis=0), (sums_GK**2).sum(axis=0), rtol=0.1)


def test_accuracy_of_single_rows_has_jeffreys_interval() -> None:
    labels_N = np.zeros(200, dtype=np.int64)
    logits_NC = 3.0 * np.eye(3)[np.where(np.arange(200) < 130, 0, 1)]
    low, high = score_intervals(judged(logits_NC, labels_N), np.arange(200))["accuracy"]
    assert (low, high) == pytest.approx(beta.ppf([0.025, 0.975], 130.5, 70.5), abs=0.006)


def test_the_mean_loss_of_single_rows_has_students_interval() -> None:
    logits_NC, labels_N = drawn(400, 5)
    losses_N = log_losses(logits_NC, labels_N)
    half = 1.966 * losses_N.std(ddof=1) / 20
    low, high = score_intervals(judged(logits_NC, labels_N), np.arange(400))["nll"]
    assert (low, high) == pytest.approx((losses_N.mean() - half, losses_N.mean() + half), abs=0.012)


def test_rows_that_repeat_in_a_block_count_once() -> None:
    logits_NC, labels_N = drawn(100, 6)
    once = score_intervals(judged(logits_NC, labels_N), np.arange(100))
    copied = judged(np.repeat(logits_NC, 9, axis=0), np.repeat(labels_N, 9))
    together = score_intervals(copied, np.repeat(np.arange(100), 9))
    apart = score_intervals(copied, np.arange(900))
    width = {name: np.ptp(found["macro_f1"]) for name, found in (("once", once), ("together", together))}
    assert width["together"] == pytest.approx(width["once"], rel=0.1)
    assert np.ptp(apart["macro_f1"]) == pytest.approx(width["once"] / 3, rel=0.15)


def test_perfect_scores_keep_an_interval_below_them() -> None:
    labels_N = np.arange(90) % 3
    found = score_intervals(judged(9.0 * np.eye(3)[labels_N], labels_N), np.arange(90))
    for low, high in (found["accuracy"], found["macro_f1"], found["per_class"]["LONG"]["precision"]):
        assert 0.85 < low < 0.99
        assert high == 1


def test_what_no_row_can_show_is_unknown() -> None:
    labels_N = np.array([0, 2] * 20)  # SHORT is absent, and never called
    found = score_intervals(judged(2.0 * np.eye(3)[labels_N[::-1]], labels_N), np.arange(40))
    assert found["per_class"]["SHORT"] == {"precision": None, "recall": None, "f1": None}
    low, high = found["per_class"]["LONG"]["recall"]
    assert (low, high) == (0, pytest.approx(beta.ppf(0.975, 0.5, 20.5), abs=0.02))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_few_rows_or_one_block_break_nothing(rows: int) -> None:
    logits_NC, labels_N = drawn(rows, 0)
    for block_N in (np.zeros(rows, dtype=np.int64), np.arange(rows)):
        found = score_intervals(judged(logits_NC, labels_N), block_N)
        ends = np.array([found[name] for name in ("accuracy", "macro_f1", "nll", "brier", "ece")])
        assert np.isfinite(ends).all()
        assert (ends[:, 0] <= ends[:, 1]).all()


def test_a_difference_is_paired() -> None:
    logits_NC, labels_N = drawn(300, 7)
    model = judged(logits_NC, labels_N)
    same = difference_intervals(model, model, np.arange(300))
    assert same["macro_f1"] == {"value": 0, "interval": pytest.approx([0, 0], abs=1e-6)}
    near_NC = logits_NC.copy()
    near_NC[:5] = near_NC[:5, ::-1]
    near = difference_intervals(model, judged(near_NC, labels_N), np.arange(300))["accuracy"]["interval"]
    far = difference_intervals(model, judged(drawn(300, 8)[0], labels_N), np.arange(300))["accuracy"]["interval"]
    assert np.ptp(near) < np.ptp(far) / 3


@pytest.mark.parametrize("setting", [independent(120, RARE), Setting(400, 60, EVEN)], ids=lambda s: s.name)
def test_intervals_hold_the_truth_about_as_often_as_they_say(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench_coverage.TRUTH_ROWS", 240_000)
    found = cover(setting, sets=100, compare=False)["product"]
    # 100 sets leave a standard error of 2 points: three of them beyond the bounds that 1,000 sets keep.
    assert [name for name in SCORES if not LOWEST - 0.05 <= found[name] <= min(HIGHEST + 0.05, 1)] == []
    assert LOWEST <= np.mean(list(found.values())) <= HIGHEST


# Calibration and answers only when sure


def test_no_block_is_split_across_folds_and_folds_are_of_like_size() -> None:
    block_N = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 9, 30))
    fold_N = assign_folds(block_N)
    assert all(len(np.unique(fold_N[block_N == block])) == 1 for block in range(30))
    assert np.bincount(fold_N).min() > 0.6 * len(block_N) / 5
    assert assign_folds(np.arange(50)).tolist() == np.repeat(np.arange(5), 10).tolist()


def test_a_temperature_of_one_block_is_not_believed() -> None:
    logits_NC, labels_N = drawn(60, 1, signal=5)
    scaler = TemperatureScaler().fit(logits_NC, labels_N, np.zeros(60, dtype=np.int64))
    assert scaler.temperature_ == 1
    assert scaler.reason_ is not None
    assert "one block" in scaler.reason_


def test_the_reliability_table_holds_the_calibration_error() -> None:
    logits_NC, labels_N = drawn(200, 2)
    probabilities_NC = softmax(logits_NC, axis=1)
    table = reliability_table(probabilities_NC, labels_N)
    assert sum(row["rows"] for row in table) == 200
    error = sum(row["rows"] * abs(row["accuracy"] - row["confidence"]) for row in table) / 200
    assert error == pytest.approx(expected_calibration_error(probabilities_NC, labels_N))


def test_the_area_under_risk_and_coverage_is_the_plug_in_of_harmonic_weights() -> None:
    logits_NC, labels_N = drawn(150, 3)
    probabilities_NC = softmax(logits_NC, axis=1)
    order = np.argsort(-probabilities_NC.max(axis=1))
    error_N = (probabilities_NC.argmax(axis=1) != labels_N)[order]
    harmonic = np.concatenate([[0], (1 / np.arange(1, 151)).cumsum()])
    found = risk_coverage(probabilities_NC, labels_N)
    assert found["aurc"] == pytest.approx(float(error_N @ (harmonic[150] - harmonic[:150])) / 150)
    least = probabilities_NC.max(axis=1).min()
    assert found["curve"][-1] == {"coverage": 1, "risk": pytest.approx(error_N.mean()), "confidence": least}
    flat = risk_coverage(np.tile([0.5, 0.3, 0.2], (150, 1)), labels_N)
    assert np.allclose([point["risk"] for point in flat["curve"]], (labels_N != 0).mean())


def test_a_threshold_reaches_the_precision_at_the_largest_coverage() -> None:
    logits_NC, labels_N = drawn(400, 9)
    probabilities_NC = softmax(logits_NC, axis=1)
    found = choose_thresholds(probabilities_NC, labels_N, {"LONG": 0.9, "SHORT": 1.01})
    least = found["LONG"]["min_confidence"]
    own_N = probabilities_NC.argmax(axis=1) == 0
    confidence_N = probabilities_NC.max(axis=1)
    assert least is not None

    def precision(bound: float) -> float:
        return float((labels_N[own_N & (confidence_N >= bound)] == 0).mean())

    assert precision(least) >= 0.9
    assert all(precision(bound) < 0.9 for bound in confidence_N[own_N] if bound < least)
    assert found["SHORT"]["min_confidence"] is None
    called_N, abstained_N = abstain(probabilities_NC, min_confidence_by_class({"LONG": least, "SHORT": None}))
    assert (called_N == 1).sum() == 0
    assert (called_N[abstained_N] == 2).all()
    assert not abstained_N[probabilities_NC.argmax(axis=1) == 2].any()
    assert found["LONG"]["calls"] == (called_N == 0).sum()


def test_fewer_than_ten_calls_are_no_evidence() -> None:
    labels_N = np.zeros(9, dtype=np.int64)
    nine = choose_thresholds(np.tile([0.8, 0.1, 0.1], (9, 1)), labels_N, {"LONG": 0.5})["LONG"]
    ten = choose_thresholds(np.tile([0.8, 0.1, 0.1], (10, 1)), np.append(labels_N, 0), {"LONG": 0.5})["LONG"]
    assert (nine["min_confidence"], nine["calls"], ten["calls"]) == (None, 0, 10)
    assert ten["min_confidence"] == pytest.approx(0.8 - 1e-5)


def test_a_precision_that_equals_the_wanted_one_reaches_it() -> None:
    for hundredths in range(1, 101):  # 55 of 100 is 0.55, though 0.55 · 100 is more than 55 in floating point
        labels_N = np.repeat([0, 1], [hundredths, 100 - hundredths])
        found = choose_thresholds(np.tile([0.8, 0.1, 0.1], (100, 1)), labels_N, {"LONG": hundredths / 100})["LONG"]
        assert (found["calls"], found["precision"]) == (100, hundredths / 100)


def test_rounding_does_not_part_the_last_row_kept_from_its_calls() -> None:
    confidence_N = np.append(np.linspace(0.9, 0.6, 20), 0.6 - 3e-6)
    probabilities_NC = np.stack([confidence_N, *2 * [(1 - confidence_N) / 2]], axis=1)
    found = choose_thresholds(probabilities_NC, np.repeat([0, 1], [20, 1]), {"LONG": 1.0})["LONG"]
    for noise in (-1e-6, 1e-6):  # of the row's confidence in other company
        abstained_N = abstain(probabilities_NC + noise, min_confidence_by_class({"LONG": found["min_confidence"]}))[1]
        assert abstained_N.nonzero()[0].tolist() == [20]
