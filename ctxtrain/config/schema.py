"""The config of a run, read from YAML and overrides.

Input: a YAML file and `section.key=value` overrides. Output: a frozen `Config`. One `ConfigError` reports all faults,
each with its dotted key, and suggests the nearest known key for an unknown one. The keys are those of `sections.py`.
The pipeline (`train.py`, `multi_run.py`, `training/`) and the command line receive a `Config`; all other modules take
plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError

from ctxtrain.config.overrides import apply_overrides, describe_error, dotted_keys, missing_key_message
from ctxtrain.config.sections import (
    SPLITS,
    AugmentationConfig,
    CalibrationConfig,
    CheckpointsConfig,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OversamplingConfig,
    Section,
    TargetsConfig,
    TrackingConfig,
    TrainingConfig,
)
from ctxtrain.config.strict_yaml import dump_yaml, load_yaml, parse_yaml
from ctxtrain.config.value_types import PathText
from ctxtrain.errors import ConfigError, DataError, short_repr
from ctxtrain.urls import absolute, shown


class Config(Section):
    """The complete config of a run."""

    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    oversampling: OversamplingConfig = OversamplingConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    export: ExportConfig = ExportConfig()
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
        if _get(tree, "data", "embargo") not in (None, 0, "auto") and _get(tree, "data", "purge") is False:
            faults.append("data.embargo needs purging, but data.purge is false. Set data.purge=auto or data.embargo=0.")
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
