"""The config of a run: typed, described and range-checked in one place.

Comes in: a YAML file and `section.key=value` overrides. Goes out: a frozen `Config`. All faults are
reported in one `ConfigError`, each with its dotted key; an unknown key is refused with the nearest name.
Defaults are those of the specification, section 7. Only `train.py` and `cli.py` see a `Config`: every
other module takes plain values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from ml.config_text import apply_overrides, dotted_keys, explain, required
from ml.errors import ConfigError, shown
from ml.labels import LABELS
from ml.yaml_text import dump_yaml, load_yaml

EMBEDDED_BASE = "embedded"
MOST = 10**9  # of windows and weights: more is a slip of the hand


def _class_weights(value: object) -> object:
    if value in ("auto", "none"):
        return value
    if isinstance(value, dict):
        by_label = {str(key).upper(): weight for key, weight in value.items()}
        if sorted(by_label) != sorted(LABELS) or len(value) != len(LABELS):
            raise ValueError(f"must name each of {', '.join(LABELS)} once")
        value = [by_label[label] for label in LABELS]
    if isinstance(value, list) and len(value) == len(LABELS) and all(map(_is_positive, value)):
        return [float(weight) for weight in value]
    numbers = f"three positive numbers of at most {MOST:,}"
    raise ValueError(f"must be auto, none, or {numbers}: [w, w, w] or {{LONG: w, SHORT: w, SKIP: w}}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST


def _oversampling_target(value: object) -> object:
    count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST
    if count or value in ("auto", "none"):
        return value
    raise ValueError(f"must be auto, none, or a number of windows per class, at least 1 and at most {MOST:,}")


def _lora_layers(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"all|last:[1-9][0-9]*", value):
        return value
    raise ValueError("must be all or last:N with N at least 1, for example last:6")


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("must be different seeds")
    return seeds


ClassWeights = Annotated[
    Literal["auto", "none"] | list[float],
    BeforeValidator(_class_weights, json_schema_input_type=Literal["auto", "none"] | list[float] | dict[str, float]),
]
OversamplingTarget = Annotated[
    Literal["auto", "none"] | int,
    BeforeValidator(_oversampling_target, json_schema_input_type=Literal["auto", "none"] | int),
]
LoraLayers = Annotated[str, BeforeValidator(_lora_layers)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the rows are and how the model reads them."""

    train: str = Field(min_length=1, description="Training rows, .jsonl or .jsonl.gz.")
    val: str | None = Field(
        None,
        min_length=1,
        description="Validation rows; they choose the epoch and the temperature. Required without folds.",
    )
    test: str | None = Field(
        None, min_length=1, description="Rows scored once, at the end; then they judge the targets."
    )
    codec: Literal["compact", "json"] = Field(
        "compact", description="How a window becomes text: quantised integers, or its JSON for comparison."
    )
    purge: bool = Field(
        False,
        description="Drop training rows that share bars with val or test, and val rows that share bars with test.",
    )
    embargo: int = Field(
        0, ge=0, description="With purge or folds, also drop rows within so many bars of the rows that judge."
    )
    allow_leakage: bool = Field(
        False, description="Train although windows or ids stand in two files; every figure is then marked."
    )


class ModelConfig(Section):
    """The frozen base."""

    base: str = Field(
        EMBEDDED_BASE,
        min_length=1,
        description=f"Folder or hub id of a Qwen checkpoint; `{EMBEDDED_BASE}` is the package's own small one.",
    )
    revision: str | None = Field(None, description="Hub revision (commit, tag or branch) of the base.")
    max_tokens: int = Field(2048, ge=8, description="Longest text in tokens; older tokens are cut off, and counted.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic of training; auto is bfloat16 on a GPU that has it, else float32."
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Weights of the frozen base during training; int8 and nf4 need a GPU and bitsandbytes.",
    )


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    r: int = Field(8, ge=1, description="Rank.")
    alpha: int = Field(16, ge=1, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: list[str] = Field(
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


class OversamplingConfig(Section):
    """Random oversampling, with replacement on top of every original row, drawn anew each epoch."""

    target: OversamplingTarget = Field(
        "auto", description="Windows per class to raise to: auto (the largest class), none, or a number."
    )
    max_repeat: float | None = Field(
        None,
        ge=1,
        description="A class grows to at most this many times its own rows; the class weights take the rest.",
    )


class TrainingConfig(Section):
    """The loop. An optimizer step sees batch_size × gradient_accumulation windows, whatever the number of processes."""

    epochs: int = Field(10, ge=1, description="Passes over the oversampled rows.")
    batch_size: int = Field(8, ge=1, description="Windows in a micro-batch.")
    learning_rate: float = Field(1.0e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(100, ge=0, description="Optimizer steps of linear warm-up; at most half of the run.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's decoupled weight decay.")
    gradient_accumulation: int = Field(4, ge=1, description="Micro-batches in an optimizer step.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are clipped to this norm; null is no clipping."
    )
    schedule: Literal["warmup_stable_decay", "linear", "cosine", "constant"] = Field(
        "warmup_stable_decay",
        description="Learning rate after warm-up; the default decays to 0 over the second half.",
    )
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="Optimizer steps that may be skipped when loss or gradient is not finite; one more ends the run.",
    )
    patience: int | None = Field(None, ge=1, description="Stop after this many epochs without a better macro-F1.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")
    seeds: Annotated[list[Seed], AfterValidator(_distinct)] | None = Field(
        None, min_length=2, description="Several seeds instead: a run for each, their mean and their spread."
    )


class CheckpointsConfig(Section):
    """What is kept for choosing and for resuming."""

    keep: int = Field(3, ge=1, description="Checkpoints kept by macro-F1; the newest is kept besides.")
    every_steps: int | None = Field(None, ge=1, description="Also save within an epoch, every so many optimizer steps.")


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
        description="Purged walk-forward folds over data.train, with data.embargo; it alone is read.",
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
    output_dir: str = Field(min_length=1, description="The run folder.")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, lay `section.key=value` overrides over it and check the whole.

        Raises ConfigError with every fault found.
        """
        return cls.parse(load_yaml(path), overrides)

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
        if faults:
            raise ConfigError(faults)
        return config

    def with_absolute_paths(self) -> Self:
        """The same config with paths that hold from any working folder."""
        data = {
            name: path and str(Path(path).absolute()) for name, path in self.data if name in ("train", "val", "test")
        }
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
