"""Mirrored and cropped training rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain import Config, TrainingPipeline
from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.dataset import Dataset, Inputs, load_dataset
from ctxtrain.data.features import window_numbers
from ctxtrain.data.mirror import (
    DISTANCES,
    MIRRORED_LABEL,
    NEGATED,
    PAIRS,
    SAME,
    labels_with_twins,
    mirrored,
    newest_bars,
    twins,
    unchanged_fields,
)
from ctxtrain.data.oversampling import class_counts
from ctxtrain.data.parse_window import Window
from ctxtrain.data.row_schema import BAR_FIELDS, PRICES, OwnFields
from ctxtrain.data.token_store import TokenStore
from ctxtrain.data.training_rows import Augmentation
from ctxtrain.data.walk_forward import cut_folds
from ctxtrain.data.window_file import WindowFile, load_windows
from ctxtrain.errors import ConfigError
from ctxtrain.evaluation.baselines import fit_baselines
from ctxtrain.labels import LABELS
from ctxtrain.model.tokenizer import tokenizer_and_notes
from tests.helpers import Row, bars_of, dated_rows, learnable_rows, make_row, make_window

MakeConfig = Callable[..., Config]
BOTH = ("augmentation.mirror=true", "augmentation.crop=true")
UP_DOWN = {
    "LONG": "SHORT", "SHORT": "LONG", "SKIP": "SKIP",
}  # fmt: skip


def full_row(label: str = "LONG", seed: int = 0) -> Row:
    """A row with every field of a bar, some drawn, so that the two sides differ."""
    row, rng = make_row(label, seed=seed, drift=0.5), np.random.default_rng(seed)
    for bar in bars_of(row):
        bar |= {name: bool(rng.random() < 0.3) for pair in PAIRS[1:] for name in pair}
        bar |= {"buy_vol": int(rng.integers(0, 99)), "sell_vol": int(rng.integers(0, 99)), "htf_dir": 1}
        bar |= {"fvg_penetration": float(rng.random()), "fvg_quality": float(rng.random())}
        bar |= {"mgann_wave_strength": float(rng.random()), "mgann_leg_first_fvg": bool(rng.random() < 0.5)}
    return row


def load(rows: list[Row], augmentation: Augmentation, own: OwnFields | None = None) -> Dataset:
    tokenizer, _ = tokenizer_and_notes("embedded", None)
    files = {split: WindowFile(rows, own=own or {}) for split in ("train", "val")}
    return load_dataset(
        Inputs(files),
        tokenizer,
        codec="compact",
        max_tokens=512,
        oversampling="auto",
        max_repeat=None,
        weights="auto",
        purge=False,
        embargo=0,
        allow_leakage=True,
        augmentation=augmentation,
    )


def texts(data: Dataset, rows: Any) -> list[str]:
    tokenizer, _ = tokenizer_and_notes("embedded", None)
    return [tokenizer.decode(rows.row(n)) for n in range(len(rows))]


def test_every_bar_field_is_in_one_group() -> None:
    groups = [*PRICES, *SAME, *NEGATED, *DISTANCES, *(name for pair in PAIRS for name in pair)]
    assert sorted(groups) == sorted(BAR_FIELDS)


def test_a_twin_has_the_same_shape_upside_down() -> None:
    window = make_window(full_row())
    twin = mirrored(window)
    numbers, flipped = window_numbers(window.bars), window_numbers(twin.bars)
    assert flipped.close == pytest.approx(1 - numbers.close, abs=0.005)
    assert flipped.high == pytest.approx(1 - numbers.low, abs=0.005)
    assert numbers.delta is not None
    assert flipped.delta is not None
    assert flipped.delta == pytest.approx(-numbers.delta)
    assert np.array_equal(twin.bars["volume"], window.bars["volume"])
    for name in ("range_in_bars", "bar_range_share", "atr_ratio"):
        assert getattr(flipped, name) == pytest.approx(getattr(numbers, name), rel=0.02)
    bars = twin.bars
    assert (bars["low"] <= np.minimum(bars["open"], bars["close"])).all()
    assert (bars["high"] >= np.maximum(bars["open"], bars["close"])).all()
    assert bars["high"].max() == pytest.approx(window.bars["high"].max(), rel=1e-12)
    assert bars["low"].min() == pytest.approx(window.bars["low"].min(), rel=1e-12)


def test_directions_change_sign_and_pairs_change_places() -> None:
    window = make_window(full_row())
    twin = mirrored(window)
    for name in NEGATED:
        assert (twin.bars[name] == -window.bars[name]).all(), name
        assert not np.signbit(twin.bars[name][window.bars[name] == 0]).any()
    for one, other in PAIRS:
        assert (twin.bars[one] == window.bars[other]).all(), one
        assert (twin.bars[other] == window.bars[one]).all(), other
    for name in SAME:
        assert (twin.bars[name] == window.bars[name]).all(), name
    assert list(twin.bars) == list(window.bars)
    assert [LABELS[label] for label in MIRRORED_LABEL] == [UP_DOWN[label] for label in LABELS]


def test_the_twin_of_a_twin_is_the_window() -> None:
    window = make_window(full_row())
    again = mirrored(mirrored(window))
    assert again.bars.keys() == window.bars.keys()
    for name, values in window.bars.items():
        assert again.bars[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name
    codec = fit_codec("compact", [window])
    assert codec.render(again) == codec.render(window)
    assert codec.render(mirrored(window)) != codec.render(window)


@pytest.mark.parametrize("least", [0.0, -25.0])
def test_a_window_without_log_prices_is_mirrored_in_plain_price(least: float) -> None:
    row = make_row()
    shift = min(bar["low"] for bar in bars_of(row)) - least
    for bar in bars_of(row):
        bar |= {name: bar[name] - shift for name in PRICES}
    window = make_window(row)
    twin = mirrored(window)
    numbers, flipped = window_numbers(window.bars), window_numbers(twin.bars)
    assert flipped.close == pytest.approx(1 - numbers.close)
    assert flipped.bar_range_share == numbers.bar_range_share
    assert (twin.bars["atr_14"] == window.bars["atr_14"]).all()


def test_json_text_of_a_twin_has_the_decimals_of_the_rows() -> None:
    window = make_window(full_row())
    codec = fit_codec("json", [window])
    (twin,) = twins([window], codec)
    for name in PRICES:
        assert (twin.bars[name] == twin.bars[name].round(2)).all()
    assert (twin.bars["low"] <= np.minimum(twin.bars["open"], twin.bars["close"])).all()
    assert len(codec.render(twin)) < 1.1 * len(codec.render(window))


def test_features_named_as_directed_bar_fields_change_as_these_do() -> None:
    features = {"ext_dir": 1, "fvg_up": True, "fvg_down": False, "rsi": 70.0, "session": "London"}
    window = make_window(make_row(features=features))
    twin = mirrored(window)
    assert twin.features == {"ext_dir": -1, "fvg_up": False, "fvg_down": True, "rsi": 70.0}
    assert unchanged_fields(fit_codec("compact", [window])) == ["features.rsi", "features.session"]


def test_mirrored_rows_follow_the_rows_and_count_as_the_other_class() -> None:
    rows = [make_row(label, seed=n) for n, label in enumerate(["LONG"] * 5 + ["SHORT"] * 2 + ["SKIP"] * 4)]
    plain, data = load(rows, Augmentation()), load(rows, Augmentation(mirror=True))
    assert (plain.training.labels_R == plain.labels["train"]).all()
    assert plain.training.whole is plain.tokens["train"]
    assert class_counts(data.training.labels_R).tolist() == [7, 7, 8] == data.counts_C.tolist()
    assert data.epoch_counts_C.tolist() == [8, 8, 8]
    assert data.summary()["classes"]["train"] == {"LONG": 5, "SHORT": 2, "SKIP": 4}
    expected = list(data.codec.render_all(map(mirrored, data.files["train"])))
    assert texts(data, data.training.whole) == texts(plain, plain.tokens["train"]) + expected
    assert data.training.names[3] == data.names["train"][3]
    assert data.training.names[14] == f"{data.names['train'][3]}, mirrored"
    assert len(list(data.training.names)) == len(data.training.labels_R)  # iteration ends
    for split in ("train", "val"):
        assert texts(data, data.tokens[split]) == texts(plain, plain.tokens[split])
    assert data.summary()["augmentation"] == {
        "mirror": True, "crop": False, "mirrored_rows": 11, "unchanged_fields": [],
    }  # fmt: skip
    assert any("mirrored twin of each of the 11 training rows, LONG as SHORT" in note for note in data.notes())


def test_the_codec_is_fitted_to_rows_and_twins() -> None:
    rows = [make_row(label, seed=n, features={"delta": 5.0 + n}) for n, label in enumerate(LABELS * 2)]
    assert load(rows, Augmentation()).codec.features["delta"].centre == 7.5
    assert load(rows, Augmentation(mirror=True)).codec.features["delta"].centre == 0


def test_a_field_without_its_partner_is_refused() -> None:
    rows = [make_row(label, seed=n) for n, label in enumerate(LABELS)]
    for row in rows:
        for bar in bars_of(row):
            del bar["fvg_down"]
    with pytest.raises(ConfigError) as refused:
        load(rows, Augmentation(mirror=True))
    (fault,) = refused.value.faults
    assert fault == (
        "augmentation.mirror swaps fvg_up with fvg_down, but not every training row has fvg_down. Add it to each row, "
        "remove fvg_up, or set augmentation.mirror=false."
    )


def test_fields_of_unknown_direction_are_named_with_the_number_of_rows() -> None:
    rows = [make_row(label, seed=n, features={"gap": 1.5 * n}) for n, label in enumerate(LABELS)]
    for row in rows:
        for bar in bars_of(row):
            bar["rsi"] = 50.0
    notes = load(rows, Augmentation(mirror=True), own={"rsi": "number"}).notes()
    assert (
        "augmentation.mirror does not change rsi, features.gap in the 3 twins, because nothing says whether they have "
        "a direction; leave out those that have one, or set augmentation.mirror=false" in notes
    )


@pytest.mark.parametrize("name", ["mirror", "crop"])
@pytest.mark.parametrize(
    ("kind", "content"), [("text rows", {"context": "price {}"}), ("rows of features alone", {"features": {"rsi": 1}})]
)
def test_rows_without_bars_are_refused(name: str, kind: str, content: Row) -> None:
    tokenizer, _ = tokenizer_and_notes("embedded", None)
    rows = [{**content, "label": label} for label in LABELS]
    files = {split: WindowFile(rows) for split in ("train", "val")}
    with pytest.raises(ConfigError) as refused:
        load_dataset(
            Inputs(files), tokenizer, codec="compact", max_tokens=64, oversampling="auto", max_repeat=None,
            weights="auto", augmentation=Augmentation(**{name: True}),
        )  # fmt: skip
    (fault,) = refused.value.faults
    assert fault == (
        f"augmentation.{name} changes the bars of windows, but the training rows are {kind}. "
        f"Set augmentation.{name}=false."
    )


def test_crop_is_refused_where_no_window_has_a_bar_to_spare() -> None:
    rows = [make_row(label, bars=20, seed=n) for n, label in enumerate(LABELS)]
    with pytest.raises(ConfigError, match="keeps the newest 20 bars, so windows must have more, but no training row"):
        load(rows, Augmentation(crop=True))
    rows[0] = make_row("LONG", bars=30, seed=7)
    assert (
        "augmentation.crop leaves 2 of 3 training rows whole: they have 20 bars"
        in load(rows, Augmentation(crop=True)).notes()
    )


def test_crops_leave_out_the_oldest_bars_of_half_of_the_rows() -> None:
    rows = [
        make_row(label, bars=bars, seed=n)
        for n, (label, bars) in enumerate([*zip(LABELS, (20, 30, 60), strict=True)] * 60)
    ]
    training = load(rows, Augmentation(crop=True, seed=3)).training
    kept = np.array([training.kept_bars(epoch) for epoch in range(30)])
    for bars in (30, 60):
        of_length = kept[:, training.bars_N == bars]
        assert of_length.min() == 20
        assert of_length.max() == bars
        assert 0.45 < (of_length < bars).mean() < 0.55
        cropped = of_length[of_length < bars]
        assert cropped.mean() == pytest.approx((20 + bars - 1) / 2, rel=0.05)
    assert (kept[:, training.bars_N == 20] == 20).all()


def test_the_rows_of_an_epoch_follow_from_seed_epoch_and_row() -> None:
    rows = [make_row(label, bars=40, seed=n) for n, label in enumerate(LABELS * 6)]
    data = load(rows, Augmentation(mirror=True, crop=True, seed=3))
    training = data.training
    first, second, again = (texts(data, training.tokens(epoch)) for epoch in (0, 1, 0))
    assert first == again != second
    windows = [*data.files["train"], *map(mirrored, data.files["train"])]
    kept = training.kept_bars(0).tolist()
    assert first == [data.codec.render(newest_bars(window, bars)) for window, bars in zip(windows, kept, strict=True)]
    assert 20 <= min(kept) < max(kept) == 40
    other = load(rows, Augmentation(mirror=True, crop=True, seed=4)).training
    assert (other.kept_bars(0) != training.kept_bars(0)).any()
    for window, bars in zip(windows, kept, strict=True):
        assert (newest_bars(window, bars).bars["close"][-20:] == window.bars["close"][-20:]).all()


def test_twins_of_a_fold_are_those_of_its_own_training_rows() -> None:
    folds = cut_folds(WindowFile(dated_rows(60, seed=1, apart=40)), 2)
    tokenizer, _ = tokenizer_and_notes("embedded", None)
    store = TokenStore()
    for fold in folds:
        data = load_dataset(
            Inputs(fold, store), tokenizer, codec="compact", max_tokens=512, oversampling="auto", max_repeat=None,
            weights="auto", augmentation=Augmentation(mirror=True),
        )  # fmt: skip
        own = list(data.files["train"])
        assert texts(data, data.training.whole) == list(data.codec.render_all([*own, *map(mirrored, own)]))
        assert (data.training.labels_R == labels_with_twins(data.labels["train"])).all()


def test_baselines_are_fitted_on_the_twins_too() -> None:
    windows = {split: load_windows(learnable_rows(60, seed)) for seed, split in enumerate(("train", "val"))}
    labels = {split: np.array([window.label for window in rows]) for split, rows in windows.items()}
    codec = fit_codec("compact", windows["train"])
    only = {"logistic_regression", "class_prior"}
    found, _ = fit_baselines(windows, labels, "val", codec, 0, only, mirror=True)
    upside_down: list[Window] = [mirrored(window) for window in windows["train"]]
    both = {**windows, "train": windows["train"] + upside_down}
    given, _ = fit_baselines(both, {**labels, "train": labels_with_twins(labels["train"])}, "val", codec, 0, only)
    plain, _ = fit_baselines(windows, labels, "val", codec, 0, only)
    trained = "logistic_regression"
    assert found[trained].scores == given[trained].scores != plain[trained].scores
    assert found["class_prior"].scores == plain["class_prior"].scores


def losses(pipeline: TrainingPipeline) -> list[float]:
    return [line["loss"] for line in pipeline.folder.metrics.read() if line["kind"] == "step"]


@pytest.mark.slow
def test_a_resumed_run_with_augmentation_equals_an_uninterrupted_one(make_config: MakeConfig) -> None:
    whole = TrainingPipeline(make_config("training.epochs=2", *BOTH, run="whole"))
    summary = whole.run()
    assert summary is not None
    assert summary["data"]["after_oversampling"] == {"LONG": 36, "SHORT": 36, "SKIP": 36}
    stopped = TrainingPipeline(make_config("training.epochs=2", "checkpoints.every_steps=5", *BOTH, run="stopped"))
    with stopped._open_run():
        stopped.train_epoch()
        stopped.save_checkpoint(stopped.evaluate())
    resumed = TrainingPipeline(stopped.config, resume=True)
    assert resumed.run() is not None
    assert losses(resumed) == losses(whole)
    digests = {Path(run.config.output_dir, "best_model.safetensors").read_bytes() for run in (whole, resumed)}
    assert len(digests) == 1
    without_crop = whole.config.augmentation.model_copy(update={"crop": False})
    changed = stopped.config.model_copy(update={"augmentation": without_crop})
    with pytest.raises(ConfigError, match=r"config\.augmentation\.crop: True → False"):
        TrainingPipeline(changed, resume=True).run()
