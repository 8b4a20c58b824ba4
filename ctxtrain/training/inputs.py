"""The rows of a run from its config: files or rows in memory, folds, and the settings that read them.

Input: a `Config`, and rows in memory by split. Output: `Inputs` of one run, or the keys that request several runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctxtrain.config.overrides import missing_key_message
from ctxtrain.config.schema import Config
from ctxtrain.config.sections import SPLITS
from ctxtrain.data.dataset import Inputs
from ctxtrain.data.row_schema import check_own_fields
from ctxtrain.data.sources import open_source
from ctxtrain.data.table_cache import TableCache
from ctxtrain.data.training_rows import Augmentation
from ctxtrain.data.walk_forward import cut_folds
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, short_repr
from ctxtrain.runtime import process_count
from ctxtrain.storage.ownership import check_cache_dir


def multi_run_keys(config: Config) -> dict[str, object]:
    """The keys that request several runs, with their values."""
    folds = config.evaluation.folds if config.evaluation.fold is None else None
    values = {"training.seeds": config.training.seeds, "evaluation.folds": folds}
    return {key: value for key, value in values.items() if value is not None}


def require_single_run(config: Config, rows: Mapping[str, object] | None = None) -> Config:
    """The config itself.

    Raises ConfigError if it requests several runs or, of several processes, a learning curve, or as `require_rows`.
    """
    if keys := multi_run_keys(config):
        raise ConfigError(
            [
                f"A TrainingPipeline makes one run, but {key}={value} requests several. Pass the config to "
                f"ctxtrain.run_several, or set {key} to null."
                for key, value in keys.items()
            ]
        )
    if config.evaluation.learning_curve and process_count() > 1:
        raise ConfigError(
            f"evaluation.learning_curve is computed in one process, this run has {process_count()}. Set it to null; "
            "train --resume without torchrun adds it to the finished run."
        )
    require_rows(config, rows)
    return config


def require_rows(config: Config, rows: Mapping[str, object] | None = None) -> None:
    """Raises ConfigError if a run lacks training or validation rows; `rows` are those in memory, by split."""
    given = rows or {}
    faults = [
        f"data must have rows of train, val or test, got {short_repr(name)}. Use these names."
        for name in given
        if name not in SPLITS
    ]
    faults += [
        f"{missing_key_message(f'data.{split}')} Rows in memory are passed as data={{'{split}': rows}}."
        for split in (("train",) if config.evaluation.folds else ("train", "val"))
        if getattr(config.data, split) is None and given.get(split) is None
    ]
    if faults:
        raise ConfigError(faults)


def window_files(config: Config, rows: Mapping[str, object] | None = None) -> dict[str, WindowFile]:
    """The rows of a run by split; with folds only `train`, which the folds are cut from.

    `rows` in memory are used in place of a file. Raises ConfigError if the config names a file of the same split.
    """
    given = {split: content for split, content in (rows or {}).items() if content is not None}
    data = config.data
    check_own_fields(data.fields)
    if twice := [split for split in given if getattr(data, split) is not None]:
        raise ConfigError(
            [f"data.{split} names a file, but rows of {split} are given too. Set data.{split}=null." for split in twice]
        )
    cache = None
    if data.cache != "auto":
        check_cache_dir(Path(data.cache), Path(config.output_dir))
        cache = TableCache(data.cache)
    splits = ("train",) if config.evaluation.folds else SPLITS
    places = {split: given.get(split, getattr(data, split)) for split in splits}
    return {
        split: WindowFile(open_source(place, split), cache=cache, own=data.fields)
        for split, place in places.items()
        if place is not None
    }


def build_inputs(config: Config, say: Callable[[str], None], rows: Mapping[str, object] | None = None) -> Inputs:
    """The rows of one run; `say` reports notes. Raises ConfigError or DataError if they cannot be cut into folds."""
    files = window_files(config, rows)
    say(f"reading {', '.join(file.source.name for file in files.values())}")
    if config.evaluation.folds:
        note_unused_files(config, say, rows)
        assert config.evaluation.fold is not None, "require_single_run rejects a config of several folds"
        return Inputs(cut_folds(files["train"], config.evaluation.folds)[config.evaluation.fold - 1])
    return Inputs(files)


def note_unused_files(config: Config, say: Callable[[str], None], rows: Mapping[str, object] | None = None) -> None:
    """Note that folds read only the training rows, if there are others."""
    if config.data.val or config.data.test or set(rows or ()) - {"train"}:
        say("note: evaluation.folds splits data.train; data.val and data.test are not read")


def part_settings(config: Config) -> dict[str, Any]:
    """Keyword arguments of `Parts` from a config; `fitting` are those of `take_part`."""
    settings = dataset_settings(config)
    fitting = {name: settings[name] for name in ("codec", "oversampling", "max_repeat", "weights", "augmentation")}
    average, engine = config.checkpoints.average, config.model.engine
    return {"fitting": fitting, "average": average, "dtype": config.export.dtype, "engine": engine}


def dataset_settings(config: Config) -> dict[str, Any]:
    """Keyword arguments of `load_dataset` from a config."""
    data = config.data
    return {
        "codec": data.codec,
        "max_tokens": config.model.max_tokens,
        "oversampling": config.oversampling.target,
        "max_repeat": config.oversampling.max_repeat,
        "weights": config.loss.class_weights,
        "purge": True if data.purge == "auto" and config.evaluation.folds else data.purge,
        "embargo": data.embargo,
        "label_horizon": data.label_horizon,
        "allow_leakage": data.allow_leakage,
        "augmentation": Augmentation(**config.augmentation.model_dump(), seed=config.training.seed),
    }
