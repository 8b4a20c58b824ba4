"""Parts 2, 8 and 10: whole runs, by the command line in processes of their own, as a user starts them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from gpu_parts.setting import CheckFailed, Setting, rounded

CTXTRAIN = (sys.executable, "-m", "ctxtrain")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
FIRST_STEPS = 2  # after which a run is stopped
CHANNELS, OUTLIER = 8, 40.0  # channels of the residual stream that are so many times as large, as in trained Qwens
LOGITS = """
import json, sys
from ctxtrain import load_model
print(json.dumps(load_model(sys.argv[1], engine=sys.argv[2]).logits(sys.argv[3]).tolist()))
"""


@dataclass
class Ended:
    """A process that has ended with 0: what it printed, and what it took; memory by its stage, in GB."""

    output: str
    seconds: float
    host_gb: dict[str, float]
    device_gb: dict[str, float]


class Watched:
    """A process with its memory, and that of its children, by stage: the first two words of its last line."""

    def __init__(self, words: tuple[str, ...], setting: Setting, **environment: str) -> None:
        self.words, self.setting = words, setting
        self.log = setting.scratch / f"output-{time.monotonic_ns()}.txt"
        self.start = time.perf_counter()
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                words, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment, cwd=setting.scratch
            )
        self.host_gb: dict[str, float] = {}
        self.device_gb: dict[str, float] = {}
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def end(self, expected: int = 0) -> Ended:
        """Wait for the end. Raises CheckFailed if the exit code is another one."""
        code = self.process.wait()
        seconds = time.perf_counter() - self.start
        self.watcher.join()
        output = self.log.read_text(encoding="utf-8", errors="replace")
        if code != expected:
            raise CheckFailed(f"{' '.join(self.words[2:])} ended with {code}: {output.strip()[-1500:]}")
        return Ended(output, seconds, self.host_gb, self.device_gb)

    def _watch(self) -> None:
        before = self._used_device_gb()
        while self.process.poll() is None:
            stage = self._stage()
            self.host_gb[stage] = max(self.host_gb.get(stage, 0.0), self._host_gb())
            if before is not None:
                used = rounded((self._used_device_gb() or before) - before)
                self.device_gb[stage] = max(self.device_gb.get(stage, 0.0), used)
            time.sleep(0.05)

    def _stage(self) -> str:
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - 2000))
            lines = stream.read().decode(errors="replace").splitlines()
        words = next((line.split() for line in reversed(lines) if line[:1].islower()), ["start"])
        return " ".join(word for word in words[:2] if word.isalpha())

    def _host_gb(self) -> float:
        total = 0
        try:
            mine = psutil.Process(self.process.pid)
            for process in (mine, *mine.children(recursive=True)):
                total += process.memory_info().rss
        except psutil.Error:  # it has ended
            pass
        return rounded(total / 1e9)

    def _used_device_gb(self) -> float | None:
        if self.setting.device != "cuda":
            return None
        import torch

        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9


def run(setting: Setting, *words: str, **environment: str) -> Ended:
    return Watched(words, setting, **environment).end()


def write_rows(setting: Setting, train: int, others: int) -> dict[str, str]:
    """The sample's rows; at tiny size as short texts, for which a run fits no baselines."""
    folder = setting.scratch / f"rows-{train}-{others}"
    sizes = ("--train", str(train), "--val", str(others), "--test", str(others))
    run(setting, *CTXTRAIN, "sample", str(folder), *sizes)
    places = {split: folder / f"{split}.jsonl" for split in ("train", "val", "test")}
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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export_check(folder: Path) -> dict[str, float]:
    """The differences of an export and what was allowed, with their ratio."""
    check: dict[str, float] = json.loads((folder / "training_summary.json").read_text())["export_check"]
    shown = {name: rounded(value) for name, value in check.items()}
    if check.get("allowed"):
        shown["of_allowed"] = rounded(check["max_logit_difference"] / check["allowed"])
    return shown


