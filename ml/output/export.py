"""From the best adapters to a folder and a zip that plain transformers opens.

Comes in: the trained PEFT model in float32, tokenizer, codec and validation windows. Goes out: `export/`, checked
against the trained model in a fresh process, `best_model.safetensors` and `final_model.zip`. All of it is made in a
scratch folder, where it can be given up at any moment, and then takes its names by a few renames. The same inputs give
the same bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
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

from ml.data.batches import Tokens, tokenise
from ml.data.codec import Codec
from ml.data.rows import Window
from ml.errors import ExportError
from ml.evaluation.assess import assess
from ml.evaluation.blocks import blocks_of
from ml.evaluation.calibration import TemperatureScaler
from ml.evaluation.metrics import Metrics, evaluate_logits
from ml.evaluation.selective import choose_thresholds
from ml.model.answers import token_logits
from ml.model.qwen import merge, quiet_transformers
from ml.output import reopen
from ml.output.card import model_card
from ml.output.files import needing, pack, share_or_copy, sync, to_json, write_manifest
from ml.output.predictor import EXPORT_FOLDER, Predictor
from ml.output.run_folder import RunFolder

Ints = NDArray[np.int64]

TOLERANCE = 1e-5
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
    codec: Codec,
    windows: Mapping[str, Iterable[Window]],
    tokens: Mapping[str, Tokens],
    labels: Mapping[str, Ints],
    *,
    max_tokens: int,
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
    size = 2 * sum(weight.nbytes for weight in model.parameters())  # the folder, and the zip of it
    texts = list(codec.render_all(islice(windows["val"], CHECKED_ROWS)))
    trained_NC = token_logits(model.eval(), tokenise(texts, tokenizer, max_tokens))
    tokenizer.model_max_length = max_tokens
    with needing(scratch, size):
        _save_adapter(model, folder / "adapter")
        merged = merge(model)
        with quiet_transformers():
            merged.save_pretrained(folder, max_shard_size="1TB")  # one file, whatever the size
            tokenizer.save_pretrained(folder)
        predictor = Predictor(merged, tokenizer, codec, 1.0, max_tokens)
        calibration: dict[str, Any] = {"method": "none", "temperature": 1.0}
        logits_NC, labels_N, test = predictor.token_logits(tokens["val"]), labels["val"], None
        if calibrate:
            scaler = TemperatureScaler().fit(logits_NC, labels_N, blocks_of(windows["val"]).kept_whole)
            calibration, predictor.temperature = scaler.summary(), scaler.temperature_
        scores = evaluate_logits(logits_NC, labels_N, predictor.temperature)
        precisions = {"LONG": targets["long_precision"], "SHORT": targets["short_precision"]}
        thresholds = choose_thresholds(softmax(logits_NC / predictor.temperature, axis=1), labels_N, precisions)
        predictor.thresholds = {label: threshold["min_confidence"] for label, threshold in thresholds.items()}
        if "test" in tokens:
            logits_NC = predictor.token_logits(tokens["test"])
            test = evaluate_logits(logits_NC, labels["test"], predictor.temperature)
        assessment = assess(
            windows,
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
        card = model_card(base_name, scores, test, assessment["baselines"], example, caveat)
        (folder / "README.md").write_text(card, encoding="utf-8")
        check = check_reopened(folder, texts, trained_NC)
        write_manifest(folder)
        _flush(folder)
        share_or_copy(folder / "model.safetensors", scratch / "best_model.safetensors")
        pack(folder, scratch / "final_model.zip")
    return Exported(predictor, calibration, scores, test, assessment, check)


def place_export(scratch: Path, folder: RunFolder) -> None:
    """Give a prepared export its names. What had them stays in the scratch folder and goes with it."""
    with needing(folder.root, 0):
        if folder.export.exists():
            folder.export.rename(scratch / "replaced")
        (scratch / EXPORT_FOLDER).rename(folder.export)
        (scratch / "best_model.safetensors").replace(folder.best_model)
        (scratch / "final_model.zip").replace(folder.zip)
        sync(folder.root)


def check_reopened(folder: Path, texts: Sequence[str], trained_NC: NDArray[np.float64]) -> dict[str, float | int]:
    """Let a fresh process open the folder with transformers alone; its logits must be the trained model's.

    The allowed difference is 1e-5, times the largest logit where that is above 1 (float32 has 24 bits whatever the
    scale).
    """
    reopened_NC = reopened_logits(folder, texts)
    difference = float(np.abs(reopened_NC - trained_NC).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(trained_NC).max()))
    if not difference <= allowed:
        raise ExportError(
            f"the exported model must give the trained model's logits within {allowed:.1e}, but differs by "
            f"{difference:.1e}. The checkpoints are untouched; export again, and report this with the base's name."
        )
    return {"rows": len(texts), "max_logit_difference": difference, "allowed": allowed}


def reopened_logits(folder: Path, texts: Sequence[str]) -> NDArray[np.float64]:
    """What `reopen.py` computes."""
    command = [sys.executable, "-I", str(reopen.__file__), str(folder), str(BATCH_SIZE)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(command, input=orjson.dumps(list(texts)), env=environment, capture_output=True, check=False)
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
