"""Write docs/config.md, the JSON Schemas beside it and configs/config.schema.json from the schemas of the code.

python -m tests.config_page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel

from ctxtrain.config.schema import Config
from ctxtrain.pretraining.run import PretrainConfig
from ctxtrain.reporting.runs_schema import Runs
from ctxtrain.reporting.summary_schema import Summary

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
SCHEMAS: dict[Path, type[BaseModel]] = {  # what is published of a file → what reads it
    PAGE.parents[1] / "configs" / "config.schema.json": Config,
    PAGE.with_name("training_summary.schema.json"): Summary,
    PAGE.with_name("runs.schema.json"): Runs,
}
HEAD = """# Every key of the config

`make docs` writes this page from the schemas in `ctxtrain/config/sections.py` and `ctxtrain/pretraining/run.py`, and a
test fails when it is not current. A config is a YAML file; each key can be changed on the command line as
`section.key=value`, where the value is YAML too: `training.epochs=3`, `data.test=null`, `'training.seeds=[0,1]'`,
`'loss.class_weights={LONG: 2, SHORT: 2, SKIP: 1}'`.

All faults of a config are reported at once, an unknown key with the nearest known one, and the command ends with exit
code 2. Types are strict: `'3'` and `2.5` are no integers. An editor that reads `configs/config.schema.json` completes
the keys: the first line of `configs/demo.yaml` shows how. `ctxtrain pretrain` has a config and keys of its own, at the
end of this page.

A relative path (`data.train`, `data.val`, `data.test`, `model.base`, `output_dir`) counts from the folder in which the
command is typed, not from the folder of the config. The `config.yaml` in a run folder has all of them absolute.
"""
PRETRAIN = """A file of its own, without overrides: `configs/pretrain.yaml` makes the embedded base, and with `base` and
`data` a Qwen is adapted to unlabelled windows ([real-qwen.md](real-qwen.md))."""
WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
    "minLength": "not empty",
}


def published(part: type[BaseModel]) -> bytes:
    """A JSON Schema, as its file holds it."""
    return orjson.dumps(part.model_json_schema(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def page() -> str:
    """The whole page: a table for each section, in the order of declaration, and one for pretrain."""
    schema = Config.model_json_schema()
    parts, alone = [HEAD], []
    for name, entry in schema["properties"].items():
        rows = _rows(name, entry, schema)
        if "$ref" in entry:
            parts.append(_table(name, schema["$defs"][entry["$ref"].rpartition("/")[2]]["description"], rows))
        else:
            alone += rows
    parts.append(_table("Outside of the sections", "", alone))
    schema = PretrainConfig.model_json_schema()
    rows = [row for name, entry in schema["properties"].items() for row in _rows(name, entry, schema)]
    parts.append(_table("ctxtrain pretrain", PRETRAIN, rows))
    return "\n".join(parts)


def _rows(name: str, entry: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """The row of a key, or those of all keys of a section."""
    if "$ref" not in entry:
        return [_row(name, entry, schema["required"])]
    section = schema["$defs"][entry["$ref"].rpartition("/")[2]]
    return [_row(f"{name}.{key}", one, section.get("required", [])) for key, one in section["properties"].items()]


def _table(title: str, said: str, rows: list[str]) -> str:
    said = f"{said}\n\n" if said else ""
    return f"## {title}\n\n{said}| key | type | default | range | |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(key: str, entry: dict[str, Any], required: list[str]) -> str:
    default = "required" if key.rpartition(".")[2] in required else f"`{orjson.dumps(entry['default']).decode()}`"
    limits = ", ".join(_limits(entry)) or "–"
    return f"| `{key}` | {_kind(entry)} | {default} | {limits} | {entry['description']} |"


def _kind(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return " or ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "anyOf" in entry:
        return " or ".join(map(_kind, entry["anyOf"]))
    if entry["type"] == "array":
        return f"list of {_kind(entry['items'])}"
    if entry["type"] == "object":
        return f"mapping to {_kind(entry['additionalProperties'])}"
    return WORDS[entry["type"]]


def _limits(entry: dict[str, Any]) -> list[str]:
    """What the values must keep to; of a list, also what its members must."""
    found = [said.format(_figure(entry[name])) for name, said in LIMITS.items() if name in entry]
    for part in [*entry.get("anyOf", []), *([entry["items"]] if "items" in entry else [])]:
        found += [limit for limit in _limits(part) if limit not in found]
    return found


def _figure(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for file, part in SCHEMAS.items():
        file.write_bytes(published(part))
