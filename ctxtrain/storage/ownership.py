"""Whose a place is: what is written must be neither what is read nor anyone else's.

Comes in: where a command would write, and what it reads. Goes out: nothing, or a ConfigError, before anything is
computed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ctxtrain.config.strict_yaml import load_yaml
from ctxtrain.errors import ConfigError
from ctxtrain.regular_files import odd_kind, open_regular, read_regular
from ctxtrain.storage.archive import FILES
from ctxtrain.storage.atomic_files import MANIFEST
from ctxtrain.storage.result_file import STANDARD_OUTPUT, try_to_write

# What a run, or several of them, write below their folder.
RUN_NAMES = frozenset({
    "config.yaml", "metrics.jsonl", "checkpoints", "best_model.safetensors", "training_summary.json", "report.html",
    "export", "final_model.zip", "run.lock", "run.owner", "tracking.json", "runs.json", "ctxtrain", "mlflow",
    "mlflow.db", "wandb",
})  # fmt: skip
SEVERAL_NAME = re.compile(r"fold_[0-9]+(-seed_[0-9]+)?|seed_[0-9]+")  # folders of several runs
_ELSE = "Give another path"
_MARKS = {"final_model.zip": (0, b"PK"), "best_model.safetensors": (8, b"{")}  # how these files begin, and where
_FOLDERS = ("checkpoints", "export")
PAGE_MARK = b"Written by ctxtrain"
SOME_RUNS = 6  # as many are named in a message
SPLITS = ("train", "val", "test")
SAMPLE, SAMPLE_MARK = "sample.json", b'"simulated_bars"'
_SAMPLE_FILES = frozenset({SAMPLE, *(f"{split}.jsonl" for split in SPLITS)})
_OF_A_BASE = frozenset({".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".py"})  # what libraries look for
_BASE_DEPTH = 2  # folders within a base, as onnx/ of some
_MOST_LINKS = 40  # on the way to a file, as the system allows


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() and any(
        (folder / name).exists() for name in ("run.lock", "metrics.jsonl", "training_summary.json")
    )


def holds_runs(folder: Path) -> bool:
    """Whether several runs, of seeds or folds, were begun in a folder."""
    return (folder / "runs.json").exists() or any(
        is_run(path) for path in folder.glob("*_[0-9]*") if SEVERAL_NAME.fullmatch(path.name)
    )


def refuse_several(folder: Path) -> None:
    """Raises ConfigError if the folder is no run itself and holds runs, as that of several seeds or folds does."""
    runs = (
        [] if (folder / "config.yaml").exists() else sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    )
    if runs:
        named = ", ".join(runs[:SOME_RUNS]) + (", …" if len(runs) > SOME_RUNS else "")
        raise ConfigError(
            f"{folder}: must be one run, and it is a folder of runs: {named}. Give one, as {folder / runs[0]}."
        )


def is_export(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and (folder / "codec.json").exists()


def is_base(folder: Path) -> bool:
    """Whether transformers would take the folder for a model."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return (folder / "config.json").exists() and any((folder / name).exists() for name in weights)


def is_sample(folder: Path) -> bool:
    """Whether `ctxtrain sample` wrote the folder."""
    facts = folder / SAMPLE
    return facts.is_file() and SAMPLE_MARK in read_regular(facts)


def ways_to(path: Path) -> list[Path]:
    """Every path, without `..`, that leads to what `path` names: by each link on the way, and last without links.

    Raises ConfigError if the links lead in a circle.
    """
    given = Path.cwd() / path
    ways, place, waiting = list[Path](), Path(given.anchor), list(given.parts[1:])
    while waiting:
        name = waiting.pop(0)
        step = place.parent if name == ".." else place / name
        if not step.is_symlink():
            place = step
            continue
        if ".." not in waiting:  # else it may lead out of the linked folder again
            ways.append(step.joinpath(*waiting))
        if len(ways) > _MOST_LINKS:
            raise ConfigError(f"a path must lead somewhere, and the links of {path} go in a circle. {_ELSE}.")
        target = step.readlink()
        if target.is_absolute():
            place = Path(target.anchor)
        waiting[:0] = target.parts[1:] if target.is_absolute() else target.parts
    return [*ways, place]