def check_embedded(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 2: a run on the embedded base, repeated, stopped and resumed."""
    rows = write_rows(setting, *((24, 12) if setting.is_tiny else (96, 48)))
    training = {"epochs": 2, "learning_rate": 1e-3}
    names = ("first",) if setting.is_tiny else ("first", "second")
    hashes = {}
    for name in names:
        ended = run(setting, *CTXTRAIN, "train", str(write_config(setting, name, rows, "embedded", **training)))
        hashes[name] = sha256(setting.scratch / name / "final_model.zip")
        yield {f"{name}_run_seconds": rounded(ended.seconds)}
    if len(hashes) > 1:
        yield {"same_bits_twice": hashes["first"] == hashes["second"]}
    yield {"export": export_check(setting.scratch / "first")}
    config = write_config(setting, "resumed", rows, "embedded", **training)
    stop_early(setting, config)
    run(setting, *CTXTRAIN, "train", str(config), "--resume")
    hashes["resumed"] = sha256(setting.scratch / "resumed" / "final_model.zip")
    yield {"same_bits_resumed": hashes["first"] == hashes["resumed"]}
    yield {"largest_logit_difference_to_cpu": compare_devices(setting, rows["test"])}
    if len(set(hashes.values())) > 1:
        raise CheckFailed(f"the zips of equal runs must have the same bits: {hashes}")


def stop_early(setting: Setting, config: Path) -> None:
    """Interrupt a run after its first steps, as Ctrl-C does."""
    watched = Watched((*CTXTRAIN, "train", str(config)), setting)
    metrics = config.with_suffix("") / "metrics.jsonl"
    while watched.process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b'"step"') >= FIRST_STEPS:
            watched.process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    watched.end(expected=128 + signal.SIGINT)


def compare_devices(setting: Setting, rows: str) -> float:
    """Largest difference of a logit: the default engine on this device against transformers on the CPU."""
    archive = str(setting.scratch / "first" / "final_model.zip")
    found = []
    for engine, environment in (("auto", {}), ("reference", {"CUDA_VISIBLE_DEVICES": ""})):
        ended = run(setting, sys.executable, "-c", LOGITS, archive, engine, rows, **environment)
        found.append(json.loads(ended.output.splitlines()[-1]))
    pairs = (pair for here, there in zip(*found, strict=True) for pair in zip(here, there, strict=True))
    return rounded(max(abs(here - there) for here, there in pairs))


def write_outlier_base(setting: Setting) -> Path:
    """A causal model of the 1.5B shape in bfloat16, some channels of whose residual stream are large."""
    import torch
    from ctxtrain.model.embedded import build_tokenizer
    from transformers import AutoModelForCausalLM

    from gpu_parts.models import config_of

    folder = setting.scratch / "outliers"
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config_of("1.5b", setting), dtype=torch.bfloat16)
    with torch.no_grad():
        channels = torch.arange(CHANNELS, device=setting.device) * (model.config.hidden_size // CHANNELS)
        model.model.embed_tokens.weight[:, channels] *= OUTLIER
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[channels] *= OUTLIER
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def check_export(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 8: a short run on a base with outlier channels and its export, then the export alone."""
    base = str(write_outlier_base(setting))
    setting.forget_peak()  # the device is the run's
    rows = write_rows(setting, *((16, 12) if setting.is_tiny else (32, 32)))
    config = write_config(setting, "export", rows, base, epochs=1, learning_rate=1e-4)
    ended = run(setting, *CTXTRAIN, "train", str(config))
    folder = setting.scratch / "export"
    yield {"run": describe(ended), "export": export_check(folder)}
    yield {"zip_gb": rounded((folder / "final_model.zip").stat().st_size / 1e9)}
    if late := setting.lacks_seconds(0 if setting.is_tiny else ended.seconds):
        yield {"export_alone": late}
        return
    again = run(setting, *CTXTRAIN, "export", str(folder))
    yield {"export_alone": describe(again)}


def describe(ended: Ended) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": rounded(ended.seconds), "host_gb_while": ended.host_gb}
    return found | ({"device_gb_while": ended.device_gb} if ended.device_gb else {})


def check_launched(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 10: one process under torchrun, by DDP a whole run, by FSDP2 some steps."""
    rows = write_rows(setting, *((16, 12) if setting.is_tiny else (32, 32)))
    config = write_config(setting, "launched", rows, "embedded", epochs=1, learning_rate=1e-3)
    commands = {
        "ddp": ("-m", "ctxtrain", "train", str(config)),
        "fsdp2": (str(Path(__file__).with_name("launched.py")), setting.device),
    }
    failed = {}
    for name, words in commands.items():
        watched = Watched((*TORCHRUN, *words), setting)
        try:
            yield {name: {"exit_code": 0, "seconds": rounded(watched.end().seconds)}}
        except CheckFailed as error:
            failed[name] = str(error)
            yield {name: {"exit_code": watched.process.returncode}}
    if failed:
        raise CheckFailed("; ".join(failed.values()))
