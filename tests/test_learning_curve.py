"""The learning curve: parts of the training rows, points that equal runs on those rows, and a curve that is stopped."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ctxtrain import TrainingPipeline, run_several
from ctxtrain.cli.console import print_summary
from ctxtrain.config.schema import Config
from ctxtrain.data.dataset import Inputs, load_dataset
from ctxtrain.data.part import take_part
from ctxtrain.errors import ConfigError, Interrupted
from ctxtrain.learning_curve import begin_curve, open_sizes, part_order
from ctxtrain.model.tokenizer import tokenizer_and_notes
from ctxtrain.progress import Reporter
from ctxtrain.reporting.learning_curve import curve_points, curve_reading
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.storage.atomic_files import list_files, sha256_file
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.training.inputs import dataset_settings, part_settings, window_files
from tests.conftest import MakeConfig, short_run
from tests.docs.test_pages import listed
from tests.helpers import bars_of, learnable_rows, write_rows

pytestmark = pytest.mark.slow

SIZES = "evaluation.learning_curve=[12, 24, 46, 100]"
EXTRAS = ("augmentation.mirror=true", "augmentation.crop=true", "checkpoints.average=2")


class Watching(Reporter):
    """Notes what is said and trained; sends this process a signal in a part of `stop_at` windows."""

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__()
        self.stop_at, self.said, self.trained = stop_at, list[str](), list[tuple[int, int]]()

    def say(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def track_part(self, windows: int, epoch: int, epochs: int, steps: int) -> Iterator[Callable[[], None]]:
        self.trained.append((windows, epoch))
        with super().track_part(windows, epoch, epochs, steps):
            yield lambda: os.kill(os.getpid(), signal.SIGTERM) if windows == self.stop_at else None


@dataclass
class Story:
    """A run without a curve, resumed with one, stopped in its second point, and resumed again."""

    config: Config
    plain: dict[str, Any]
    plain_files: dict[str, str]
    stopped: Interrupted
    between: Summary
    whole: dict[str, Any]
    reporters: list[Watching]


def files_of(config: Config) -> dict[str, str]:
    root = Path(config.output_dir)
    return {name: sha256_file(root / name) for name in list_files(root)}


@pytest.fixture(scope="module")
def story(tiny_base: Path, tiny_rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("curve") / "run"
    config, reporters = short_run(tiny_base, tiny_rows, folder, *EXTRAS), [Watching(), Watching(24), Watching()]
    plain = TrainingPipeline(config, reporter=reporters[0]).run()
    assert plain is not None
    files, config = files_of(config), short_run(tiny_base, tiny_rows, folder, SIZES, *EXTRAS)
    with pytest.raises(Interrupted) as stopped:
        TrainingPipeline(config, resume=True, reporter=reporters[1]).run()
    between = RunFolder(folder).read_summary()
    whole = TrainingPipeline(config, resume=True, reporter=reporters[2]).run()
    assert whole is not None
    return Story(config, plain, files, stopped.value, between, whole, reporters)


def test_parts_are_nested_keep_the_shares_of_the_classes_and_follow_from_the_seed() -> None:
    labels_N = np.random.default_rng(0).permutation([0] * 480 + [1] * 17 + [2] * 503)
    order = part_order(labels_N, seed=3)
    assert sorted(order) == list(range(1000))
    for size in (3, 10, 57, 300, 999):
        counts_C = np.bincount(labels_N[order[:size]], minlength=3)
        assert counts_C.min() >= 1
        assert np.abs(counts_C - size * np.array([0.480, 0.017, 0.503])).max() <= 1.5
    assert np.array_equal(part_order(labels_N, seed=3), order)
    assert not np.array_equal(part_order(labels_N, seed=4)[:10], order[:10])


def test_without_the_key_a_summary_has_no_curve_and_with_it_nothing_else_changes(story: Story) -> None:
    assert "learning_curve" not in story.plain
    assert {key: value for key, value in story.whole.items() if key != "learning_curve"} == story.plain
    changed = {name for name, digest in files_of(story.config).items() if story.plain_files.get(name) != digest}
    assert changed == {"config.yaml", "training_summary.json", "report.html"}
    assert RunFolder(story.config.output_dir).read_summary().to_dict() == story.whole


def test_a_point_is_what_a_run_on_these_rows_alone_comes_to(
    story: Story, make_config: MakeConfig, tiny_rows: dict[str, str], tmp_path: Path
) -> None:
    lines = Path(tiny_rows["train"]).read_text().splitlines()
    order = part_order(np.array([("LONG", "SHORT", "SKIP").index(label_of(line)) for line in lines]), seed=0)
    train = write_rows(tmp_path / "part.jsonl", [lines[row] for row in sorted(order[:24])])
    warmup = "training.warmup_steps=1"  # the share of 2 in the 42 steps of the run, of 24
    alone = TrainingPipeline(make_config(f"data.train={train}", warmup, *EXTRAS)).run()
    assert alone is not None
    point = story.whole["learning_curve"]["points"][1]
    best = alone["baselines"]["best"]
    assert point == {
        "windows": 24,
        "classes": alone["data"]["classes"]["train"],
        "epoch": alone["best"]["epoch"],
        "macro_f1": alone["best"]["macro_f1"],
        "best_baseline": best,
        "baseline_macro_f1": alone["baselines"]["scores"][best]["macro_f1"],
    }


def label_of(line: str) -> str:
    return line.rpartition('"label": "')[2].partition('"')[0]


def test_sizes_not_below_the_training_rows_are_left_out_and_named(story: Story) -> None:
    reason = "the run itself trains on 46 windows"
    assert story.whole["learning_curve"]["left_out"] == [{"windows": size, "reason": reason} for size in (46, 100)]
    assert f"note: evaluation.learning_curve leaves out 46, 100: {reason}" in story.reporters[1].said


def test_a_signal_ends_the_curve_and_a_resume_computes_what_is_missing(story: Story) -> None:
    assert story.stopped.exit_code == 128 + signal.SIGTERM
    assert str(story.stopped) == (
        "the run is finished, stopped in its learning curve; continue with train --resume"
    )  # fmt: skip
    assert story.between.learning_curve is not None
    kept = [point.to_dict() for point in story.between.learning_curve.points]
    assert kept == story.whole["learning_curve"]["points"][:1]
    assert story.reporters[0].trained == []
    assert story.reporters[1].trained == [(12, 1), (12, 2), (12, 3), (24, 1)]
    assert story.reporters[2].trained == [(24, 1), (24, 2), (24, 3)]
    assert "learning curve: 24 windows, epoch 2 of 3" in story.reporters[2].said


def test_points_of_another_training_are_not_kept(story: Story) -> None:
    folder, summary = RunFolder(story.config.output_dir), Summary.model_validate(story.plain)
    sizes = [12, 24, 30]
    assert open_sizes(begin_curve(summary, sizes, folder), sizes) == [30]
    other = summary.model_copy(update={"epochs": summary.epochs[:2]})
    assert open_sizes(begin_curve(other, sizes, folder), sizes) == sizes
    assert begin_curve(summary, None, folder) is summary
    unfinished = summary.model_copy(update={"unfinished": "stopped"})
    assert begin_curve(unfinished, sizes, folder) is unfinished


def test_a_summary_whose_points_do_not_ascend_to_the_run_is_refused(story: Story) -> None:
    points = story.whole["learning_curve"]["points"]
    for wrong in (points[::-1], [points[0], points[1] | {"windows": 46}], [points[0], points[0]]):
        curve = {"points": wrong, "left_out": []}
        with pytest.raises(ValidationError, match=r"learning_curve\.points must ascend to less than data\.rows\.train"):
            Summary.model_validate(story.whole | {"learning_curve": curve})


def test_the_formats_page_lists_what_a_point_has(story: Story) -> None:
    assert listed("key of a point") == story.whole["learning_curve"]["points"][0].keys()


def test_the_table_ends_with_the_run_itself_and_fits_80_columns(
    story: Story, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summary = Summary.model_validate(story.whole)
    print_summary(summary, "runs/x")
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("Learning curve: macro-F1 on validation rows"))
    assert max(map(len, lines[start : start + 7])) <= 80
    last = curve_points(summary)[-1]
    assert (last.windows, last.macro_f1) == (46, story.plain["best"]["macro_f1"])
    assert f"│      46 │ {last.macro_f1:.3f} │" in lines[start + 6]
    assert any(line.startswith("From 24 to 46 windows, the model's macro-F1 changes by") for line in lines)


@pytest.mark.parametrize(
    ("score", "interval", "said"),
    [
        (0.5, None, "There is no interval, so the change may be noise."),
        (0.5, [0.4, 0.7], "lies within the 95 % interval of the last, 0.400 to 0.700, so the change may be noise."),
        (0.3, [0.4, 0.7], "lies below the 95 % interval of the last, 0.400 to 0.700, so the last windows seem to have"),
        (0.8, [0.4, 0.7], "lies above the 95 % interval of the last, 0.400 to 0.700, so the last windows do not seem"),
    ],
)
def test_the_sentence_claims_no_more_than_is_shown(
    story: Story, score: float, interval: list[float] | None, said: str
) -> None:
    summary = Summary.model_validate(story.whole)
    assert summary.learning_curve
    summary.learning_curve.points[-1].macro_f1 = score
    summary.intervals.scores.macro_f1 = interval
    last = summary.judged.value("macro_f1")
    start = (
        f"From 24 to 46 windows, the model's macro-F1 changes by {last - score:+.3f}, from {score:.3f} to {last:.3f}."
    )
    assert curve_reading(summary).startswith(start)
    assert said in curve_reading(summary)


def test_a_part_with_the_codec_of_the_run_is_not_tokenised_again(make_config: MakeConfig) -> None:
    config = make_config()
    inputs, (tokenizer, _) = Inputs(window_files(config)), tokenizer_and_notes(config.model.base, None)
    data = load_dataset(inputs, tokenizer, **dataset_settings(config))
    rows, before = np.array([2, 5, 9, 11, 17, 23, 30, 45]), data.tokens["train"].flat
    part = take_part(data, rows, inputs.tokens, tokenizer, **part_settings(config)["fitting"])
    assert part.codec == data.codec
    assert len(part.tokens["train"].flat) == len(before)
    assert [part.tokens["train"].row(n).tolist() for n in range(8)] == [
        data.tokens["train"].row(row).tolist() for row in rows
    ]
    assert part.names["train"][3] == data.names["train"][11]
    assert part.counts_C.sum() == 8


def test_a_part_that_does_not_fit_the_validation_rows_is_left_out_with_the_reason(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Every row of the part has `delta`, so its codec reads it; the codec of the run does not."""
    rows = learnable_rows(46, seed=1)
    order = part_order(np.array([("LONG", "SHORT", "SKIP").index(row["label"]) for row in rows]), seed=0)
    for row in [rows[order[-1]], *(val := learnable_rows(20, seed=2))]:
        for bar in bars_of(row):
            del bar["delta"]
    files = {"train": write_rows(tmp_path / "a.jsonl", rows), "val": write_rows(tmp_path / "b.jsonl", val)}
    places = [f"data.{name}={path}" for name, path in files.items()]
    config = make_config(*places, "training.epochs=1", "evaluation.learning_curve=[12]")
    summary = TrainingPipeline(config).run()
    assert summary is not None
    assert summary["learning_curve"]["points"] == []
    (left_out,) = summary["learning_curve"]["left_out"]
    assert "delta" in left_out["reason"]
    assert curve_reading(Summary.model_validate(summary)) == "No smaller number of windows was trained on."
    assert left_out["reason"] in (Path(config.output_dir) / "report.html").read_text()


def test_each_of_several_runs_has_its_curve_and_a_resume_adds_what_one_lacks(make_config: MakeConfig) -> None:
    config = make_config("training.seeds=[0,1]", "training.epochs=1", "evaluation.learning_curve=[12]")
    run_several(config)
    folders = [RunFolder(Path(config.output_dir) / name) for name in ("seed_0", "seed_1")]
    before = [folder.summary.read_bytes() for folder in folders]
    lacking = folders[1].read_summary()
    assert lacking.learning_curve
    lacking.learning_curve.points.clear()
    folders[1].summary.write_bytes(lacking.model_dump_json(by_alias=True, exclude_unset=True).encode())
    reporter = Watching()
    run_several(config, resume=True, reporter=reporter)
    assert reporter.trained == [(12, 1)]
    assert [folder.summary.read_bytes() for folder in folders] == before


def test_several_processes_are_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^evaluation\.learning_curve is computed in one process, this run has 2\."):
        TrainingPipeline(make_config(SIZES))
