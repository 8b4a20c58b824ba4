"""From the best adapters to a folder and a zip that plain transformers opens.

Comes in: the trained PEFT model in float32, tokenizer, codec and validation windows. Goes out: `export/`, checked
against the trained model in a fresh process before it takes its name, `best_model.safetensors` and
`final_model.zip`. The same inputs give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ml.data.batches import Tokens, tokenise
from ml.data.codec import Codec
from ml.data.windows import Window
from ml.errors import ExportError
from ml.evaluation.calibration import TemperatureScaler
from ml.evaluation.metrics import Metrics
from ml.model.qwen import merge, quiet_transformers
from ml.output import reopen
from ml.output.card import model_card
from ml.output.files import pack, share_or_copy, sync_folder, to_json, write_manifest
from ml.output.predictor import BATCH_SIZE, Predictor, token_logits
from ml.output.run_folder import RunFolder

Ints = NDArray[np.int64]

TOLERANCE = 1e-5
CHECKED_ROWS = 200


@dataclass(frozen=True)
class Exported:
    """The merged model as it was exported, its temperature fit, validation scores and the largest logit difference."""

    predictor: Predictor
    calibration: dict[str, Any]
    validation: Metrics
    check: dict[str, float | int]


def export_model(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    codec: Codec,
    validation: Iterable[Window],
    tokens: Tokens,
    labels_N: Ints,
    *,
    max_tokens: int,
    calibrate: bool,
    base_name: str,
    folder: RunFolder,
) -> Exported:
    """Merge, calibrate, write, check and pack. Raises ExportError if the reopened model answers differently.

    `tokens` and `labels_N` are of the validation windows.
    """
    texts = list(codec.render_all(islice(validation, CHECKED_ROWS)))
    trained_NC = token_logits(model.eval(), tokenise(texts, tokenizer, max_tokens))
    tokenizer.model_max_length = max_tokens
    with tempfile.TemporaryDirectory(prefix=".export.", dir=folder.root) as scratch_name:
        scratch = Path(scratch_name) / "export"
        _save_adapter(model, scratch / "adapter")
        merged = merge(model)
        with quiet_transformers():
            merged.save_pretrained(scratch, max_shard_size="1TB")  # one file, whatever the size
            tokenizer.save_pretrained(scratch)
        predictor = Predictor(merged, tokenizer, codec, 1.0, max_tokens)
        calibration: dict[str, Any] = {"method": "none", "temperature": 1.0}
        if calibrate:
            scaler = TemperatureScaler().fit(token_logits(merged, tokens), labels_N)
            calibration, predictor.temperature = scaler.summary(), scaler.temperature_
        scores = predictor.evaluate(tokens, labels_N)
        codec.save(scratch / "codec.json")
        (scratch / "calibration.json").write_bytes(to_json(calibration))
        (scratch / "README.md").write_text(
            model_card(base_name, scores, texts[0] if codec.kind == "compact" else "your text"),
            encoding="utf-8",
        )
        check = check_reopened(scratch, texts, trained_NC)
        write_manifest(scratch)
        _put_in_place(scratch, folder)
    return Exported(predictor, calibration, scores, check)


def check_reopened(folder: Path, texts: Sequence[str], trained_NC: NDArray[np.float64]) -> dict[str, float | int]:
    """Let a fresh process open the folder with transformers alone; its logits must be the trained model's.

    The allowed difference is 1e-5, times the largest logit where that is above 1 (float32 has 24 bits whatever the
    scale).
    """
    with tempfile.TemporaryDirectory() as scratch:
        texts_file, logits_file = Path(scratch) / "texts.json", Path(scratch) / "logits.json"
        texts_file.write_bytes(orjson.dumps(list(texts)))
        command = [
            sys.executable,
            "-I",
            str(reopen.__file__),
            *map(str, (folder, texts_file, logits_file, BATCH_SIZE)),
        ]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(f"{folder}: transformers cannot open the export:\n{done.stderr[-2000:]}")
        reopened_NC = np.array(orjson.loads(logits_file.read_bytes()))
    difference = float(np.abs(reopened_NC - trained_NC).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(trained_NC).max()))
    if not difference <= allowed:
        raise ExportError(
            f"the exported model must give the trained model's logits within {allowed:.1e}, but differs by "
            f"{difference:.1e}. The checkpoints are untouched; export again, and report this with the base's name."
        )
    return {"rows": len(texts), "max_logit_difference": difference, "allowed": allowed}


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """The adapters alone, for PEFT; its config sorted, since sets have no order of their own."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = orjson.loads((folder / "adapter_config.json").read_bytes())
    for name in ("target_modules", "modules_to_save"):
        config[name] = sorted(config[name])
    (folder / "adapter_config.json").write_bytes(to_json(dict(sorted(config.items()))))


def _put_in_place(scratch: Path, folder: RunFolder) -> None:
    """Give a finished export its name, then make the two files that hold its content."""
    for path in [*scratch.rglob("*"), scratch]:
        if path.is_dir():
            sync_folder(path)
        else:
            path.chmod(0o644)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    if folder.export.exists():
        shutil.rmtree(folder.export)
    scratch.rename(folder.export)
    sync_folder(folder.root)
    share_or_copy(folder.export / "model.safetensors", folder.best_model)
    pack(folder.export, folder.zip)
