"""Parts 2, 8 and 10: whole runs by the command line, in processes of their own, as a user starts them.

Tiny runs on a CPU are called in the part's process instead, which spares them the imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import yaml
from gpu_parts.setting import CheckFailed, Setting, rounded

FIRST_STEPS = 2  # after which a run is stopped
LOOK = 0.1  # seconds between looks at a process


def ctxtrain(*words: str) -> None:
    """The command line; ends the process with its exit code."""
    from ctxtrain.cli.process import main

    sys.argv = ["ctxtrain", *words]
    main()


def torchrun(*words: str) -> None:
    """torch's launcher, of one process."""
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", "1", *words])


def logits(archive: str, rows: str, engine: Any) -> list[list[float]]:
    from ctxtrain.export.predictor import load_model

    found: list[list[float]] = load_model(archive, engine=engine).logits(rows).tolist()
    return found


def print_logits(archive: str, rows: str, engine: Any) -> None:
    print(json.dumps(logits(archive, rows, engine)))


def call_here(*words: str) -> int:
    """The exit code of the command line in this process."""
    from ctxtrain.cli.process import main
    from ctxtrain.export.fresh_process import fresh_process

    fresh_process.start()  # the runs of a part share the process that opens their exports
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def start_command(call: Callable[..., None], words: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
    """In the new process: its output goes into `log`, and `environment` is set before libraries are imported."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ |= environment
    call(*words)


@dataclass
class Ended:
    """A process that has ended with 0: what it printed, and what it took; most memory by its stage, in GB."""

    output: str
    seconds: float
    host_gb: dict[str, float]
    device_gb: dict[str, float]


class Command:
    """A process of a command, with its memory by stage, which is the first two words of its last message."""

    def __init__(
        self, setting: Setting, call: Callable[..., None], *words: str, watched: bool = False, **environment: str
    ) -> None:
        self.setting, self.watched, self.words = setting, watched, (call.__name__, *words)
        self.log = setting.scratch / f"output-{time.monotonic_ns()}.txt"
        self.log.touch()
        self.start = time.perf_counter()
        context = get_context("spawn")  # a fork of a process that has computed may hang
        self.process = context.Process(target=start_command, args=(call, words, self.log, environment))
        self.process.start()

    def end(self, expected: int = 0) -> Ended:
        """Wait for the end. Raises CheckFailed if the exit code is another one."""
        host_gb: dict[str, float] = {}
        device_gb: dict[str, float] = {}
        before = self._device_gb()
        while self.watched and self.process.is_alive():
            stage = self._stage()
            host_gb[stage] = max(host_gb.get(stage, 0.0), self._host_gb())
            if before is not None:
                used = rounded((self._device_gb() or before) - before)
                device_gb[stage] = max(device_gb.get(stage, 0.0), used)
            self.process.join(LOOK)
        self.process.join()
        seconds = time.perf_counter() - self.start
        output = self.log.read_text(encoding="utf-8", errors="replace")
        if self.process.exitcode != expected:
            text = f"{' '.join(self.words)} ended with {self.process.exitcode}: {output.strip()[-1500:]}"
            raise CheckFailed(text)
        return Ended(output, seconds, host_gb, device_gb)

    def _stage(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        words = next((line.split() for line in reversed(lines) if line[:1].islower()), ["start"])
        return " ".join(word for word in words[:2] if word.isalpha())

    def _host_gb(self) -> float:
        """Resident memory of the process and those below it."""
        total = 0
        with suppress(psutil.Error):  # one has ended
            mine = psutil.Process(self.process.pid)
            for process in (mine, *mine.children(recursive=True)):
                total += process.memory_info().rss
        return rounded(total / 1e9)

    def _device_gb(self) -> float | None:
        """Memory of the device in use by all processes."""
        if self.setting.device != "cuda" or not self.watched:
            return None
        import torch

        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9


def run(setting: Setting, *words: str, watched: bool = False, expected: int = 0) -> Ended:
    """The command line to its end. Raises CheckFailed if the exit code is another one."""
    if not runs_here(setting):
        return Command(setting, ctxtrain, *words, watched=watched).end(expected)
    start = time.perf_counter()
    if (code := call_here(*words)) != expected:
        raise CheckFailed(f"ctxtrain {' '.join(words)} ended with {code}")
    return Ended("", time.perf_counter() - start, {}, {})


def runs_here(setting: Setting) -> bool:
    return setting.is_tiny and setting.device == "cpu"


def write_rows(setting: Setting, train: int, others: int) -> dict[str, str]:
    """The sample's rows; at tiny size as short texts, for which a run fits no baselines."""
    folder = setting.scratch / f"rows-{train}-{others}"
    places = {split: folder / f"{split}.jsonl" for split in ("train", "val", "test")}
    if folder.exists():
        return {split: str(place) for split, place in places.items()}
    sizes = ("--train", str(train), "--val", str(others), "--test", str(others))
    run(setting, "sample", str(folder), *sizes)
    if setting.is_tiny:
        for place in places.values():
            rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
            texts = [{"context": as_text(row), "label": row["label"]} for row in rows]
            place.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return {split: str(place) for split, place in places.items()}


def as_text(row: dict[str, Any]) -> str:
    return " ".join(f"{bar['close']:g}" for bar in (*row["context_bars"][-4:], row["current_bar"]))


def write_config(setting: Setting, name: str, rows: dict[str, str], base: str, **training: Any) -> Path:
    """A config with the run folder `name` beside it."""
    tree = {
        "data": rows,
        "model": {"base": base, "max_tokens": 512},
        "oversampling": {"target": "none"},
        "training": {"batch_size": 8, "gradient_accumulation": 1, "warmup_steps": 1, **training},
        "output_dir": str(setting.scratch / name),
    }
    place = setting.scratch / f"{name}.yaml"
    place.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return place


def small_base(setting: Setting) -> str:
    if not setting.is_tiny:
        return "embedded"
    from gpu_parts.models import write_base

    return str(write_base("0.5b", setting))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export_check(folder: Path) -> dict[str, Any]:
    """The differences of an export and what was allowed, with their ratio."""
    check: dict[str, Any] = json.loads((folder / "training_summary.json").read_text())["export_check"]
    shown = {name: rounded(value) if isinstance(value, float) else value for name, value in check.items()}
    if check.get("allowed"):
        shown["of_allowed"] = rounded(check["max_logit_difference"] / check["allowed"])
    return shown


def check_embedded(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 2: a run on the embedded base, repeated, stopped and resumed; at tiny size on a base of two layers."""
    rows, base = write_rows(setting, *((24, 12) if setting.is_tiny else (96, 48))), small_base(setting)
    training = {"epochs": 2, "learning_rate": 1e-3}
    names = ("first",) if setting.is_tiny else ("first", "second")
    hashes = {}
    for name in names:
        ended = run(setting, "train", str(write_config(setting, name, rows, base, **training)))
        hashes[name] = sha256(setting.scratch / name / "final_model.zip")
        yield {f"{name}_run_seconds": rounded(ended.seconds)}
    if len(hashes) > 1:
        yield {"same_bits_twice": hashes["first"] == hashes["second"]}
    yield {"export": export_check(setting.scratch / "first")}
    config = write_config(setting, "resumed", rows, base, **training)
    stop_early(setting, config)
    run(setting, "train", str(config), "--resume")
    hashes["resumed"] = sha256(setting.scratch / "resumed" / "final_model.zip")
    yield {"same_bits_resumed": hashes["first"] == hashes["resumed"]}
    yield {"largest_logit_difference_to_cpu": compare_devices(setting, rows["test"])}
    if len(set(hashes.values())) > 1:
        raise CheckFailed(f"the zips of equal runs must have the same bits: {hashes}")


def stop_early(setting: Setting, config: Path) -> None:
    """Interrupt a run after its first steps, as Ctrl-C does."""
    words, expected = ("train", str(config)), 128 + signal.SIGINT
    command = None if runs_here(setting) else Command(setting, ctxtrain, *words)
    process = psutil.Process(command.process.pid if command else os.getpid())
    metrics = config.with_suffix("") / "metrics.jsonl"

    def interrupt() -> None:
        with suppress(psutil.NoSuchProcess):  # then its exit code is another one
            while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= FIRST_STEPS):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    if command:
        command.end(expected)
    else:
        run(setting, *words, expected=expected)


def compare_devices(setting: Setting, rows: str) -> float:
    """Largest difference of a logit: the default engine on this device against transformers on the CPU."""
    archive = str(setting.scratch / "first" / "final_model.zip")
    if runs_here(setting):
        found = [logits(archive, rows, engine) for engine in ("auto", "reference")]
    else:
        here = Command(setting, print_logits, archive, rows, "auto").end()
        there = Command(setting, print_logits, archive, rows, "reference", CUDA_VISIBLE_DEVICES="").end()
        found = [json.loads(ended.output.splitlines()[-1]) for ended in (here, there)]
    pairs = (pair for rows in zip(*found, strict=True) for pair in zip(*rows, strict=True))
    return rounded(max(abs(here - there) for here, there in pairs))


def check_export(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 8: a short run on a base with outlier channels and its export, then the export alone."""
    from gpu_parts.models import write_outlier_base

    base = str(write_outlier_base(setting))
    setting.forget_peak()  # the device is the run's
    rows = write_rows(setting, *((16, 12) if setting.is_tiny else (32, 32)))
    config = write_config(setting, "export", rows, base, epochs=1, learning_rate=1e-4)
    ended = run(setting, "train", str(config), watched=True)
    folder = setting.scratch / "export"
    yield {"run": describe(ended), "export": export_check(folder)}
    yield {"zip_gb": rounded((folder / "final_model.zip").stat().st_size / 1e9)}
    if late := setting.lacks_seconds(0 if setting.is_tiny else ended.seconds):
        yield {"export_alone": late}
        return
    again = run(setting, "export", str(folder), watched=True)
    yield {"export_alone": describe(again)}


def describe(ended: Ended) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": rounded(ended.seconds)}
    found |= {"host_gb_while": ended.host_gb} if ended.host_gb else {}
    return found | ({"device_gb_while": ended.device_gb} if ended.device_gb else {})


def check_launched(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 10: one process under torchrun, by DDP a whole run, by FSDP2 some steps."""
    rows = write_rows(setting, *((16, 12) if setting.is_tiny else (32, 32)))
    config = write_config(setting, "launched", rows, small_base(setting), epochs=1, learning_rate=1e-3)
    commands = {
        "ddp": ("-m", "ctxtrain", "train", str(config)),
        "fsdp2": (str(Path(__file__).with_name("launched.py")), setting.device),
    }
    failed = {}
    for name, words in commands.items():
        command = Command(setting, torchrun, *words)
        try:
            yield {name: {"exit_code": 0, "seconds": rounded(command.end().seconds)}}
        except CheckFailed as error:
            failed[name] = str(error)
            yield {name: {"exit_code": command.process.exitcode}}
    if failed:
        raise CheckFailed("; ".join(failed.values()))
