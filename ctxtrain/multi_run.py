"""Several runs of one config: walk-forward folds over one file, several seeds, or both; mean, spread and intervals.

Comes in: a config with `evaluation.folds` or `training.seeds`. Goes out: `runs.json` in its output_dir, and below it a
folder of its own for every run, as any run has, so that each can be resumed, looked at and used by itself.

One seed or one split says little where rows are few. The pooled scores take the rows that judged each run together;
their intervals draw blocks of time, and a window that several seeds answered stays with its block.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ctxtrain.config.schema import Config
from ctxtrain.config.strict_yaml import parse_yaml
from ctxtrain.data.dataset import Inputs, read_splits
from ctxtrain.data.positions import places_of
from ctxtrain.data.tokens import TokenStore
from ctxtrain.data.walk_forward import cut_folds
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError
from ctxtrain.evaluation.baselines import WITHOUT_INPUT, Baseline, best_on_validation, fit_baselines, pooled, variants
from ctxtrain.evaluation.blocks import blocks_of
from ctxtrain.evaluation.bootstrap import score_intervals
from ctxtrain.evaluation.comparison import compare
from ctxtrain.evaluation.metrics import CHIEF, evaluate_logits
from ctxtrain.evaluation.scores import Judged
from ctxtrain.evaluation.targets import judge
from ctxtrain.export.predictor import load_model
from ctxtrain.progress import Reporter
from ctxtrain.reporting.runs_schema import OF_EACH_RUN, RUNS_VERSION, Run, Runs
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import leak_mark
from ctxtrain.storage.atomic_files import write_json
from ctxtrain.storage.ownership import SEVERAL_NAME, refuse_foreign_runs, refuse_output
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.train import TrainingPipeline
from ctxtrain.training.build import dataset_settings, note_unread, row_files, several

REPORT = "runs.json"


def run_several(config: Config, *, resume: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """All runs, one after the other; returns what `runs.json` holds. Raises what a run raises; those done stay."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("evaluation.folds and training.seeds run in one process. Start them without torchrun.")
    if not several(config):
        raise ConfigError(
            "run_several makes several runs, but the config has neither training.seeds nor evaluation.folds. "
            "Set one of them, or give the config to TrainingPipeline."
        )
    reporter = reporter or Reporter()
    folder = RunFolder(config.output_dir)
    refuse_output(folder.root, config.model.base)
    with folder.owned():
        refuse_foreign_runs(folder.root / REPORT)
        if not resume:
            _refuse_other_runs(folder)
        if config.evaluation.folds:
            note_unread(config, reporter.say)
        runs, configs = [], _configs(config, folder.root)
        inputs = _inputs(config)
        for number, (name, settings) in enumerate(configs.items(), start=1):
            reporter.begin(f"run {number} of {len(configs)}: {name}")
            own = inputs[settings.evaluation.fold]
            summary = _finished(settings, own.files) if resume else None
            if summary is None:
                written = TrainingPipeline(settings, resume=resume, reporter=reporter, inputs=own).run()
                summary = Summary.model_validate(written)
            runs.append(_of_run(name, settings.training.seed, summary))
        leaked = _leaked(runs)
        mark, targets = leak_mark(leaked), config.targets.model_dump()
        report = Runs.model_validate(
            {
                "runs": runs,
                "version": RUNS_VERSION,
                "leaked": leaked,
                **_pooled(list(configs.values()), inputs, runs, targets, config.training.seed, mark),
                "spread": {name: _spread(values) | mark for name, values in _of_each(runs).items()},
            }
        ).plain()
        write_json(folder.root / REPORT, report)
    return report


