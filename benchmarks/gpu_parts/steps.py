"""Parts 4, 5, 6 and 9: optimizer steps at the shapes of Qwen2.5-0.5B, 1.5B and Qwen3-8B, and loading 8B."""

from __future__ import annotations

import hashlib
import shutil
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from bench_step import DROPOUT, demanded_flops, our_learner, our_step, peer_step, peer_trainer
from gpu_parts.machine import matmul_tflops
from gpu_parts.models import (
    config_of,
    make_classifier,
    make_rows,
    set_dropout,
    weight_dtype,
    with_adapters,
    write_base,
)
from gpu_parts.profiling import describe_step
from gpu_parts.setting import CheckFailed, Setting, rounded

from ctxtrain.model.base import load_classifier
from ctxtrain.model.lora import parameter_counts

MICRO_BATCHES = {"tiny": (4, 8), "full": (8, 32)}
BEST_FLAGS = {"optim": "adamw_torch_fused"}
COMPILE_SECONDS = 45  # that compiling and timing 24 layers may take


def ceiling_of(setting: Setting) -> float:
    """bf16 TFLOP/s of part 1, or of float32 on a CPU, measured here if part 1 did not run."""
    side = 256 if setting.is_tiny else 8192 if setting.device == "cuda" else 2048
    if setting.device == "cuda" and setting.ceiling:
        return setting.ceiling
    return matmul_tflops(setting, weight_dtype(setting), (side, side, side))


def of_ceiling(flops: float, milliseconds: float, ceiling: float) -> float:
    return rounded(flops / (milliseconds / 1e3) / (ceiling * 1e12))


def engine_kind(learner: Any) -> str:
    """Which activations the memory estimate counts."""
    return "reference" if learner.engine.unsupported_reason else "packed"


def predicted_gb(setting: Setting, shape: str, windows: int, **how: Any) -> float | str:
    """Peak of a step of so many windows at a time by the package's own memory estimate, without the CUDA context."""
    try:
        from ctxtrain.engine.memory_needs import memory_needs
        from ctxtrain.model.shape import Batch, LoraShape, ModelShape, Precision, Training
    except ImportError as error:
        return f"not available: {error}"
    batch = Batch.of_rows(windows, int(make_rows(setting)[0].lengths.max()))
    precision = Precision(str(weight_dtype(setting)).removeprefix("torch."), setting.device)
    run = Training(LoraShape(dropout=DROPOUT), precision, batch, batch, **how)
    needs = memory_needs(ModelShape.from_config(config_of(shape, setting)), run)
    return rounded((needs.training - needs.runtime) / 1e9)


class Side:
    """Ours or the opponent, in a process of its own: each has its own global settings and its own peak memory."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting = setting
        attention = "sdpa" if name == "ours" else attention_flag()
        self.model = with_adapters(make_classifier("0.5b", setting, attention=attention))
        rows = make_rows(setting)
        self.facts: dict[str, Any] = {}
        if name == "ours":
            learner = our_learner(self.model, weight_dtype(setting))
            self.facts = {"engine": learner.engine.unsupported_reason or "fast", "kind": engine_kind(learner)}
            self.steps = {size: our_step(learner, *rows, size) for size in MICRO_BATCHES[setting.size]}
        else:
            flags = {"use_cpu": setting.device == "cpu", "bf16": setting.device == "cuda", **BEST_FLAGS}
            folder = str(setting.scratch / name)
            trainer = peer_trainer(self.model, folder, torch_compile=name == "compiled", **flags)
            self.steps = {size: peer_step(trainer, *rows, size) for size in MICRO_BATCHES[setting.size]}
        self.number = 0

    def step(self, size: int) -> float:
        """Milliseconds of a step in micro-batches of `size` windows."""
        self.number += 1
        return 1e3 * self.setting.seconds(lambda: self.steps[size](self.number))

    def loss_without_dropout(self, size: int) -> float:
        set_dropout(self.model, 0.0)
        loss = float(self.steps[size](0))
        set_dropout(self.model, DROPOUT)
        return loss

    def loose_step(self, size: int) -> float:
        """`step` without deterministic algorithms."""
        torch.use_deterministic_algorithms(False)
        milliseconds = self.step(size)
        torch.use_deterministic_algorithms(True)
        return milliseconds

    def peak(self, size: int) -> dict[str, float]:
        self.setting.forget_peak()
        self.step(size)
        return self.setting.peak_gb()

    def profile(self, size: int) -> dict[str, Any]:
        return describe_step(lambda: self.steps[size](self.number), self.step(size))


def live(pipe: Any, name: str, setting: Setting) -> None:
    """Build one side, then answer each order (a method of `Side` and a micro-batch) with its result."""
    warnings.simplefilter("ignore")
    side = Side(name, setting)
    flops = demanded_flops(side.model, make_rows(setting)[0].lengths)
    pipe.send(side.facts | {"flops": flops})
    while order := pipe.recv():
        method, size = order
        pipe.send(getattr(side, method)(size))


class Sides:
    """The processes of the sides of part 4."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.context = get_context(setting.start_method)
        self.pipes: dict[str, Any] = {}

    def start(self, name: str) -> dict[str, Any]:
        self.pipes[name], theirs = self.context.Pipe()
        self.context.Process(target=live, args=(theirs, name, self.setting), daemon=True).start()
        theirs.close()  # so that the end of a process ends the waiting for its answer
        facts: dict[str, Any] = self.pipes[name].recv()
        return facts

    def ask(self, name: str, method: str, size: int) -> Any:
        self.pipes[name].send((method, size))
        return self.pipes[name].recv()

    def end(self, name: str) -> None:
        self.pipes.pop(name).send(None)

    def ratio(self, peer: str, size: int, rounds: int) -> dict[str, Any]:
        """Milliseconds of both, A B A B …, and the median of peer / ours with the smallest and the largest."""
        for name in ("ours", peer):
            self.ask(name, "step", size)
        pairs = [(self.ask("ours", "step", size), self.ask(peer, "step", size)) for _ in range(rounds)]
        ratios = sorted(theirs / ours for ours, theirs in pairs)
        return {
            "ms": rounded(statistics.median(ours for ours, _ in pairs)),
            f"{peer}_ms": rounded(statistics.median(theirs for _, theirs in pairs)),
            f"ratio_{peer}": rounded(statistics.median(ratios)),
            f"ratio_{peer}_spread": [rounded(ratios[0]), rounded(ratios[-1])],
        }


