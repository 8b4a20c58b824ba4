"""Export the best adapters as a merged model, in a folder and a zip that transformers can open.

Input: what a run has trained, tokenizer, codec and rows. Output: `export/`, checked against the trained model in a new
process, `best_model.safetensors` and `final_model.zip`. All files are first written to a scratch folder, so an
interrupted export leaves nothing behind; a few renames then move them into the run folder. Equal inputs give identical
bytes, and each file is hashed once, while it is written.

At any time at most one whole model is in memory, of this process and the new one together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ctxtrain.config.value_types import CheckDevice, ExportDtype
from ctxtrain.data.codec import Codec
from ctxtrain.data.dataset import Dataset
from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.api import EngineChoice
from ctxtrain.evaluation.blocks import assign_blocks
from ctxtrain.evaluation.calibration import TemperatureScaler
from ctxtrain.evaluation.export_scores import score_export
from ctxtrain.evaluation.metrics import PRIMARY_METRIC, Metrics, evaluate_logits
from ctxtrain.evaluation.probabilities import calibrated_probabilities
from ctxtrain.evaluation.selective import Threshold, choose_thresholds
from ctxtrain.export.check_device import choose_device
from ctxtrain.export.choose import choose_weights
from ctxtrain.export.compare import (
    TrainedLogits,
    check_archive,
    checked_rows,
    compare_logits,
    local_logits,
    max_difference,
    rounding_note,
)
from ctxtrain.export.fresh_process import BATCH_SIZE, fresh_process
from ctxtrain.export.locate import EXPORT_FOLDER
from ctxtrain.export.merge import round_weights, write_merged
from ctxtrain.export.model_card import model_card
from ctxtrain.export.predictor import Predictor
from ctxtrain.memory import release_memory
from ctxtrain.model.averaging import Candidates
from ctxtrain.model.lora import merge
from ctxtrain.model.skeleton import Skeleton, Trained
from ctxtrain.reporting.summary_schema import Baselines
from ctxtrain.reporting.verdict import recommendation
from ctxtrain.storage.archive import pack
from ctxtrain.storage.atomic_files import (
    FileDigest,
    annotate_write_errors,
    link_or_copy,
    sync,
    to_json,
    write_manifest,
)
from ctxtrain.storage.metrics_log import Scores
from ctxtrain.storage.run_folder import RunFolder

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

WEIGHTS, BEST_MODEL, ARCHIVE = "model.safetensors", "best_model.safetensors", "final_model.zip"


@dataclass(frozen=True)
class ExportScores:
    """Calibration, thresholds and scores of the merged model.

    `assessment` is the result of `score_export` on the test rows, or on the validation rows if there are no test rows.
    """

    calibration: dict[str, Any]
    thresholds: dict[str, Threshold]
    validation: Metrics
    test: Metrics | None
    assessment: dict[str, Any]


@dataclass(frozen=True)
class ExportResult:
    """Scores of the export, the result of the logit check, and the SHA-256 of each file by its path in the run.

    `averaging` is the second value of `choose_weights`.
    """

    scores: ExportScores
    check: dict[str, Any]
    files: dict[str, str]
    averaging: dict[str, Any] | None


def prepare_export(
    candidates: Candidates,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    tokens: Mapping[str, Tokens],
    *,
    max_tokens: int,
    engine: EngineChoice,
    dtype: ExportDtype,
    check_device: CheckDevice,
    calibrate: bool,
    targets: Mapping[str, float],
    seed: int,
    base_name: str,
    caveat: str,
    scratch: Path,
    say: Callable[[str], None],
) -> ExportResult:
    """Choose, merge, calibrate, write, check and pack the model in an empty scratch folder.

    The temperature is fitted on validation rows. Test rows, if `tokens` has any, are only scored. `seed` is that of the
    baselines. The export stores a confidence threshold for each precision in `targets`; the card shows `caveat`. Raises
    ExportError if the logits of the reopened model differ, WriteFailed if the disk is full.
    """
    trained, averaging = choose_weights(candidates, tokenizer, data, dtype=dtype, engine=engine, say=say)
    folder, skeleton = scratch / EXPORT_FOLDER, trained.skeleton
    folder.mkdir()
    device = choose_device(check_device, skeleton.nbytes)
    count = checked_rows(skeleton.plain.num_parameters(), float(tokens["val"].lengths.mean()), device)
    texts = list(data.codec.render_all(islice(data.files["val"], count)))
    tokenizer.model_max_length = max_tokens
    with annotate_write_errors(scratch, 2 * skeleton.nbytes):  # folder and zip
        say(f"exporting: merging the adapters into {base_name}")
        for note in trained.notes:
            say(f"note: {note}")
        weights_digest = write_merged(folder / WEIGHTS, skeleton, trained.weights, dtype, trained.load)
        save_config(skeleton, folder, dtype)
        say("scoring the model and its baselines")
        local = _compute_locally(trained, tokenizer, texts, tokens, folder / "adapter", dtype, device, engine, data)
        release_memory()  # the fresh process loads the model anew
        tokenizer.save_pretrained(folder)
        # The fresh process computes while this one fits the baselines.
        with fresh_process.reopened_logits(folder, texts, torch.get_num_threads(), device) as reopened:
            scored = _score(local.logits, data, calibrate=calibrate, targets=targets, seed=seed)
            _write_extras(folder, data.codec, scored, base_name, texts[0], caveat, averaging)
            say("checking the export in a fresh process")
            check = compare_logits(reopened.result(), local.trained, local.merged_NC)
        if dtype != "float32":
            say(f"note: {rounding_note(dtype, check)}")
        files = _pack(scratch, weights_digest)
        check["max_predict_difference"] = check_archive(scratch / ARCHIVE, texts, local.trained, check, engine)
    return ExportResult(scored, {"dtype": dtype, "device": device} | check, files, averaging)


def save_config(skeleton: Skeleton, folder: Path, dtype: ExportDtype) -> None:
    """Write `config.json`, as `save_pretrained` of the merged model does."""
    config = deepcopy(skeleton.plain.config)
    config.dtype, config.architectures = dtype, [type(skeleton.plain).__name__]
    config.save_pretrained(folder)


@dataclass(frozen=True)
class _Local:
    """Logits of this process: of the trained model, of the merged one on the first checked rows, and by split."""

    trained: TrainedLogits
    merged_NC: Floats
    logits: dict[str, Floats]


def _compute_locally(
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    tokens: Mapping[str, Tokens],
    adapter: Path,
    dtype: ExportDtype,
    device: str,
    engine: EngineChoice,
    data: Dataset,
) -> _Local:
    """Load the trained model, save its adapters, merge them with PEFT and score; nothing of it stays in memory."""
    model = trained.load().to(device).eval()
    _save_adapter(model, adapter)
    expected = TrainedLogits.of(model, tokenizer, texts)
    merged = merge(model)
    merged_NC = local_logits(merged, tokenizer, texts[:BATCH_SIZE])
    if dtype != "float32":
        exact_NC = merged_NC
        max_difference("trained", exact_NC, expected.logits_NC[: len(exact_NC)], expected.allowed)
        round_weights(merged, getattr(torch, dtype))
        merged_NC = local_logits(merged, tokenizer, texts[:BATCH_SIZE])
        expected = replace(expected, rounding=float(np.abs(merged_NC - exact_NC).max()))
    merged = merged.to(choose_device("auto", trained.skeleton.nbytes) if device == "cpu" else device)
    predictor = Predictor(merged, tokenizer, data.codec, 1.0, tokenizer.model_max_length, engine=engine)
    logits = {split: predictor.token_logits(tokens[split]) for split in ("val", "test") if split in tokens}
    return _Local(expected, merged_NC, logits)


def _score(
    logits: Mapping[str, Floats], data: Dataset, *, calibrate: bool, targets: Mapping[str, float], seed: int
) -> ExportScores:
    """Calibrate on the validation rows, then score the model and its baselines. `logits` are by split."""
    labels, split = data.labels, "test" if "test" in logits else "val"
    blocks = assign_blocks(data.positions["val"]).fold_groups if calibrate else None
    calibration, thresholds = _calibrate(logits["val"], labels["val"], blocks, targets)
    temperature = calibration["temperature"]
    validation = evaluate_logits(logits["val"], labels["val"], temperature)
    test = evaluate_logits(logits["test"], labels["test"], temperature) if split == "test" else None
    assessment = score_export(
        data.files,
        data.positions,
        labels,
        split,
        codec=data.codec,
        logits_NC=logits[split],
        temperature=temperature,
        metrics=test or validation,
        targets=targets,
        thresholds=thresholds,
        seed=seed,
        mirror=data.training.augmentation.mirror,
    )
    return ExportScores(calibration, thresholds, validation, test, assessment)


def _write_extras(
    folder: Path,
    codec: Codec,
    scored: ExportScores,
    base_name: str,
    text: str,
    caveat: str,
    averaging: Mapping[str, Any] | None,
) -> None:
    """Write `codec.json`, `calibration.json` and the model card, with `text` as its example."""
    codec.save(folder / "codec.json")
    (folder / "calibration.json").write_bytes(to_json({**scored.calibration, "thresholds": scored.thresholds}))
    baselines = Baselines.model_validate(scored.assessment["baselines"])
    score = (scored.test or scored.validation)[PRIMARY_METRIC]
    card = model_card(
        base_name,
        Scores.model_validate(scored.validation),
        None if scored.test is None else Scores.model_validate(scored.test),
        recommendation(score, baselines, scored.assessment["intervals"]["doubt"]),
        text if codec.kind == "compact" else "your text",
        caveat,
        averaging["reason"] if averaging else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _calibrate(
    logits_NC: Floats, labels_N: Ints, blocks: Ints | None, targets: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Threshold]]:
    """Fit temperature and confidence thresholds on validation rows.

    `blocks` assigns each row to a group that the cross-fit does not split. Without `blocks` the temperature stays 1.
    """
    calibration: dict[str, Any] = {"method": "none", "temperature": 1.0}
    if blocks is not None:
        calibration = TemperatureScaler().fit(logits_NC, labels_N, blocks).summary()
    precisions = {"LONG": targets["long_precision"], "SHORT": targets["short_precision"]}
    probabilities_NC = calibrated_probabilities(logits_NC, calibration["temperature"])
    return calibration, choose_thresholds(probabilities_NC, labels_N, precisions)


def _pack(scratch: Path, weights: FileDigest) -> dict[str, str]:
    """Pack the folder, whose weights have a known digest; returns the SHA-256 of each file by its path in the run."""
    folder = scratch / EXPORT_FOLDER
    digests = write_manifest(folder, {WEIGHTS: weights})
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    link_or_copy(folder / WEIGHTS, scratch / BEST_MODEL)
    files = {BEST_MODEL: weights.sha256, ARCHIVE: pack(folder, scratch / ARCHIVE, digests)}
    return files | {f"{EXPORT_FOLDER}/{name}": digests[name].sha256 for name in sorted(digests)}


def place_export(scratch: Path, folder: RunFolder) -> None:
    """Move a prepared export into the run folder. An older export moves to the scratch folder, which is deleted."""
    with annotate_write_errors(folder.root, 0):
        if folder.export.exists():
            folder.export.rename(scratch / "replaced")
        (scratch / EXPORT_FOLDER).rename(folder.export)
        (scratch / BEST_MODEL).replace(folder.best_model)
        (scratch / ARCHIVE).replace(folder.zip)
        sync(folder.root)


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapters for PEFT. Sets in the config are sorted, because their order varies between processes."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = orjson.loads((folder / "adapter_config.json").read_bytes())
    for name in ("target_modules", "modules_to_save"):
        config[name] = sorted(config[name])
    (folder / "adapter_config.json").write_bytes(to_json(dict(sorted(config.items()))))
