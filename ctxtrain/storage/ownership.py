"""Refuse an output path if writing to it would replace an input, or a file of a run, export, set of rows or base.

Input: the paths that a command writes and reads. Output: nothing, or a ConfigError before anything is computed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ctxtrain.config.strict_yaml import load_yaml
from ctxtrain.errors import ConfigError
from ctxtrain.regular_files import non_regular_kind, open_regular, read_regular
from ctxtrain.storage.archive import EXPORT_FILES
from ctxtrain.storage.atomic_files import MANIFEST
from ctxtrain.storage.result_file import STANDARD_OUTPUT, check_writable

# Names that a run, or a folder of several runs, contains.
RUN_NAMES = frozenset({
    "config.yaml", "metrics.jsonl", "checkpoints", "best_model.safetensors", "training_summary.json", "report.html",
    "export", "final_model.zip", "run.lock", "run.owner", "tracking.json", "runs.json", "ctxtrain", "mlflow",
    "mlflow.db", "wandb",
})  # fmt: skip
RUN_SUBFOLDER = re.compile(r"fold_[0-9]+(-seed_[0-9]+)?|seed_[0-9]+")  # folder of one run among several
_REMEDY = "Give another path"
_MAGIC = {"final_model.zip": (0, b"PK"), "best_model.safetensors": (8, b"{")}  # file name → offset, and the bytes at it
_FOLDERS = ("checkpoints", "export")
PAGE_MARK = b"Written by ctxtrain"
MAX_NAMES = 6  # listed in a message
SPLITS = ("train", "val", "test")
SAMPLE, WINDOWS = "sample.json", "windows.json"
# Cards of folders with rows: the key that only such a card has, and the kind of the folder.
CARDS = {SAMPLE: (b'"simulated_bars"', "sample"), WINDOWS: (b'"bars_a_window"', "set of windows")}
_ROW_FILES = frozenset(f"{split}.jsonl" for split in SPLITS)
_BASE_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".py"})  # libraries load these
_BASE_DEPTH = 2  # levels of subfolders in a base; some bases have onnx/
_MAX_LINKS = 40  # in one path, as Linux allows


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() and any(
        (folder / name).exists() for name in ("run.lock", "metrics.jsonl", "training_summary.json")
    )


def holds_runs(folder: Path) -> bool:
    """Whether the folder contains the runs of several seeds or folds."""
    return (folder / "runs.json").exists() or any(
        is_run(path) for path in folder.glob("*_[0-9]*") if RUN_SUBFOLDER.fullmatch(path.name)
    )


def refuse_folder_of_runs(folder: Path) -> None:
    """Raise ConfigError if the folder is not one run but contains several, one per seed or fold."""
    runs = (
        [] if (folder / "config.yaml").exists() else sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    )
    if runs:
        names = ", ".join(runs[:MAX_NAMES]) + (", …" if len(runs) > MAX_NAMES else "")
        raise ConfigError(
            f"{folder}: must be one run, got a folder of runs: {names}. Give one of them, such as {folder / runs[0]}."
        )


def is_export(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and (folder / "codec.json").exists()


def is_base(folder: Path) -> bool:
    """Whether transformers could load the folder as a model."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return (folder / "config.json").exists() and any((folder / name).exists() for name in weights)


def _has_card(folder: Path, card: str) -> bool:
    """Whether `ctxtrain sample` or `ctxtrain windows` wrote the folder, by its card."""
    description = folder / card
    return description.is_file() and CARDS[card][0] in read_regular(description)


def equivalent_paths(path: Path) -> list[Path]:
    """Absolute forms of `path` without `..`: one for each symbolic link on the way, and last the fully resolved path.

    The caller must check all of them, because a link can be inside a run or export while its target is outside. Raises
    ConfigError for circular links.
    """
    absolute = Path.cwd() / path
    paths, resolved, remaining = list[Path](), Path(absolute.anchor), list(absolute.parts[1:])
    while remaining:
        name = remaining.pop(0)
        step = resolved.parent if name == ".." else resolved / name
        if not step.is_symlink():
            resolved = step
            continue
        if ".." not in remaining:  # a later `..` may leave the linked folder
            paths.append(step.joinpath(*remaining))
        if len(paths) > _MAX_LINKS:
            raise ConfigError(f"a path must not have circular links; the links of {path} are circular. {_REMEDY}.")
        target = step.readlink()
        if target.is_absolute():
            resolved = Path(target.anchor)
        remaining[:0] = target.parts[1:] if target.is_absolute() else target.parts
    return [*paths, resolved]


def owner_of(path: Path) -> str | None:
    """The run, export, sample or base that contains `path`, as text for a message; None if there is none.

    The path need not exist, and symbolic links are followed. Raises ConfigError for circular links.
    """
    return next(filter(None, map(_owner, equivalent_paths(path))), None)


