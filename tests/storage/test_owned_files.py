"""What is written is never what is read nor anyone else's, and what is read back is held to its schema.

One tiny run, made once, is copied for each test that damages it.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from ctxtrain import TrainingPipeline, load_model
from ctxtrain.cli.process import main
from ctxtrain.config.schema import Config
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.storage import checkpoint
from ctxtrain.storage.atomic_files import append_checksum, sha256_file
from ctxtrain.storage.checkpoint import CheckpointFolder
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import short_run
from tests.helpers import learnable_rows, without_progress, write_rows

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]
SECONDS = 60  # until a process that waits for ever is given up
SETTINGS = ("training.epochs=2", "model.max_tokens=64", "checkpoints.keep=2")


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tiny_rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two epochs of seven steps, both checkpoints kept."""
    config = short_run(tiny_base, tiny_rows, tmp_path_factory.mktemp("owned") / "run", *SETTINGS)
    TrainingPipeline(config).run()
    return config


@pytest.fixture
def run(finished: Config, tmp_path: Path) -> Path:
    """A copy of the run, with a config that trains it on."""
    root = Path(shutil.copytree(finished.output_dir, tmp_path / "run"))
    config = Config.load(root / "config.yaml", [f"output_dir={root}"])
    (root / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return root


def unfinished(run: Path) -> None:
    """As if the run had been killed after its last checkpoint."""
    for name in ("export", "final_model.zip", "best_model.safetensors", "training_summary.json", "report.html"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def ends(capsys: Capture, *words: object) -> tuple[object, str]:
    """Exit code of a command in this process, and stderr less the lines that say what it is doing."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "internal fault" not in err
    return end.value.code, without_progress(err)


def resumed(capsys: Capture, run: Path) -> tuple[object, str]:
    return ends(capsys, "train", run.parent / "config.yaml", "--resume", "--json")


def state(folder: Path) -> dict[str, object]:
    """Every name below a folder with its content, times and links aside."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) if path.is_file() else os.lstat(path).st_mode
        for path in sorted(folder.rglob("*"))
        if path.name != "run.lock"
    }


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    before = [state(folder) for folder in folders]
    yield
    assert [state(folder) for folder in folders] == before


# What is written is never what is read


@pytest.mark.promise("C6")
def test_predictions_go_into_no_file_of_the_model_or_its_run(run: Path, capsys: Capture, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", learnable_rows(2, seed=9))
    (tmp_path / "hard.jsonl").hardlink_to(run / "export" / "model.safetensors")
    (tmp_path / "soft.jsonl").symlink_to(run / "checkpoints" / "checkpoint_epoch_1.pt")
    (tmp_path / "rows_link.jsonl").hardlink_to(rows)
    below = [path for path in run.rglob("*") if path.is_file()]
    assert len(below) > 15
    new = [run / "export" / "new.jsonl", run / "checkpoints" / "checkpoint_epoch_9.pt", run / "tracking.json"]
    linked = [tmp_path / name for name in ("hard.jsonl", "soft.jsonl", "rows_link.jsonl")]
    with unchanged(tmp_path):
        for model in (run, run / "export", run / "final_model.zip"):
            for target in [*below, *new, *linked]:
                code, err = ends(capsys, "predict", model, rows, "-o", target)
                assert code == 2, (model, target)
                assert err.startswith("error: output must not be "), err
                assert err.endswith("Give another path.\n")


@pytest.mark.promise("C6")
def test_predictions_go_into_nothing_of_another_run_or_base_nor_over_what_is_piped_in(
    run: Path, finished: Config, capsys: Capture, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", learnable_rows(2, seed=9))
    theirs = [Path(finished.output_dir) / "config.yaml", Path(finished.model.base) / "model.safetensors"]
    mine = [Path(finished.data.train or ""), Path(finished.data.val or "")]  # rows that the run's config names
    for target in (*theirs, *mine):
        with unchanged(target.parent):
            assert ends(capsys, "predict", run, rows, "-o", target)[0] == 2, target
    command = [sys.executable, "-m", "ctxtrain", "predict", str(run), "-", "-o", str(rows)]
    with rows.open("rb") as stream, unchanged(tmp_path):
        done = subprocess.run(command, stdin=stream, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: output must not be an input, got {rows} for both. Give another path.\n",
    )


def refused(capsys: Capture, model: Path, rows: Path, target: Path) -> str:
    """The message of a prediction that may not go to a place."""
    code, err = ends(capsys, "predict", model, rows, "-o", target)
    assert (code, err.startswith("error: ")) == (2, True), (target, err)
    return err


@pytest.mark.promise("C6")
def test_predictions_go_nowhere_that_a_linked_part_of_a_run_leads_to(
    run: Path, capsys: Capture, tmp_path: Path
) -> None:
    rows, other = write_rows(tmp_path / "rows.jsonl", learnable_rows(2, seed=9)), tmp_path / "other_disk"
    other.mkdir()
    for name in ("checkpoints", "export"):
        (run / name).rename(other / name)
        (run / name).symlink_to(Path("..") / "other_disk" / name)
    for name in ("metrics.jsonl", "final_model.zip"):
        (run / name).rename(other / name)
        (run / name).symlink_to(other / name)
    (other / "checkpoints" / "deep").mkdir()
    (tmp_path / "link").symlink_to(run / "checkpoints" / "checkpoint_epoch_1.pt")
    (tmp_path / "checks").symlink_to(run / "checkpoints")
    places = [
        *(run / "checkpoints" / name for name in ("checkpoint_epoch_1.pt", "checkpoint_epoch_9.pt", "deep/new")),
        *(other / "checkpoints" / name for name in ("checkpoint_epoch_1.pt", "checkpoint_epoch_9.pt", "deep/new")),
        *(folder / "export" / "new.jsonl" for folder in (run, other)),
        *(folder / name for folder in (run, other) for name in ("metrics.jsonl", "final_model.zip")),
        *(tmp_path / "link", tmp_path / "checks" / "checkpoint_epoch_2.pt", run / "export" / ".." / "export" / "x"),
    ]
    with unchanged(tmp_path):
        for place in places:
            for model in (run, run / "final_model.zip"):
                refused(capsys, model, rows, place)
    assert ends(capsys, "predict", run, rows, "-o", other / "mine.jsonl")[0] == 0


@pytest.mark.promise("C6")
def test_predictions_go_into_no_base_that_is_made_of_links(
    run: Path, tiny_base: Path, capsys: Capture, tmp_path: Path
) -> None:
    """As the cache of the hub lays it out: a snapshot of links to files whose names are digests."""
    rows, blobs = write_rows(tmp_path / "rows.jsonl", learnable_rows(2, seed=9)), tmp_path / "blobs"
    base = tmp_path / "snapshot"
    base.mkdir()
    for number, path in enumerate(Path(shutil.copytree(tiny_base, blobs)).iterdir()):
        (base / path.name).symlink_to(path.rename(blobs / str(number)))
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_text("a model")
    changed = Config.load(run / "config.yaml", [f"model.base={base}"])
    (run / "config.yaml").write_text(changed.to_yaml())
    places = [base / name for name in ("config.json", "model.safetensors", "added_tokens.json", "onnx/model.onnx")]
    with unchanged(tmp_path):
        for place in (*places, blobs / "0", blobs / "1"):
            refused(capsys, run, rows, place)


@pytest.mark.promise("C6")
def test_a_place_for_predictions_that_cannot_be_is_refused_before_anything_is_read(
    capsys: Capture, tmp_path: Path
) -> None:
    """There is neither model nor data: whoever looks for them first ends with another message."""
    model, rows = tmp_path / "none.zip", tmp_path / "none.jsonl"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "lost").symlink_to(tmp_path / "no_folder" / "out.jsonl")
    for name in ("a", "self", "a/out.jsonl"):
        assert "the links of" in refused(capsys, model, rows, tmp_path / name)
    for name in ("lost", "no_folder/out.jsonl"):
        assert f"there is no folder {tmp_path}/no_folder" in refused(capsys, model, rows, tmp_path / name)
    code, err = ends(capsys, "predict", model, rows, "-o", tmp_path / ("x" * 250))  # no room for a scratch name
    assert (code, "File name too long" in err) == (74, True), err
    for command in (("sample", tmp_path / "a"), ("pretrain", pretrain_file(tmp_path, output_dir=str(tmp_path / "a")))):
        code, err = ends(capsys, *command)
        assert (code, "the links of" in err) == (2, True), err
    assert ends(capsys, "predict", model, rows, "-o", tmp_path / "out.jsonl")[1].startswith(f"error: {model}: no such")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.promise("C6")
def test_predictions_go_over_no_file_of_a_sample(run: Path, capsys: Capture, tmp_path: Path) -> None:
    rows, folder = write_rows(tmp_path / "rows.jsonl", learnable_rows(2, seed=9)), tmp_path / "sample"
    words = ("sample", folder, "--train", 4, "--val", 2, "--test", 2)
    assert ends(capsys, *words)[0] == 0
    (folder / "val.jsonl").unlink()
    with unchanged(tmp_path):
        for name in ("sample.json", "train.jsonl", "val.jsonl", "test.jsonl"):
            assert f"belongs to the sample {folder}" in refused(capsys, run, rows, folder / name)
    assert ends(capsys, "predict", run, rows, "-o", folder / "predictions.jsonl")[0] == 0
    assert ends(capsys, *words)[0] == 0


@pytest.mark.promise("C6")
def test_a_report_that_is_written_again_is_for_its_owner_alone(run: Path, capsys: Capture) -> None:
    before = os.umask(0o022)
    try:
        for remove in (False, True):
            (run / "report.html").chmod(0o644)
            if remove:
                (run / "report.html").unlink()
            assert ends(capsys, "report", run)[0] == 0
            assert (run / "report.html").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_predictions_beside_the_run_s_own_files_are_written_and_written_again(
    run: Path, capsys: Capture, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", learnable_rows(2, seed=9))
    for _ in range(2):
        assert ends(capsys, "predict", run / "final_model.zip", rows, "-o", run / "mine.jsonl")[0] == 0
    assert len((run / "mine.jsonl").read_text().splitlines()) == 2


def pretrain_file(tmp_path: Path, **keys: object) -> Path:
    tiny = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate": 16}
    path = tmp_path / "pretrain.yaml"
    path.write_text(json.dumps({"steps": 0, "batch_size": 2, "architecture": tiny} | keys))
    return path


@pytest.mark.promise("C6")
def test_pretrain_writes_into_a_new_or_empty_folder_alone(
    tiny_base: Path, tiny_rows: dict[str, str], run: Path, capsys: Capture, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    rows = Path(shutil.copy(tiny_rows["train"], tmp_path / "rows.jsonl"))
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("mine")
    for place in (base, base / "inside", own, rows, rows / "below", run, run / "export" / "new", tmp_path):
        for keys in ({}, {"base": str(base), "data": [str(rows)]}):
            config = pretrain_file(tmp_path, output_dir=str(place), **keys)
            with unchanged(tmp_path):
                code, err = ends(capsys, "pretrain", config)
            assert code == 2, (place, err)
            assert err.startswith("error: output_dir must "), err
            assert err.endswith("Use another output_dir.\n")


@pytest.mark.parametrize("inside", [".", "sub/run"])
@pytest.mark.promise("C6")
def test_a_run_does_not_lie_in_its_base(
    inside: str, tiny_base: Path, tiny_rows: dict[str, str], capsys: Capture, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (tmp_path / "link").symlink_to(base)
    for named in (base, tmp_path / "link"):
        config = short_run(base, tiny_rows, named / inside, *SETTINGS)
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        for more in ([], ["training.seeds=[0,1]"]):
            with unchanged(base):
                code, err = ends(capsys, "train", tmp_path / "config.yaml", *more)
            assert (code, "output_dir must not lie in the base" in err) == (2, True), err


def test_a_run_does_not_write_over_the_base_that_it_exported(run: Path, capsys: Capture) -> None:
    with unchanged(run):
        code, err = ends(capsys, "train", run.parent / "config.yaml", f"model.base={run}/export", "--resume")
    assert (code, "the run must not overwrite its base" in err) == (2, True), err


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl", "sample.json"])
@pytest.mark.parametrize("how", ["content", "folder", "pipe", "link"])
@pytest.mark.promise("C6")
def test_a_sample_writes_over_nothing_but_itself(name: str, how: str, capsys: Capture, tmp_path: Path) -> None:
    folder, mine = tmp_path / "sample", tmp_path / "mine.jsonl"
    words = ("sample", folder, "--train", 4, "--val", 2, "--test", 2)
    assert ends(capsys, *words)[0] == 0
    mine.write_text("mine")
    (folder / name).unlink()
    {
        "content": lambda path: path.write_text("mine"),
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to(mine),
    }[how](folder / name)
    with unchanged(tmp_path):
        code, err = ends(capsys, *words)
    assert code == 2, err
    assert name in err
    assert "Use another folder." in err


def test_a_damaged_sample_json_is_named_and_a_sample_in_a_run_or_export_refused(
    run: Path, capsys: Capture, tmp_path: Path
) -> None:
    folder = tmp_path / "sample"
    words = ("sample", folder, "--train", 4, "--val", 2, "--test", 2)
    assert ends(capsys, *words)[0] == 0
    whole = (folder / "sample.json").read_text()
    cut = json.dumps(json.loads(whole) | {"files": {"train": 5}})
    for content, said in ((whole[:-9], "not valid JSON"), (cut, "files.train must be a valid dictionary")):
        (folder / "sample.json").write_text(content)
        with unchanged(tmp_path):
            code, err = ends(capsys, *words)
        assert (code, f"{folder}/sample.json" in err, said in err) == (65, True, True), err
    for place in (run / "export", run / "checkpoints" / "new"):
        code, err = ends(capsys, "sample", place)
        assert (code, err.startswith("error: folder must not be inside the ")) == (2, True), err


FOREIGN = ("final_model.zip", "best_model.safetensors", "report.html", "export/notes.txt")


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.promise("C6")
def test_an_export_writes_over_no_file_of_anyone_else(name: str, run: Path, capsys: Capture) -> None:
    (run / name).write_text("mine, and no file of a run")
    commands = [("export", run), ("train", run.parent / "config.yaml", "--resume")]
    for words in commands + ([("report", run)] if name == "report.html" else []):
        with unchanged(run):
            code, err = ends(capsys, *words)
        assert (code, f"error: {run}/{name} is " in err) == (2, True), err
        assert err.endswith("Move it away.\n")


def test_damaged_files_of_the_run_itself_are_exported_anew(run: Path, capsys: Capture) -> None:
    for name in ("final_model.zip", "best_model.safetensors", "training_summary.json", "export/model.safetensors"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
    assert ends(capsys, "export", run)[0] == 0
    assert ends(capsys, "report", run)[0] == 0


# History is never lost or doubled in silence


def lines_of(run: Path) -> list[bytes]:
    return (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def flipped(run: Path, line: int, place: int) -> None:
    lines = lines_of(run)
    damaged = bytearray(lines[line])
    damaged[place] ^= 1
    lines[line] = bytes(damaged)
    (run / "metrics.jsonl").write_bytes(b"".join(lines))


HISTORIES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in a key": lambda run: flipped(run, 0, 3),
    "a flipped bit in a figure": lambda run: flipped(run, 0, lines_of(run)[0].index(b'"loss":') + 11),
    "a flipped bit in a later line": lambda run: flipped(run, 9, 20),
    "doubled": lambda run: (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run) * 2)),
    "one line twice": lambda run: (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run)[:3] + lines_of(run)[2:])),
    "an epoch twice": lambda run: (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run)[:8] + lines_of(run)[7:])),
    "cut in its middle": lambda run: (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run)[:5])),
    "without a line": lambda run: (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run)[:3] + lines_of(run)[4:])),
    "without its first lines": lambda run: (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run)[3:])),
    "of another": lambda run: (run / "metrics.jsonl").write_bytes(b'5\n{}\n{"kind":"step","step":"1"}\n'),
}


