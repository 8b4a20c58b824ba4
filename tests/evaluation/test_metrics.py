"""Scores, targets and temperature."""

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    log_loss,
)

from ctxtrain.config.sections import TargetsConfig
from ctxtrain.evaluation import bootstrap
from ctxtrain.evaluation import metrics as metrics_module
from ctxtrain.evaluation.bootstrap import NO_INTERVALS, difference_intervals, score_intervals
from ctxtrain.evaluation.calibration import FOLDS, MAX_TEMPERATURE, MIN_TEMPERATURE, TemperatureScaler, fit_temperature
from ctxtrain.evaluation.metric_formulas import ScoredRows, expected_calibration_error, negative_log_likelihood
from ctxtrain.evaluation.metrics import METRICS, FromConfusion, MeanOverRows, Metric, View, evaluate_logits, metrics_for
from ctxtrain.evaluation.targets import evaluate_targets
from ctxtrain.labels import LABELS
from ctxtrain.storage.metrics_log import metric_schema
from ctxtrain.storage.validated import schema_faults

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def drawn(rows: int, seed: int, scale: float = 1.0) -> tuple[Floats, Ints]:
    """Logits, and labels drawn from softmax(logits): so `logits · scale` has the temperature `scale`."""
    rng = np.random.default_rng(seed)
    logits_NC = rng.normal(0, 1.5, (rows, 3))
    labels_N = (rng.random((rows, 1)) > softmax(logits_NC, axis=1).cumsum(axis=1)).sum(axis=1)
    return logits_NC * scale, labels_N


UNKNOWN: dict[str, Any] = {
    **dict.fromkeys(("accuracy", "macro_f1")),
    "per_class": dict.fromkeys(LABELS, dict.fromkeys(("precision", "recall"))),
}

# Scores


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    logits_NC, labels_N = drawn(200, seed)
    metrics = evaluate_logits(logits_NC, labels_N)
    predicted_N = logits_NC.argmax(axis=1)
    report = classification_report(labels_N, predicted_N, target_names=LABELS, output_dict=True)
    assert metrics["accuracy"] == accuracy_score(labels_N, predicted_N)
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels_N, predicted_N, average="macro"), abs=1e-12)
    assert metrics["confusion"] == confusion_matrix(labels_N, predicted_N).tolist()
    assert metrics["nll"] == pytest.approx(log_loss(labels_N, softmax(logits_NC, axis=1)), abs=1e-12)
    assert (metrics["rows"], metrics["absent"]) == (200, [])
    for label in LABELS:
        scores = metrics["per_class"][label]
        assert scores["precision"] == pytest.approx(report[label]["precision"], abs=1e-12)
        assert scores["recall"] == pytest.approx(report[label]["recall"], abs=1e-12)
        assert scores["f1"] == pytest.approx(report[label]["f1-score"], abs=1e-12)
        assert scores["support"] == report[label]["support"]


def test_confusion_has_the_true_class_in_rows_and_the_called_class_in_columns() -> None:
    metrics = evaluate_logits(np.eye(3)[[1, 1, 2, 0]], np.array([0, 0, 0, 2]))
    assert metrics["confusion"] == [[0, 2, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("called", [0, 1])
def test_a_class_without_rows_scores_0_stays_in_the_mean_and_is_named(called: int) -> None:
    labels_N = np.array([0, 0, 2, 2])
    logits_NC = np.eye(3)[[0, called, 2, 2]] * 5  # SHORT is absent; once it is also called
    metrics = evaluate_logits(logits_NC, labels_N)
    assert metrics["absent"] == ["SHORT"]
    assert metrics["per_class"]["SHORT"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    others = [metrics["per_class"][label]["f1"] for label in ("LONG", "SKIP")]
    assert metrics["macro_f1"] == pytest.approx(sum(others) / 3)


def test_a_temperature_changes_probabilities_only() -> None:
    logits_NC, labels_N = drawn(300, 1)
    plain, cooled = evaluate_logits(logits_NC, labels_N), evaluate_logits(logits_NC, labels_N, temperature=2.5)
    assert (cooled["accuracy"], cooled["confusion"]) == (plain["accuracy"], plain["confusion"])
    assert cooled["nll"] == negative_log_likelihood(logits_NC / 2.5, labels_N) != plain["nll"]
    assert cooled["ece"] == expected_calibration_error(softmax(logits_NC / 2.5, axis=1), labels_N) != plain["ece"]


def test_likelihood_is_finite_at_extreme_logits() -> None:
    logits_NC = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0]])
    assert negative_log_likelihood(logits_NC, np.array([0, 0])) == 0
    assert negative_log_likelihood(logits_NC, np.array([0, 1])) == 1e4


