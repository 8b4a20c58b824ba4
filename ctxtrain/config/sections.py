"""The sections of the config of a run: every key with its type, range, default and description.

Defaults follow section 7 of the specification.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ctxtrain.config.value_types import (
    Bars,
    CheckDevice,
    ClassWeights,
    Embargo,
    ExportDtype,
    FieldKind,
    Fraction,
    GradNorm,
    LearningRate,
    LoraLayers,
    OversamplingTarget,
    PartSize,
    PathText,
    Seed,
    Switch,
    Text,
    require_ascending,
    require_distinct,
)
from ctxtrain.limits import (
    MAX_BATCH_SIZE,
    MAX_BATCH_TOKENS,
    MAX_EPOCHS,
    MAX_FOLDS,
    MAX_PARTS,
    MAX_SEEDS,
    MAX_STEPS,
    MAX_TEXT_TOKENS,
    MAX_WINDOWS,
)

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
    purge: Switch = Field(
        "auto",
        description="Drop training rows that share bars with val or test, and val rows that share bars with test; auto "
        "does so with folds, with an embargo, and if labels look ahead.",
    )
    embargo: Embargo = Field(
        "auto",
        description="Purging also drops rows within this many bars of the evaluation rows; auto is the label horizon.",
    )
    label_horizon: Bars | None = Field(
        None,
        description="Bars after the event that labels look at; null is the largest label_horizon of the rows.",
    )
    fields: dict[Text, FieldKind] = Field(
        {},
        description="Your own bar fields to read, as name: kind; a kind is number, flag, count or category (words).",
    )
    cache: PathText = Field(
        "auto", description="Folder of parsed rows, reused while the files are unchanged; auto keeps them for one run."
    )
    allow_leakage: bool = Field(
        False, description="Train even if windows or ids occur in two files; all results are then marked as unreliable."
    )


class AugmentationConfig(Section):
    """Changed copies of training rows. Validation and test rows are never changed."""

    mirror: bool = Field(
        False,
        description="Train also on each row upside down, with LONG and SHORT swapped; true if the market and your "
        "rules are symmetric. An epoch has twice the rows.",
    )
    crop: bool = Field(
        False,
        description="In each epoch, leave out the oldest bars of half of the rows; at least the newest 20 remain.",
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
        "auto", description="Data type for training; auto is bfloat16 where this machine computes faster in it."
    )
    engine: Literal["auto", "reference"] = Field(
        "auto",
        description="Model implementation: auto is the fastest engine verified here, reference is transformers.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Quantization of the frozen base during training; int8 and nf4 need a GPU and bitsandbytes.",
    )
    gradient_checkpointing: Switch = Field(
        "auto",
        description="Compute each layer anew in the backward pass instead of keeping its activations: same results, "
        "less memory, about a third slower; auto does so where a step would not fit otherwise.",
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
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        le=MAX_BATCH_TOKENS,
        description="Cut micro-batches by tokens instead: at most this many, padding included, and at least one "
        "window; a step keeps its windows.",
    )
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
    average: int = Field(
        1,
        ge=1,
        le=MAX_EPOCHS,
        description="Export the mean of the weights of this many best epochs if its validation macro-F1 is not lower "
        "than that of the best one; at least as many checkpoints are kept.",
    )


class CalibrationConfig(Section):
    """Calibration of probabilities after training (Guo et al. 2017)."""

    method: Literal["temperature", "none"] = Field("temperature", description="Temperature scaling, or none.")


class ExportConfig(Section):
    """The exported model and its check."""

    dtype: ExportDtype = Field(
        "float32", description="Data type of the exported weights; bfloat16 halves the file and rounds each weight."
    )
    check_device: CheckDevice = Field(
        "auto", description="Device of the export's check; auto is a GPU with enough free memory, else the CPU."
    )


class TargetsConfig(Section):
    """Targets of section 6.2 of the specification, each as a fraction."""

    accuracy: Fraction = Field(0.65, description="Priority HIGH.")
    macro_f1: Fraction = Field(0.60, description="Priority CRITICAL.")
    long_precision: Fraction = Field(0.60, description="Priority HIGH.")
    short_precision: Fraction = Field(0.60, description="Priority HIGH.")
    long_recall: Fraction = Field(0.55, description="Priority MEDIUM.")
    short_recall: Fraction = Field(0.55, description="Priority MEDIUM.")


class EvaluationConfig(Section):
    """Walk-forward evaluation over several folds; the learning curve of a run."""

    folds: int | None = Field(
        None,
        ge=2,
        le=MAX_FOLDS,
        description="Number of walk-forward folds of data.train, by default purged; no other file is read.",
    )
    fold: int | None = Field(
        None, ge=1, le=MAX_FOLDS, description="Run only this fold, counted from 1; null runs all folds."
    )
    learning_curve: Annotated[list[PartSize], AfterValidator(require_ascending)] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PARTS,
        description="After the run, train model and baselines anew on so many of the training windows, ascending, such "
        "as [100, 300], and score them; each size takes its share of the time of the run.",
    )


class TrackingConfig(Section):
    """Experiment trackers, used through Accelerate."""

    to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        [], description="Trackers that get the metrics besides metrics.jsonl; each needs its package installed."
    )
