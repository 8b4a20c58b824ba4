"""The config of a run: every key with its type, range, default and description.

Input: a YAML file and `section.key=value` overrides. Output: a frozen `Config`. One `ConfigError` reports all faults,
each with its dotted key, and suggests the nearest known key for an unknown one. Defaults follow section 7 of the
specification. Only `train.py` and `cli/process.py` receive a `Config`; every other module takes plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ctxtrain.config.overrides import apply_overrides, describe_error, dotted_keys, missing_key_message
from ctxtrain.config.strict_yaml import dump_yaml, load_yaml, parse_yaml
from ctxtrain.config.value_types import (
    ClassWeights,
    Fraction,
    GradNorm,
    LearningRate,
    LoraLayers,
    OversamplingTarget,
    PathText,
    Seed,
    Text,
    require_distinct,
)
from ctxtrain.errors import ConfigError, DataError, short_repr
from ctxtrain.limits import (
    MAX_BATCH_SIZE,
    MAX_EPOCHS,
    MAX_FOLDS,
    MAX_SEEDS,
    MAX_STEPS,
    MAX_TEXT_TOKENS,
    MAX_WINDOWS,
)
from ctxtrain.urls import absolute, shown

EMBEDDED_BASE = "embedded"
SPLITS = ("train", "val", "test")  # keys of `data` with the place of a file


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Input files and how the model reads them."""

    train: PathText | None = Field(
        None, description="Training rows: a file or a URL. Required, unless rows in memory are given from Python."
    )
    val: PathText | None = Field(
        None,
        description="Validation rows, to choose the epoch and the temperature. Required without evaluation.folds.",
    )
    test: PathText | None = Field(None, description="Test rows, scored once at the end, against the targets.")
    codec: Literal["compact", "json"] = Field(
        "compact", description="Text format of a window: compact (quantised integers) or json (for comparison)."
    )
    purge: bool = Field(
        False,
        description="Drop training rows that share bars with val or test, and val rows that share bars with test.",
    )
    embargo: int = Field(
        0,
        ge=0,
        le=MAX_WINDOWS,
        description="With purge or folds: also drop rows within this many bars of the evaluation rows.",
    )
    cache: PathText = Field(
        "auto", description="Folder of parsed rows, reused while the files are unchanged; auto keeps them for one run."
    )
    allow_leakage: bool = Field(
        False, description="Train even if windows or ids occur in two files; all results are then marked as unreliable."
    )


class ModelConfig(Section):
    """The frozen base model."""

    base: PathText = Field(
        EMBEDDED_BASE,
        description=f"Folder or hub id of a Qwen checkpoint; `{EMBEDDED_BASE}` is the small one in this package.",
    )
    revision: Text | None = Field(None, description="Hub revision (commit, tag or branch) of the base.")
    max_tokens: int = Field(
        2048, ge=8, le=MAX_TEXT_TOKENS, description="Most tokens per text; longer texts lose their oldest tokens."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Data type for training; auto is bfloat16 on a GPU that supports it, else float32."
    )
    engine: Literal["auto", "reference"] = Field(
        "auto",
        description="Model implementation: auto is the fastest engine verified here, reference is transformers.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Quantization of the frozen base during training; int8 and nf4 need a GPU and bitsandbytes.",
    )


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    r: int = Field(8, ge=1, le=4096, description="Rank of the update matrices.")
    alpha: int = Field(16, ge=1, le=65_536, description="Scaling: the update is multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout probability of the adapter input.")
    target_modules: list[Text] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="Names of the linear layers that get an adapter.",
    )
    layers: LoraLayers = Field("all", description="Transformer layers that get adapters: all, or last:N.")


