"""From the best adapters to a folder and a zip that plain transformers opens.

Comes in: the trained PEFT model in float32, tokenizer, codec and validation windows. Goes out: `export/`, checked
against the trained model in a fresh process, `best_model.safetensors` and `final_model.zip`. All of it is made in a
scratch folder, where it can be given up at any moment, and then takes its names by a few renames. The same inputs give
the same bytes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
from ctxtrain.data.dataset import Dataset
from ctxtrain.engine.api import Engine
from ctxtrain.errors import DataError, ExportError, OutOfMemory
from ctxtrain.evaluation.assess import assess
from ctxtrain.evaluation.blocks import blocks_of
from ctxtrain.evaluation.calibration import TemperatureScaler
from ctxtrain.evaluation.metrics import Metrics, evaluate_logits
from ctxtrain.evaluation.selective import Threshold, choose_thresholds
from ctxtrain.export import reopen
from ctxtrain.export.locate import EXPORT_FOLDER
from ctxtrain.export.model_card import model_card
from ctxtrain.export.predictor import Predictor, load_model
from ctxtrain.memory import REMEDY, out_of_memory
from ctxtrain.model.lora import merge
from ctxtrain.model.tokenizer import quiet_transformers
from ctxtrain.reporting.summary_schema import Baselines
from ctxtrain.storage.archive import pack
from ctxtrain.storage.atomic_files import needing, share_or_copy, sync, to_json, write_manifest
from ctxtrain.storage.metrics_log import Scores
from ctxtrain.storage.run_folder import RunFolder

Ints = NDArray[np.int64]

TOLERANCE = 1e-5
READING_TOLERANCE = 2e-6
NOISE_FACTOR = 16  # merging rounds each weight once, a batch of another size each sum of products: like amounts
CHECKED_ROWS = 200
BATCH_SIZE = 32  # rows that `reopen.py` gives to transformers at a time


@dataclass(frozen=True)
class Exported:
    """The merged model as it was exported, its temperature fit, scores and the largest logit difference.

    `assessment` is that of `assess`, on the test rows if there are any, else on the validation rows.
    """

    predictor: Predictor
    calibration: dict[str, Any]
    validation: Metrics
    test: Metrics | None
    assessment: dict[str, Any]
    check: dict[str, float | int]


def prepare_export(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    tokens: Mapping[str, Tokens],
    *,
    max_tokens: int,
    engine: Engine,
    calibrate: bool,
    targets: Mapping[str, float],
    seed: int,
    base_name: str,
    caveat: str,
    scratch: Path,
) -> Exported:
    """Merge, calibrate, write, check and pack into an empty scratch folder.

    Validation rows choose the temperature, and test rows judge it if `tokens` has any; `seed` fixes its baselines.
    A confidence threshold is stored for each precision in `targets`; `caveat` is what the card must warn of.
    Raises ExportError if the reopened model answers differently, WriteFailed if the disk takes no more.
    """
    folder = scratch / EXPORT_FOLDER
    labels, codec = data.labels, data.codec
    texts = list(codec.render_all(islice(data.files["val"], CHECKED_ROWS)))
    tokenizer.model_max_length = max_tokens
    trained = TrainedLogits.of(model.eval(), tokenizer, texts)
    with needing(scratch, 2 * sum(weight.nbytes for weight in model.parameters())):  # the folder, and the zip of it
        _save_adapter(model, folder / "adapter")
        merged = merge(model)
        with quiet_transformers():
            merged.save_pretrained(folder, max_shard_size="1TB")  # one file, whatever the size
            tokenizer.save_pretrained(folder)
        predictor = Predictor(merged, tokenizer, codec, 1.0, max_tokens, engine=engine)
        logits_NC, test = predictor.token_logits(tokens["val"]), None
        blocks = blocks_of(data.places["val"]).kept_whole if calibrate else None
        calibration, thresholds = _calibrate(predictor, logits_NC, labels["val"], blocks, targets)
        scores = evaluate_logits(logits_NC, labels["val"], predictor.temperature)
        if "test" in tokens:
            logits_NC = predictor.token_logits(tokens["test"])
            test = evaluate_logits(logits_NC, labels["test"], predictor.temperature)
        assessment = assess(
            data.files,
            data.places,
            labels,
            "val" if test is None else "test",
            codec=codec,
            logits_NC=logits_NC,
            temperature=predictor.temperature,
            metrics=test or scores,
            targets=targets,
            thresholds=thresholds,
            seed=seed,
        )
        codec.save(folder / "codec.json")
        (folder / "calibration.json").write_bytes(to_json({**calibration, "thresholds": thresholds}))
        example = texts[0] if codec.kind == "compact" else "your text"
        card = _card(base_name, scores, test, assessment["baselines"], example, caveat)
        (folder / "README.md").write_text(card, encoding="utf-8")
        check = _check_and_pack(scratch, texts, trained, _plain_logits(merged, tokenizer, texts[:BATCH_SIZE]), engine)
    return Exported(predictor, calibration, scores, test, assessment, check)


def _card(
    base_name: str, scores: Metrics, test: Metrics | None, baselines: Mapping[str, Any], text: str, caveat: str
) -> str:
    judged = None if test is None else Scores.model_validate(test)
    compared = Baselines.model_validate(baselines)
    return model_card(base_name, Scores.model_validate(scores), judged, compared, text, caveat)


def _calibrate(
    predictor: Predictor,
    logits_NC: NDArray[np.float64],
    labels_N: Ints,
    blocks: Ints | None,
    targets: Mapping[str, float],
) -> tuple[dict[str, Any], dict[str, Threshold]]:
    """Choose temperature and confidence thresholds on validation rows, and give them to the predictor.

    Without `blocks`, which a cross-fit keeps whole, the temperature stays 1.
    """
    calibration: dict[str, Any] = {"method": "none", "temperature": 1.0}
    if blocks is not None:
        scaler = TemperatureScaler().fit(logits_NC, labels_N, blocks)
        calibration, predictor.temperature = scaler.summary(), scaler.temperature_
    precisions = {"LONG": targets["long_precision"], "SHORT": targets["short_precision"]}
    thresholds = choose_thresholds(softmax(logits_NC / predictor.temperature, axis=1), labels_N, precisions)
    predictor.thresholds = {label: threshold["min_confidence"] for label, threshold in thresholds.items()}
    return calibration, thresholds


def _check_and_pack(
    scratch: Path, texts: list[str], trained: TrainedLogits, merged_NC: NDArray[np.float64], engine: Engine
) -> dict[str, float | int]:
    """Compare the written folder with the model that it is of, pack it, and open the zip as `predict` does."""
    folder, archive = scratch / EXPORT_FOLDER, scratch / "final_model.zip"
    check = check_reopened(folder, texts, trained, merged_NC)
    write_manifest(folder)
    _flush(folder)
    share_or_copy(folder / "model.safetensors", scratch / "best_model.safetensors")
    pack(folder, archive)
    check["max_predict_difference"] = check_opens(archive, texts, trained, check, engine)
    return check


def place_export(scratch: Path, folder: RunFolder) -> None:
    """Give a prepared export its names. What had them stays in the scratch folder and goes with it."""
    with needing(folder.root, 0):
        if folder.export.exists():
            folder.export.rename(scratch / "replaced")
        (scratch / EXPORT_FOLDER).rename(folder.export)
        (scratch / "best_model.safetensors").replace(folder.best_model)
        (scratch / "final_model.zip").replace(folder.zip)
        sync(folder.root)


@dataclass(frozen=True)
class TrainedLogits:
    """The trained model's logits of the checked rows, of shape (N, 3), and how far rounding alone moves them.

    `noise` is the largest difference between the logits of the first rows in batches of two sizes.
    """

    logits_NC: NDArray[np.float64]
    noise: float

    @classmethod
    def of(cls, model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> TrainedLogits:
        logits_NC = _plain_logits(model, tokenizer, texts)
        other_NC = _plain_logits(model, tokenizer, texts[:BATCH_SIZE], BATCH_SIZE // 4)
        return cls(logits_NC, float(np.abs(other_NC - logits_NC[:BATCH_SIZE]).max()))


def check_reopened(
    folder: Path, texts: list[str], trained: TrainedLogits, merged_NC: NDArray[np.float64]
) -> dict[str, float | int]:
    """Let a fresh process open the folder with transformers alone, and compare its logits with two others.

    Those of the merged model here, of the first rows, must be the same but for the last bits: that is writing and
    reading. Those of the trained model, adapters apart, may differ by what merging rounds: 1e-5, times the largest
    logit where that is above 1 (float32 has 24 bits whatever the scale), or a multiple of the noise measured on these
    rows where that is more. Raises ExportError.
    """
    reopened_NC = reopened_logits(folder, texts)
    scale = max(1.0, float(np.abs(trained.logits_NC).max()))
    reading = _checked("merged", reopened_NC[: len(merged_NC)], merged_NC, READING_TOLERANCE * scale)
    allowed = max(TOLERANCE * scale, NOISE_FACTOR * trained.noise)
    merging = _checked("trained", reopened_NC, trained.logits_NC, allowed)
    return {
        "rows": len(texts),
        "max_logit_difference": merging,
        "allowed": allowed,
        "noise": trained.noise,
        "max_reading_difference": reading,
    }


def check_opens(
    archive: Path, texts: list[str], trained: TrainedLogits, check: Mapping[str, float | int], engine: Engine = "auto"
) -> float:
    """Open the packed export as `predict` does; its logits must be the trained model's too.

    Returns the largest difference. Raises ExportError, also where the reader of exports refuses what was written.
    """
    try:
        opened = load_model(archive, engine=engine)
    except DataError as error:
        raise ExportError(
            f"the export must open again, but predict refuses it: {error} The checkpoints are untouched; report this "
            "with the base's name."
        ) from error
    answers_NC = opened.token_logits(tokenise(texts, opened.tokenizer, opened.max_tokens))
    return _checked("trained", answers_NC, trained.logits_NC, float(check["allowed"]))


def _checked(side: str, found_NC: NDArray[np.float64], wanted_NC: NDArray[np.float64], allowed: float) -> float:
    difference = float(np.abs(found_NC - wanted_NC).max())
    if not difference <= allowed:
        raise ExportError(
            f"the exported model must give the {side} model's logits within {allowed:.1e}, but differs by "
            f"{difference:.1e}. The checkpoints are untouched; export again, and report this with the base's name."
        )
    return difference


def _plain_logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int | None = None
) -> NDArray[np.float64]:
    """Logits of shape (texts, 3) as `reopen.py` computes them, in this process."""
    return np.array(reopen.model_logits(model, tokenizer, texts, batch_size or BATCH_SIZE))


def reopened_logits(folder: Path, texts: Sequence[str]) -> NDArray[np.float64]:
    """What `reopen.py` computes."""
    command = [sys.executable, "-I", str(reopen.__file__), str(folder), str(BATCH_SIZE)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(command, input=orjson.dumps(list(texts)), env=environment, capture_output=True, check=False)
    if done.returncode == -signal.SIGKILL or out_of_memory(done.stderr.decode(errors="replace")):
        raise OutOfMemory(f"memory ran out while transformers opened the export again. {REMEDY}.")
    if done.returncode:
        raise ExportError(f"{folder}: transformers cannot open the export:\n{done.stderr.decode()[-2000:]}")
    return np.array(orjson.loads(done.stdout.splitlines()[-1]))


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """The adapters alone, for PEFT; its config sorted, since sets have no order of their own."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = orjson.loads((folder / "adapter_config.json").read_bytes())
    for name in ("target_modules", "modules_to_save"):
        config[name] = sorted(config[name])
    (folder / "adapter_config.json").write_bytes(to_json(dict(sorted(config.items()))))


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