@pytest.mark.parametrize("how", HISTORIES)
@pytest.mark.promise("B8")
def test_a_history_that_is_not_the_run_s_is_refused_and_nothing_changes(how: str, run: Path, capsys: Capture) -> None:
    unfinished(run)
    HISTORIES[how](run)
    with unchanged(run):
        code, err = resumed(capsys, run)
    assert (code, f"error: {run}/metrics.jsonl:" in err) == (65, True), err
    assert "or move it away to resume without the earlier lines" in err


@pytest.mark.promise("B8")
def test_a_history_that_was_moved_away_is_counted_as_lost_and_a_cut_line_is_no_loss(
    run: Path, finished: Config, capsys: Capture
) -> None:
    for name in ("checkpoint_epoch_2.pt",):
        (run / "checkpoints" / name).unlink()
    unfinished(run)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-10])
    code, err = resumed(capsys, run)
    assert code == 0, err
    assert f"note: {run}/metrics.jsonl: 7 lines after optimizer step 7 dropped; they are written again\n" in err
    assert (run / "metrics.jsonl").read_bytes() == whole
    (run / "metrics.jsonl").unlink()
    for _ in range(2):  # the second knows that the lines before are gone
        (run / "checkpoints" / "checkpoint_epoch_2.pt").unlink()
        unfinished(run)
        code, err = resumed(capsys, run)
        assert code == 0, err
        assert [json.loads(line)["step"] for line in lines_of(run)] == [*range(8, 15), 14]
    assert f"note: {run}/metrics.jsonl: lacks the lines of 7 optimizer steps up to step 7\n" in err
    said = f"note: {run}/metrics.jsonl lacks 7 of 14 optimizer steps, and so do the curves\n"
    assert ends(capsys, "report", run) == (0, said)


