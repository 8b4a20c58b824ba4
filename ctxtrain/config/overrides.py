"""What a config's keys are called, and what is said of one that is wrong.

Comes in: a model of sections and keys, overrides, faults that pydantic found. Goes out: dotted keys, a changed tree,
one sentence a fault.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ctxtrain.config.strict_yaml import parse_yaml
from ctxtrain.errors import ConfigError, shown

SCHEMA = "configs/config.schema.json"
# What other tools call a key, where difflib would find another one or none.
USUAL_NAMES = {
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
    """Write each `section.key=value` into the tree; return the faults of those that cannot be written."""
    faults = []
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            faults.append(f"An override must read section.key=value, got {override!r}.")
            continue
        *sections, key = name.split(".")
        node: Any = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            faults.append(f"{name} is not a config key{_nearest(name, keys)}")
            continue
        try:
            node[key] = parse_yaml(value, name)
        except ConfigError as error:
            faults += error.faults
    return faults


def explain(detail: ErrorDetails, keys: Sequence[str], listed_in: str = SCHEMA) -> str:
    """One pydantic error as `dotted.key rule, got value.`; `listed_in` is where a reader finds all keys."""
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("function-"))
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key} is not a config key{_nearest(key, keys, listed_in)}"
    if detail["type"] == "missing":
        return required(key)
    rule = re.sub(r"^(Input|List|String) should", "must", detail["msg"].removeprefix("Value error, "))
    rule = rule.partition(" after validation")[0]
    if detail["type"] in ("model_type", "model_attributes_type"):
        rule = "must be a section with keys of its own"
    return f"{key} {rule}, got {shown(detail['input'])}."


def required(key: str) -> str:
    return f"{key} is required. Set it in the config or as an override, {key}=…"


def _nearest(name: str, keys: Sequence[str], listed_in: str = SCHEMA) -> str:
    """`; did you mean section.key?`, or where the keys are listed.

    The nearest key has the same last part, or one that other tools call so, or is most alike as a whole, or in its last
    part.
    """
    sections = {key.partition(".")[0] for key in keys if "." in key}
    known = [key for key in keys if "." not in name or key not in sections]
    leaf = name.rpartition(".")[2]
    leaf = USUAL_NAMES.get(leaf.lower().replace("-", "_"), leaf)
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    alike = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not alike:
        alike = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    return f"; did you mean {alike[0]}?" if alike else f"; the keys are listed in {listed_in}."


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a config as `section.key`, sections included, in the order of declaration."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += dotted_keys(field.annotation, f"{prefix}{name}.")
    return keys
