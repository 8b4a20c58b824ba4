"""Export the best adapters as a merged model, in a folder and a zip that transformers can open.

Input: the trained PEFT model in float32, tokenizer, codec and validation windows. Output: `export/`, checked against
the trained model in a new process, `best_model.safetensors` and `final_model.zip`. All files are first written to a
scratch folder, so an interrupted export leaves nothing behind; a few renames then move them into the run folder. Equal
inputs give identical bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from peft import PeftModel
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from ctxtrain.data.batches import Tokens, tokenise
from ctxtrain.data.codec import Codec
from ctxtrain.data.dataset import Dataset
from ctxtrain.engine.api import EngineChoice
from ctxtrain.errors import DataError, ExportError
from ctxtrain.evaluation.assess import assess
from ctxtrain.evaluation.blocks import assign_blocks
from ctxtrain.evaluation.calibration import TemperatureScaler
from ctxtrain.evaluation.metrics import PRIMARY_METRIC, Metrics, evaluate_logits
from ctxtrain.evaluation.selective import Threshold, choose_thresholds
from ctxtrain.export import reopen
from ctxtrain.export.fresh_process import BATCH_SIZE, fresh_process
from ctxtrain.export.locate import EXPORT_FOLDER
from ctxtrain.export.model_card import model_card
from ctxtrain.export.predictor import Predictor, load_model
from ctxtrain.model.lora import merge
from ctxtrain.model.tokenizer import quiet_transformers
from ctxtrain.reporting.summary_schema import Baselines
from ctxtrain.reporting.verdict import recommendation
from ctxtrain.storage.archive import pack
from ctxtrain.storage.atomic_files import annotate_write_errors, link_or_copy, sync, to_json, write_manifest
from ctxtrain.storage.metrics_log import Scores
from ctxtrain.storage.run_folder import RunFolder

Ints = NDArray[np.int64]

TOLERANCE = 1e-5
READING_TOLERANCE = 2e-6
# Merging rounds each weight once; another batch size rounds each sum of products differently. Both errors are of
# similar size, so the measured difference between batch sizes, times a margin, bounds that of merging.
NOISE_FACTOR = 16
CHECKED_ROWS = 200


@dataclass(frozen=True)
class ExportScores:
    """Calibration, thresholds and scores of the merged model.

    `assessment` is the result of `assess` on the test rows, or on the validation rows if there are no test rows.
    """

    calibration: dict[str, Any]
    thresholds: dict[str, Threshold]
    validation: Metrics
    test: Metrics | None
    assessment: dict[str, Any]


@dataclass(frozen=True)
class ExportResult:
    """The exported model with its scores and the result of the logit check."""

    predictor: Predictor
    scores: ExportScores
    check: dict[str, float | int]


def prepare_export(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    tokens: Mapping[str, Tokens],
    *,
    max_tokens: int,
    engine: EngineChoice,
    calibrate: bool,
    targets: Mapping[str, float],
    seed: int,
    base_name: str,
    caveat: str,
    scratch: Path,
    say: Callable[[str], None],
) -> ExportResult:
    """Merge, calibrate, write, check and pack the model in an empty scratch folder.

    The temperature is fitted on validation rows. Test rows, if `tokens` has any, are only scored. `seed` is that of the
    baselines. The export stores a confidence threshold for each precision in `targets`; the card shows `caveat`. Raises
    ExportError if the logits of the reopened model differ, WriteFailed if the disk is full.
    """
    folder = scratch / EXPORT_FOLDER
    texts = list(data.codec.render_all(islice(data.files["val"], CHECKED_ROWS)))
    tokenizer.model_max_length = max_tokens
    trained = TrainedLogits.of(model.eval(), tokenizer, texts)
    with annotate_write_errors(scratch, 2 * sum(weight.nbytes for weight in model.parameters())):  # folder and zip
        _save_adapter(model, folder / "adapter")
        merged = merge(model)
        with quiet_transformers():
            merged.save_pretrained(folder, max_shard_size="1TB")  # a single file
            tokenizer.save_pretrained(folder)
        merged_NC = _local_logits(merged, tokenizer, texts[:BATCH_SIZE])
        predictor = Predictor(merged, tokenizer, data.codec, 1.0, max_tokens, engine=engine)
        # The fresh process computes while this one fits the baselines.
        with fresh_process.reopened_logits(folder, texts, torch.get_num_threads()) as reopened:
            say("scoring the model and its baselines")
            scored = _score(predictor, data, tokens, calibrate=calibrate, targets=targets, seed=seed)
            _write_extras(folder, data.codec, scored, base_name, texts[0], caveat)
            say("checking the export in a fresh process")
            check = compare_logits(reopened.result(), trained, merged_NC)
        check["max_predict_difference"] = _pack(scratch, texts, trained, check, engine)
    return ExportResult(predictor, scored, check)


def _score(
    predictor: Predictor,
    data: Dataset,
    tokens: Mapping[str, Tokens],
    *,
    calibrate: bool,
    targets: Mapping[str, float],
    seed: int,
) -> ExportScores:
    """Calibrate on the validation rows, then score the model and its baselines."""
    labels, split = data.labels, "test" if "test" in tokens else "val"
    logits_NC = predictor.token_logits(tokens["val"])
    blocks = assign_blocks(data.positions["val"]).fold_groups if calibrate else None
    calibration, thresholds = _calibrate(predictor, logits_NC, labels["val"], blocks, targets)
    validation, test = evaluate_logits(logits_NC, labels["val"], predictor.temperature), None
    if split == "test":
        logits_NC = predictor.token_logits(tokens["test"])
        test = evaluate_logits(logits_NC, labels["test"], predictor.temperature)
    assessment = assess(
        data.files,
        data.positions,
        labels,
        split,
        codec=data.codec,
        logits_NC=logits_NC,
        temperature=predictor.temperature,
        metrics=test or validation,
        targets=targets,
        thresholds=thresholds,
        seed=seed,
    )
    return ExportScores(calibration, thresholds, validation, test, assessment)


def _write_extras(folder: Path, codec: Codec, scored: ExportScores, base_name: str, text: str, caveat: str) -> None:
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
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _calibrate(
    predictor: Predictor,
    logits_NC: NDArray[np.float64],
    labels_N: Ints,
    blocks: Ints | None,
    targets: Mapping[str, float],
) -> tuple[dict[str, Any], dict[str, Threshold]]:
    """Fit temperature and confidence thresholds on validation rows, and set them in the predictor.

    `blocks` assigns each row to a group that the cross-fit does not split. Without `blocks` the temperature stays 1.
    """
    calibration: dict[str, Any] = {"method": "none", "temperature": 1.0}
    if blocks is not None:
        scaler = TemperatureScaler().fit(logits_NC, labels_N, blocks)
        calibration, predictor.temperature = scaler.summary(), scaler.temperature_
    precisions = {"LONG": targets["long_precision"], "SHORT": targets["short_precision"]}
    thresholds = choose_thresholds(softmax(logits_NC / predictor.temperature, axis=1), labels_N, precisions)
    predictor.thresholds = {label: threshold["min_confidence"] for label, threshold in thresholds.items()}
    return calibration, thresholds


def _pack(
    scratch: Path, texts: list[str], trained: TrainedLogits, check: Mapping[str, float | int], engine: EngineChoice
) -> float:
    """Pack the folder, and open the zip the way `predict` does; returns the largest difference of a logit."""
    folder, archive = scratch / EXPORT_FOLDER, scratch / "final_model.zip"
    write_manifest(folder)
    _flush(folder)
    link_or_copy(folder / "model.safetensors", scratch / "best_model.safetensors")
    pack(folder, archive)
    return check_archive(archive, texts, trained, check, engine)


def place_export(scratch: Path, folder: RunFolder) -> None:
    """Move a prepared export into the run folder. An older export moves to the scratch folder, which is deleted."""
    with annotate_write_errors(folder.root, 0):
        if folder.export.exists():
            folder.export.rename(scratch / "replaced")
        (scratch / EXPORT_FOLDER).rename(folder.export)
        (scratch / "best_model.safetensors").replace(folder.best_model)
        (scratch / "final_model.zip").replace(folder.zip)
        sync(folder.root)


@dataclass(frozen=True)
class TrainedLogits:
    """The trained model's logits of the checked rows, shape (N, 3), and the size of their rounding error.

    `noise` is the largest difference between the logits of the first rows at two batch sizes.
    """

    logits_NC: NDArray[np.float64]
    noise: float

    @classmethod
    def of(cls, model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> TrainedLogits:
        logits_NC = _local_logits(model, tokenizer, texts)
        other_NC = _local_logits(model, tokenizer, texts[:BATCH_SIZE], BATCH_SIZE // 4)
        return cls(logits_NC, float(np.abs(other_NC - logits_NC[:BATCH_SIZE]).max()))


def compare_logits(
    reopened_NC: NDArray[np.float64], trained: TrainedLogits, merged_NC: NDArray[np.float64]
) -> dict[str, float | int]:
    """Compare the logits of transformers in a fresh process with two references.

    The first is the merged model in this process, on the first rows: only writing and reading lie between, so the
    logits may differ only in the last bits. The second is the trained model with separate adapters: merging rounds, so
    they may differ by 1e-5 times the largest logit (at least 1, as float32 has 24 bits at any scale), or by a multiple
    of the noise measured on these rows if that is more. Raises ExportError.
    """
    scale = max(1.0, float(np.abs(trained.logits_NC).max()))
    reading = _max_difference("merged", reopened_NC[: len(merged_NC)], merged_NC, READING_TOLERANCE * scale)
    allowed = max(TOLERANCE * scale, NOISE_FACTOR * trained.noise)
    merging = _max_difference("trained", reopened_NC, trained.logits_NC, allowed)
    return {
        "rows": len(reopened_NC),
        "max_logit_difference": merging,
        "allowed": allowed,
        "noise": trained.noise,
        "max_reading_difference": reading,
    }


def check_archive(
    archive: Path,
    texts: list[str],
    trained: TrainedLogits,
    check: Mapping[str, float | int],
    engine: EngineChoice = "auto",
) -> float:
    """Open the packed export the way `predict` does, and compare its logits with those of the trained model.

    Returns the largest difference. Raises ExportError if the logits differ or the export does not open.
    """
    try:
        opened = load_model(archive, engine=engine)
    except DataError as error:
        raise ExportError(
            f"the new export must be readable, but predict rejects it: {error} The checkpoints are unchanged. Report "
            "this with the name of the base."
        ) from error
    predicted_NC = opened.token_logits(tokenise(texts, opened.tokenizer, opened.max_tokens))
    return _max_difference("trained", predicted_NC, trained.logits_NC, float(check["allowed"]))


def _max_difference(
    reference: str, actual_NC: NDArray[np.float64], expected_NC: NDArray[np.float64], allowed: float
) -> float:
    """The largest difference of the logits. Raises ExportError if it is above `allowed` or NaN."""
    difference = float(np.abs(actual_NC - expected_NC).max())
    if not difference <= allowed:
        raise ExportError(
            f"the exported model must give the {reference} model's logits within {allowed:.1e}, but differs by "
            f"{difference:.1e}. The checkpoints are unchanged. Export again, and report this with the name of the base."
        )
    return difference


def _local_logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int | None = None
) -> NDArray[np.float64]:
    """Logits of shape (texts, 3), computed in this process as in `reopen.py`."""
    return np.array(reopen.model_logits(model, tokenizer, texts, batch_size or BATCH_SIZE))


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapters for PEFT. Sets in the config are sorted, because their order varies between processes."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = orjson.loads((folder / "adapter_config.json").read_bytes())
    for name in ("target_modules", "modules_to_save"):
        config[name] = sorted(config[name])
    (folder / "adapter_config.json").write_bytes(to_json(dict(sorted(config.items()))))


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
