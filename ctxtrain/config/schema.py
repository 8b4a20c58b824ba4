"""The config of a run: typed, described and range-checked in one place.

Comes in: a YAML file and `section.key=value` overrides. Goes out: a frozen `Config`. All faults are
reported in one `ConfigError`, each with its dotted key; an unknown key is refused with the nearest name.
Defaults are those of the specification, section 7. Only `train.py` and `cli/process.py` see a `Config`: every
other module takes plain values.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ctxtrain.config.overrides import apply_overrides, dotted_keys, explain, required
from ctxtrain.config.strict_yaml import dump_yaml, load_yaml, parse_yaml
from ctxtrain.config.value_types import (
    ClassWeights,
    LoraLayers,
    Norm,
    OversamplingTarget,
    Place,
    Rate,
    Seed,
    Share,
    Text,
    distinct,
)
from ctxtrain.errors import ConfigError, DataError, shown
from ctxtrain.limits import (
    MOST_EPOCHS,
    MOST_FOLDS,
    MOST_IN_BATCH,
    MOST_SEEDS,
    MOST_STEPS,
    MOST_TOKENS,
    MOST_WINDOWS,
)

EMBEDDED_BASE = "embedded"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the rows are and how the model reads them."""

    train: Place = Field(description="Training rows, .jsonl or .jsonl.gz.")
    val: Place | None = Field(
        None,
        description="Validation rows; they choose the epoch and the temperature. Required without folds.",
    )
    test: Place | None = Field(None, description="Rows scored once, at the end; then they judge the targets.")
    codec: Literal["compact", "json"] = Field(
        "compact", description="How a window becomes text: quantised integers, or its JSON for comparison."
    )
    purge: bool = Field(
        False,
        description="Drop training rows that share bars with val or test, and val rows that share bars with test.",
    )
    embargo: int = Field(
        0,
        ge=0,
        le=MOST_WINDOWS,
        description="With purge or folds, also drop rows within so many bars of the rows that judge.",
    )
    cache: Place = Field(
        "auto", description="Folder that keeps parsed rows between runs, by content; auto keeps them for the run."
    )
    allow_leakage: bool = Field(
        False, description="Train although windows or ids stand in two files; every figure is then marked."
    )


class ModelConfig(Section):
    """The frozen base."""

    base: Place = Field(
        EMBEDDED_BASE,
        description=f"Folder or hub id of a Qwen checkpoint; `{EMBEDDED_BASE}` is the package's own small one.",
    )
    revision: Text | None = Field(None, description="Hub revision (commit, tag or branch) of the base.")
    max_tokens: int = Field(
        2048, ge=8, le=MOST_TOKENS, description="Longest text in tokens; older tokens are cut off, and counted."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic of training; auto is bfloat16 on a GPU that has it, else float32."
    )
    engine: Literal["auto", "reference"] = Field(
        "auto",
        description="Passes of the model: auto is the fastest that is proven for it here, reference is transformers.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Weights of the frozen base during training; int8 and nf4 need a GPU and bitsandbytes.",
    )


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    r: int = Field(8, ge=1, le=4096, description="Rank.")
    alpha: int = Field(16, ge=1, le=65_536, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: list[Text] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="Linear layers that get an adapter.",
    )
    layers: LoraLayers = Field("all", description="Layers that get adapters: all, or last:N.")


class LossConfig(Section):
    """Class-weighted focal loss (Lin et al. 2017)."""

    focal_gamma: float = Field(2.0, ge=0, le=10, description="Focusing parameter; 0 is weighted cross-entropy.")
    class_weights: ClassWeights = Field(
        "auto",
        description="auto (inverse frequency after oversampling, mean 1), none, [w, w, w] or {LONG: w, …}.",
    )

    @property
    def settings(self) -> dict[str, Any]:
        """What `make_loss` takes; class weights depend on the data too."""
        return self.model_dump(exclude={"class_weights"})


class OversamplingConfig(Section):
    """Random oversampling, with replacement on top of every original row, drawn anew each epoch."""

    target: OversamplingTarget = Field(
        "auto", description="Windows per class to raise to: auto (the largest class), none, or a number."
    )
    max_repeat: float | None = Field(
        None,
        ge=1,
        le=MOST_WINDOWS,
        description="A class grows to at most this many times its own rows; the class weights take the rest.",
    )


