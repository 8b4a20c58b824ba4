"""Several runs of one config: folds that go forward in time, seeds, and what is said of them together."""

import gzip
import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain import TrainingPipeline, load_model
from ctxtrain.cli.process import main
from ctxtrain.config.schema import Config
from ctxtrain.data.profile import survey
from ctxtrain.data.walk_forward import cut_folds, walk_forward
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError, Interrupted, RunLocked
from ctxtrain.multi_run import run_several
from ctxtrain.reporting.runs_schema import Runs
from ctxtrain.reporting.summary_schema import Baselines
from ctxtrain.reporting.verdict import recommendation, verdict, verdict_of_several
from ctxtrain.storage.atomic_files import list_files, sha256_file
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import MakeConfig
from tests.helpers import dated_rows, learnable_rows, make_row, write_rows
from tests.storage.test_resume import Signaller

pytestmark = pytest.mark.slow

LABELS = ("LONG", "SHORT", "SKIP")


def test_folds_go_forward_and_test_every_later_row_once(tmp_path: Path) -> None:
    rows = dated_rows(50, 1, apart=7)
    shuffled = [rows[n] for n in np.random.default_rng(0).permutation(50)]
    found = survey(WindowFile(write_rows(tmp_path / "rows.jsonl", shuffled)))[0]
    folds = walk_forward(found, 4)
    events = np.array(found.positions.time.last)
    for fold in folds:
        train, val, test = (events[fold[name]] for name in ("train", "val", "test"))
        assert train.max() < val.min() <= val.max() < test.min()
        assert len(val) == round(0.2 * (len(train) + len(val)))
    tested = np.concatenate([fold["test"] for fold in folds])
    assert sorted(tested) == sorted(np.argsort(events)[10:])
    assert all(len(one["train"]) < len(other["train"]) for one, other in pairwise(folds))


