"""Several runs of one config: walk-forward folds over one file, several seeds, or both.

Input: a config with `evaluation.folds` or `training.seeds`. Output: `runs.json` in its output_dir with mean, spread and
pooled scores, and a normal run folder per run below it, which can be resumed and used separately.

With few rows, one seed or one split is weak evidence. The pooled scores cover the scored rows of all runs together.
Their intervals resample time blocks, so predictions of several seeds for one window stay in the same block.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ctxtrain.config.schema import Config
from ctxtrain.config.strict_yaml import parse_yaml
from ctxtrain.data.dataset import Inputs, fit_codec_of_run, read_splits
from ctxtrain.data.positions import collect_positions
from ctxtrain.data.token_store import TokenStore
from ctxtrain.data.walk_forward import cut_folds
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError
from ctxtrain.evaluation.baselines import (
    WITHOUT_INPUT,
    Baseline,
    best_on_validation,
    count_variants,
    fit_baselines,
    pool_baseline,
)
from ctxtrain.evaluation.blocks import assign_blocks
from ctxtrain.evaluation.bootstrap import NO_INTERVALS, score_intervals
from ctxtrain.evaluation.comparison import compare
from ctxtrain.evaluation.metric_formulas import ScoredRows
from ctxtrain.evaluation.metrics import PRIMARY_METRIC, evaluate_logits
from ctxtrain.evaluation.targets import evaluate_targets
from ctxtrain.export.fresh_process import fresh_process
from ctxtrain.export.predictor import load_model
from ctxtrain.progress import Reporter
from ctxtrain.reporting.runs_schema import OF_EACH_RUN, RUNS_VERSION, Run, Runs
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import leak_mark
from ctxtrain.storage.atomic_files import write_json
from ctxtrain.storage.ownership import RUN_SUBFOLDER, check_output_dir, refuse_foreign_runs_file
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.train import TrainingPipeline
from ctxtrain.training.inputs import (
    dataset_settings,
    multi_run_keys,
    note_unused_files,
    require_rows,
    window_files,
)

REPORT = "runs.json"


def run_several(
    config: Config,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    data: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Make all runs one after another; returns the content of `runs.json`. `data` has rows in memory by split.

    An exception of a run is passed on; the runs before it stay on disk.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("evaluation.folds and training.seeds run in one process. Start them without torchrun.")
    if not multi_run_keys(config):
        raise ConfigError(
            "run_several makes several runs, but the config has neither training.seeds nor evaluation.folds. "
            "Set one of them, or pass the config to TrainingPipeline."
        )
    require_rows(config, data)
    reporter = reporter or Reporter()
    folder = RunFolder(config.output_dir)
    check_output_dir(folder.root, config.model.base)
    with folder.lock(), fresh_process.running():
        refuse_foreign_runs_file(folder.root / REPORT)
        if not resume:
            _refuse_other_runs(folder)
        if config.evaluation.folds:
            note_unused_files(config, reporter.say, data)
        runs, configs = [], _run_configs(config, folder.root)
        inputs = _fold_inputs(config, data)
        for number, (name, run_config) in enumerate(configs.items(), start=1):
            reporter.begin_run(f"run {number} of {len(configs)}: {name}")
            run_inputs = inputs[run_config.evaluation.fold]
            summary = _finished_summary(run_config, run_inputs.files) if resume else None
            if summary is None:
                content = TrainingPipeline(run_config, resume=resume, reporter=reporter, inputs=run_inputs).run()
                summary = Summary.model_validate(content)
            runs.append(_run_record(name, run_config.training.seed, summary))
        leaked = _join_leaks(runs)
        mark, targets = leak_mark(leaked), config.targets.model_dump()
        report = Runs.model_validate(
            {
                "runs": runs,
                "version": RUNS_VERSION,
                "leaked": leaked,
                **_pooled_scores(list(configs.values()), inputs, runs, targets, config.training.seed, mark),
                "spread": {name: _spread(values) | mark for name, values in _values_by_metric(runs).items()},
            }
        ).to_dict()
        write_json(folder.root / REPORT, report)
    return report


def _refuse_other_runs(folder: RunFolder) -> None:
    """Raises ConfigError if the folder holds a run, or runs of seeds or folds: `REPORT` describes all of them."""
    folder.refuse_other_run(resume=False)
    existing = [
        path.name
        for path in sorted(folder.root.iterdir())
        if path.name == REPORT or (RUN_SUBFOLDER.fullmatch(path.name) and RunFolder(path).existing_outputs())
    ]
    if existing:
        raise ConfigError(
            f"output_dir must be new, {folder.root} holds several runs already: {', '.join(existing)}. "
            "Continue them with --resume, or use another output_dir."
        )


def _run_configs(config: Config, root: Path) -> dict[str, Config]:
    """The config of each run by its name, which is also its folder below `root`."""
    configs = {}
    for fold in _folds(config):
        for seed in config.training.seeds or [config.training.seed]:
            parts = [f"fold_{fold}" if fold else "", f"seed_{seed}" if config.training.seeds else ""]
            name = "-".join(filter(None, parts))
            configs[name] = config.model_copy(
                update={
                    "training": config.training.model_copy(update={"seed": seed, "seeds": None}),
                    "evaluation": config.evaluation.model_copy(update={"fold": fold}),
                    "output_dir": str(root / name),
                }
            )
    return configs


def _folds(config: Config) -> list[int | None]:
    """The folds to run, counted from 1; `[None]` without folds."""
    folds, fold = config.evaluation.folds, config.evaluation.fold
    return [fold] if folds is None or fold is not None else list(range(1, folds + 1))


def _fold_inputs(config: Config, data: Mapping[str, object] | None) -> dict[int | None, Inputs]:
    """The rows of each fold, from one table and one token store, so that no row is parsed or tokenised twice."""
    files, tokens, folds = window_files(config, data), TokenStore(), config.evaluation.folds
    if folds is None:
        return {None: Inputs(files, tokens)}
    splits = cut_folds(files["train"], folds)
    return {fold: Inputs(splits[fold - 1], tokens) for fold in _folds(config) if fold is not None}


def _finished_summary(config: Config, files: Mapping[str, WindowFile]) -> Summary | None:
    """The summary of a run, if it is finished and has this config and these rows. Raises DataError if it is damaged."""
    folder = RunFolder(config.output_dir)
    if not folder.summary.exists():
        return None
    if _comparable_values(folder.read_config()) != _comparable_values(config.with_absolute_paths().to_yaml()):
        return None
    summary = folder.read_summary()
    digests = {split: file.sha256() for split, file in files.items()}
    is_finished = not summary.unfinished  # the export of an unfinished run writes a summary too
    sizes = config.evaluation.learning_curve
    if sizes and (not summary.learning_curve or summary.learning_curve.misses(sizes)):
        return None
    return summary if is_finished and summary.data.sha256 == digests else None


def _comparable_values(config: str) -> object:
    """The values of a stored config, without the cache path, which does not affect results; None if damaged."""
    try:
        values = parse_yaml(config, "config.yaml")
        return {**values, "data": {**values["data"], "cache": None}}
    except (ConfigError, KeyError, TypeError):
        return None


def _run_record(name: str, seed: int, summary: Summary) -> Run:
    scores, baselines = summary.judged, summary.baselines
    return Run.model_validate(
        {
            "name": name,
            "seed": seed,
            "rows": summary.data.rows,
            "purged": summary.data.purged,
            "epoch": summary.best.epoch,
            "skipped_steps": summary.skipped_steps,
            **{metric.name: scores.value(metric.name) for metric in OF_EACH_RUN},
            "best_baseline": baselines.best,
            "lead": scores.value(PRIMARY_METRIC) - baselines.scores[baselines.best].value(PRIMARY_METRIC),
            "beats_baseline": baselines.finding == "ahead",
            "baselines": {
                baseline: {PRIMARY_METRIC: item.value(PRIMARY_METRIC), "validation_macro_f1": item.validation_macro_f1}
                for baseline, item in baselines.scores.items()
            },
            "baselines_left_out": baselines.left_out,
            "judged_on": summary.targets_judged_on,
            "judged_rows_chose_the_epoch": summary.judged_rows_chose_the_epoch,
            **leak_mark(summary.data.leaked),
        }
    )


def _join_leaks(runs: Sequence[Run]) -> str:
    """The rows shared by two files, with the names of the runs that have them; empty if there are none."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.leaked:
            names.setdefault(run.leaked, []).append(run.name)
    return "; ".join(f"{leaked} ({', '.join(run_names)})" for leaked, run_names in names.items())