def _owner(place: Path) -> str | None:
    for folder in (place, *place.parents):
        if is_export(folder):
            return f"the export {folder}"
        if folder == place or place.relative_to(folder).parts[0] not in RUN_NAMES:
            continue
        if is_run(folder):
            return f"the run {folder}"
        if holds_runs(folder):
            return f"the runs in {folder}"
    for card, (_, kind) in CARDS.items():
        if (place.name == card or place.name in _ROW_FILES) and _has_card(place.parent, card):
            return f"the {kind} {place.parent}"
    if is_base(place.parent) and (place.exists() or place.suffix in _BASE_SUFFIXES):
        return f"the base {place.parent}"
    ancestors = list(place.parents)[1 : _BASE_DEPTH + 1] if place.is_file() else []
    return next((f"the base {folder}" for folder in ancestors if is_base(folder)), None)


def check_output_file(path: Path | None, model: Path, data: str) -> None:
    """Raise ConfigError if a result must not be written to `path`, and OSError if `path` is not writable.

    Called before any input is read. If `path` is None or `-`, the output is standard output, which is always allowed.
    If `data` is `-`, the input is standard input.
    """
    if path is None or path == STANDARD_OUTPUT:
        return
    place = equivalent_paths(path)[-1]
    if place.is_dir() or not place.parent.is_dir():
        problem = f"{path} is a folder" if place.is_dir() else f"there is no folder {place.parent}"
        raise ConfigError(f"output must be a file in an existing folder; {problem}. {_REMEDY}.")
    target = _file_id(path)
    inputs = [_file_id(model), _standard_input_id() if data == "-" else _file_id(Path(data))]
    if target and target in inputs:
        raise ConfigError(f"output must not be an input, got {path} for both. {_REMEDY}.")
    if owner := owner_of(path):
        rule = "output must not be in a run, an export, a sample, a set of windows or a base"
        raise ConfigError(f"{rule}; {path} belongs to {owner}. {_REMEDY}.")
    forbidden = {target, _file_id(place.parent)} - {None}
    for model_path in _model_paths(model):
        if _file_id(model_path) in forbidden:
            relation = f"is in {model_path}" if model_path.is_dir() else f"is the same file as {model_path}"
            raise ConfigError(f"output must not be a part of the model; {path} {relation}. {_REMEDY}.")
    if not path.exists() or path.is_file():  # pipes and devices are not replaced
        check_writable(place)