class TrainingConfig(Section):
    """The loop. An optimizer step sees batch_size × gradient_accumulation windows, whatever the number of processes."""

    epochs: int = Field(10, ge=1, le=MOST_EPOCHS, description="Passes over the oversampled rows.")
    batch_size: int = Field(8, ge=1, le=MOST_IN_BATCH, description="Windows in a micro-batch.")
    learning_rate: Rate = Field(1.0e-4, description="Peak learning rate of AdamW, at least 1e-12.")
    warmup_steps: int = Field(
        100, ge=0, le=MOST_STEPS, description="Optimizer steps of linear warm-up; at most half of the run."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's decoupled weight decay.")
    gradient_accumulation: int = Field(4, ge=1, le=MOST_IN_BATCH, description="Micro-batches in an optimizer step.")
    max_grad_norm: Norm | None = Field(
        1.0, description="Gradients are clipped to this norm, at least 1e-9; null is no clipping."
    )
    schedule: Literal["warmup_stable_decay", "linear", "cosine", "constant"] = Field(
        "warmup_stable_decay",
        description="Learning rate after warm-up; the default decays to 0 over the second half.",
    )
    skip_nonfinite: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="Optimizer steps that may be skipped when loss or gradient is not finite; one more ends the run.",
    )
    patience: int | None = Field(
        None, ge=1, le=MOST_EPOCHS, description="Stop after this many epochs without a better macro-F1."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")
    seeds: Annotated[list[Seed], AfterValidator(distinct)] | None = Field(
        None,
        min_length=2,
        max_length=MOST_SEEDS,
        description="Several seeds instead: a run for each, their mean and their spread.",
    )

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """What `make_optimizer` takes."""
        return self.model_dump(include={"learning_rate", "weight_decay"})


class CheckpointsConfig(Section):
    """What is kept for choosing and for resuming."""

    keep: int = Field(3, ge=1, le=MOST_EPOCHS, description="Checkpoints kept by macro-F1; the newest is kept besides.")
    every_steps: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Also save within an epoch, every so many optimizer steps."
    )


class CalibrationConfig(Section):
    """Post-calibration (Guo et al. 2017)."""

    method: Literal["temperature", "none"] = Field("temperature", description="Temperature scaling, or nothing.")


class TargetsConfig(Section):
    """The specification's targets, section 6.2, each as a share."""

    accuracy: Share = Field(0.65, description="Priority HIGH.")
    macro_f1: Share = Field(0.60, description="Priority CRITICAL.")
    long_precision: Share = Field(0.60, description="Priority HIGH.")
    short_precision: Share = Field(0.60, description="Priority HIGH.")
    long_recall: Share = Field(0.55, description="Priority MEDIUM.")
    short_recall: Share = Field(0.55, description="Priority MEDIUM.")


class EvaluationConfig(Section):
    """More than one split."""

    folds: int | None = Field(
        None,
        ge=2,
        le=MOST_FOLDS,
        description="Purged walk-forward folds over data.train, with data.embargo; it alone is read.",
    )
    fold: int | None = Field(
        None, ge=1, le=MOST_FOLDS, description="Run this one of the folds only, counted from 1; null runs all."
    )


class TrackingConfig(Section):
    """Experiment trackers, through Accelerate."""

    to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        [], description="Where metrics go besides metrics.jsonl; each needs its package installed."
    )


class Config(Section):
    """A whole run."""

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
    output_dir: Place = Field(description="The run folder.")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, lay `section.key=value` overrides over it and check the whole.

        Raises ConfigError with every fault found.
        """
        return cls.parse(load_yaml(path), overrides)

    @classmethod
    def of_run(cls, text: str, path: Path) -> Self:
        """The config that a run wrote. Raises DataError, with the file, if it is no longer that."""
        try:
            return cls.parse(parse_yaml(text, str(path)))
        except ConfigError as error:
            faults = [fault if fault.startswith(str(path)) else f"{path}: {fault}" for fault in error.faults]
            raise DataError([*faults, "Put back the file as the run left it."]) from None

    @classmethod
    def parse(cls, tree: object, overrides: Sequence[str] = ()) -> Self:
        """Check a nested mapping with overrides laid over it. Raises ConfigError with every fault found."""
        if not isinstance(tree, dict):
            raise ConfigError(f"A config must be a mapping of sections, got {shown(tree)}.")
        tree = deepcopy(tree)
        for name in SECTIONS:
            if tree.get(name) is None:  # a section without keys has its defaults
                tree[name] = {}
        faults = apply_overrides(tree, overrides, KEYS)
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            faults += [explain(detail, KEYS) for detail in error.errors(include_url=False)]
        if _key(tree, "evaluation", "folds") is None:
            if _key(tree, "data", "val") is None:
                faults.append(required("data.val"))
            if _key(tree, "data", "embargo") and not _key(tree, "data", "purge"):
                faults.append(
                    "data.embargo drops rows only with data.purge=true or evaluation.folds. Add one, or leave it 0."
                )
        if not faults and config.evaluation.fold and not config.evaluation.fold <= (config.evaluation.folds or 0):
            fold, folds = config.evaluation.fold, config.evaluation.folds
            faults.append(f"evaluation.fold must be one of evaluation.folds, got {fold} of {folds}. Set both, or none.")
        if faults:
            raise ConfigError(faults)
        return config

    def with_absolute_paths(self) -> Self:
        """The same config with paths that hold from any working folder."""
        data = {
            name: path and str(Path(path).absolute()) for name, path in self.data if name in ("train", "val", "test")
        }
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

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(mode="json"))


def _key(tree: dict[str, Any], section: str, name: str) -> object:
    found = tree[section]
    return found.get(name) if isinstance(found, dict) else found


KEYS = dotted_keys(Config)
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
