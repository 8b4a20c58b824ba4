"""Runs on rows in memory: the same as on files, resumed with equal rows, and refused without rows."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from ctxtrain import Config, TrainingPipeline
from ctxtrain.cli.process import main
from ctxtrain.config.sections import DataConfig
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.multi_run import run_several
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import MakeConfig
from tests.data.test_formats import table
from tests.helpers import dated_rows, learnable_rows

pytestmark = pytest.mark.slow


def without_files(config: Config) -> Config:
    return config.model_copy(update={"data": DataConfig()})


def rows_of(holder: Any = list) -> dict[str, Any]:
    """The rows of the files of `make_config`."""
    return {"train": holder(learnable_rows(46, seed=1)), "val": holder(learnable_rows(20, seed=2))}


def test_a_run_on_rows_in_memory_is_that_on_files_and_is_resumed_with_equal_rows(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_config("training.epochs=1", run="files")
    TrainingPipeline(files).run()
    config = without_files(make_config("training.epochs=1", run="memory"))
    summary = TrainingPipeline(config, data=rows_of()).run()
    assert summary
    zips = [(Path(made.output_dir) / "final_model.zip").read_bytes() for made in (files, config)]
    assert zips[0] == zips[1]
    again = TrainingPipeline(config, data=rows_of(pd.DataFrame), resume=True).run()
    assert again
    assert again["data"]["sha256"] == summary["data"]["sha256"]
    changed = rows_of(table)
    changed["train"] = changed["train"].slice(1)
    with pytest.raises(ConfigError, match="rows"):
        TrainingPipeline(config, data=changed, resume=True).run()
    stored = Config.from_run(RunFolder(config.output_dir).read_config(), Path("config.yaml"))
    assert stored.data.train is None
    with pytest.raises(SystemExit) as ended:
        main(["export", config.output_dir])
    assert ended.value.code == ConfigError.exit_code
    assert "Rows in memory are passed as data={'train': rows}." in capsys.readouterr().err


def test_faults_of_rows_in_memory_have_their_split_and_number(make_config: MakeConfig) -> None:
    rows = rows_of()
    rows["train"][16]["label"] = rows["val"][2]["label"] = "UP"
    with pytest.raises(DataError) as refused:
        TrainingPipeline(without_files(make_config()), data=rows).load_data()
    assert [fault.partition(": ")[0] for fault in refused.value.faults] == ["train row 17", "val row 3"]


def test_folds_over_rows_in_memory_are_resumed(make_config: MakeConfig) -> None:
    config = without_files(make_config("evaluation.folds=2", "training.epochs=1", "training.warmup_steps=1"))
    report = run_several(config, data={"train": dated_rows(60, 1, apart=40)})
    made = (Path(config.output_dir) / "fold_1" / "final_model.zip").stat()
    again = run_several(config, data={"train": pa.Table.from_pylist(dated_rows(60, 1, apart=40))}, resume=True)
    assert again == report
    assert (Path(config.output_dir) / "fold_1" / "final_model.zip").stat() == made


def test_rows_that_are_missing_twice_or_of_no_split_are_refused(make_config: MakeConfig) -> None:
    with_files, config, rows = make_config(), without_files(make_config()), rows_of()
    needed = "Set it in the config or as an override: data.{0}=… Rows in memory are passed as data={{'{0}': rows}}."
    for given, faults in (
        (None, [f"data.{name} is required. {needed.format(name)}" for name in ("train", "val")]),
        ({"train": rows["train"], "val": None}, [f"data.val is required. {needed.format('val')}"]),
        (rows | {"tset": []}, ['data must have rows of train, val or test, got "tset". Use these names.']),
    ):
        with pytest.raises(ConfigError) as refused:
            TrainingPipeline(config, data=given)
        assert refused.value.faults == faults
    with pytest.raises(ConfigError, match=r"^data\.train names a file, but rows of train are given too\. Set data\."):
        TrainingPipeline(with_files, data={"train": rows["train"]}).load_data()
    tree = {"training": {"epochs": 1}, "output_dir": "runs/a"}
    assert Config.parse(tree, rows_in_memory=True).data.train is None
    with pytest.raises(ConfigError, match=r"^data\.train is required"):
        Config.parse(tree)