def check_output_dir(output_dir: Path, base: str) -> None:
    """Raise ConfigError if a new run or base cannot use `output_dir`: inside its base, an export or another run."""
    place, base_folder = equivalent_paths(output_dir)[-1], Path(os.path.realpath(base))
    for folder in (place, *place.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output_dir must be a folder, and {folder} is a file. Use another output_dir.")
    if Path(base).is_dir() and (place == base_folder or base_folder in place.parents):
        raise ConfigError(f"output_dir must not lie in the base, got {output_dir} in {base}. Use another output_dir.")
    if Path(base).is_dir() and place in base_folder.parents and base_folder.relative_to(place).parts[0] in RUN_NAMES:
        raise ConfigError(f"the run must not overwrite its base, got {base} in {output_dir}. Copy the base elsewhere.")
    if owner := owner_of(output_dir):
        raise ConfigError(f"output_dir must not lie in {owner}, got {output_dir}. Use another output_dir.")


def check_cache_dir(cache: Path, output_dir: Path) -> None:
    """Raise ConfigError if `data.cache` is inside a run, an export, a base or `output_dir`."""
    place, output = equivalent_paths(cache)[-1], equivalent_paths(output_dir)[-1]
    owner = owner_of(cache)
    for folder in (place, *place.parents):
        kinds = {"the run": is_run, "the runs in": holds_runs, "the base": is_base, "output_dir": output.__eq__}
        owner = owner or next((f"{kind} {folder}" for kind, matches in kinds.items() if matches(folder)), None)
    if owner:
        rule = "data.cache must be outside of output_dir, runs, exports and bases"
        raise ConfigError(f"{rule}, but {cache} is in {owner}. Give another folder, or auto.")


def require_empty_output_dir(output_dir: Path, base: str) -> None:
    """Raise ConfigError unless `output_dir` is new or empty, and outside of any base, export or run."""
    check_output_dir(output_dir, base)
    entries = sorted(path.name for path in output_dir.iterdir()) if output_dir.exists() else []
    if entries:
        names = ", ".join(entries[:MAX_NAMES]) + (", …" if len(entries) > MAX_NAMES else "")
        raise ConfigError(f"output_dir must be new or empty, {output_dir} has {names}. Use another output_dir.")
    for folder in output_dir.absolute().parents:
        if is_base(folder):
            raise ConfigError(
                f"output_dir must not lie in the base {folder}, got {output_dir}. Use another output_dir."
            )


def refuse_foreign_files(run: Path, epochs: int = 0) -> None:
    """Raise ConfigError if the run would overwrite a file in its folder that was not written by a run.

    `epochs` is the number of epochs whose checkpoints will be written. A file of a run is recognised by its first
    bytes, so a file of a run that is damaged further on may be overwritten.
    """
    files = sorted(RUN_NAMES - {*_FOLDERS, "run.lock", "ctxtrain", "mlflow", "wandb"})
    special = {run / name: kind for name in files if (kind := non_regular_kind(run / name))}
    faults = [f"{path} is {kind}, not a file of a run" for path, kind in special.items()]
    folders = [run / name for name in _FOLDERS]
    faults += [f"{path} must be a folder, got a file" for path in folders if path.exists() and not path.is_dir()]
    faults += [f"{path} is not a file of an export" for path in _foreign_files(run / "export")]
    for name, (offset, magic) in _MAGIC.items():
        if not _has_magic(run / name, offset, magic):
            faults.append(f"{run / name} is not a file of a run")
    for path in (run / "checkpoints").glob("checkpoint_epoch_*.pt"):
        number = path.stem.rpartition("_")[2]
        if (kind := non_regular_kind(path)) and number.isdecimal() and int(number[:9]) <= epochs:
            faults.append(f"{path} is {kind}, and the run would write a checkpoint there")
    if not faults:
        faults = _report_faults(run / "report.html")
    if faults:
        raise ConfigError([f"{fault}. Move it away." for fault in faults])


def refuse_foreign_report(page: Path) -> None:
    """Raise ConfigError if `page` exists and is not a report of ctxtrain."""
    if faults := _report_faults(page):
        raise ConfigError([f"{fault}. Move it away." for fault in faults])


def refuse_foreign_runs_file(report: Path) -> None:
    """Raise ConfigError if `report` exists and is not a `runs.json` of ctxtrain."""
    kind = non_regular_kind(report)
    content = read_regular(report) if not kind and report.exists() else b""
    if kind or (content and not re.match(rb'\s*{\s*"runs"', content)):
        raise ConfigError(f"{report} is {kind or 'not a runs.json of ctxtrain'}. Move it away.")


def _report_faults(page: Path) -> list[str]:
    if kind := non_regular_kind(page):
        return [f"{page} is {kind}, not a file of a run"]
    content = read_regular(page) if page.exists() else b""
    return [f"{page} is not a report of a run"] if content and PAGE_MARK not in content else []


def _foreign_files(export: Path) -> list[Path]:
    if not export.is_dir():
        return []
    paths = (path for path in sorted(export.rglob("*")) if not path.is_dir() or path.is_symlink())
    return [path for path in paths if path.relative_to(export).as_posix() not in EXPORT_FILES or non_regular_kind(path)]


def _has_magic(path: Path, offset: int, magic: bytes) -> bool:
    """Whether a file has the bytes `magic` at `offset`. Also True if the file is empty, missing or not regular.

    The caller reports files that are not regular.
    """
    if non_regular_kind(path) or not path.exists():
        return True
    with open_regular(path) as stream:
        head = stream.read(offset + len(magic))
    return not head or head[offset:] == magic


def _model_paths(model: Path) -> Iterator[Path]:
    """Every file and folder of the model and of the run that contains it, and the files that this run reads."""
    places = equivalent_paths(model)
    folders = [folder for place in places for folder in (place, *list(place.parents)[:2])]
    runs = dict.fromkeys(folder for folder in folders if folder.is_dir() and is_run(folder))
    for run in runs:
        for path in run.iterdir():
            if path.name in RUN_NAMES:
                yield from _walk(path)
    for export in (folder for place in places for folder in (place, place / "export") if is_export(folder)):
        yield from _walk(export)
    for run in runs:
        yield from _run_inputs(run)


def _walk(path: Path) -> Iterator[Path]:
    """The path, and everything in it if it is a folder. Unlike `Path.walk`, it follows links to folders."""
    seen = set[str]()
    stack = [path]
    while stack:
        entry = stack.pop()
        yield entry
        if entry.is_dir() and (real := os.path.realpath(entry)) not in seen:
            seen.add(real)
            stack += entry.iterdir()


def _run_inputs(run: Path) -> Iterator[Path]:
    """The row files in a run's config, and the files of its base."""
    try:
        config = load_yaml(run / "config.yaml")
        rows = [Path(config["data"][name]) for name in SPLITS if config["data"].get(name)]
        base = Path(config["model"]["base"])
    except (ConfigError, KeyError, TypeError, AttributeError, OSError):  # a damaged config; its reader reports it
        return
    yield from rows
    if base.is_dir():
        yield from base.iterdir()


def _file_id(path: Path) -> tuple[int, int] | None:
    """Device and inode, which are equal for all links to a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _standard_input_id() -> tuple[int, int] | None:
    """Device and inode of the file that is redirected to standard input, if there is one."""
    try:
        status = os.fstat(0)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None
