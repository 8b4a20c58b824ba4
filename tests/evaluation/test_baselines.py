"""What a model is held against, which of the two is to be used, and the words for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import norm

from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.parse_window import Window
from ctxtrain.data.positions import collect_positions
from ctxtrain.data.window_file import WindowFile
from ctxtrain.evaluation.baseline_models import MAX_ROWS_PER_TREE, extra_trees
from ctxtrain.evaluation.baselines import (
    Baseline,
    best_on_validation,
    count_variants,
    expected_random_scores,
    fit_baselines,
)
from ctxtrain.evaluation.blocks import Blocks
from ctxtrain.evaluation.comparison import Finding, compare, finding
from ctxtrain.evaluation.export_scores import score_export
from ctxtrain.evaluation.metric_formulas import ScoredRows, confusion_scores, log_losses
from ctxtrain.evaluation.metrics import evaluate_logits
from ctxtrain.labels import LABELS
from ctxtrain.reporting.summary_schema import Baselines, Best, Data, Intervals, Summary, Target
from ctxtrain.reporting.verdict import advice, verdict
from tests.helpers import DRIFT, Row, dated_rows, learnable_rows, make_row, make_window, write_rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Splits = tuple[dict[str, list[Window]], dict[str, Ints]]

TRAINED = ["logistic_regression", "gradient_boosting", "extra_trees", "catboost"]


def splits(**rows: list[Row]) -> Splits:
    windows = {name: [make_window(row) for row in own] for name, own in rows.items()}
    return windows, {name: np.array([LABELS.index(row["label"]) for row in own]) for name, own in rows.items()}


pytestmark = pytest.mark.usefixtures("all_trees")


def learnable_days() -> dict[str, list[Row]]:
    sizes = {"train": 120, "val": 40, "test": 40}
    return {name: dated_rows(count, seed, apart=1440) for seed, (name, count) in enumerate(sizes.items())}


@pytest.fixture(scope="module")
def learnable() -> Splits:
    return splits(**learnable_days())


@pytest.fixture(scope="module")
def fitted(learnable: Splits, all_trees: None) -> dict[str, Baseline]:
    windows, labels = learnable
    found, left_out = fit_baselines(windows, labels, "test", fit_codec("compact", windows["train"]), seed=0)
    assert left_out == {}
    return found


def test_baselines_learn_what_is_there_and_come_out_the_same_each_time(
    learnable: Splits,
    fitted: dict[str, Baseline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert list(fitted) == ["majority", "class_prior", *TRAINED]
    assert min(fitted[name].scores["macro_f1"] for name in TRAINED) > 0.8
    windows, labels = learnable
    codec = fit_codec("compact", windows["train"])
    monkeypatch.chdir(tmp_path)
    again, _ = fit_baselines(windows, labels, "test", codec, seed=0)
    for name, baseline in fitted.items():
        assert baseline.scores == again[name].scores
        assert (baseline.scored_rows.probabilities_NC == again[name].scored_rows.probabilities_NC).all()
    other, _ = fit_baselines(windows, labels, "test", codec, seed=1, only={"extra_trees", "catboost"})
    assert list(other) == ["extra_trees", "catboost"]
    for name, baseline in other.items():
        assert (baseline.scored_rows.probabilities_NC != fitted[name].scored_rows.probabilities_NC).any()
    assert list(tmp_path.iterdir()) == []  # CatBoost would keep its logs in the working directory
    assert capfd.readouterr() == ("", "")


def test_baselines_can_be_fitted_where_prices_come_next_to_0() -> None:
    windows, labels = splits(train=learnable_rows(60, 0), val=learnable_rows(20, 1))
    for window in windows["train"][::2]:
        window.bars["close"][-1] = window.bars["low"][-1] = 1e-300
    found, left_out = fit_baselines(windows, labels, "val", fit_codec("compact", windows["train"]), seed=0)
    assert (len(found), left_out) == (6, {})


def test_catboost_is_left_out_with_its_reason_where_windows_do_not_differ() -> None:
    same = [make_row(label) for label in [*LABELS, "SKIP"]] * 5
    windows, labels = splits(train=same, val=same)
    found, left_out = fit_baselines(windows, labels, "val", fit_codec("compact", windows["train"]), seed=0)
    assert list(found) == ["majority", "class_prior", *TRAINED[:-1]]
    assert left_out == {
        "catboost": "CatBoost cannot be fitted to these rows (All features are either constant or ignored.)"
    }


def test_text_rows_get_the_two_baselines_that_need_no_bars() -> None:
    text = {name: [Window("", None, 0, text="x")] * 6 for name in ("train", "val")}
    labels = dict.fromkeys(text, np.array([0, 1, 2, 2, 2, 0]))
    found, left_out = fit_baselines(text, labels, "val", fit_codec("compact", text["train"]), seed=0)
    assert list(found) == ["majority", "class_prior"]
    assert left_out == dict.fromkeys(TRAINED, "text rows have no bars to compute features from")
    assert found["majority"].scores["accuracy"] == 0.5
    assert found["majority"].scores["per_class"]["SKIP"]["recall"] == 1
    judged = answers(labels["val"], labels["val"])
    metrics = evaluate_logits(3.0 * np.eye(3)[labels["val"]], labels["val"])
    looks = count_variants(found)
    against = compare(judged, metrics, found, "class_prior", rows_as_blocks(6), seed=0, candidate_count=looks)
    assert (looks, against["finding"]) == (1, "ahead")


@pytest.mark.parametrize("looks", [1, 8])
@pytest.mark.parametrize("rows", [2, 6])
def test_no_interval_of_a_lead_leaves_its_range_however_few_the_rows(rows: int, looks: int) -> None:
    labels = {"train": np.array([0, 1, 2, 2, 2, 0]), "val": np.array([0, 1, 2, 2, 0, 1])[:rows]}
    text = {name: [Window("", None, 0, text="x")] * len(labels_N) for name, labels_N in labels.items()}
    found, _ = fit_baselines(text, labels, "val", fit_codec("compact", text["train"]), seed=0)
    metrics = evaluate_logits(3.0 * np.eye(3)[labels["val"]], labels["val"])
    judged = answers(labels["val"], labels["val"])
    compared = compare(judged, metrics, found, "majority", rows_as_blocks(rows), seed=0, candidate_count=looks)
    scores = compared["scores"]
    leads = [own["difference"][name] for own in scores.values() for name in ("macro_f1", "accuracy")]
    leads += [own["over_chance"] for own in scores.values() if own["over_chance"]]
    assert all(-1 <= lead["interval"][0] <= lead["value"] <= lead["interval"][1] <= 1 for lead in leads)
    assert 1 in [lead["interval"][1] for lead in leads]  # one would reach further


def rare(count: int, seed: int) -> list[Row]:
    """One LONG and one SHORT to eight SKIP, with drifts that are hard to tell from none."""
    labels = np.random.default_rng(seed).choice(LABELS, count, p=[0.1, 0.1, 0.8]).tolist()
    return [
        make_row(label, seed=10_000 * seed + n, drift=DRIFT[label] / 3, flags=False) for n, label in enumerate(labels)
    ]


def test_class_weights_are_kept_where_they_do_better_on_validation_rows(fitted: dict[str, Baseline]) -> None:
    windows, labels = splits(train=rare(150, 1), val=rare(100, 2))
    names = ("extra_trees", "catboost")
    found, _ = fit_baselines(windows, labels, "val", fit_codec("compact", windows["train"]), seed=0, only=names)
    for baseline in found.values():
        assert baseline.scores["class_weights"] == "balanced"
        assert baseline.scores["per_class"]["LONG"]["recall"] > 0  # without weights none is called
    assert "none" in [fitted[name].scores["class_weights"] for name in TRAINED]


def test_the_one_to_beat_is_the_best_on_validation_rows_also_where_test_rows_would_choose_another(
    learnable: Splits, tmp_path: Path
) -> None:
    windows, labels = learnable
    files = {name: WindowFile(write_rows(tmp_path / name, rows)) for name, rows in learnable_days().items()}
    turned = {**labels, "test": (labels["test"] + 1) % 3}  # of these test rows nobody can have learned anything
    metrics = evaluate_logits(np.eye(3)[turned["test"]], turned["test"])
    found = score_export(
        files,
        {name: collect_positions(file) for name, file in files.items()},
        turned,
        "test",
        codec=fit_codec("compact", windows["train"]),
        logits_NC=5 * np.eye(3)[turned["test"]],
        temperature=1.0,
        metrics=metrics,
        targets={"accuracy": 0.5, "macro_f1": 0.5}
        | {f"{side}_{score}": 0.5 for side in ("long", "short") for score in ("precision", "recall")},
        thresholds={},
        seed=0,
    )["baselines"]
    scores = found["scores"]
    assert max(scores, key=lambda name: scores[name]["macro_f1"]) == "class_prior"
    assert found["best"] == max(scores, key=lambda name: scores[name]["validation_macro_f1"]) in TRAINED
    assert (found["finding"], found["use"]) == ("ahead", "model")
    assert {own["over_chance"]["looks"] for name, own in scores.items() if name != "class_prior"} == {1}


def test_of_equal_baselines_the_simpler_one_is_to_be_beaten() -> None:
    assert best_on_validation({name: {"validation_macro_f1": 0.5} for name in TRAINED}) == "logistic_regression"


def test_a_tree_sees_no_more_rows_than_fit_into_memory_by_the_hundred() -> None:
    for rows, most in {30: 30, 3 * MAX_ROWS_PER_TREE: MAX_ROWS_PER_TREE}.items():
        labels_N = np.arange(rows) % 3
        trees = extra_trees(False, 0, rows).set_params(n_estimators=5)
        trees.fit((labels_N == 1)[:, None].astype(float), labels_N)
        assert most / 2 < max(tree.tree_.n_node_samples[0] for tree in trees.estimators_) <= most


def test_expected_scores_of_random_calls_are_the_mean_of_many_draws() -> None:
    labels_N = np.repeat([0, 1, 2], [4, 9, 17])
    shares_C = np.array([0.1, 0.3, 0.6])
    rng = np.random.default_rng(0)
    draws = [confusion_scores(np.eye(3)[labels_N].T @ np.eye(3)[rng.choice(3, 30, p=shares_C)]) for _ in range(6_000)]
    expected = expected_random_scores(labels_N, shares_C)
    assert expected["accuracy"] == pytest.approx(np.mean([d["accuracy"] for d in draws]), abs=0.006)
    assert expected["macro_f1"] == pytest.approx(np.mean([d["macro_f1"] for d in draws]), abs=0.006)
    for c, label in enumerate(LABELS):
        for name in ("precision", "recall", "f1"):
            mean = np.mean([d[name][c] for d in draws])
            assert expected["per_class"][label][name] == pytest.approx(mean, abs=0.012)


# Which is to be used


def leads(
    over_best: tuple[float, float], over_chance: tuple[float, float], alone: tuple[float, float]
) -> dict[str, dict[str, Any]]:
    """Scores of CatBoost and of random calls, with the intervals of three leads; the model has 0.7."""

    def lead(interval: tuple[float, float]) -> dict[str, Any]:
        return {"value": sum(interval) / 2, "interval": [*interval]}

    others = {"accuracy": 0.5, "nll": 1.0, "validation_macro_f1": 0.5}
    prior = {"macro_f1": 0.3, "difference": {"macro_f1": lead(over_chance)}, "over_chance": None}
    best = {
        "macro_f1": 0.65,
        "difference": {"macro_f1": lead(over_best)},
        "over_chance": lead(alone) | {"looks": 1},
    }
    return {"class_prior": prior | others, "catboost": best | others}


FINDINGS: dict[Finding, tuple[tuple[float, float], ...]] = {
    "ahead": ((0.01, 0.09), (0.3, 0.5), (0.3, 0.4)),
    "not ahead": ((-0.02, 0.09), (0.3, 0.5), (0.3, 0.4)),
    "undecided": ((-0.02, 0.09), (0.01, 0.1), (-0.01, 0.1)),
    "nothing learned": ((0.01, 0.09), (-0.1, 0.1), (-0.1, 0.1)),
}


@pytest.mark.parametrize("expected", FINDINGS)
def test_what_is_found_follows_from_three_intervals(expected: Finding) -> None:
    scores = leads(*FINDINGS[expected])
    assert finding(scores, "catboost", "class_prior") == expected


def test_where_no_baseline_was_trained_the_model_has_to_beat_chance() -> None:
    for interval, expected in {(0.1, 0.2): "ahead", (-0.1, 0.2): "nothing learned"}.items():
        scores = {"class_prior": leads((0, 0), interval, (0, 0))["class_prior"]}
        assert finding(scores, "class_prior", "class_prior") == expected


def rows_as_blocks(rows: int) -> Blocks:
    return Blocks(np.arange(rows), "single rows", None)


def answers(called_N: Ints, labels_N: Ints) -> ScoredRows:
    logits_NC = 3.0 * np.eye(3)[called_N]
    return ScoredRows(labels_N, softmax(logits_NC, axis=1), np.eye(3)[called_N], log_losses(logits_NC, labels_N))


def test_who_learned_is_seen_from_the_rows_and_the_best_of_several_needs_more(
    learnable: Splits, fitted: dict[str, Baseline]
) -> None:
    best = best_on_validation({name: own.scores for name, own in fitted.items()})
    labels_N, blocks = learnable[1]["test"], rows_as_blocks(40)

    def against(called_N: Ints, looks: int = 1) -> dict[str, Any]:
        metrics = evaluate_logits(3.0 * np.eye(3)[called_N], labels_N)
        model = answers(called_N, labels_N)
        return compare(model, metrics, fitted, best, blocks, seed=0, candidate_count=looks)

    blind = against(np.zeros(40, dtype=np.int64))
    assert (blind["finding"], blind["use"]) == ("not ahead", best)
    assert blind["best_without_input"] == "class_prior"
    counts = (1, count_variants(fitted))
    one, eight = (against(labels_N, looks)["scores"]["catboost"]["over_chance"] for looks in counts)
    assert eight["looks"] == 8
    assert np.ptp(eight["interval"]) / np.ptp(one["interval"]) == pytest.approx(
        norm.ppf(1 - 0.025 / 8) / 1.96, rel=1e-4
    )
    assert one["value"] == eight["value"] == pytest.approx(np.mean(eight["interval"]))


# Words


def partly(part: Any, **values: Any) -> Any:
    """A part of a summary with what its words are about, and no more."""
    return part.model_construct(**values)


def summary(expected: Finding, doubt: str | None = None, **baselines: Any) -> Summary:
    """A summary with what a verdict reads; `baselines` are changes of that part."""
    verdicts = {"accuracy": "met", "macro_f1": "met, may be luck", "long_recall": "missed"}
    compared = {
        "finding": expected,
        "best": "catboost",
        "best_without_input": "class_prior",
        "scores": leads(*FINDINGS.get(expected, FINDINGS["ahead"])),
        "left_out": {},
        "use": None,
    }
    found: Summary = partly(
        Summary,
        targets=[partly(Target, metric=metric, verdict=said) for metric, said in verdicts.items()],
        unfinished=None,
        skipped_steps=0,
        targets_judged_on="validation rows",
        judged_rows_chose_the_epoch=True,
        test=None,
        data=partly(Data, leaked=""),
        best=partly(Best, macro_f1=0.7, rows=60),
        intervals=partly(Intervals, trusted=doubt is None, doubt=doubt),
        baselines=Baselines.model_validate(compared | baselines),
    )
    return found


def in_brief(summary: Summary) -> str:
    return advice(summary, brief=True)


def test_the_verdict_begins_with_usable_and_goes_on_with_the_targets() -> None:
    assert verdict(summary("ahead")) == (
        "Usable: the model clearly beats the best baseline, CatBoost (macro-F1 0.700 against 0.650, difference +0.050, "
        "95 % interval +0.010 to +0.090). Next: score it on newer windows before you trade on it. 1 of 3 targets "
        "missed on 60 validation windows: LONG recall; macro-F1 may be luck. These rows were also used to choose the "
        "epoch, so the scores are optimistic."
    )
    assert in_brief(summary("ahead")).startswith("Usable: the model clearly beats the best baseline, CatBoost. Next: ")


def test_where_the_model_does_not_beat_the_best_baseline_the_verdict_names_it_and_the_next_step() -> None:
    said = verdict(summary("not ahead"))
    assert said.startswith(
        "Not shown to beat the best baseline, CatBoost: the model scores higher, and the gap may be noise (macro-F1 "
        "0.700 against 0.650, difference +0.035, 95 % interval -0.020 to +0.090). That baseline clearly beats random "
        "predictions (macro-F1 0.650 against 0.300, difference +0.350, 95 % interval +0.300 to +0.400); the model does "
        "too (macro-F1 "
    )
    assert "Next: use CatBoost, or train on more windows." in said
    less = summary("not ahead", scores=leads((-0.09, 0.01), (-0.1, 0.1), (0.3, 0.4)))
    assert in_brief(less) == (
        "Not shown to beat the best baseline, CatBoost: the model scores lower, and the gap may be noise. That "
        "baseline clearly beats random predictions; the model is not shown to. Next: use CatBoost, or train on "
        "more windows."
    )
    scores = leads((-0.09, -0.01), (0.1, 0.2), (0.3, 0.4))
    scores["extra_trees"] = scores.pop("catboost")
    less = summary("not ahead", scores=scores, best="extra_trees")
    assert verdict(less).startswith("Beaten by the best baseline, extremely randomised trees (macro-F1 ")


def test_where_nothing_is_learned_the_verdict_recommends_neither() -> None:
    said = verdict(summary("nothing learned"))
    assert said.startswith(
        "No evidence that the model learned anything: do not use it. Neither the model (macro-F1 0.700 against 0.300, "
    )
    assert ") nor the best baseline, CatBoost (macro-F1 0.650 against 0.300, difference +0.000, " in said
    assert "), clearly beats random predictions. Next: check the labels, and what the windows carry." in said
    scores = leads(*FINDINGS["nothing learned"])
    scores["catboost"]["over_chance"]["looks"] = 8
    assert "95 % interval for the best of 8 -0.100 to +0.100)" in verdict(summary("nothing learned", scores=scores))
    left_out = dict.fromkeys(TRAINED, "the rows are text")
    said = verdict(summary("nothing learned", best="class_prior", left_out=left_out))
    assert "do not use it. It does not clearly beat random predictions (macro-F1 0.700 against 0.300, " in said
    assert said.endswith(
        "Baselines left out: logistic regression, gradient boosting, extremely randomised trees and CatBoost; the rows "
        "are text."
    )


def test_where_only_the_model_is_ahead_of_chance_neither_is_recommended_yet() -> None:
    assert in_brief(summary("undecided")) == (
        "Not shown to beat the best baseline, CatBoost: the model scores higher, and the gap may be noise. The model "
        "clearly beats random predictions; that baseline is not shown to. Next: score both on more windows."
    )


def test_with_too_few_blocks_there_are_no_intervals_and_the_verdict_claims_nothing(
    learnable: Splits, fitted: dict[str, Baseline]
) -> None:
    labels_N = learnable[1]["test"]
    model, metrics = answers(labels_N, labels_N), evaluate_logits(3.0 * np.eye(3)[labels_N], labels_N)
    doubt = "the windows cover 2 independent periods; use 10 or more"
    compared = compare(model, metrics, fitted, "catboost", Blocks(np.arange(40) // 20, "days", doubt), seed=0)
    assert (compared["finding"], compared["use"]) == ("too few blocks", None)
    baselines = compared["scores"].values()
    assert {lead["interval"] for own in baselines for lead in own["difference"].values()} == {None}
    assert {own["over_chance"]["interval"] for own in baselines if own["over_chance"]} == {None}
    assert compared["scores"]["majority"]["difference"]["macro_f1"]["value"] > 0
    scores = leads(*FINDINGS["ahead"])
    scores["catboost"]["difference"]["macro_f1"]["interval"] = None
    assert verdict(summary("too few blocks", doubt, scores=scores)).startswith(
        "Not shown whether the model is useful: the windows cover 2 independent periods; use 10 or more. The best "
        "baseline is CatBoost (macro-F1 0.700 against 0.650, difference +0.050). Next: score both on 10 or more "
        "independent periods, such as days. 1 of 3 targets missed"
    )