def _values_by_metric(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The values over all runs, by metric; `lead` is the lead over the best baseline."""
    values = {metric.name: [run.value(metric.name) for run in runs] for metric in OF_EACH_RUN}
    return {**values, "lead": [run.lead for run in runs]}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (n − 1), minimum and maximum."""
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values, ddof=1)),
        "lowest": min(values),
        "highest": max(values),
    }


def _pooled_scores(
    configs: Sequence[Config],
    inputs: Mapping[int | None, Inputs],
    runs: Sequence[Run],
    targets: dict[str, float],
    seed: int,
    mark: dict[str, str],
) -> dict[str, Any]:
    """Scores over the scored rows of all runs, with intervals, targets and baselines.

    Each row is predicted by the model of its run. `mark` is added to the scores and targets.
    """
    scored_files: dict[int | None, WindowFile] = {}
    starts: dict[int | None, int] = {}
    logits, labels, rows = [], [], []
    for config in configs:
        fold = config.evaluation.fold
        if fold not in scored_files:
            starts[fold] = sum(map(len, scored_files.values()))
            files = inputs[fold].files
            scored_files[fold] = files["test" if "test" in files else "val"]
        model = load_model(RunFolder(config.output_dir).zip, engine=config.model.engine)
        encoded = model.encode(scored_files[fold])
        rows.append(starts[fold] + np.arange(len(encoded.labels_N)))
        labels.append(encoded.labels_N)
        logits.append(model.token_logits(encoded.tokens) / model.temperature)
    row_N, logits_NC, labels_N = np.concatenate(rows), np.concatenate(logits), np.concatenate(labels)
    blocks = assign_blocks(collect_positions(chain.from_iterable(scored_files.values())))
    blocks = replace(blocks, block_N=blocks.block_N[row_N])
    scored = ScoredRows.from_logits(logits_NC, labels_N)
    intervals = score_intervals(scored, blocks.block_N, seed) if blocks.trusted else NO_INTERVALS
    metrics = evaluate_logits(logits_NC, labels_N)
    target_results = evaluate_targets(metrics, targets, intervals)
    means, left_out = _mean_baselines(runs)
    best = best_on_validation(means)
    is_optimistic = any(run.judged_rows_chose_the_epoch for run in runs)
    comparison = compare(
        scored,
        metrics,
        _pooled_baselines(configs, inputs, {best, *WITHOUT_INPUT}),
        best,
        blocks,
        seed=seed,
        candidate_count=count_variants(means) if is_optimistic else 1,
    )
    return {
        "pooled": {**metrics, **mark},
        "baselines": {"means": means, "left_out": left_out, **comparison},
        "intervals": {"blocks": blocks.count, "block": blocks.note, "doubt": blocks.doubt, "scores": intervals},
        "targets": [target | mark for target in target_results],
        "targets_met": all(target["met"] for target in target_results),
    }