# The registry


def kappa(confusion_CC: Floats) -> Floats:
    """Cohen's, 0 where it is not defined."""
    rows = confusion_CC.sum(axis=(-2, -1))
    right = np.trace(confusion_CC, axis1=-2, axis2=-1) * rows
    chance = (confusion_CC.sum(axis=-1) * confusion_CC.sum(axis=-2)).sum(axis=-1)
    whole = rows**2 - chance
    return np.divide(right - chance, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 1e-9)


KAPPA = Metric(
    "kappa", "Cohen’s kappa", "kappa", "kappa", FromConfusion(kappa), -1.0, 1.0, ("scores", "baselines", "runs")
)
MARGIN = Metric(  # how far the likeliest class lies above the true one
    name="margin",
    title="mean margin",
    short="margin",
    narrow="margin",
    measure=MeanOverRows(
        lambda judged: (
            judged.probabilities_NC.max(axis=1)
            - np.take_along_axis(judged.probabilities_NC, judged.labels_N[:, None], 1)[:, 0]
        )
    ),
    lowest=0.0,
    highest=1.0,
    views=("scores", "spread"),
)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (metrics_module, bootstrap):
        monkeypatch.setattr(module, "METRICS", (*METRICS, KAPPA, MARGIN))


def within(ends: list[float], lowest: float, highest: float) -> bool:
    return lowest <= ends[0] <= ends[1] <= highest


def test_names_are_unique_and_functions_of_the_confusion_matrix_have_a_finite_range() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.lowest < metric.highest
        assert not metric.depends_only_on_predictions or np.isfinite([metric.lowest, metric.highest]).all()


def test_every_metric_of_the_registry_is_a_key_of_the_scores_and_has_an_interval(added: None) -> None:
    logits_NC, labels_N = drawn(200, 0)
    scores = evaluate_logits(logits_NC, labels_N)
    metrics = (*METRICS, KAPPA, MARGIN)
    of_predictions = [metric.name for metric in metrics if metric.depends_only_on_predictions]
    others = [metric.name for metric in metrics if not metric.depends_only_on_predictions]
    assert list(scores) == [*of_predictions, "per_class", "confusion", *others, "rows", "absent"]
    assert scores["kappa"] == pytest.approx(cohen_kappa_score(labels_N, logits_NC.argmax(axis=1)), abs=1e-12)
    found = score_intervals(ScoredRows.from_logits(logits_NC, labels_N), np.arange(200))
    assert list(found) == [*(metric.name for metric in (*METRICS, KAPPA, MARGIN)), "per_class"]
    for name in ("kappa", "margin"):
        assert found[name][0] < scores[name] < found[name][1]


def test_a_metric_of_the_confusion_matrix_leaves_the_other_intervals_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged, block_N = ScoredRows.from_logits(*drawn(120, 1)), np.arange(120) // 3
    before = score_intervals(judged, block_N)
    for module in (metrics_module, bootstrap):
        monkeypatch.setattr(module, "METRICS", (*METRICS, KAPPA))
    after = score_intervals(judged, block_N)
    assert {name: after[name] for name in before} == before


def test_intervals_of_an_added_metric_are_as_wide_as_redrawing_the_rows_says(added: None) -> None:
    logits_NC, labels_N = drawn(400, 2)
    judged = ScoredRows.from_logits(logits_NC, labels_N)
    found = score_intervals(judged, np.arange(400))
    rng = np.random.default_rng(0)
    for metric in (KAPPA, MARGIN):
        values = []
        for _ in range(1000):
            rows = rng.integers(0, 400, 400)
            values.append(metric.measure.value(ScoredRows.from_logits(logits_NC[rows], labels_N[rows])))
        assert found[metric.name] == pytest.approx(
            np.quantile(values, [0.025, 0.975]), abs=0.15 * np.ptp(found[metric.name])
        )


def test_an_added_metric_keeps_an_interval_where_no_replicate_differs(added: None) -> None:
    labels_N = np.arange(90) % 3
    low, high = score_intervals(ScoredRows.from_logits(9.0 * np.eye(3)[labels_N], labels_N), np.arange(90))["kappa"]
    assert 0.85 < low < 0.99
    assert high == 1


