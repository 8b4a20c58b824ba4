"""Predict with an exported model: rows in, labels with calibrated probabilities out.

model = load_model("final_model.zip")      also accepts a run folder or an export folder; dtype="bfloat16" answers in it
model.predict(rows)                        a list of dicts, in the order of the rows; rows is a list of dicts, a frame,
                                           an Arrow table, another iterable of mappings, a path or a URL
model.logits(rows)                         uncalibrated, shape (rows, 3), in the order of `LABELS`
model.render(row)                          the text that the tokenizer sees
"""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctxtrain.data.codec import Codec
from ctxtrain.data.parse_window import Window
from ctxtrain.data.sources import MemorySource
from ctxtrain.data.tokens import Tokens, tokenise
from ctxtrain.data.window_file import WindowFile
from ctxtrain.engine.api import EngineChoice, make_inference_engine
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.evaluation.metrics import Metrics, evaluate_logits
from ctxtrain.evaluation.probabilities import calibrated_probabilities
from ctxtrain.evaluation.selective import abstain, min_confidence_by_class
from ctxtrain.export.answer_dtype import (
    DtypeChoice,
    check_dtype_choice,
    choose_answer_dtype,
    dtype_name,
    restore_head,
    stored_dtype,
)
from ctxtrain.export.locate import find_export
from ctxtrain.export.untrusted import check_tokenizer, open_config
from ctxtrain.labels import LABELS
from ctxtrain.memory import annotate_memory_errors
from ctxtrain.model.base_config import convert_errors
from ctxtrain.model.precision import choose_precision
from ctxtrain.model.tokenizer import quiet_transformers
from ctxtrain.storage.archive import unpack
from ctxtrain.storage.atomic_files import MANIFEST, FileDigest, check_manifest, sha256_file
from ctxtrain.storage.validated import StoredModel, read_json_as

Ints = NDArray[np.int64]

VERSION_DIGITS = 16
Rows = object  # what `open_source` takes


MinConfidence = float | Literal["auto"] | None


class Prediction(TypedDict):
    """The prediction of one row.

    `confidence` is the largest probability. With `abstained`, the label is SKIP even if another class is more likely.
    """

    id: str | None
    label: str
    confidence: float
    probabilities: dict[str, float]
    abstained: NotRequired[bool]


@dataclass(frozen=True)
class EncodedBatch:
    """Tokenised windows with their ids, locations in the file and labels. The windows themselves are not kept.

    `labels_N` has class indices, and -1 for a window without a label. `unseen_words` counts, by category, the windows
    with a word that the training rows do not have.
    """

    ids: list[str | None]
    locations: list[str]
    labels_N: Ints
    tokens: Tokens
    unseen_words: Counter[str] = field(default_factory=Counter)


class StoredThreshold(StoredModel):
    min_confidence: float | None = Field(ge=0, le=1)


class CalibrationFile(StoredModel):
    """The part of `calibration.json` that prediction reads."""

    temperature: float = Field(ge=0.01, le=100)  # far wider than the range of fitted values
    thresholds: dict[Literal["LONG", "SHORT", "SKIP"], StoredThreshold] = Field(default_factory=dict)


def load_model(path: str | Path, *, engine: EngineChoice = "auto", dtype: DtypeChoice = "auto") -> Predictor:
    """Open a run folder, an export folder or a `final_model.zip`. The `reference` engine is transformers itself.

    `dtype` is that of the answers; `auto` is that of the export, but float32 where bfloat16 would be slower.
    Raises ConfigError if the path does not exist, DataError if it is not an intact export.
    """
    check_dtype_choice(dtype)
    with annotate_memory_errors(f"while opening the model {path}"):
        return Predictor.load(Path(path), engine, dtype)