def _refuse_other_runs(folder: RunFolder) -> None:
    """Raises ConfigError if the folder holds a run, or runs of any seeds or folds: `REPORT` is about all of them."""
    folder.refuse_other_run(resume=False)
    found = [
        path.name
        for path in sorted(folder.root.iterdir())
        if path.name == REPORT or (SEVERAL_NAME.fullmatch(path.name) and RunFolder(path).holds())
    ]
    if found:
        raise ConfigError(
            f"output_dir must be new, {folder.root} holds several runs already: {', '.join(found)}. "
            "Continue them with --resume, or use another output_dir."
        )


def _configs(config: Config, root: Path) -> dict[str, Config]:
    """The config of every run by its name, which is also its folder below `root`."""
    found = {}
    for fold in _folds(config):
        for seed in config.training.seeds or [config.training.seed]:
            parts = [f"fold_{fold}" if fold else "", f"seed_{seed}" if config.training.seeds else ""]
            name = "-".join(filter(None, parts))
            found[name] = config.model_copy(
                update={
                    "training": config.training.model_copy(update={"seed": seed, "seeds": None}),
                    "evaluation": config.evaluation.model_copy(update={"fold": fold}),
                    "output_dir": str(root / name),
                }
            )
    return found


def _folds(config: Config) -> list[int | None]:
    """The folds to run, counted from 1; `[None]` without folds."""
    folds, fold = config.evaluation.folds, config.evaluation.fold
    return [fold] if folds is None or fold is not None else list(range(1, folds + 1))


def _inputs(config: Config) -> dict[int | None, Inputs]:
    """The rows of every fold, all of one table, so that no row is parsed or tokenised twice."""
    files, tokens, folds = row_files(config), TokenStore(), config.evaluation.folds
    if folds is None:
        return {None: Inputs(files, tokens)}
    cut = cut_folds(files["train"], folds)
    return {fold: Inputs(cut[fold - 1], tokens) for fold in _folds(config) if fold is not None}


def _finished(config: Config, files: Mapping[str, WindowFile]) -> Summary | None:
    """The summary of a run that has ended, of this very config and these rows. Raises DataError if it is damaged."""
    folder = RunFolder(config.output_dir)
    if not folder.summary.exists() or _what_counts(folder.read_config()) != _what_counts(_written(config)):
        return None
    summary = folder.read_summary()
    now = {split: file.sha256() for split, file in files.items()}
    ended = not summary.unfinished  # an export before the end writes a summary too
    return summary if ended and summary.data.sha256 == now else None


def _written(config: Config) -> str:
    return config.with_absolute_paths().to_yaml()


def _what_counts(config: str) -> object:
    """The values of a config that a run was made with, less where its tables are kept."""
    try:
        values = parse_yaml(config, "config.yaml")
        return {**values, "data": {**values["data"], "cache": None}}
    except (ConfigError, KeyError, TypeError):  # damaged: no run of this config
        return None


def _of_run(name: str, seed: int, summary: Summary) -> Run:
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
            "lead": scores.value(CHIEF) - baselines.scores[baselines.best].value(CHIEF),
            "beats_baseline": baselines.finding == "ahead",
            "baselines": {
                baseline: {CHIEF: own.value(CHIEF), "validation_macro_f1": own.validation_macro_f1}
                for baseline, own in baselines.scores.items()
            },
            "baselines_left_out": baselines.left_out,
            "judged_on": summary.targets_judged_on,
            "judged_rows_chose_the_epoch": summary.judged_rows_chose_the_epoch,
            **leak_mark(summary.data.leaked),
        }
    )


