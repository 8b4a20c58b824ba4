"""YAML text → plain values, stricter than PyYAML: YAML 1.2 numbers, no duplicate keys, errors with line and column.

Why not ruamel.yaml: it implements YAML 1.2 and refuses duplicate keys, but still reads 1_000 as a number, 2025-01-02 as
a date and << as a merge. So it would need the same rules as below, plus a dependency.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ctxtrain.errors import ConfigError
from ctxtrain.regular_files import NotRegularFile, read_regular


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file. Raises ConfigError if the file does not exist or is not valid."""
    try:
        text = read_regular(Path(path)).decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file. Give the path of a YAML file.") from None
    except NotRegularFile as error:
        reason = f"a config must be a regular file, got {error.kind}"
        raise ConfigError(f"{path}: {reason}. Give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: a config must be UTF-8 text, got {error.reason} at byte {error.start}.") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text. Raises ConfigError with `source:line:column` if it is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{place}: not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a number of thousands of digits raises the last two
        raise ConfigError(f"{source}: not valid YAML: {error}.") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply for a config.") from None


def dump_yaml(tree: Any) -> str:
    """YAML text from which `parse_yaml`, and any other YAML parser, reads the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Numbers of YAML 1.2's core schema, no dates, no duplicate keys.

    PyYAML reads 1e-4 as text, 010 as 8, 1:30 as 90 and 2025-01-02 as a date. Of duplicate keys it keeps the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that PyYAML or `_Loader` would read as a number."""


def _reject_date(_loader: yaml.SafeLoader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, "no config key takes a date", node.start_mark)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_INTEGER, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first_character: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INTEGER, _FLOAT, _DATE)]
    for first_character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    _reader_or_writer.add_implicit_resolver(
        _FLOAT,
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    )
_Loader.add_constructor(_INTEGER, _construct_int)
_Loader.add_constructor(_DATE, _reject_date)
