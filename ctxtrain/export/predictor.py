"""An exported model, ready to answer: rows in, labels with calibrated probabilities out.

model = load_model("final_model.zip")      a run folder and an export folder work too
model.predict(rows)                        a list of dicts, in the order of the rows
model.logits(rows)                         uncalibrated, shape (rows, 3), in the order of `LABELS`
model.render(row)                          the text that the tokenizer sees
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import softmax
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctxtrain.data.batches import Tokens, tokenise
from ctxtrain.data.codec import Codec
from ctxtrain.data.formats import StandardInput
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.window_file import WindowFile
from ctxtrain.engine.api import Engine, for_inference
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.evaluation.metrics import Metrics, evaluate_logits
from ctxtrain.evaluation.selective import abstain, least_confidences
from ctxtrain.export.locate import find_export
from ctxtrain.export.untrusted import check_tokenizer, open_config
from ctxtrain.labels import LABELS
from ctxtrain.memory import needed_for
from ctxtrain.model.base_config import refusing
from ctxtrain.model.tokenizer import quiet_transformers
from ctxtrain.storage.archive import unpack
from ctxtrain.storage.atomic_files import MANIFEST, check_manifest, sha256_file
from ctxtrain.storage.validated import Part, read_as

Ints = NDArray[np.int64]

VERSION_DIGITS = 16
Rows = Iterable[Mapping[str, Any]]


MinConfidence = float | Literal["auto"] | None


class Prediction(TypedDict):
    """`confidence` is the largest probability; with `abstained` the label is SKIP although another may be likelier."""

    id: str | None
    label: str
    confidence: float
    probabilities: dict[str, float]
    abstained: NotRequired[bool]


@dataclass(frozen=True)
class Question:
    """What answers need of windows, which are not kept: ids, places in their file, labels and tokens.

    `labels_N` has numbers of classes, and -1 for a window without a label.
    """

    ids: list[str | None]
    places: list[str]
    labels_N: Ints
    tokens: Tokens


class StoredThreshold(Part):
    min_confidence: float | None = Field(ge=0, le=1)


class CalibrationFile(Part):
    """The part of `calibration.json` that prediction reads."""

    temperature: float = Field(ge=0.01, le=100)  # what is fitted lies well within
    thresholds: dict[Literal["LONG", "SHORT", "SKIP"], StoredThreshold] = Field(default_factory=dict)


def load_model(path: str | Path, *, engine: Engine = "auto") -> Predictor:
    """Open a run folder, an export folder or a `final_model.zip`; `reference` answers by plain transformers.

    Raises ConfigError if there is nothing at the path, DataError if what is there is no whole export.
    """
    with needed_for(f"while opening the model {path}"):
        return Predictor.load(Path(path), engine)


class Predictor:
    """Model, tokenizer, codec, temperature and confidence thresholds by class of one export.

    `passes` are what the engine gives for the model. `version` names an export that was opened: the start of the
    SHA-256 of its manifest, which holds the SHA-256 of every other file.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        codec: Codec,
        temperature: float,
        max_tokens: int,
        thresholds: Mapping[str, float | None] | None = None,
        version: str = "",
        engine: Engine = "auto",
    ) -> None:
        self.passes = for_inference(model.eval(), max_tokens, engine=engine)
        self.tokenizer = tokenizer
        self.codec = codec
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.thresholds = dict(thresholds or {})
        self.version = version

    @classmethod
    def load(cls, path: Path, engine: Engine = "auto") -> Predictor:
        found = find_export(path)
        if found.is_dir():
            return cls._load_folder(found, engine)
        with tempfile.TemporaryDirectory() as scratch:
            unpack(found, Path(scratch))
            return cls._load_folder(Path(scratch), engine)

    @classmethod
    def _load_folder(cls, folder: Path, engine: Engine) -> Predictor:
        check_manifest(folder)
        try:
            calibration = read_as(CalibrationFile, folder / "calibration.json", "Export the model again")
        except FileNotFoundError:
            raise DataError(f"{folder}/calibration.json: missing. Export the model again.") from None
        rule = f"{folder}: not an export that transformers opens"
        with quiet_transformers(), refusing(DataError, rule, "Export again"):
            config = open_config(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            check_tokenizer(folder, tokenizer, config)
            model = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
            codec = Codec.load(folder / "codec.json")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            model.to(device),
            tokenizer,
            codec,
            calibration.temperature,
            tokenizer.model_max_length,
            {label: threshold.min_confidence for label, threshold in calibration.thresholds.items()},
            sha256_file(folder / MANIFEST)[:VERSION_DIGITS],
            engine,
        )

    def predict(self, rows: Rows, min_confidence: MinConfidence = None) -> list[Prediction]:
        """A prediction a row. With `min_confidence`, a less confident row is SKIP, and every row has `abstained`.

        "auto" takes the export's thresholds, chosen on validation for the precisions of the targets. Raises ConfigError
        if the export has none, or the number is not between 0 and 1.
        """
        return self.predict_windows(self._windows(rows), min_confidence=min_confidence)

    def logits(self, rows: Rows) -> NDArray[np.float64]:
        return self.window_logits(self._windows(rows))

    def render(self, row: Mapping[str, Any]) -> str:
        return self.codec.render(self._windows([row])[0])

    def predict_windows(self, windows: Iterable[Window], *, min_confidence: MinConfidence = None) -> list[Prediction]:
        return list(self.answers(self.read(windows), min_confidence=min_confidence))

    def read(self, windows: Iterable[Window]) -> Question:
        """Walk through windows once. Raises DataError for those that lack what the model was trained on."""
        ids: list[str | None] = []
        places: list[str] = []
        labels = array("b")

        def noted() -> Iterator[Window]:
            for window in windows:
                ids.append(window.id)
                places.append(window.place)
                labels.append(-1 if window.label is None else window.label)
                yield window

        tokens = self.tokenise(noted())
        return Question(ids, places, np.array(labels, dtype=np.int64), tokens)

    def read_rows(self, rows: WindowFile | StandardInput) -> Question:
        """The same of rows that may have faults, which are named before what the model misses in the others."""
        try:
            question = self.read(rows)
        except DataError:
            rows.reading.refuse_faults()
            raise
        rows.reading.refuse_faults()
        return question

    def answers(
        self,
        question: Question,
        advance: Callable[[int], None] | None = None,
        *,
        min_confidence: MinConfidence = None,
    ) -> Iterator[Prediction]:
        """A prediction a window, in their order; `advance` is told how many windows each batch held."""
        least_C = self._least_confidences(min_confidence)
        probabilities_NC = softmax(self._logits(question, advance) / self.temperature, axis=1)
        called_N, abstained_N = abstain(probabilities_NC, least_C)
        for id_, called, abstained, p_C in zip(
            question.ids, called_N.tolist(), abstained_N.tolist(), probabilities_NC.tolist(), strict=True
        ):
            prediction = Prediction(
                id=id_, label=LABELS[called], confidence=max(p_C), probabilities=dict(zip(LABELS, p_C, strict=True))
            )
            if min_confidence is not None:
                prediction["abstained"] = abstained
            yield prediction

    def _least_confidences(self, min_confidence: MinConfidence) -> NDArray[np.float64]:
        if min_confidence == "auto":
            if not self.thresholds:
                raise ConfigError("this export stores no thresholds. Export the run again, or give a number.")
            return least_confidences(self.thresholds)
        value = 0.0 if min_confidence is None else min_confidence
        if not 0 <= value <= 1:
            raise ConfigError(f"min-confidence must be auto or a number from 0 to 1, got {value}. Try 0.55.")
        return np.full(len(LABELS), value)

    def evaluate(self, tokens: Tokens, labels_N: Ints, advance: Callable[[int], None] | None = None) -> Metrics:
        """Scores on labelled windows that `tokenise` gave; probabilities are calibrated."""
        return evaluate_logits(self.token_logits(tokens, advance), labels_N, self.temperature)

    def token_logits(self, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        """Uncalibrated logits of shape (rows, 3) of windows that `tokenise` gave."""
        logits_NC = self.passes.token_logits(tokens, advance)
        _refuse_broken(logits_NC, [f"row {row}" for row in range(1, len(tokens) + 1)])
        return logits_NC

    def tokenise(self, windows: Iterable[Window]) -> Tokens:
        """What the model reads of windows. Raises DataError for those that lack what it was trained on."""
        return tokenise(self.codec.render_all(windows), self.tokenizer, self.max_tokens)

    def window_logits(self, windows: Iterable[Window]) -> NDArray[np.float64]:
        """Uncalibrated logits of shape (windows, 3)."""
        return self._logits(self.read(windows))

    def _logits(self, question: Question, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        logits_NC = self.passes.token_logits(question.tokens, advance)
        _refuse_broken(logits_NC, question.places)
        return logits_NC

    def _windows(self, rows: Rows) -> list[Window]:
        windows, faults = [], []
        for number, row in enumerate(rows, start=1):
            window, reasons = parse_row(row, f"row {number}", labelled=False)
            faults += [f"row {number}: {reason}" for reason in reasons]
            if window:
                windows.append(window)
        if faults:
            raise DataError(faults)
        return windows


def _refuse_broken(logits_NC: NDArray[np.float64], places: Sequence[str]) -> None:
    broken = np.flatnonzero(~np.isfinite(logits_NC).all(axis=1)).tolist()
    if broken:
        raise DataError([f"{places[row]}: the model gives no finite logits" for row in broken])