@pytest.mark.parametrize("line", ["5", "{}", '{"kind": "step", "step": "1"}', '{"kind": "odd"}', "[]", '{"a', "\0"])
@pytest.mark.promise("F9")
def test_a_report_names_the_line_of_a_history_that_is_wrong(line: str, run: Path, capsys: Capture) -> None:
    lines = lines_of(run)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:2], line.encode() + b"\n", *lines[2:]]))
    with unchanged(run):
        code, err = ends(capsys, "report", run)
    assert (code, f"error: {run}/metrics.jsonl:3:" in err) == (65, True), err


@pytest.mark.parametrize("key", ["loss", "learning_rate", "step", "epoch", "windows", "grad_norm"])
@pytest.mark.parametrize("value", [None, "1", [], True])
def test_a_report_names_the_key_of_a_step_that_is_wrong(key: str, value: object, run: Path, capsys: Capture) -> None:
    lines = lines_of(run)
    lines[1] = orjson.dumps(orjson.loads(lines[1]) | {key: value}) + b"\n"
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    code, err = ends(capsys, "report", run)
    assert code == 65
    assert f"error: {run}/metrics.jsonl:2: step.{key} must be " in err, err


# Every parsed file has a schema


def places(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every key of a nested object, and of the first member of every list."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from places(value, (*path, key))
    elif isinstance(tree, list) and tree:
        yield (*path, 0)
        yield from places(tree[0], (*path, 0))


def changed(tree: Any, path: tuple[str | int, ...], *value: Any) -> Any:
    """A copy with another value at a place, or without it."""
    copy = orjson.loads(orjson.dumps(tree))
    node = copy
    for part in path[:-1]:
        node = node[part]
    if value:
        node[path[-1]] = value[0]
    else:
        del node[path[-1]]
    return copy


def faults_of(folder: RunFolder) -> list[str]:
    try:
        folder.read_summary()
    except DataError as error:
        return error.faults
    return []


@pytest.mark.promise("F9")
def test_a_report_on_a_summary_with_any_key_gone_or_of_another_type_is_written_or_names_it(
    run: Path, capsys: Capture
) -> None:
    folder = RunFolder(run)
    summary = orjson.loads(folder.summary.read_bytes())
    found = [path for path in places(summary) if len(path) <= 5]
    assert len(found) > 200
    values: list[tuple[Any, ...]] = [(), (None,), ("x",), ({},)]
    written = []
    for n, path in enumerate(found):
        content = orjson.dumps(changed(summary, path, *values[n % 4]))
        folder.summary.write_bytes(content)
        faults = faults_of(folder)
        assert all(fault.startswith(f"{folder.summary}: ") for fault in faults)
        if faults:
            assert any(str(part) in faults[0] for part in path), (path, faults)
        else:
            written.append(content)
    assert len(written) < len(found) / 2
    for content in written[:: max(1, len(written) // 10)]:  # what is let through makes a page
        folder.summary.write_bytes(content)
        assert ends(capsys, "report", run) == (0, "")
    for key in summary:
        folder.summary.write_bytes(orjson.dumps(changed(summary, (key,))))
        code, err = ends(capsys, "report", run)
        assert (code, f"but it lacks {key}. Run ctxtrain export {run}" in err) == (65, True), err


def resealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    payload = torch.load(path, weights_only=True)
    change(payload)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    append_checksum(buffer)
    path.write_bytes(buffer.getvalue())


def at(*keys: Any) -> Callable[[dict[str, Any]], Any]:
    def find(tree: Any) -> Any:
        for key in keys:
            tree = tree[key]
        return tree

    return find


OPTIMIZER, SCHEDULE = at("learner", "optimizer"), at("learner", "schedule")
PARTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an extra part": lambda p: p.update(more=1),
    "an extra key of the state": lambda p: p["state"].update(more=1),
    "a step of text": lambda p: p["state"].update(step="14"),
    "a step before its epochs": lambda p: (p["state"].update(step=3), SCHEDULE(p).update(last_epoch=3)),
    "epochs of text": lambda p: p["state"].update(epochs="two"),
    "an epoch without scores": lambda p: p["state"]["epochs"][0].pop("per_class"),
    "an epoch of another length": lambda p: p["state"]["epochs"][0].update(step=6),
    "no learner": lambda p: p.pop("learner"),
    "a learner of text": lambda p: p.update(learner="x"),
    "no weights": lambda p: p["learner"].pop("weights"),
    "a weight of another shape": lambda p: at("learner", "weights")(p).update(
        {next(iter(at("learner", "weights")(p))): torch.zeros(3)}
    ),
    "a weight that is a number": lambda p: at("learner", "weights")(p).update(
        {next(iter(at("learner", "weights")(p))): 1}
    ),
    "other names": lambda p: p["learner"]["optimizer_names"].append("x"),
    "no moments": lambda p: OPTIMIZER(p).pop("state"),
    "moments of another shape": lambda p: OPTIMIZER(p)["state"][0].update(exp_avg=torch.zeros(2)),
    "moments without a step": lambda p: OPTIMIZER(p)["state"][0].pop("step"),
    "moments of a weight too many": lambda p: OPTIMIZER(p)["state"].update({999: OPTIMIZER(p)["state"][0]}),
    "another weight decay": lambda p: OPTIMIZER(p)["param_groups"][0].update(weight_decay=0.5),
    "betas of text": lambda p: OPTIMIZER(p)["param_groups"][0].update(betas="x"),
    "a schedule elsewhere": lambda p: SCHEDULE(p).update(last_epoch=3),
    "a schedule with more": lambda p: SCHEDULE(p).update(step=5),
    "a fingerprint of text": lambda p: p.update(fingerprint="x"),
    "an environment of lists": lambda p: p.update(environment={"torch": []}),
}


@pytest.mark.parametrize("how", PARTS)
@pytest.mark.promise("F9")
def test_a_checkpoint_with_a_part_too_many_or_wrong_is_refused_and_nothing_changes(
    how: str, run: Path, capsys: Capture
) -> None:
    unfinished(run)
    newest = run / "checkpoints" / "checkpoint_epoch_2.pt"
    resealed(newest, PARTS[how])
    with unchanged(run):
        code, err = resumed(capsys, run)
    assert (code, f"error: {newest}" in err) == (65, True), err
    assert "Move it away to resume from the previous one.\n" in err


def test_the_checkpoint_of_the_best_epoch_is_held_to_the_same(run: Path, capsys: Capture) -> None:
    best = orjson.loads((run / "training_summary.json").read_bytes())["best"]["epoch"]
    unfinished(run)
    if best == 2:  # the newest shall not be the best: its epochs are told otherwise
        pytest.fail("the fixture's best epoch must be the first")
    resealed(run / "checkpoints" / f"checkpoint_epoch_{best}.pt", PARTS["a weight that is a number"])
    with unchanged(run):
        code, err = resumed(capsys, run)
    assert (code, f"checkpoint_epoch_{best}.pt: learner.weights." in err) == (65, True), err


CONFIGS = [
    b"\xff\xfe",
    b"data: [",
    b"5",
    b"",
    b"data: {train: 1}",
    b"data: {train: a, val: b}\noutput_dir: x\nmore: 1\n",
]


@pytest.mark.parametrize("content", CONFIGS)
@pytest.mark.promise("F9")
def test_a_config_of_a_run_that_is_damaged_is_named(content: bytes, run: Path, capsys: Capture) -> None:
    (run / "config.yaml").write_bytes(content)
    with unchanged(run):
        code, err = ends(capsys, "export", run)
    assert (code, err.startswith(f"error: {run}/config.yaml")) == (65, True), err


CALIBRATIONS = [
    {}, {"temperature": "1"}, {"temperature": 1e-320}, {"temperature": None}, {"temperature": 1e300}, [],
    {"temperature": 1, "thresholds": {"HOLD": {"min_confidence": 0.5}}},
    {"temperature": 1, "thresholds": {"LONG": {}}}, {"temperature": 1, "thresholds": {"LONG": {"min_confidence": 2}}},
]  # fmt: skip


@pytest.mark.parametrize("value", CALIBRATIONS, ids=str)
@pytest.mark.promise("F9")
def test_a_calibration_or_manifest_that_is_wrong_is_named_with_its_key(
    value: object, run: Path, capsys: Capture, tiny_rows: dict[str, str]
) -> None:
    export = run / "export"
    (export / "calibration.json").write_text(json.dumps(value))
    manifest = json.loads((export / "manifest.json").read_text())
    manifest["files"]["calibration.json"]["sha256"] = sha256_file(export / "calibration.json")
    (export / "manifest.json").write_text(json.dumps(manifest))
    code, err = ends(capsys, "evaluate", export, tiny_rows["val"])
    assert (code, f"error: {export}/calibration.json: " in err) == (65, True), err
    manifest["files"]["calibration.json"] = {"sha256": 5}
    (export / "manifest.json").write_text(json.dumps(manifest))
    code, err = ends(capsys, "evaluate", export, tiny_rows["val"])
    assert (code, f"{export}/manifest.json: files.calibration.json.sha256 must be" in err) == (65, True), err


def export_with(run: Path, name: str, place: tuple[str | int, ...], value: object) -> Path:
    """The run's export with another value in one of its JSON files, and a manifest that fits it."""
    path = run / "export" / name
    path.write_bytes(orjson.dumps(changed(orjson.loads(path.read_bytes()), place, value)))
    manifest = orjson.loads((run / "export" / "manifest.json").read_bytes())
    manifest["files"][name]["sha256"] = sha256_file(path)
    (run / "export" / "manifest.json").write_bytes(orjson.dumps(manifest))
    return run / "export"


SCALE: dict[str, object] = {"centre": 0.0, "spread": 1.0}
WRONG_VALUES: list[tuple[str, str, object]] = [
    *(("codec.json", "features", {"a": SCALE | {"spread": spread}}) for spread in (0, 0.0, -1.0, 1e300, "1", None)),
    *(("codec.json", "features", {"a": SCALE | {"centre": centre}}) for centre in (1e16, -1e300, "0", True)),
    *(("codec.json", "fields", fields) for fields in (["openness"], ["open", "open"], "open", [1])),
    *(("codec.json", "version", version) for version in (0, 2, "1")),
    *(("config.json", "pad_token_id", pad) for pad in (-5, -1, 10**6, None, 1, "x")),
    *(("config.json", "vocab_size", size) for size in (0, -1, 7)),
    *(("tokenizer_config.json", "model_max_length", longest) for longest in (0, -1, 2**40, 1.5)),
]


@pytest.mark.parametrize(("name", "key", "value"), WRONG_VALUES)
@pytest.mark.promise("F9")
def test_an_export_of_sound_digests_and_wrong_values_is_refused_when_it_is_opened(
    name: str, key: str, value: object, run: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(str(run / "export"))):
        load_model(export_with(run, name, (key,), value))


# A pipe, a socket, a device or a folder where a file is expected


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        folder = os.open(path.parent, os.O_RDONLY)  # a socket's path has 100 characters at most
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": make_pipe,
    "socket": make_socket,
    "device": make_device,
    "folder": Path.mkdir,
}


def in_time(capsys: Capture, *words: object) -> tuple[object, str]:
    """As `ends`, of a command that must not wait: opening a pipe is given up after a while."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"{words} waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        return ends(capsys, *words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.promise("F8")
def test_what_only_has_a_checkpoint_s_name_is_passed_over_with_a_note(kind: str, run: Path) -> None:
    odd = run / "checkpoints" / "checkpoint_epoch_77.pt"
    ODD[kind](odd)
    said: list[str] = []
    found = CheckpointFolder(run / "checkpoints", 2).find_resume_point(7, said.append)
    assert found == run / "checkpoints" / "checkpoint_epoch_2.pt"
    (note,) = said
    assert note.startswith(f"note: {odd} is skipped: it is a {kind if kind != 'pipe' else 'named pipe'}, not a file.")
    assert odd.exists()


def test_a_run_goes_on_past_a_pipe_and_a_folder_of_a_checkpoint_s_name(
    run: Path, finished: Config, capsys: Capture
) -> None:
    make_pipe(run / "checkpoints" / "checkpoint_epoch_77.pt")
    (run / "checkpoints" / "checkpoint_step_99.pt").mkdir()
    unfinished(run)
    code, err = in_time(capsys, "train", run.parent / "config.yaml", "--resume", "--json")
    assert code == 0, err
    assert err.count("is skipped: it is") == 2
    assert sha256_file(run / "final_model.zip") == sha256_file(Path(finished.output_dir) / "final_model.zip")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "training_summary.json", "report.html"])
@pytest.mark.promise("F8")
def test_a_file_of_a_run_that_is_none_is_refused_and_nothing_changes(name: str, run: Path, capsys: Capture) -> None:
    commands = [("train", run.parent / "config.yaml", "--resume"), ("export", run), ("report", run)]
    kept = (run / name).rename(run.parent / "kept")
    for make in ODD.values():
        make(run / name)
        for words in commands:
            with unchanged(run):
                code, err = in_time(capsys, *words)
            assert code in (2, 65), (words, err)
            assert f"{run}/{name}" in err
        (run / name).rmdir() if (run / name).is_dir() else (run / name).unlink()
    assert kept.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "calibration.json", "manifest.json", "added_tokens.json"])
@pytest.mark.promise("F8")
def test_a_file_of_an_export_that_is_none_is_refused(
    name: str, run: Path, tiny_rows: dict[str, str], capsys: Capture
) -> None:
    export = run / "export"
    (export / name).unlink(missing_ok=True)
    for make in (make_pipe, make_socket, make_device):
        make(export / name)
        code, err = in_time(capsys, "evaluate", export, tiny_rows["val"])
        assert (code, f"{export}/{name}" in err) == (65, True), err
        (export / name).unlink()


@pytest.mark.promise("F8")
def test_a_pipe_in_the_folder_of_a_base_is_refused(run: Path, tiny_base: Path, capsys: Capture, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    for name in ("special_tokens_map.json", "model.safetensors", "config.json", "tokenizer.json"):
        (base / name).unlink(missing_ok=True)
        make_pipe(base / name)
        words = (tmp_path / "config.yaml", f"model.base={base}", f"output_dir={tmp_path}/other")
        code, err = in_time(capsys, "train", *words)
        assert code == 65, err
        assert f"{base}/{name}: must be a regular file, got a named pipe." in err
        if name != "tokenizer.json":
            (base / name).unlink()
    code, err = in_time(capsys, "check", Config.load(run / "config.yaml").data.train, "--base", base)
    assert (code, f"{base}/tokenizer.json: must be a regular file, got a named pipe." in err) == (65, True)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.promise("F8")
def test_a_config_that_is_no_file_is_refused(kind: str, capsys: Capture, tmp_path: Path) -> None:
    ODD[kind](tmp_path / "config.yaml")
    for command in ("train", "pretrain"):
        code, err = ends(capsys, command, tmp_path / "config.yaml")
        assert code == 2
        assert err.startswith(f"error: {tmp_path}/config.yaml: a config must be a regular file, got a "), err


# A resume that cannot go on changes nothing


@pytest.mark.parametrize("how", ["checkpoints is a file", "a checkpoint to come is a folder", "other rows", "no epoch"])
@pytest.mark.promise("B9")
def test_a_resume_that_cannot_go_on_changes_nothing(
    how: str, run: Path, capsys: Capture, tiny_rows: dict[str, str]
) -> None:
    unfinished(run)
    words: tuple[object, ...] = ("train", run.parent / "config.yaml", "--resume")
    (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run)) + b'{"kind":"st')
    if how == "checkpoints is a file":
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("mine")
    elif how == "a checkpoint to come is a folder":
        (run / "checkpoints" / "checkpoint_epoch_2.pt").unlink()
        (run / "checkpoints" / "checkpoint_epoch_2.pt").mkdir()
    elif how == "no epoch":
        shutil.rmtree(run / "checkpoints")
        words = ("export", run)
    else:
        words += (f"data.train={tiny_rows['val']}", f"data.val={tiny_rows['train']}")
    with unchanged(run):
        code, err = ends(capsys, *words)
    assert code == 2, err


def test_the_python_door_refuses_as_the_command_does(run: Path, finished: Config) -> None:
    config = Config.load(run / "config.yaml")
    (run / "checkpoints" / "checkpoint_epoch_2.pt").rename(run / "checkpoints" / "kept.bin")
    (run / "metrics.jsonl").write_bytes(b"".join(lines_of(run) * 2))
    with pytest.raises(DataError, match="is a duplicate"):
        TrainingPipeline(config, resume=True).run()
    with pytest.raises(ConfigError, match="must not lie in the base"):
        TrainingPipeline(config.model_copy(update={"output_dir": finished.model.base})).run()
    assert checkpoint.load(run / "checkpoints" / "kept.bin")["state"]["step"] == 14
    assert RunFolder(run).summary.exists()


@pytest.mark.parametrize("version", [2, None])
def test_a_summary_of_another_version_is_refused_with_the_remedy(
    version: int | None, run: Path, capsys: Capture
) -> None:
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["version"] == 1
    (run / "training_summary.json").write_text(json.dumps(summary | {"version": version}))
    code, err = in_time(capsys, "report", run)
    assert code == 65
    assert "version must be 1, got" in err
    assert f"Run ctxtrain export {run} to write it again." in err