def compare_steps(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 4: the 0.5B shape against transformers' Trainer with PEFT."""
    sides, rounds = Sides(setting), 2 if setting.is_tiny else 10
    facts = sides.start("ours")
    sides.start("trainer")
    ceiling = ceiling_of(setting)  # after the sides, as a fork of a process that has computed may hang
    yield {"engine": facts["engine"], "ceiling_tflops": ceiling, "attention_of_trainer": attention_flag()}
    losses = [sides.ask(name, "loss_without_dropout", max(MICRO_BATCHES[setting.size])) for name in sides.pipes]
    yield {"losses_agree": rounded(abs(losses[0] - losses[1]) / abs(losses[1]))}
    for size in MICRO_BATCHES[setting.size]:
        found = sides.ratio("trainer", size, rounds)
        found["of_ceiling"] = of_ceiling(facts["flops"], found["ms"], ceiling)
        loose = [sides.ask("ours", "loose_step", size) for _ in range(rounds)]
        found["ms_without_determinism"] = rounded(statistics.median(loose))
        found |= sides.ask("ours", "peak", size)
        found["predicted_gb"] = predicted_gb(setting, "0.5b", size, engine=facts["kind"])
        found |= {f"trainer_{name}": value for name, value in sides.ask("trainer", "peak", size).items()}
        if setting.device == "cuda":
            found |= sides.ask("ours", "profile", size)
        yield {f"batch_{size}": found}
    sides.end("trainer")
    if setting.device == "cuda":
        late = setting.lacks_seconds(COMPILE_SECONDS)
        if not late:
            sides.start("compiled")
        yield {"compiled": late or sides.ratio("compiled", max(MICRO_BATCHES[setting.size]), rounds)}


def attention_flag() -> str:
    """What Trainer's model attends with: transformers takes SDPA where the flash-attn package is missing."""
    return "flash_attention_2" if find_spec("flash_attn") else "sdpa"


def time_learner(
    setting: Setting,
    shape: str,
    size: int,
    repeats: int,
    *,
    checkpointed: bool,
    model: Any = None,
    quantization: str = "none",
) -> dict[str, Any]:
    """Milliseconds, share of the ceiling, peak and first loss of steps of a shape in micro-batches of `size`."""
    rows = make_rows(setting)
    size = min(size, len(rows[0]))
    model = model or with_adapters(make_classifier(shape, setting))
    setting.forget_peak()
    learner = our_learner(model, weight_dtype(setting))
    if checkpointed:
        learner.engine.checkpoint_layers()
    step = our_step(learner, *rows, size)
    set_dropout(model, 0.0)
    loss = step(0)
    set_dropout(model, DROPOUT)
    milliseconds = 1e3 * setting.median_seconds(lambda: step(1), repeats, warm_up=1)
    return {
        "ms": rounded(milliseconds),
        "of_ceiling": of_ceiling(demanded_flops(model, rows[0].lengths), milliseconds, ceiling_of(setting)),
        "first_loss": loss,
        **setting.peak_gb(),
        "predicted_gb": predicted_gb(
            setting, shape, size, engine=engine_kind(learner), quantization=quantization, checkpointing=checkpointed
        ),
    }


def can_checkpoint() -> str | None:
    from ctxtrain.engine.reference import TrainingEngine

    return None if hasattr(TrainingEngine, "checkpoint_layers") else "not available: this engine keeps all layers"


def time_checkpointing(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 5: the 1.5B shape with and without gradient checkpointing."""
    kept = time_learner(setting, "1.5b", 8, 5, checkpointed=False)
    yield {"kept": kept}
    if why := can_checkpoint():
        yield {"checkpointed": why}
        return
    computed = time_learner(setting, "1.5b", 8, 5, checkpointed=True)
    yield {"checkpointed": computed, "slowdown": rounded(computed["ms"] / kept["ms"])}
    if computed["first_loss"] != kept["first_loss"]:
        raise CheckFailed("the first loss with checkpointing has other bits")


def file_gb(shape: str, setting: Setting) -> float:
    """Size of the checkpoint of a shape, without making it."""
    model = make_classifier(shape, replace(setting, device="meta"))
    return sum(weight.numel() for weight in model.parameters()) * 2 / 1e9


def obstacle(gigabytes: float, seconds: float, setting: Setting) -> str | None:
    """Why a checkpoint of this size cannot be written and read here, or None."""
    free = shutil.disk_usage(setting.scratch).free / 1e9
    if free < gigabytes + 2:
        return f"not run: needs {gigabytes + 2:.0f} GB in {setting.scratch}, {free:.0f} GB free"
    return setting.lacks_seconds(seconds)


def time_large(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 6: steps of 8B first, as they matter most; then a checkpoint on disk, loaded and hashed."""
    why = can_checkpoint()
    yield {"batch_4": time_learner(setting, "8b", 4, 3, checkpointed=False)}
    yield {"batch_8_checkpointed": why or time_learner(setting, "8b", 8, 3, checkpointed=True)}
    gigabytes = file_gb("8b", setting)
    if late := obstacle(gigabytes, 2.0 * gigabytes, setting):
        yield {"load": late}
        return
    yield {"file_gb": rounded(gigabytes), "write_seconds": rounded(setting.seconds(lambda: write_base("8b", setting)))}
    setting.forget_peak()
    seconds, _model = setting.timed(lambda: load_on_device("8b", setting))
    yield {"load_seconds": rounded(seconds)}
    if late := setting.lacks_seconds(2.5 * gigabytes):
        yield {"hash": late, "hash_gb_s": hash_rate(setting)}
        return
    from ctxtrain.config.sections import LoraConfig
    from ctxtrain.model.skeleton import Skeleton  # reads private parts of transformers, which an older one may lack

    skeleton = Skeleton.of(str(setting.scratch / "8b"), 0, LoraConfig().model_dump())
    yield {"hash_seconds": rounded(setting.seconds(skeleton.sha256))}


def hash_rate(setting: Setting) -> float:
    """GB/s of SHA-256 in one thread."""
    block = np.zeros(1 << 28, dtype=np.uint8)
    return rounded(len(block) / setting.seconds(lambda: hashlib.sha256(block.data).digest()) / 1e9)


def load_on_device(shape: str, setting: Setting, quantization: str = "none") -> Any:
    folder = write_base(shape, setting)
    model = load_classifier(str(folder), 0, dtype=weight_dtype(setting), quantization=quantization)
    return model if quantization != "none" else model.to(setting.device)


def time_quantized(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part 9: 8B in nf4."""
    gigabytes = file_gb("8b", setting)
    is_written = (setting.scratch / "8b" / "config.json").exists()
    if not is_written and (late := obstacle(gigabytes, 1.5 * gigabytes, setting)):
        raise CheckFailed(f"no checkpoint: {late}. Run part 6 too.")
    model = with_adapters(load_on_device("8b", setting, "nf4"))
    yield {"counts": parameter_counts(model)}
    run = partial(time_learner, setting, "8b", 4, 3, model=model, quantization="nf4")
    yield {"batch_4": run(checkpointed=False)}
    yield {"batch_4_checkpointed": can_checkpoint() or run(checkpointed=True)}
