"""B: what was finished stays, whatever happens to the disk; what is damaged is seen before it is used."""

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxtrain.errors import DataError
from ctxtrain.storage import checkpoint
from ctxtrain.storage.archive import pack, unpack
from ctxtrain.storage.atomic_files import DamagedFile, append_checksum, check_manifest, sha256_file
from ctxtrain.storage.checkpoint import CheckpointFolder
from ctxtrain.storage.metrics_log import MetricsLog
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import Amount, Needs
from tests.reliability.calls import Calls
from tests.reliability.conftest import Figure, NewTrial
from tests.reliability.harness import SHARDS, Trial, points_of, results, same
from tests.reliability.power import Recorded

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_format_1.pt"
FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE)
PER_EPOCH = 6


def payload(step: int, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """A small checkpoint whose weights tell its step."""
    return {
        "state": {"step": step, "loss_sum": 0.0, "weight_sum": 0.0, "epochs": list(epochs)},
        "learner": {"weights": {"head": torch.full((64,), float(step))}},
        "fingerprint": {},
        "environment": {},
    }


def record(epoch: int, macro_f1: float, loss: float = 0.5) -> dict[str, Any]:
    return {"epoch": epoch, "macro_f1": macro_f1, "loss": loss}


def step_line(step: int, epoch: int = 1) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    figures = {"loss": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0, "windows": 8}
    return {"kind": "step", "step": step, "epoch": epoch, **figures}


def quiet(_: str) -> None:
    """For notes that a test does not read."""


def small_run(root: Path, seed: int, committed: Callable[[int], None]) -> None:
    """The writes of a run of four epochs in a run folder; tells when a checkpoint is committed."""
    luck, folder = random.Random(seed), RunFolder(root)
    epochs: list[dict[str, Any]] = []
    checkpoints = folder.checkpoints(keep=2)
    with folder.lock():
        folder.metrics.replace_lines(b"")
        for step in range(1, 4 * PER_EPOCH + 1):
            folder.metrics.append(step_line(step, (step - 1) // PER_EPOCH + 1))
            if step % 4 == 0 or step % PER_EPOCH == 0:
                folder.metrics.sync()
                if step % PER_EPOCH:
                    checkpoints.save_step(payload(step, epochs), step)
                else:
                    epochs.append(record(len(epochs) + 1, luck.random()))
                    checkpoints.save_epoch(payload(step, epochs), epochs)
                committed(step)


@pytest.mark.promise("B1")
def test_after_a_power_cut_the_newest_committed_checkpoint_is_there(
    tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    states = amount(200, 2000)
    disk = tmp_path / "disk"
    disk.mkdir()
    recorded = Recorded(disk)
    commits: list[tuple[int, int]] = [(0, 0)]
    with recorded.installed():
        small_run(disk / "run", 1, lambda step: commits.append((recorded.count, step)))
    luck = random.Random(0)
    for number in range(states):
        crashed = tmp_path / f"crash{number}"
        at = luck.randint(0, recorded.count)
        recorded.crash(at, luck, crashed)
        committed = max(step for count, step in commits if count <= at)
        run = RunFolder(crashed / "run")
        found = run.checkpoints(keep=2).find_resume_point(PER_EPOCH, quiet)
        assert (found is not None) >= (committed > 0), (at, committed)
        if found:
            saved = checkpoint.load(found)
            step = saved["state"]["step"]
            assert step >= committed
            assert saved["learner"]["weights"]["head"].tolist() == [float(step)] * 64
            lines, _ = run.metrics.lines_up_to(step=step, epoch=0)
            assert [json.loads(line)["step"] for line in lines.splitlines()] == list(range(1, step + 1))
        shutil.rmtree(crashed, ignore_errors=True)
    figure("B1", "{} states after a power cut, 0 lost", states)


@pytest.mark.promise("B1")
def test_a_run_flushes_its_metrics_before_each_checkpoint_that_counts_on_them(late_events: list[list[str]]) -> None:
    last, checkpoints = "", 0
    for kind, path in late_events:
        if path == "metrics.jsonl":
            last = kind
        if kind == "create" and path.startswith("checkpoints/"):
            assert last == "fsync"
            checkpoints += 1
    assert checkpoints == 2


@pytest.mark.promise("B1")
def test_a_name_that_is_not_flushed_is_seen_to_be_lost(tmp_path: Path) -> None:
    """The model of the disk can fail a program: without the flush of its folder, a new file vanishes at times."""
    recorded = Recorded(tmp_path)
    with recorded.installed(), (tmp_path / "file").open("wb") as stream:
        stream.write(b"content")
        stream.flush()
        os.fsync(stream.fileno())
    luck, found = random.Random(0), set()
    for number in range(50):
        recorded.crash(recorded.count, luck, tmp_path / f"crash{number}")
        found |= {(tmp_path / f"crash{number}" / "file").exists()}
    assert found == {True, False}


def damages(content: bytes, luck: random.Random, flips: int, cuts: int) -> Iterator[bytes]:
    """Copies with one bit turned, and copies that end too early."""
    for _ in range(flips):
        copy = bytearray(content)
        copy[luck.randrange(len(copy))] ^= 1 << luck.randrange(8)
        yield bytes(copy)
    for _ in range(cuts):
        yield content[: luck.randrange(len(content))]


@pytest.mark.promise("B2")
def test_every_flipped_bit_and_every_cut_is_seen(
    undisturbed: Trial, tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    luck, flips, cuts = random.Random(0), amount(40, 500), amount(10, 100)
    run = RunFolder(undisturbed.root)
    saved = run.root / "checkpoints" / "checkpoint_epoch_2.pt"
    for number, content in enumerate(damages(saved.read_bytes(), luck, flips, cuts)):
        path = tmp_path / f"checkpoint{number}.pt"
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=f"{path}: not a readable checkpoint"):
            checkpoint.load(path)
        path.unlink()
    ends = [run.zip.read_bytes()[:-71]]  # without the checksum, cut exactly where it starts
    for number, content in enumerate(chain(ends, damages(run.zip.read_bytes(), luck, flips, cuts))):
        path = tmp_path / f"model{number}.zip"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}: not a whole zip file"):
            unpack(path, tmp_path / "unpacked")
        assert not (tmp_path / "unpacked").exists()
        path.unlink()
    figure("B2", "{} flipped bits and {} cuts seen, of as many", 2 * flips, 2 * cuts + 1)


@pytest.mark.promise("B2")
def test_removed_and_swapped_files_are_named_and_the_previous_checkpoint_is_used(
    undisturbed: Trial, tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    count = amount(10, 50)
    for number in range(count):
        luck = random.Random(number)
        root = Path(shutil.copytree(undisturbed.root, tmp_path / f"run{number}"))
        folder = RunFolder(root).checkpoints(keep=2)
        newest, best, other = (root / "checkpoints" / f"checkpoint_epoch_{epoch}.pt" for epoch in (3, 2, 1))
        how = ["swap", "cut", "best", "export"][number % 4]
        said: list[str] = []
        if how == "export":
            files = sorted(path for path in (root / "export").rglob("*.json") if path.name != "manifest.json")
            one, two = luck.sample(files, 2)
            shutil.copy(one, two) if luck.random() < 0.5 else two.unlink()
            with pytest.raises(DataError, match=f"{two}: (changed|listed)"):
                check_manifest(root / "export")
        elif how == "best":
            best.unlink() if luck.random() < 0.5 else best.write_bytes(best.read_bytes()[:99])
            assert folder.find_resume_point(7, said.append) == other  # from there the best epoch is trained again
            assert sum(best.name in note for note in said) >= 1
        else:
            shutil.copy(other, newest) if how == "swap" else newest.write_bytes(b"")
            assert folder.find_resume_point(7, said.append) == best
            assert len(said) == 1
            assert f"{newest}: not a readable checkpoint" in said[0]
            assert said[0].endswith(f"Resuming from {best.name}, which is intact.")
        shutil.rmtree(root)
    figure("B2", "{} removed and swapped files named", count)


@pytest.mark.promise("B2")
@pytest.mark.parametrize("damaged", ["checkpoint_epoch_3.pt", "checkpoint_epoch_2.pt"])
def test_a_resume_past_damage_ends_with_the_same_bits(
    damaged: str, undisturbed: Trial, new_trial: NewTrial, expected: dict[str, Any]
) -> None:
    trial = new_trial("run")
    shutil.copytree(undisturbed.root, trial.root)
    path = trial.root / "checkpoints" / damaged
    path.write_bytes(path.read_bytes()[:-1])
    assert f"note: {path}: not a readable checkpoint" in trial.finish().said
    same(results(trial.root), expected)


@pytest.mark.promise("B2")
def test_where_no_checkpoint_is_whole_all_are_named_and_kept(undisturbed: Trial, new_trial: NewTrial) -> None:
    trial = new_trial("run")
    shutil.copytree(undisturbed.root, trial.root)
    paths = sorted((trial.root / "checkpoints").iterdir())
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    ended = trial.train().wait()
    assert ended.code == 65
    assert all(f"error: {path}: not a readable checkpoint" in ended.said for path in paths)
    assert "Delete them to start from the beginning." in ended.said
    assert sorted((trial.root / "checkpoints").iterdir()) == paths


def test_torch_and_zip_readers_open_sealed_files(undisturbed: Trial, tmp_path: Path) -> None:
    path = undisturbed.root / "checkpoints" / "checkpoint_epoch_2.pt"
    assert torch.load(path, weights_only=True)["state"]["step"] == 14
    subprocess.run([sys.executable, "-m", "zipfile", "-t", str(undisturbed.root / "final_model.zip")], check=True)


@pytest.mark.promise("B3")
def test_a_failure_of_any_call_costs_nothing_and_is_told(
    shard: int,
    late_trial: NewTrial,
    late_events: list[list[str]],
    expected: dict[str, Any],
    amount: Amount,
    figure: Figure,
) -> None:
    points = points_of(shard, amount(1, SHARDS), len(late_events), amount)
    for number, point in enumerate(points):
        trial, failure = late_trial(f"at{point}"), FAILURES[(shard + number) % len(FAILURES)]
        kind, path = late_events[point - 1]
        ended = trial.train(fail_at=point, failure=failure).wait()
        assert ended.code == 74 or (ended.code == 0 and tolerated(kind, path)), (kind, path, ended)
        if ended.code:
            last = ended.said.rpartition("error: ")[2]  # a progress bar of a library may stand before it
            assert str(trial.root) in last
            assert os.strerror(failure) in last
            if kind in ("create", "write", "half", "replace") and "run.lock" not in path:
                assert re.search(r"\([0-9,]+ bytes needed, [0-9,]+ free\)\. Make room", last), last
            assert CheckpointFolder(trial.root / "checkpoints", 2).find_resume_point(7, quiet)
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
    figure("B3", "{} calls failed", len(points))


def tolerated(kind: str, path: str) -> bool:
    """Tidying up may fail at the end, and a link may become a copy."""
    return (kind in ("unlink", "rmdir") and path.startswith((".export.", "run.owner"))) or kind == "link"


@pytest.mark.promise("B3")
def test_a_disk_that_is_full_or_read_only_costs_nothing(
    late: Trial, late_trial: NewTrial, expected: dict[str, Any], amount: Amount, needs: Needs, figure: Figure
) -> None:
    used = sum(path.stat().st_size for path in late.root.rglob("*") if path.is_file())
    needs(shutil.which("mount") is not None, "mount")
    sizes = random.Random(0).sample(range(used + 100_000, used + 5_500_000, 4096), amount(2, 12))
    stopped = 0
    for number, size in enumerate([0, *sizes]):
        trial = late_trial(f"disk{number}")
        after = trial.root.with_name(f"after{number}")
        mode = "small" if size else "read-only"
        words = [str(trial.config), str(trial.root), str(late.root), str(after), str(size), mode]
        child = trial.server.start(*words, root=trial.root, call="tests.reliability.small_disk:run_on")
        ended = child.wait()
        needs(ended.code != 77, "unshare and mount of a tmpfs")
        assert ended.code == 0, ended.said
        code = int(Path(f"{after}.code").read_text())
        assert code in (0, 74), ended.said
        assert mode == "small" or code == 74
        if code:
            stopped += 1
            assert ("No space left on device" if size else "Read-only file system") in ended.said
        same(results(after), expected)
    assert stopped
    figure("B3", "{} full disks, {} of them ended a run", len(sizes) + 1, stopped)


@pytest.mark.promise("B4")
def test_a_flush_that_fails_is_not_tried_again(tmp_path: Path, figure: Figure) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    folder.save_epoch(payload(7, [record(1, 0.4)]), [record(1, 0.4)])
    epochs = [record(1, 0.4), record(2, 0.6)]
    for failing, there in ((1, False), (2, True)):  # the flush of the file; that of the folder, after the rename
        seen: list[tuple[str, str]] = []

        def on_event(_: int, kind: str, path: str, seen: list[tuple[str, str]] = seen, failing: int = failing) -> None:
            seen.append((kind, path))
            if kind == "fsync" and sum(kind == "fsync" for kind, _ in seen) == failing:
                raise OSError(errno.EIO, "injected")

        with Calls(tmp_path, on_event).installed(), pytest.raises(OSError, match="injected"):
            folder.save_epoch(payload(14, epochs), epochs)
        flushed = [path for kind, path in seen if kind == "fsync"]
        assert len(flushed) == len(set(flushed)) == failing
        assert ("replace" in [kind for kind, _ in seen]) == there
        assert folder.epoch_path(2).exists() == there
        assert checkpoint.load(folder.epoch_path(1))["state"]["step"] == 7  # nothing is deleted for what may be lost
        assert not list(folder.folder.glob(".*"))
    figure("B4", "{} flushes failed, none repeated", 2)


class Crash(BaseException):
    """The end of a process, as far as its files are concerned."""


SCORES = st.sampled_from([0.0, 0.3, 0.3, 0.5, 0.9, float("nan")])
LOSSES = st.sampled_from([0.1, 0.5, 0.5, float("nan"), float("inf")])
ACTIONS = st.tuples(SCORES, LOSSES, st.sampled_from(["on", "on", "on", "restart", "crash"]), st.integers(1, 12))


def reference(epochs: list[dict[str, Any]], keep: int) -> set[str]:
    """The names that must be there: a plain selection sort, newest added."""
    left, kept = [entry for entry in epochs if entry["macro_f1"] == entry["macro_f1"]], {epochs[-1]["epoch"]}
    left = [entry for entry in left if entry["loss"] == entry["loss"]]
    for _ in range(min(keep, len(left))):
        best = left[0]
        for entry in left[1:]:
            higher = entry["macro_f1"] > best["macro_f1"]
            if higher or (entry["macro_f1"] == best["macro_f1"] and entry["loss"] < best["loss"]):
                best = entry
        kept.add(best["epoch"])
        left.remove(best)
    return {f"checkpoint_epoch_{epoch}.pt" for epoch in kept}


@pytest.mark.promise("B5")
def test_the_best_and_the_newest_are_kept_as_a_plain_model_says(shard: int, amount: Amount, figure: Figure) -> None:
    shared = Path("/dev/shm")  # flushing memory costs nothing
    place = str(shared) if shared.is_dir() else None
    count = amount(25, 2500)

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(ACTIONS, min_size=1, max_size=8), st.integers(1, 3))
    def check(actions: list[tuple[float, float, str, int]], keep: int) -> None:
        with tempfile.TemporaryDirectory(dir=place) as name:
            follow(Path(name), actions, keep)

    check()
    figure("B5", "{} sequences of epochs as the model says", count)


def follow(root: Path, actions: list[tuple[float, float, str, int]], keep: int) -> None:
    """Do the actions in a folder that also holds files of others, and compare after each."""
    foreign = {"notes.txt", "checkpoint_epoch_1.pt.bak", "checkpoint_epoch_01.pt", "checkpoint_best.pt"}
    for name in foreign:
        (root / name).write_text("not the run's")
    folder = CheckpointFolder(root, keep)
    epochs: list[dict[str, Any]] = []
    for macro_f1, loss, how, at in actions:
        before = reference(epochs, keep) if epochs else set()
        epochs.append(record(len(epochs) + 1, macro_f1, loss))
        saving = payload(7 * len(epochs), epochs)

        def on_event(count: int, _kind: str, _path: str, at: int = at) -> None:
            if count == at:
                raise Crash

        if how == "crash":
            with Calls(root, on_event).installed():
                try:
                    folder.save_epoch(saving, epochs)
                except Crash:
                    there = {path.name for path in root.glob("checkpoint_epoch_?.pt")}
                    assert there >= before or folder.epoch_path(len(epochs)).exists()
                    assert there >= reference(epochs, keep) or there >= before
                    for stray in root.glob(".checkpoint*"):
                        stray.unlink()
        if how != "on":
            folder = CheckpointFolder(root, keep)
        folder.save_epoch(saving, epochs)
        assert {path.name for path in root.iterdir()} == reference(epochs, keep) | foreign
    for name in foreign:
        assert (root / name).read_text() == "not the run's"


@pytest.mark.promise("B6")
def test_the_same_inputs_give_the_same_zip_wherever_it_is_made(
    undisturbed: Trial, new_trial: NewTrial, amount: Amount, figure: Figure
) -> None:
    """In fresh interpreters with other hash seeds, time zones and umasks."""
    expected = sha256_file(undisturbed.root / "final_model.zip")
    places = [("1", "Asia/Tokyo", 0o077), ("2", "America/New_York", 0o027), ("0", "UTC", 0o000)]
    places = [*places, ("3", "Asia/Kolkata", 0o022), ("random", "Pacific/Apia", 0o002)][: amount(1, 5)]
    for number, (seed, zone, umask) in enumerate(places):
        trial = new_trial(f"run{number}")
        shutil.copytree(undisturbed.root, trial.root)
        (trial.root / "final_model.zip").unlink()
        command = [sys.executable, "-m", "ctxtrain", "export", str(trial.root)]
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": zone, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, umask=umask, check=True, stdout=subprocess.DEVNULL)
        assert sha256_file(trial.root / "final_model.zip") == expected
        same(results(trial.root)["files"], results(undisturbed.root)["files"])
        trial.gone()
    figure("B6", "{} exports, one SHA-256", len(places) + 1)


@pytest.mark.promise("B6")
def test_a_zip_that_cannot_be_packed_leaves_the_one_before(undisturbed: Trial, tmp_path: Path) -> None:
    target = tmp_path / "final_model.zip"
    shutil.copy(undisturbed.root / "final_model.zip", target)
    before = sha256_file(target)

    def full(_: int, kind: str, _path: str) -> None:
        if kind == "half":
            raise OSError(errno.ENOSPC, "No space left on device")

    with Calls(tmp_path, full).installed(), pytest.raises(OSError, match="bytes needed"):
        pack(undisturbed.root / "export", target)
    assert sha256_file(target) == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.promise("B7")
def test_a_checkpoint_of_the_first_format_loads_and_one_of_a_later_is_refused_by_its_number(
    tmp_path: Path, figure: Figure
) -> None:
    saved = checkpoint.load(GOLDEN)
    assert saved["state"]["epochs"] == [record(1, 0.5)]
    assert saved["learner"]["weights"]["head"].tolist() == [6.0] * 64
    assert checkpoint.TrainState(**saved["state"]).skipped == 0  # what is not in it has its default
    buffer = io.BytesIO()
    torch.save(saved | {"format": 2}, buffer)
    append_checksum(buffer)
    later = tmp_path / "later.pt"
    later.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=f"{later}: a checkpoint must be of format 1, got 2"):
        checkpoint.load(later)
    figure("B7", "format {}", saved["format"])


@pytest.mark.promise("B8")
def test_what_is_torn_behind_a_checkpoint_s_lines_is_counted_and_before_it_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(step_line(1))
    whole = log.path.read_bytes()
    with log.path.open("ab") as stream:
        stream.write(b"\0\0\0\n" + json.dumps(step_line(3)).encode() + b'\n{"kind": "st')
    assert log.lines_up_to(step=1, epoch=0) == (
        whole,
        [f"{log.path}: 2 lines after optimizer step 1, 1 of them damaged, dropped; they are written again"],
    )
    with pytest.raises(DataError, match=f"{log.path}:2:1: not valid JSON"):
        log.lines_up_to(step=3, epoch=0)


def test_strays_of_a_killed_run_go_at_its_next_start_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    strays = [
        ".config.yaml.abcd1234.tmp",
        "checkpoints/.checkpoint_epoch_2.pt.abcd_234.tmp",
        ".export.abcd1234/export/x",
        ".runs.json.abcd1234.tmp",
    ]
    others = [".config.yaml.swp", ".notes.tmp", "checkpoints/.mine.pt.abcd1234.tmp", ".exported.abcd1234/x"]
    others += ["rows/.train.jsonl.abcd1234.tmp", "fold_1/.config.yaml.abcd1234.tmp"]
    for name in strays + others:
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_text("x")
    with folder.lock():
        assert not any((folder.root / name).exists() for name in strays)
    assert all((folder.root / name).exists() for name in others)
    assert not (folder.root / ".export.abcd1234").exists()


@pytest.mark.promise("B3")
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failure_in_compiled_code_is_told_too(
    call: str, late_trial: NewTrial, expected: dict[str, Any], amount: Amount, needs: Needs, figure: Figure
) -> None:
    """What safetensors and tokenizers raise when the disk is full is no OSError."""
    from tests.reliability.test_exact_resume import under_strace

    needs(shutil.which("strace") is not None, "strace")
    ended = []
    for number in list(range(1, 400, 37))[: amount(1, 11)]:
        trial = late_trial(f"{call}{number}")
        code = under_strace(trial, f"{call}:error=ENOSPC:when={number}", needs)
        assert code in (0, 74), code
        ended.append(code)
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
    assert signal.SIGKILL not in ended
    figure("B3", "{} failures of {} system calls ended a run", ended.count(74), len(ended))