def owner_of(path: Path) -> str | None:
    """What a file or folder at `path`, there or not, would be a part of, by any way that leads there; or nothing.

    Raises ConfigError if the links of the path lead in a circle.
    """
    return next(filter(None, map(_owner, ways_to(path))), None)


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
    if place.name in _SAMPLE_FILES and is_sample(place.parent):
        return f"the sample {place.parent}"
    if is_base(place.parent) and (place.exists() or place.suffix in _OF_A_BASE):
        return f"the base {place.parent}"
    above = list(place.parents)[1 : _BASE_DEPTH + 1] if place.is_file() else []
    return next((f"the base {folder}" for folder in above if is_base(folder)), None)


def refuse_target(path: Path | None, model: Path, data: str) -> None:
    """Raises ConfigError if a result should not go to `path`, and OSError if none can: before anything is read.

    None and `-` stand for standard output, and `-` as data for standard input.
    """
    if path is None or path == STANDARD_OUTPUT:
        return
    place = ways_to(path)[-1]
    if place.is_dir() or not place.parent.is_dir():
        found = f"{path} is a folder" if place.is_dir() else f"there is no folder {place.parent}"
        raise ConfigError(f"output must be a file in a folder that is there; {found}. Give another path.")
    target = _identity(path)
    read = [_identity(model), _standard_input() if data == "-" else _identity(Path(data))]
    if target and target in read:
        raise ConfigError(f"output must not be what is read, got {path} for both. Give another path.")
    if owner := owner_of(path):
        raise ConfigError(f"output must not be a part of what a run or a model is, and {path} is of {owner}. {_ELSE}.")
    taken = {target, _identity(place.parent)} - {None}
    for owned in _parts_of(model):
        if _identity(owned) in taken:
            of = f"lies in {owned}" if owned.is_dir() else f"is the same file as {owned}"
            raise ConfigError(f"output must not be a part of the model, and {path} {of}. {_ELSE}.")
    if not path.exists() or path.is_file():  # else a pipe or a device, which is written to and not replaced
        try_to_write(place)


def refuse_output(output_dir: Path, base: str) -> None:
    """Raises ConfigError if the files of a new run or base would lie among those of its base, of an export or a run."""
    place, base_folder = ways_to(output_dir)[-1], Path(os.path.realpath(base))
    for above in (place, *place.parents):
        if above.exists() and not above.is_dir():
            raise ConfigError(f"output_dir must be a folder, and {above} is a file. Use another output_dir.")
    if Path(base).is_dir() and (place == base_folder or base_folder in place.parents):
        raise ConfigError(f"output_dir must not lie in the base, got {output_dir} in {base}. Use another output_dir.")
    if Path(base).is_dir() and place in base_folder.parents and base_folder.relative_to(place).parts[0] in RUN_NAMES:
        raise ConfigError(f"the base must not be what the run writes, got {base} in {output_dir}. Copy it elsewhere.")
    if owner := owner_of(output_dir):
        raise ConfigError(f"output_dir must not lie in {owner}, got {output_dir}. Use another output_dir.")


def refuse_cache(cache: Path, output_dir: Path) -> None:
    """Raises ConfigError if tables would lie in a run, an export or a base, or where the run writes."""
    place, output = ways_to(cache)[-1], ways_to(output_dir)[-1]
    owner = owner_of(cache)
    for folder in (place, *place.parents):
        kinds = {"the run": is_run, "the runs in": holds_runs, "the base": is_base, "output_dir": output.__eq__}
        owner = owner or next((f"{what} {folder}" for what, is_one in kinds.items() if is_one(folder)), None)
    if owner:
        rule = "data.cache must be a folder of its own"
        raise ConfigError(f"{rule}, and {cache} lies in {owner}. Give another folder, or auto.")


def refuse_taken(output_dir: Path, base: str) -> None:
    """Raises ConfigError unless `output_dir` is a new or an empty folder, outside of any base, export or run."""
    refuse_output(output_dir, base)
    found = sorted(path.name for path in output_dir.iterdir()) if output_dir.exists() else []
    if found:
        named = ", ".join(found[:6]) + (", …" if len(found) > 6 else "")
        raise ConfigError(f"output_dir must be new or empty, {output_dir} has {named}. Use another output_dir.")
    for above in output_dir.absolute().parents:
        if is_base(above):
            raise ConfigError(f"output_dir must not lie in the base {above}, got {output_dir}. Use another output_dir.")