def test_folds_that_cannot_be_are_refused(tmp_path: Path) -> None:
    placeless = [make_row(LABELS[n % 3], seed=n, place=False) for n in range(12)]
    with pytest.raises(ConfigError, match=r"evaluation\.folds orders rows by time"):
        walk_forward(survey(WindowFile(write_rows(tmp_path / "a", placeless)))[0], 2)
    one_class = dated_rows(30, 1, apart=7)
    for row in one_class[:16]:
        row["label"] = "SKIP"
    with pytest.raises(ConfigError) as refused:
        walk_forward(survey(WindowFile(write_rows(tmp_path / "b", one_class)))[0], 3)
    assert [fault.split(" of ")[0] for fault in refused.value.faults] == ["fold 1", "fold 2", "fold 3"]
    assert "6 training rows and no LONG rows, no SHORT rows" in refused.value.faults[0]


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Windows that overlap by 10 bars with the next."""
    return str(write_rows(tmp_path_factory.mktemp("dated") / "rows.jsonl", dated_rows(72, 3, apart=20)))


def several(make_config: MakeConfig, dated: str, *overrides: str, run: str = "runs") -> Config:
    fixed = (f"data.train={dated}", "evaluation.folds=2", "training.epochs=1", "training.warmup_steps=0", *overrides)
    return make_config(*fixed, run=run)


def test_folds_times_seeds_are_runs_of_their_own_and_pooled(make_config: MakeConfig, dated: str) -> None:
    config = several(make_config, dated, "training.seeds=[0,4]", "data.embargo=5")
    report = run_several(config)
    root = Path(config.output_dir)
    assert json.loads((root / "runs.json").read_text())["runs"] == report["runs"]
    names = ["fold_1-seed_0", "fold_1-seed_4", "fold_2-seed_0", "fold_2-seed_4"]
    assert [run["name"] for run in report["runs"]] == names
    assert [run["seed"] for run in report["runs"]] == [0, 4, 0, 4]
    summaries = [json.loads((root / name / "training_summary.json").read_text()) for name in names]
    for run, summary in zip(report["runs"], summaries, strict=True):
        assert run["macro_f1"] == summary["test"]["macro_f1"]
        assert run["purged"] == {"train": 1, "val": 1, "test": 0}  # one window at each of two seams
        assert [leak for leak in summary["data"]["leaks"] if leak["kind"] == "shared bars"] == []
        assert Config.load(root / run["name"] / "config.yaml").data.embargo == 5
        assert run["skipped_steps"] == summary["skipped_steps"] == 0
    assert "skipped" not in verdict_of_several(Runs.model_validate(report))
    skipping = [run | {"skipped_steps": steps} for run, steps in zip(report["runs"], (2, 0, 0, 1), strict=True)]
    assert (
        "3 optimizer steps were skipped because loss or gradient was not finite; "
        "metrics.jsonl of fold_1-seed_0 and fold_2-seed_4 lists their windows."
    ) in verdict_of_several(Runs.model_validate(report | {"runs": skipping}))
    scores = [run["macro_f1"] for run in report["runs"]]
    assert report["spread"]["macro_f1"]["mean"] == pytest.approx(np.mean(scores))
    assert report["spread"]["macro_f1"]["deviation"] == pytest.approx(np.std(scores, ddof=1))
    assert report["pooled"]["rows"] == 2 * 48
    assert_pooled_baselines(report, summaries)
    right = 0
    for name in names:
        windows = list(cut_folds(WindowFile(dated), 2)[int(name[5]) - 1]["test"])
        predictions = load_model(root / name / "final_model.zip").predict_windows(windows)
        right += sum(p["label"] == LABELS[w.label or 0] for p, w in zip(predictions, windows, strict=True))
    assert report["pooled"]["accuracy"] == right / 96
    assert report["intervals"]["blocks"] <= 48  # a window that two seeds answered is in one block


def assert_pooled_baselines(report: dict[str, Any], summaries: list[dict[str, Any]]) -> None:
    """The one to beat has the best mean on validation rows, and is pooled with the very answers of the runs."""
    found, of_runs = report["baselines"], [summary["baselines"]["scores"] for summary in summaries]
    means = {name: np.mean([scores[name]["validation_macro_f1"] for scores in of_runs]) for name in of_runs[0]}
    assert found["best"] == max(means, key=lambda name: means[name])
    assert {name: mean["validation_macro_f1"] for name, mean in found["means"].items()} == pytest.approx(means)
    leads = [
        summary["test"]["macro_f1"] - summary["baselines"]["scores"]["catboost"]["macro_f1"] for summary in summaries
    ]
    assert found["means"]["catboost"]["lead"] == pytest.approx(np.mean(leads))
    assert set(found["scores"]) == {found["best"], "majority", "class_prior"}
    for name, pooled in found["scores"].items():
        assert pooled["accuracy"] == pytest.approx(np.mean([scores[name]["accuracy"] for scores in of_runs]))
        assert pooled["nll"] == pytest.approx(np.mean([scores[name]["nll"] for scores in of_runs]))
    assert found["scores"][found["best"]]["difference"]["macro_f1"]["value"] == pytest.approx(
        report["pooled"]["macro_f1"] - found["scores"][found["best"]]["macro_f1"]
    )
    assert {own["over_chance"]["looks"] for own in found["scores"].values() if own["over_chance"]} == {1}
    several = Runs.model_validate(report)
    assert (several.version, several.to_dict()) == (1, report)
    advice = recommendation(report["pooled"]["macro_f1"], several.baselines, several.intervals.doubt)
    assert verdict_of_several(several).startswith(advice)


def test_seeds_alone_say_that_scores_on_validation_rows_are_optimistic(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = make_config("training.seeds=[1,2]", "training.epochs=1")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "config.yaml"), "--require-targets"])
    out = capfd.readouterr().out
    report = json.loads((Path(config.output_dir) / "runs.json").read_text())
    assert ended.value.code == (0 if report["targets_met"] else 3)
    assert [run["name"] for run in report["runs"]] == ["seed_1", "seed_2"]
    assert report["pooled"]["rows"] == 40
    assert report["intervals"]["blocks"] == 20  # rows, each answered by two seeds
    out = " ".join(out.split())
    assert "reached on the pooled rows" in out or "missed on the pooled rows" in out
    assert "These rows were also used to choose the epoch, so the scores are optimistic." in out
    ahead, lead = sum(run["beats_baseline"] for run in report["runs"]), report["spread"]["lead"]
    assert (
        f"{ahead} of 2 runs clearly beat their best baseline; the mean lead in macro-F1 is {lead['mean']:+.3f} (" in out
    )
    assert f"({lead['lowest']:+.3f} to {lead['highest']:+.3f})." in out
    found = Baselines.model_validate(report["baselines"])
    assert recommendation(report["pooled"]["macro_f1"], found, report["intervals"]["doubt"]) in out
    assert {own["over_chance"]["looks"] for own in report["baselines"]["scores"].values() if own["over_chance"]} == {8}
    for run in report["runs"]:
        summary = RunFolder(Path(config.output_dir) / run["name"]).read_summary()
        assert run["beats_baseline"] == ("The model beats the best baseline" in verdict(summary))
    assert "deviation" in out


def test_leaked_rows_mark_every_figure_of_several_runs(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = learnable_rows(46, seed=1)
    train = write_rows(tmp_path / "train.jsonl", rows)
    val = write_rows(tmp_path / "val.jsonl", [*learnable_rows(19, seed=2), rows[3]])
    allowed = (f"data.train={train}", f"data.val={val}", "data.allow_leakage=true")
    config = make_config("training.seeds=[1,2]", "training.epochs=1", *allowed)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "config.yaml")])
    assert ended.value.code == 0
    report = json.loads((Path(config.output_dir) / "runs.json").read_text())
    leaked = "1 × identical window in train and val; 1 × same id in train and val"
    assert [run["leaked"] for run in report["runs"]] == [leaked, leaked]
    pooled = f"{leaked} (seed_1, seed_2)"
    assert report["leaked"] == pooled
    for figures in (report["pooled"], *report["targets"], *report["spread"].values()):
        assert figures["leaked"] == pooled
    out = " ".join(capfd.readouterr().out.split())  # a table's title is wrapped
    shown = out[out.index("Runs (LEAKED") :]
    assert shown.startswith(f"Runs (LEAKED: {pooled})")
    assert "seed_1 LEAKED" in shown
    assert "seed_2 LEAKED" in shown
    assert f"Targets, on the pooled rows of all runs (LEAKED: {pooled})" in shown
    assert f"Do not believe any figure here: rows are in two files ({pooled})." in shown


def test_runs_that_were_stopped_go_on_where_they_were(make_config: MakeConfig, dated: str) -> None:
    config = several(make_config, dated)
    root = Path(config.output_dir)
    with pytest.raises(Interrupted):
        run_several(config, reporter=Signaller(4, signal.SIGTERM))  # the first fold has three steps
    assert (root / "fold_2" / "checkpoints").exists()
    assert not (root / "runs.json").exists()
    with pytest.raises(ConfigError, match="resume"):
        run_several(config)
    finished = (root / "fold_1" / "final_model.zip").stat().st_mtime_ns
    report = run_several(config, resume=True)
    assert [run["name"] for run in report["runs"]] == ["fold_1", "fold_2"]
    assert (root / "fold_1" / "final_model.zip").stat().st_mtime_ns == finished  # what was done is not done again
    steps = [line["step"] for line in RunFolder(root / "fold_2").metrics.read() if line["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))  # the second fold went on, each step once


def test_runs_on_packed_rows_that_have_ended_are_not_done_again(make_config: MakeConfig, tmp_path: Path) -> None:
    packed = {}
    for name, rows in (("train", learnable_rows(46, seed=1)), ("val", learnable_rows(20, seed=2))):
        plain = write_rows(tmp_path / f"{name}.jsonl", rows).read_bytes()
        packed[name] = tmp_path / f"{name}.jsonl.gz"
        packed[name].write_bytes(gzip.compress(plain))
    files = (f"data.{name}={path}" for name, path in packed.items())
    config = make_config("training.seeds=[1,2]", "training.epochs=1", *files)
    run_several(config)
    summary = json.loads((Path(config.output_dir) / "seed_1" / "training_summary.json").read_text())
    assert summary["data"]["sha256"] == {name: sha256_file(path) for name, path in packed.items()}
    archive = Path(config.output_dir) / "seed_1" / "final_model.zip"
    finished = archive.stat().st_mtime_ns
    run_several(config, resume=True)
    assert archive.stat().st_mtime_ns == finished
    early = archive.parent / "training_summary.json"  # as export writes it before the end of a run
    early.write_text(json.dumps(summary | {"unfinished": "stopped at optimizer step 1 of 6"}))
    run_several(config, resume=True)
    assert json.loads(early.read_text())["unfinished"] is None


def test_test_rows_judge_runs_that_have_ended_too(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nothing has been read by then, and a file that was not walked must not count as missing."""
    test = write_rows(tmp_path / "test.jsonl", learnable_rows(14, seed=3))
    config = make_config("training.seeds=[1,2]", "training.epochs=1", f"data.test={test}")
    report = run_several(config)
    assert report["pooled"]["rows"] == 2 * 14
    assert run_several(config, resume=True) == report