@pytest.mark.parametrize("rows", [2, 3, 7])
@pytest.mark.parametrize("signal", [-4.0, 0.0, 200.0])
@pytest.mark.parametrize("size", [1, 5])
def test_no_interval_leaves_the_range_of_its_metric(added: None, rows: int, signal: float, size: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        labels_N, block_N = rng.integers(0, 3, rows), np.arange(rows) // size
        logits_NC = signal * np.eye(3)[labels_N] + rng.normal(0, 1, (rows, 3))
        model = ScoredRows.from_logits(logits_NC, labels_N)
        other = ScoredRows.from_logits(np.eye(3)[labels_N] + rng.normal(0, 1, (rows, 3)), labels_N)
        found = score_intervals(model, block_N, seed)
        assert [m.name for m in (*METRICS, KAPPA, MARGIN) if not within(found[m.name], m.lowest, m.highest)] == []
        shares = [ends for own in found["per_class"].values() for ends in own.values() if ends]
        assert all(within(ends, 0, 1) for ends in shares)
        differences = difference_intervals(model, other, block_N, seed)
        widest = {metric.name: metric.highest - metric.lowest for metric in metrics_for("baselines")}
        assert differences.keys() == widest.keys() >= {"macro_f1", "accuracy", "nll", "kappa"}
        assert all(within(differences[name]["interval"], -most, most) for name, most in widest.items())


def test_an_exact_difference_moves_its_interval_before_the_range_ends_it() -> None:
    labels_N = np.array([0, 1, 2, 0])
    model, other = (ScoredRows.from_logits(sign * 9.0 * np.eye(3)[labels_N], labels_N) for sign in (1, -1))
    few = ScoredRows.from_logits(9.0 * np.eye(3)[[0, 1, 0, 1]], labels_N)
    plain = difference_intervals(model, few, np.arange(4))["accuracy"]
    assert plain == {"value": 0.5, "interval": [pytest.approx(-0.5, abs=0.5), 1.0]}
    exact = {metric.name: 0.2 for metric in metrics_for("baselines")}
    moved = difference_intervals(model, few, np.arange(4), exact=exact)["accuracy"]
    assert moved["value"] == 0.2
    assert moved["interval"][1] == 1.0  # not 1 less the 0.3 that it moved by
    assert moved["interval"][0] == pytest.approx(plain["interval"][0] - 0.3)
    assert difference_intervals(model, other, np.arange(4))["accuracy"]["interval"] == pytest.approx([1, 1])


def test_tables_of_leads_begin_with_the_metric_of_the_leads(added: None) -> None:
    names = {place: [metric.name for metric in metrics_for(place)] for place in get_args(View)}
    assert names["scores"][:4] == names["spread"][:4] == ["accuracy", "macro_f1", "nll", "ece"]
    assert (names["baselines"][:3], names["runs"][:2]) == (["macro_f1", "accuracy", "nll"], ["macro_f1", "accuracy"])
    assert [place for place, found in names.items() if "kappa" in found] == ["scores", "baselines", "runs"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"kappa": -1.5}, "kappa must be greater than or equal to -1, got -1.5"),
        ({"accuracy": 1.5}, "accuracy must be less than or equal to 1, got 1.5"),
        ({"ece": None}, "ece must be a valid number, got null"),
    ],
)
def test_files_hold_each_metric_in_its_range_and_lack_none(change: dict[str, Any], fault: str | None) -> None:
    schema = metric_schema((*METRICS, KAPPA))
    value = {**dict.fromkeys((metric.name for metric in (*METRICS, KAPPA)), 0.5), **change}
    assert schema_faults(schema, value) == [fault] * (fault is not None)
    for name in ("accuracy", "kappa"):
        del value[name]
        assert f"lacks {name}" in schema_faults(schema, value)


# Expected calibration error


def confident(confidence_N: Floats, correct_N: NDArray[np.bool_]) -> tuple[Floats, Ints]:
    """Probabilities whose largest entry is the confidence, and labels that it meets or misses."""
    rest_N = (1 - confidence_N) / 2
    return np.stack([confidence_N, rest_N, rest_N], axis=1), np.where(correct_N, 0, 1)