def _mean_baselines(runs: Sequence[Run]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Mean scores of each baseline that all runs have, with the model's mean `lead`; and why others are left out."""
    left_out = {name: reason for run in runs for name, reason in run.baselines_left_out.items()}
    means = {
        name: {
            "macro_f1": float(np.mean([run.baselines[name].macro_f1 for run in runs])),
            "validation_macro_f1": float(np.mean([run.baselines[name].validation_macro_f1 for run in runs])),
            "lead": float(np.mean([run.value(PRIMARY_METRIC) - run.baselines[name].macro_f1 for run in runs])),
        }
        for name in runs[0].baselines
        if name not in left_out
    }
    return means, left_out


def _pooled_baselines(
    configs: Sequence[Config], inputs: Mapping[int | None, Inputs], names: Collection[str]
) -> dict[str, Baseline]:
    """The named baselines over the scored rows of all runs; fitted again, because a run stores only their scores."""
    baselines: dict[str, list[Baseline]] = {}
    for config in configs:
        settings = dataset_settings(config)
        surveys, *_ = read_splits(
            inputs[config.evaluation.fold].files, settings["purge"], settings["embargo"], settings["label_horizon"]
        )
        fitted, _ = fit_baselines(
            {split: survey.file for split, survey in surveys.items()},
            {split: survey.labels_N for split, survey in surveys.items()},
            "test" if "test" in surveys else "val",
            fit_codec_of_run(surveys["train"], config.data.codec, settings["augmentation"]),
            config.training.seed,
            names,
            mirror=config.augmentation.mirror,
        )
        for name, baseline in fitted.items():
            baselines.setdefault(name, []).append(baseline)
    return {name: pool_baseline(fits) for name, fits in baselines.items()}