def test_a_damaged_summary_of_a_run_that_has_ended_is_named_and_can_be_written_again(make_config: MakeConfig) -> None:
    config = make_config("training.seeds=[1,2]", "training.epochs=1")
    report = run_several(config)
    run = Path(config.output_dir) / "seed_1"
    whole = (run / "training_summary.json").read_bytes()
    (run / "training_summary.json").write_bytes(whole[:500])
    with pytest.raises(
        DataError, match=rf"{run}/training_summary\.json: .* Run ctxtrain export {run} to write it again"
    ):
        run_several(config, resume=True)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run)])
    assert ended.value.code == 0
    assert run_several(config, resume=True) == report


def digests(root: Path) -> dict[str, str]:
    return {name: sha256_file(root / name) for name in list_files(root)}


def test_a_start_that_is_refused_changes_no_file_of_the_runs_before_it(
    make_config: MakeConfig, dated: str, tmp_path: Path
) -> None:
    config = several(make_config, dated)
    run_several(config)
    root = Path(config.output_dir)
    before = digests(root)
    other = write_rows(tmp_path / "other.jsonl", dated_rows(72, 5, apart=20))
    changed = several(make_config, str(other), "evaluation.folds=3")
    seeds = make_config("training.seeds=[1,2]", run="runs")  # runs of other names, but the same runs.json
    old_to_new = r"^checkpoint_epoch_1\.pt was made with other inputs.*: rows\.train: '"
    for refused, resume, why in (
        (changed, False, "output_dir must be new"),
        (config, False, r"output_dir must be new, .*/runs holds several runs already: fold_1, fold_2, runs\.json\. "),
        (seeds, False, "output_dir must be new"),
        (changed, True, old_to_new),
    ):
        with pytest.raises(ConfigError, match=why):
            run_several(refused, resume=resume)
        assert digests(root) == before
    with pytest.raises(SystemExit) as ended:
        main(["export", str(root / "fold_1")])
    assert ended.value.code == 0


