"""What a command was given, looked at before seconds of imports: is it there, and is it of the right kind?

Comes in: paths and names. Goes out: nothing, or one error with every fault, the one that the command would end with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctxtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ctxtrain.config.schema import Config


def look_at_inputs(config: Config) -> None:
    """Raises ConfigError for a base or an output folder that cannot be, DataError for files that hold no rows."""
    from ctxtrain.data.sources import require_readable
    from ctxtrain.model.base_name import refuse_unknown_base
    from ctxtrain.storage.ownership import check_cache_dir, check_output_dir

    refuse_unknown_base(config.model.base)
    check_output_dir(Path(config.output_dir), config.model.base)
    if config.data.cache != "auto":
        check_cache_dir(Path(config.data.cache), Path(config.output_dir))
    splits = ("train",) if config.evaluation.folds else ("train", "val", "test")
    faults = []
    drivers = []  # that URLs need
    for path in filter(None, (getattr(config.data, split) for split in splits)):
        try:
            require_readable(path)
        except ConfigError as error:
            drivers += error.faults
        except DataError as error:
            faults += error.faults
    if drivers:
        raise ConfigError(list(dict.fromkeys(drivers + faults)))
    if faults:
        raise DataError(list(dict.fromkeys(faults)))


def look_at_model(model: Path, data: str | None = None) -> None:
    """Raises ConfigError or DataError if there is no export at `model`, or no rows at `data`; `-` is standard input."""
    from ctxtrain.data.sources import require_readable
    from ctxtrain.export.locate import find_export

    find_export(model)
    if data not in (None, "-"):
        require_readable(str(data))
