"""Config keys: apply overrides, suggest corrections, and explain validation errors.

Input: a pydantic model of sections and keys, `section.key=value` overrides, pydantic error details. Output: dotted
keys, an updated config tree, and one sentence per fault.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ctxtrain.config.strict_yaml import parse_yaml
from ctxtrain.errors import ConfigError, short_repr

SCHEMA_PATH = "configs/config.schema.json"
# Names of the same setting in other tools, for which difflib suggests a wrong key or none.
KEY_ALIASES = {
    "lr": "learning_rate",
    "max_lr": "learning_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_epochs": "epochs",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "accumulate_grad_batches": "gradient_accumulation",
    "grad_clip": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "early_stopping_patience": "patience",
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "gamma": "focal_gamma",
    "weights": "class_weights",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "model_name_or_path": "base",
    "checkpoint": "base",
    "val_data": "val",
    "validation": "val",
    "eval": "val",
    "save_total_limit": "keep",
    "save_steps": "every_steps",
    "report_to": "to",
}


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Write each `section.key=value` into the tree; return a fault for each one that cannot be applied."""
    faults = []
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            faults.append(f"An override must have the form section.key=value, got {override!r}.")
            continue
        *sections, key = name.split(".")
        node: Any = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            faults.append(f"{name} is not a config key{_suggestion(name, keys)}")
            continue
        try:
            node[key] = parse_yaml(value, name)
        except ConfigError as error:
            faults += error.faults
    return faults


def describe_error(detail: ErrorDetails, keys: Sequence[str], listed_in: str = SCHEMA_PATH) -> str:
    """One pydantic error as `dotted.key rule, got value.`; `listed_in` is the document that lists all keys."""
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("function-"))
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key} is not a config key{_suggestion(key, keys, listed_in)}"
    if detail["type"] == "missing":
        return missing_key_message(key)
    rule = re.sub(r"^(Input|List|String|Value) should", "must", detail["msg"].removeprefix("Value error, "))
    rule = rule.partition(" after validation")[0]
    if detail["type"] in ("model_type", "model_attributes_type"):
        rule = "must be a section with keys"
    return f"{key} {rule}, got {short_repr(detail['input'])}."


def missing_key_message(key: str) -> str:
    return f"{key} is required. Set it in the config or as an override: {key}=…"


def _suggestion(name: str, keys: Sequence[str], listed_in: str = SCHEMA_PATH) -> str:
    """`; did you mean section.key?`, or where the keys are listed.

    Candidates, in order: the same last part, an alias from another tool, a similar whole name, a similar last part.
    """
    sections = {key.partition(".")[0] for key in keys if "." in key}
    candidates = [key for key in keys if "." not in name or key not in sections]
    leaf = name.rpartition(".")[2]
    leaf = KEY_ALIASES.get(leaf.lower().replace("-", "_"), leaf)
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(candidates)}
    matches = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if not matches:
        matches = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    return f"; did you mean {matches[0]}?" if matches else f"; the keys are listed in {listed_in}."


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a config model as `section.key`, including the sections, in declaration order."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += dotted_keys(field.annotation, f"{prefix}{name}.")
    return keys