class LossConfig(Section):
    """Class-weighted focal loss (Lin et al. 2017)."""

    focal_gamma: float = Field(2.0, ge=0, le=10, description="Focusing parameter; 0 is weighted cross-entropy.")
    class_weights: ClassWeights = Field(
        "auto",
        description="auto (inverse frequency after oversampling, mean 1), none, [w, w, w] or {LONG: w, …}.",
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `make_loss`, without the class weights, which also depend on the data."""
        return self.model_dump(exclude={"class_weights"})


class OversamplingConfig(Section):
    """Random oversampling: every original row, plus rows drawn with replacement, anew in each epoch."""

    target: OversamplingTarget = Field(
        "auto", description="Windows per class and epoch: auto (size of the largest class), none, or a number."
    )
    max_repeat: float | None = Field(
        None,
        ge=1,
        le=MAX_WINDOWS,
        description="Growth limit of a class, as a multiple of its rows; class weights correct the remainder.",
    )


class TrainingConfig(Section):
    """Training loop. An optimizer step has batch_size × gradient_accumulation windows, for any world size."""

    epochs: int = Field(10, ge=1, le=MAX_EPOCHS, description="Passes over the oversampled rows.")
    batch_size: int = Field(8, ge=1, le=MAX_BATCH_SIZE, description="Windows per micro-batch.")
    learning_rate: LearningRate = Field(1.0e-4, description="Peak learning rate of AdamW, at least 1e-12.")
    warmup_steps: int = Field(
        100, ge=0, le=MAX_STEPS, description="Optimizer steps of linear warm-up; limited to half of the run."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="Decoupled weight decay of AdamW.")
    gradient_accumulation: int = Field(4, ge=1, le=MAX_BATCH_SIZE, description="Micro-batches per optimizer step.")
    max_grad_norm: GradNorm | None = Field(
        1.0, description="Gradients are clipped to this norm, at least 1e-9; null disables clipping."
    )
    schedule: Literal["warmup_stable_decay", "linear", "cosine", "constant"] = Field(
        "warmup_stable_decay",
        description="Learning-rate schedule after warm-up; the default decays to 0 over the second half.",
    )
    skip_nonfinite: int = Field(
        0,
        ge=0,
        le=MAX_STEPS,
        description="Optimizer steps that may be skipped for a non-finite loss or gradient; one more ends the run.",
    )
    patience: int | None = Field(
        None, ge=1, le=MAX_EPOCHS, description="Stop after this many epochs without a better validation macro-F1."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all random numbers.")
    seeds: Annotated[list[Seed], AfterValidator(require_distinct)] | None = Field(
        None,
        min_length=2,
        max_length=MAX_SEEDS,
        description="Several seeds instead: one run per seed, with the mean and spread of the results.",
    )

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """Keyword arguments of `make_optimizer`."""
        return self.model_dump(include={"learning_rate", "weight_decay"})


class CheckpointsConfig(Section):
    """Checkpoints for model selection and for resuming."""

    keep: int = Field(3, ge=1, le=MAX_EPOCHS, description="Checkpoints to keep by macro-F1, besides the newest.")
    every_steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="Optimizer steps between extra checkpoints within an epoch."
    )


class CalibrationConfig(Section):
    """Calibration of probabilities after training (Guo et al. 2017)."""

    method: Literal["temperature", "none"] = Field("temperature", description="Temperature scaling, or none.")


class TargetsConfig(Section):
    """Targets of section 6.2 of the specification, each as a fraction."""

    accuracy: Fraction = Field(0.65, description="Priority HIGH.")
    macro_f1: Fraction = Field(0.60, description="Priority CRITICAL.")
    long_precision: Fraction = Field(0.60, description="Priority HIGH.")
    short_precision: Fraction = Field(0.60, description="Priority HIGH.")
    long_recall: Fraction = Field(0.55, description="Priority MEDIUM.")
    short_recall: Fraction = Field(0.55, description="Priority MEDIUM.")


class EvaluationConfig(Section):
    """Walk-forward evaluation over several folds."""

    folds: int | None = Field(
        None,
        ge=2,
        le=MAX_FOLDS,
        description="Number of purged walk-forward folds of data.train, with data.embargo; no other file is read.",
    )
    fold: int | None = Field(
        None, ge=1, le=MAX_FOLDS, description="Run only this fold, counted from 1; null runs all folds."
    )


class TrackingConfig(Section):
    """Experiment trackers, used through Accelerate."""

    to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        [], description="Trackers that get the metrics besides metrics.jsonl; each needs its package installed."
    )


class Config(Section):
    """The complete config of a run."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    oversampling: OversamplingConfig = OversamplingConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    targets: TargetsConfig = TargetsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    output_dir: PathText = Field(description="The run folder.")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), *, rows_in_memory: bool = False) -> Self:
        """Read a YAML file, apply `section.key=value` overrides and validate the result, as `parse` does."""
        return cls.parse(load_yaml(path), overrides, rows_in_memory=rows_in_memory)

    @classmethod
    def from_run(cls, text: str, path: Path) -> Self:
        """Parse the `config.yaml` of a run folder. Raises DataError, with the file name, if the text is not valid."""
        try:
            return cls.parse(parse_yaml(text, str(path)), rows_in_memory=True)
        except ConfigError as error:
            faults = [fault if fault.startswith(str(path)) else f"{path}: {fault}" for fault in error.faults]
            raise DataError([*faults, "Restore the file that the run wrote."]) from None

    @classmethod
    def parse(cls, tree: object, overrides: Sequence[str] = (), *, rows_in_memory: bool = False) -> Self:
        """Validate a nested mapping after applying overrides. Raises ConfigError with all faults.

        With `rows_in_memory`, which are given to the pipeline, `data.train` and `data.val` are not required.
        """
        if not isinstance(tree, dict):
            raise ConfigError(f"A config must be a mapping of sections, got {short_repr(tree)}.")
        tree = deepcopy(tree)
        for name in SECTIONS:
            if tree.get(name) is None:  # an empty section in YAML is null and means its defaults
                tree[name] = {}
        faults = apply_overrides(tree, overrides, KEYS)
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            faults += [describe_error(detail, KEYS) for detail in error.errors(include_url=False)]
        has_folds = _get(tree, "evaluation", "folds") is not None
        required = [] if rows_in_memory else ["train"] if has_folds else ["train", "val"]
        faults += [missing_key_message(f"data.{name}") for name in required if _get(tree, "data", name) is None]
        if not has_folds and _get(tree, "data", "embargo") and not _get(tree, "data", "purge"):
            faults.append("data.embargo needs data.purge=true or evaluation.folds. Set one of them, or data.embargo=0.")
        if not faults and config.evaluation.fold and not config.evaluation.fold <= (config.evaluation.folds or 0):
            fold, folds = config.evaluation.fold, config.evaluation.folds
            faults.append(f"evaluation.fold must be one of evaluation.folds, got {fold} of {folds}. Set both or none.")
        if faults:
            raise ConfigError(faults)
        return config

    def with_absolute_paths(self) -> Self:
        """A copy to be stored, valid in any working directory: with absolute paths, and URLs without credentials."""
        data = self._places(absolute)
        if self.data.cache != "auto":
            data["cache"] = str(Path(self.data.cache).absolute())
        base = str(Path(self.model.base).absolute()) if Path(self.model.base).is_dir() else self.model.base
        return self.model_copy(
            update={
                "data": self.data.model_copy(update=data),
                "model": self.model.model_copy(update={"base": base}),
                "output_dir": str(Path(self.output_dir).absolute()),
            }
        )

    def public_values(self) -> dict[str, Any]:
        """All values, for trackers: URLs have no credentials."""
        values = self.model_dump()
        return values | {"data": values["data"] | self._places(shown)}

    def _places(self, convert: Callable[[str], str]) -> dict[str, str | None]:
        return {name: path and convert(path) for name, path in self.data if name in SPLITS}

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(mode="json"))


def _get(tree: dict[str, Any], section: str, name: str) -> object:
    values = tree[section]
    return values.get(name) if isinstance(values, dict) else values


KEYS = dotted_keys(Config)
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