def _leaked(runs: Sequence[Run]) -> str:
    """What stands in two files of which runs, or nothing; several seeds have the same files."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.leaked:
            names.setdefault(run.leaked, []).append(run.name)
    return "; ".join(f"{leaked} ({', '.join(where)})" for leaked, where in names.items())


def _of_each(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The numbers of every run whose spread is told."""
    found = {metric.name: [run.value(metric.name) for run in runs] for metric in OF_EACH_RUN}
    return {**found, "lead": [run.lead for run in runs]}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n − 1), smallest and largest."""
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values, ddof=1)),
        "lowest": min(values),
        "highest": max(values),
    }


def _pooled(
    configs: Sequence[Config],
    inputs: Mapping[int | None, Inputs],
    runs: Sequence[Run],
    targets: dict[str, float],
    seed: int,
    mark: dict[str, str],
) -> dict[str, Any]:
    """Scores of all judged rows of all runs, each by the model of its run, with intervals and targets; all marked."""
    judging: dict[int | None, WindowFile] = {}
    starts: dict[int | None, int] = {}
    logits, labels, rows = [], [], []
    for config in configs:
        fold = config.evaluation.fold
        if fold not in judging:
            starts[fold] = sum(map(len, judging.values()))
            files = inputs[fold].files
            judging[fold] = files["test" if "test" in files else "val"]
        model = load_model(RunFolder(config.output_dir).zip, engine=config.model.engine)
        question = model.read(judging[fold])
        rows.append(starts[fold] + np.arange(len(question.labels_N)))
        labels.append(question.labels_N)
        logits.append(model.token_logits(question.tokens) / model.temperature)
    row_N, logits_NC, labels_N = np.concatenate(rows), np.concatenate(logits), np.concatenate(labels)
    blocks = blocks_of(places_of(chain.from_iterable(judging.values())))
    judged = Judged.of_logits(logits_NC, labels_N)
    metrics, intervals = evaluate_logits(logits_NC, labels_N), score_intervals(judged, blocks.block_N[row_N], seed)
    judgements = judge(metrics, targets, intervals, trusted=blocks.trusted)
    means, left_out = _mean_baselines(runs)
    best, flatters = best_on_validation(means), any(run.judged_rows_chose_the_epoch for run in runs)
    compared = compare(
        judged,
        metrics,
        _pooled_baselines(configs, inputs, {best, *WITHOUT_INPUT}),
        best,
        blocks.block_N[row_N],
        trusted=blocks.trusted,
        seed=seed,
        looks=variants(means) if flatters else 1,
    )
    return {
        "pooled": {**metrics, **mark},
        "baselines": {"means": means, "left_out": left_out, **compared},
        "intervals": {"blocks": blocks.count, "block": blocks.note, "doubt": blocks.doubt, "scores": intervals},
        "targets": [target | mark for target in judgements],
        "targets_met": all(target["met"] for target in judgements),
    }


def _mean_baselines(runs: Sequence[Run]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Mean scores of each baseline that every run has, with the model's mean `lead`; why others are left out."""
    left_out = {name: why for run in runs for name, why in run.baselines_left_out.items()}
    means = {
        name: {
            "macro_f1": float(np.mean([run.baselines[name].macro_f1 for run in runs])),
            "validation_macro_f1": float(np.mean([run.baselines[name].validation_macro_f1 for run in runs])),
            "lead": float(np.mean([run.value(CHIEF) - run.baselines[name].macro_f1 for run in runs])),
        }
        for name in runs[0].baselines
        if name not in left_out
    }
    return means, left_out


def _pooled_baselines(
    configs: Sequence[Config], inputs: Mapping[int | None, Inputs], names: Collection[str]
) -> dict[str, Baseline]:
    """What these baselines say about the judged rows of all runs, fitted anew: a run keeps only their scores."""
    found: dict[str, list[Baseline]] = {}
    for config in configs:
        settings = dataset_settings(config)
        surveys, _ = read_splits(
            inputs[config.evaluation.fold].files, purge=settings["purge"], embargo=settings["embargo"]
        )
        fitted, _ = fit_baselines(
            {split: one.file for split, one in surveys.items()},
            {split: one.labels_N for split, one in surveys.items()},
            "test" if "test" in surveys else "val",
            surveys["train"].fields.fit(config.data.codec),
            config.training.seed,
            names,
        )
        for name, baseline in fitted.items():
            found.setdefault(name, []).append(baseline)
    return {name: pooled(own) for name, own in found.items()}