@pytest.mark.promise("C6")
def test_predictions_of_a_fold_go_over_no_file_that_its_rows_are_from(
    make_config: MakeConfig, dated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path(shutil.copy(dated, tmp_path / "mine.jsonl"))
    config = several(make_config, str(mine))
    run_several(config)
    root = Path(config.output_dir)
    (tmp_path / "linked").symlink_to(mine)
    (tmp_path / "fold").symlink_to(root / "fold_1")
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    models = [root / "fold_1" / "final_model.zip", root / "fold_2", tmp_path / "fold", moved / "fold_1" / "export"]
    before, new = mine.read_bytes(), str(write_rows(tmp_path / "new.jsonl", learnable_rows(2, seed=9)))
    named = [mine, tmp_path / "linked", *config.data.model_dump(include={"val"}).values(), root / "runs.json"]
    for model in models:
        for target in named:
            with pytest.raises(SystemExit) as ended:
                main(["predict", str(model), new, "-o", str(target)])
            assert (ended.value.code, "error: output must not be" in capsys.readouterr().err) == (2, True), target
    assert mine.read_bytes() == before


def test_a_folder_that_holds_an_ordinary_run_is_refused_and_folders_of_others_are_not(
    make_config: MakeConfig, dated: str
) -> None:
    config = several(make_config, dated)
    root = Path(config.output_dir)
    (root / "notes").mkdir(parents=True)
    (root / "notes" / "config.yaml").write_text("mine")
    (root / "config.yaml").write_text("a run's")
    with pytest.raises(ConfigError, match="output_dir must be new"):
        run_several(config)
    assert not (root / "fold_1").exists()
    (root / "config.yaml").unlink()
    run_several(config)
    assert (root / "notes" / "config.yaml").read_text() == "mine"


def test_two_processes_cannot_share_the_folder_of_several_runs(make_config: MakeConfig, dated: str) -> None:
    config = several(make_config, dated)
    with RunFolder(config.output_dir).lock(), pytest.raises(RunLocked):
        run_several(config)


def test_a_pipeline_makes_one_run_and_says_what_makes_several(make_config: MakeConfig, dated: str) -> None:
    for override, asked in (
        ("training.seeds=[3,4]", r"makes one run, but training\.seeds=\[3, 4\] requests several"),
        ("evaluation.folds=2", r"makes one run, but evaluation\.folds=2 requests several"),
    ):
        config = make_config(override)
        with pytest.raises(
            ConfigError, match=rf"^A TrainingPipeline {asked}\. Pass the config to ctxtrain\.run_several"
        ):
            TrainingPipeline(config)
        assert not Path(config.output_dir).exists()
    both = several(make_config, dated, "training.seeds=[3,4]", "data.val=null")
    with pytest.raises(ConfigError) as refused:
        TrainingPipeline(both)
    assert len(refused.value.faults) == 2  # rows to validate on come with the folds
    config = make_config()
    without = config.model_copy(update={"data": config.data.model_copy(update={"val": None})})
    with pytest.raises(ConfigError, match=r"^data\.val is required"):
        TrainingPipeline(without)


def test_several_runs_of_a_config_that_asks_for_one_are_refused(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(ConfigError, match=r"neither training\.seeds nor evaluation\.folds\. Set one of them, or pass"):
        run_several(config)
    assert not Path(config.output_dir).exists()


def test_several_processes_are_refused(make_config: MakeConfig, dated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        run_several(several(make_config, dated))