def refuse_foreign(run: Path, epochs: int = 0) -> None:
    """Raises ConfigError if something in a run folder has a name that the run is to write, and is not the run's.

    `epochs` are those whose checkpoints will be written. Damaged files of a run may be written over: they begin right.
    """
    files = sorted(RUN_NAMES - {*_FOLDERS, "run.lock", "ctxtrain", "mlflow", "wandb"})
    odd = {run / name: kind for name in files if (kind := odd_kind(run / name))}
    faults = [f"{path} is {kind} and not the file that a run writes" for path, kind in odd.items()]
    folders = [run / name for name in _FOLDERS]
    faults += [f"{path} must be a folder, and it is none" for path in folders if path.exists() and not path.is_dir()]
    faults += [f"{path} is no file of an export" for path in _foreign_in(run / "export")]
    for name, (start, mark) in _MARKS.items():
        if not _begins(run / name, start, mark):
            faults.append(f"{run / name} is not what a run writes under that name")
    for path in (run / "checkpoints").glob("checkpoint_epoch_*.pt"):
        number = path.stem.rpartition("_")[2]
        if (kind := odd_kind(path)) and number.isdecimal() and int(number[:9]) <= epochs:
            faults.append(f"{path} is {kind}, and a checkpoint is to have that name")
    if not faults:
        faults = _foreign_page(run / "report.html")
    if faults:
        raise ConfigError([f"{fault}. Move it away." for fault in faults])


def refuse_foreign_page(page: Path) -> None:
    """Raises ConfigError if what is to become a report is anything else now."""
    if faults := _foreign_page(page):
        raise ConfigError([f"{fault}. Move it away." for fault in faults])


def refuse_foreign_runs(report: Path) -> None:
    """Raises ConfigError if what is to become a `runs.json` is anything else now."""
    kind = odd_kind(report)
    content = read_regular(report) if not kind and report.exists() else b""
    if kind or (content and not re.match(rb'\s*{\s*"runs"', content)):
        raise ConfigError(f"{report} is {kind or 'not what several runs write under that name'}. Move it away.")


def _foreign_page(page: Path) -> list[str]:
    if kind := odd_kind(page):
        return [f"{page} is {kind} and not the file that a run writes"]
    content = read_regular(page) if page.exists() else b""
    return [f"{page} is not a report of a run"] if content and PAGE_MARK not in content else []


def _foreign_in(export: Path) -> list[Path]:
    if not export.is_dir():
        return []
    found = (path for path in sorted(export.rglob("*")) if not path.is_dir() or path.is_symlink())
    return [path for path in found if path.relative_to(export).as_posix() not in FILES or odd_kind(path)]


def _begins(path: Path, start: int, mark: bytes) -> bool:
    """Whether a file has the mark, or is empty, missing or no regular file (which is told elsewhere)."""
    if odd_kind(path) or not path.exists():
        return True
    with open_regular(path) as stream:
        head = stream.read(start + len(mark))
    return not head or head[start:] == mark


def _parts_of(model: Path) -> Iterator[Path]:
    """Every file and folder of a model: below it, of the run that it lies in, and of what that run was made from."""
    ways = ways_to(model)
    above = [folder for place in ways for folder in (place, *list(place.parents)[:2])]
    runs = dict.fromkeys(folder for folder in above if folder.is_dir() and is_run(folder))
    for run in runs:
        for path in run.iterdir():
            if path.name in RUN_NAMES:
                yield from _below(path)
    for export in (folder for place in ways for folder in (place, place / "export") if is_export(folder)):
        yield from _below(export)
    for run in runs:
        yield from _inputs_of(run)


def _below(path: Path) -> Iterator[Path]:
    """A file or a folder, and all that is in it, also where a link leads to another folder."""
    seen = set[str]()
    waiting = [path]
    while waiting:
        found = waiting.pop()
        yield found
        if found.is_dir() and (real := os.path.realpath(found)) not in seen:
            seen.add(real)
            waiting += found.iterdir()


def _inputs_of(run: Path) -> Iterator[Path]:
    """The rows that a run's config names, and the files of its base."""
    try:
        config = load_yaml(run / "config.yaml")
        rows = [Path(config["data"][name]) for name in SPLITS if config["data"].get(name)]
        base = Path(config["model"]["base"])
    except (ConfigError, KeyError, TypeError, AttributeError, OSError):  # of a damaged config; whoever reads it tells
        return
    yield from rows
    if base.is_dir():
        yield from base.iterdir()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _standard_input() -> tuple[int, int] | None:
    """Of the file that is piped in, if it is one."""
    try:
        found = os.fstat(0)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None