def test_confidence_that_comes_true_has_no_calibration_error() -> None:
    probabilities_NC, labels_N = confident(np.full(1500, 0.8), np.arange(1500) % 5 != 0)
    assert expected_calibration_error(probabilities_NC, labels_N) == pytest.approx(0, abs=1e-9)
    logits_NC, labels_N = drawn(60_000, 3)
    assert expected_calibration_error(softmax(logits_NC, axis=1), labels_N) < 0.01


def test_overconfidence_is_the_gap_between_confidence_and_accuracy() -> None:
    probabilities_NC, labels_N = confident(np.full(1500, 0.9), np.arange(1500) % 2 == 0)
    assert expected_calibration_error(probabilities_NC, labels_N) == pytest.approx(0.4, abs=0.01)
    assert expected_calibration_error(np.eye(3)[[0, 1, 2]], np.array([1, 2, 0])) == 1


def test_bins_hold_equal_mass() -> None:
    # Confidences lie so close that bins of equal width would be one bin, in which the two errors cancel out.
    order_N = np.random.default_rng(0).permutation(100)
    confidence_N = np.where(order_N < 50, 0.701, 0.702)
    probabilities_NC, labels_N = confident(confidence_N, order_N >= 30)
    assert expected_calibration_error(probabilities_NC, labels_N, bins=2) == pytest.approx(0.3, abs=0.01)
    assert expected_calibration_error(probabilities_NC, labels_N, bins=1) == pytest.approx(0, abs=0.01)


def test_fewer_rows_than_bins_make_one_bin_a_row() -> None:
    probabilities_NC, labels_N = confident(np.array([0.9, 0.6]), np.array([True, False]))
    assert expected_calibration_error(probabilities_NC, labels_N, bins=15) == pytest.approx((0.1 + 0.6) / 2)


# Targets


def test_targets_carry_the_specifications_values_and_priorities() -> None:
    metrics = evaluate_logits(*drawn(100, 0))
    verdicts = evaluate_targets(metrics, TargetsConfig().model_dump(), UNKNOWN)
    assert [(v["metric"], v["target"], v["priority"]) for v in verdicts] == [
        ("accuracy", 0.65, "HIGH"),
        ("macro_f1", 0.60, "CRITICAL"),
        ("long_precision", 0.60, "HIGH"),
        ("short_precision", 0.60, "HIGH"),
        ("long_recall", 0.55, "MEDIUM"),
        ("short_recall", 0.55, "MEDIUM"),
    ]
    assert [v["value"] for v in verdicts] == [
        metrics["accuracy"],
        metrics["macro_f1"],
        *(metrics["per_class"][label]["precision"] for label in ("LONG", "SHORT")),
        *(metrics["per_class"][label]["recall"] for label in ("LONG", "SHORT")),
    ]


def test_a_value_that_equals_its_target_meets_it() -> None:
    metrics = evaluate_logits(*drawn(100, 0))
    values = {
        verdict["metric"]: verdict["value"]
        for verdict in evaluate_targets(metrics, TargetsConfig().model_dump(), UNKNOWN)
    }
    assert all(verdict["met"] for verdict in evaluate_targets(metrics, values, UNKNOWN))
    above = {name: np.nextafter(value, 2) for name, value in values.items()}
    assert not any(verdict["met"] for verdict in evaluate_targets(metrics, above, UNKNOWN))


def intervals(low: float, high: float) -> dict[str, Any]:
    scores = {"precision": [low, high], "recall": [low, high]}
    return {"accuracy": [low, high], "macro_f1": [low, high], "per_class": dict.fromkeys(LABELS, scores)}


@pytest.mark.parametrize(
    ("target", "low", "verdict"), [(0.6, 0.6, "met"), (0.6, 0.59, "met, may be luck"), (0.95, 0.6, "missed")]
)
def test_a_target_is_met_without_luck_if_the_lower_end_of_the_interval_reaches_it(
    target: float, low: float, verdict: str
) -> None:
    metrics = evaluate_logits(4 * np.eye(3)[[0, 1, 2, 0, 1, 0, 0, 1, 1, 2]], np.array([0, 1, 2, 0, 1, 0, 0, 1, 1, 0]))
    targets = dict.fromkeys(TargetsConfig().model_dump(), target)
    judged = evaluate_targets(metrics, targets, intervals(low, 1))
    assert {
        (v["verdict"], v["met"], *(v["interval"] or ())) for v in judged if v["metric"] in ("accuracy", "long_recall")
    } == {(verdict, verdict != "missed", low, 1)}
    without = {v["verdict"] for v in evaluate_targets(metrics, targets, NO_INTERVALS) if v["metric"] == "accuracy"}
    assert without == {"missed" if verdict == "missed" else "met, may be luck"}