class Predictor:
    """Model, tokenizer, codec, temperature and confidence thresholds by class of one export.

    `engine` computes the logits, in `dtype`. `version` identifies an opened export: the first digits of the SHA-256 of
    its manifest, which has the SHA-256 of every other file. `notes` are for the user, about the dtype.
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
        engine: EngineChoice = "auto",
        notes: tuple[str, ...] = (),
    ) -> None:
        self.dtype = dtype_name(model.dtype)
        self.engine = make_inference_engine(model.eval(), max_tokens, engine=engine)
        self.tokenizer = tokenizer
        self.codec = codec
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.thresholds = dict(thresholds or {})
        self.version = version
        self.notes = notes

    def __repr__(self) -> str:
        engine = type(self.engine).__name__
        return f"<Predictor {self.version or 'in memory'}: temperature {self.temperature:.3f}, {self.dtype}, {engine}>"

    @classmethod
    def load(cls, path: Path, engine: EngineChoice = "auto", dtype: DtypeChoice = "auto") -> Predictor:
        export = find_export(path)
        if export.is_dir():
            return cls._load_folder(export, engine, dtype)
        with tempfile.TemporaryDirectory() as scratch:
            digests = unpack(export, Path(scratch))
            return cls._load_folder(Path(scratch), engine, dtype, digests)

    @classmethod
    def _load_folder(
        cls, folder: Path, engine: EngineChoice, dtype: DtypeChoice, digests: Mapping[str, FileDigest] | None = None
    ) -> Predictor:
        check_manifest(folder, digests)
        try:
            calibration = read_json_as(CalibrationFile, folder / "calibration.json", "Export the model again")
        except FileNotFoundError:
            raise DataError(f"{folder}/calibration.json: missing. Export the model again.") from None
        rule = f"{folder}: not an export that transformers opens"
        with quiet_transformers(), convert_errors(DataError, rule, "Export again"):
            config, device = open_config(folder), "cuda" if torch.cuda.is_available() else "cpu"
            text = config.get_text_config()
            text.use_cache = False  # keys and values of every layer, which no answer reads
            fast = choose_precision("auto", config, None).dtype
            chosen = choose_answer_dtype(dtype, stored_dtype(folder), fast, text.hidden_size, on_cpu=device == "cpu")
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            check_tokenizer(folder, tokenizer, config)
            model = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=chosen.dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
            restore_head(model, folder)
            codec = Codec.load(folder / "codec.json")
        return cls(
            model.to(device),
            tokenizer,
            codec,
            calibration.temperature,
            tokenizer.model_max_length,
            {label: threshold.min_confidence for label, threshold in calibration.thresholds.items()},
            sha256_file(folder / MANIFEST)[:VERSION_DIGITS],
            engine,
            chosen.notes,
        )

    def predict(self, rows: Rows, min_confidence: MinConfidence = None) -> list[Prediction]:
        """One prediction per row. With `min_confidence`, less confident rows become SKIP and all rows have `abstained`.

        "auto" uses the thresholds of the export, which were chosen on validation rows for the target precisions. Raises
        ConfigError if the export has no thresholds, or if the number is not between 0 and 1.
        """
        return self.predict_windows(self._windows(rows), min_confidence=min_confidence)

    def logits(self, rows: Rows) -> NDArray[np.float64]:
        """Uncalibrated logits, shape (rows, 3), in the order of `LABELS`. Raises DataError for invalid rows."""
        return self.window_logits(self._windows(rows))

    def render(self, row: Mapping[str, Any]) -> str:
        """The text that the tokenizer receives for a row. Raises DataError if the row is invalid."""
        return self.codec.render(self._windows([row])[0])

    def predict_windows(self, windows: Iterable[Window], *, min_confidence: MinConfidence = None) -> list[Prediction]:
        return list(self.predict_encoded(self.encode(windows), min_confidence=min_confidence))

    def encode(self, windows: Iterable[Window]) -> EncodedBatch:
        """Tokenise windows in one pass. Raises DataError for windows without a field that the model was trained on."""
        ids: list[str | None] = []
        locations: list[str] = []
        labels = array("b")
        unseen = Counter[str]()

        def record_metadata() -> Iterator[Window]:
            for window in windows:
                ids.append(window.id)
                locations.append(window.location)
                labels.append(-1 if window.label is None else window.label)
                unseen.update(self.codec.unseen_words(window))
                yield window

        tokens = self.tokenise(record_metadata())
        return EncodedBatch(ids, locations, np.array(labels, dtype=np.int64), tokens, unseen)

    def encode_rows(self, rows: WindowFile) -> EncodedBatch:
        """Tokenise rows in one pass. Raises DataError: invalid rows are reported before missing model inputs."""
        try:
            batch = self.encode(rows)
        except DataError:
            rows.report.refuse_faults()
            raise
        rows.report.refuse_faults()
        return batch

    def predict_encoded(
        self,
        batch: EncodedBatch,
        advance: Callable[[int], None] | None = None,
        *,
        min_confidence: MinConfidence = None,
    ) -> Iterator[Prediction]:
        """One prediction per window, in order. `advance` is called with the number of windows in each batch."""
        min_confidence_C = self._min_confidence_by_class(min_confidence)
        probabilities_NC = calibrated_probabilities(self._logits(batch, advance), self.temperature)
        predicted_N, abstained_N = abstain(probabilities_NC, min_confidence_C)
        for id_, predicted, abstained, p_C in zip(
            batch.ids, predicted_N.tolist(), abstained_N.tolist(), probabilities_NC.tolist(), strict=True
        ):
            prediction = Prediction(
                id=id_, label=LABELS[predicted], confidence=max(p_C), probabilities=dict(zip(LABELS, p_C, strict=True))
            )
            if min_confidence is not None:
                prediction["abstained"] = abstained
            yield prediction

    def _min_confidence_by_class(self, min_confidence: MinConfidence) -> NDArray[np.float64]:
        if min_confidence == "auto":
            if not self.thresholds:
                raise ConfigError("this export has no confidence thresholds. Export the run again, or give a number.")
            return min_confidence_by_class(self.thresholds)
        value = 0.0 if min_confidence is None else min_confidence
        if not 0 <= value <= 1:
            raise ConfigError(f"min-confidence must be auto or a number from 0 to 1, got {value}. Try 0.55.")
        return np.full(len(LABELS), value)

    def evaluate(self, rows: Rows) -> Metrics:
        """Scores of labelled rows, with calibrated probabilities. Raises DataError for invalid rows."""
        batch = self.encode_rows(WindowFile(rows, keep=False, own=self.codec.own_fields))
        return evaluate_logits(self.token_logits(batch.tokens), batch.labels_N, self.temperature)

    def token_logits(self, tokens: Tokens, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        """Uncalibrated logits of tokenised windows, shape (rows, 3)."""
        logits_NC = self.engine.token_logits(tokens, advance)
        _refuse_non_finite(logits_NC, [f"row {row}" for row in range(1, len(tokens) + 1)])
        return logits_NC

    def tokenise(self, windows: Iterable[Window]) -> Tokens:
        """Render and tokenise windows. Raises DataError for windows without a field that the model was trained on."""
        return tokenise(self.codec.render_all(windows), self.tokenizer, self.max_tokens)

    def window_logits(self, windows: Iterable[Window]) -> NDArray[np.float64]:
        """Uncalibrated logits of shape (windows, 3)."""
        return self._logits(self.encode(windows))

    def _logits(self, batch: EncodedBatch, advance: Callable[[int], None] | None = None) -> NDArray[np.float64]:
        logits_NC = self.engine.token_logits(batch.tokens, advance)
        _refuse_non_finite(logits_NC, batch.locations)
        return logits_NC

    def _windows(self, rows: Rows) -> list[Window]:
        file = WindowFile(rows, labelled=False, keep=False, own=self.codec.own_fields)
        windows = list(file)
        if file.report.rows or not isinstance(file.source, MemorySource):  # an empty list has no predictions
            file.report.refuse_faults()
        return windows


def _refuse_non_finite(logits_NC: NDArray[np.float64], locations: Sequence[str]) -> None:
    non_finite = np.flatnonzero(~np.isfinite(logits_NC).all(axis=1)).tolist()
    if non_finite:
        raise DataError([f"{locations[row]}: the model gives no finite logits" for row in non_finite])