# Temperature


@pytest.mark.parametrize("temperature", [0.4, 0.8, 1.7, 5.0])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    logits_NC, labels_N = drawn(20_000, 4, scale=temperature)
    scaler = TemperatureScaler().fit(logits_NC, labels_N)
    assert scaler.reason_ is None
    assert scaler.temperature_ == pytest.approx(temperature, rel=0.04)
    assert scaler.after_["nll"] < scaler.before_["nll"]
    assert scaler.after_["ece"] < scaler.before_["ece"]
    assert scaler.after_["ece"] < 0.02


def test_the_found_temperature_is_the_best_of_a_grid() -> None:
    logits_NC, labels_N = drawn(400, 8, scale=3.0)
    least = negative_log_likelihood(logits_NC / fit_temperature(logits_NC, labels_N), labels_N)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 400)
    assert all(negative_log_likelihood(logits_NC / t, labels_N) >= least for t in grid)


def test_scores_after_calibration_are_judged_on_rows_that_did_not_fit_it() -> None:
    logits_NC, labels_N = drawn(60, 11, scale=3.0)
    scaler = TemperatureScaler().fit(logits_NC, labels_N)
    in_sample = negative_log_likelihood(logits_NC / scaler.temperature_, labels_N)
    assert in_sample < scaler.after_["nll"] < scaler.before_["nll"]
    assert scaler.before_["nll"] == negative_log_likelihood(logits_NC, labels_N)


def test_the_probabilities_are_the_softmax_of_scaled_logits_and_the_class_stays() -> None:
    logits_NC, labels_N = drawn(300, 2, scale=3.0)
    scaler = TemperatureScaler().fit(logits_NC, labels_N)
    probabilities_NC = scaler.predict_proba(logits_NC)
    assert scaler.temperature_ > 1.5
    assert np.allclose(probabilities_NC, softmax(logits_NC / scaler.temperature_, axis=1), atol=1e-15)
    assert (probabilities_NC.argmax(axis=1) == logits_NC.argmax(axis=1)).all()


def test_the_temperature_stays_1_where_it_does_not_help() -> None:
    scaler = TemperatureScaler().fit(np.zeros((60, 3)), np.arange(60) % 3)
    assert scaler.temperature_ == 1
    assert scaler.after_ == scaler.before_
    assert scaler.reason_ == "no temperature lowered the negative log-likelihood of rows it was not fitted on"
    assert scaler.summary()["reason"] == scaler.reason_


@pytest.mark.parametrize(
    ("labels", "found"),
    [([1] * 60, "60 of 1 classes"), ([0, 1, 2] * 3, "9 of 3 classes"), ([2], "1 of 1 classes")],
)
def test_the_temperature_stays_1_with_too_few_rows_or_classes(labels: list[int], found: str) -> None:
    logits_NC, _ = drawn(len(labels), 0, scale=4.0)
    scaler = TemperatureScaler().fit(logits_NC, np.array(labels))
    assert (scaler.temperature_, scaler.after_) == (1, scaler.before_)
    assert scaler.reason_ == f"too few rows to fit a temperature: {found}"


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(2 * FOLDS, 40),
    size=st.sampled_from([0.0, 1e-9, 1.0, 50.0, 1e4, 1e30]),
    ties=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_finite_logits_give_a_temperature_within_bounds_that_does_no_harm(
    seed: int, rows: int, size: float, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits_NC: Floats = size * (rng.integers(-2, 3, (rows, 3)).astype(float) if ties else rng.normal(0, 1, (rows, 3)))
    labels_N = rng.integers(0, 3, rows)
    scaler = TemperatureScaler().fit(logits_NC, labels_N)
    assert MIN_TEMPERATURE <= scaler.temperature_ <= MAX_TEMPERATURE
    assert (scaler.reason_ is None) == (scaler.after_["nll"] < scaler.before_["nll"])
    assert scaler.after_["nll"] <= scaler.before_["nll"]
    probabilities_NC = scaler.predict_proba(logits_NC)
    assert np.isfinite(probabilities_NC).all()
    likeliest_N = logits_NC.argmax(axis=1)[:, None]
    assert np.allclose(np.take_along_axis(probabilities_NC, likeliest_N, 1)[:, 0], probabilities_NC.max(axis=1))
