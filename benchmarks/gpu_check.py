"""Check this machine's GPU in 11 parts: a line of JSON per part, then a table. The limit of 8 minutes is for one H200.

    python benchmarks/gpu_check.py --output gpu.jsonl       # all parts
    python benchmarks/gpu_check.py --parts 1 4 --budget 120 # two of them, in 120 s together
    python benchmarks/gpu_check.py --cpu                    # all that need no CUDA, on two-layer models

The first line says what the machine lacks: missing packages with the command that installs them, and versions outside
pyproject.toml's ranges. Each part runs in a process of its own, so that a crash, an error or a hang loses no other
part; it is ended after its limit (the second column below, `--cap`, or what is left of `--budget`). A part that lacks a
package or a GPU is `not run`, with the reason; its line then has no figures. A line has part, name, status (ok, failed,
timed out, not run), why, seconds, device and the figures below; those measured before a failure or the limit are kept.
Exit code: 0 if no part failed or timed out, else 1. Nothing is downloaded: weights are random, of the true shapes. With
`--size tiny` models have two layers and rows a few tokens, so that figures say only that a part works. Figures of a CPU
are labelled with `device: cpu`.

 1  15 s   machine       versions; TFLOP/s of products: bf16, TF32, fp32 squares, and the widest product of the 0.5B
                         shape (`bf16_linear_tflops`); GB/s of copies, on the device counting bytes read and written
 2  40 s   embedded run  `same_bits_twice`, `same_bits_resumed`: the zips of equal runs, of one that was stopped and
                         resumed; `export`: differences of logits and what was allowed;
                         `largest_logit_difference_to_cpu`, of the default engine on this device and transformers there
 3  20 s   families      for each of six families: do two passes give gradients of the same bits, and which operators
                         have no deterministic implementation (a run with one of these throws)
 4 100 s   0.5B steps    by micro-batch of a step of 32 windows: `ms` of `Learner.step`; `of_ceiling`, demanded FLOPs
                         (as bench_step.py counts them) / ms / the bf16 rate of part 1; `ratio_trainer`, the median of
                         Trainer's ms / ours in turn, with PEFT, bf16, fused AdamW, batches grouped by length and
                         flash-attn where installed; `ratio_compiled` against the same with torch_compile, if time is
                         left; `ms_without_determinism`; kernels, copies, host waits of a step; `busy_share`, time of
                         kernels / ms; `peak_gb` measured, `predicted_gb` by the package's memory estimate, both without
                         the CUDA context
 5  40 s   1.5B memory   steps with all activations kept, and with gradient checkpointing; the first losses must have
                         equal bits
 6  70 s   8B            steps, with checkpointing too; seconds to write, load and hash a checkpoint of 16 GB
 7  50 s   answers       windows per second of merged models in fp32, TF32 and bf16, and labels that change against fp32
 8  60 s   export        a run and an export of the 1.5B shape with large channels: differences and what was allowed;
                         most memory of the host's processes and of the device (all processes) by stage, named by the
                         first words of the last message; "scoring the" begins as the fresh process is asked
 9  30 s   8B in nf4     parameter counts, steps, peak; needs bitsandbytes
10  20 s   torchrun      exit codes of one process, by DDP a whole run, by FSDP2 some steps (NCCL, on a CPU gloo)
11  30 s   attention     of 32 windows, forward and backward: error against float64, ms, same bits when repeated; padded
                         SDPA, torch's varlen kernels, and the fast engine's attention
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_parts.needs import describe, missing, requirements  # noqa: E402  # after the path
from gpu_parts.setting import Setting  # noqa: E402

BUDGET, CPU_BUDGET, CPU_CAP = 480, 3600, 600  # seconds
LEAST = 5  # seconds, under which a part is not started
LOG_LINES = 20
WIDTH = 80
FIRM = "\N{NO-BREAK SPACE}"
HEAD = ("part", "name", "status", "why", "seconds", "device", "log")
FAILED = ("failed", "timed out")
STEP = ("torch", "transformers", "peft", "accelerate", "numpy", "pydantic", "orjson", "scipy", "safetensors", "PyYAML")
RUN = tuple(requirements())


@dataclass(frozen=True)
class Part:
    """`place` is module and function in `gpu_parts`; `cap` is in seconds on a GPU; `needs` are packages."""

    name: str
    cap: int
    place: str
    needs: tuple[str, ...]
    needs_cuda: bool = False


PARTS = {
    1: Part("machine", 15, "machine.ceilings", ("torch",)),
    2: Part("embedded run", 40, "runs.check_embedded", RUN),
    3: Part("families", 20, "families.check_families", ("torch", "transformers")),
    4: Part("0.5B steps", 100, "steps.compare_steps", STEP),
    5: Part("1.5B memory", 40, "steps.time_checkpointing", STEP),
    6: Part("8B", 70, "steps.time_large", STEP, needs_cuda=True),
    7: Part("answers", 50, "answers.answer", STEP),
    8: Part("export", 60, "runs.check_export", RUN),
    9: Part("8B in nf4", 30, "steps.time_quantized", (*STEP, "bitsandbytes"), needs_cuda=True),
    10: Part("torchrun", 20, "runs.check_launched", RUN),
    11: Part("attention", 30, "attention.compare_attention", ("torch",)),
}


def run_in_child(pipe: Any, place: str, setting: Setting, log: Path) -> None:
    """Run a part and send its figures. What it prints, its traceback too, goes into `log`."""
    os.setsid()  # a group of its own, so that its processes can be ended with it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    module, _, function = place.rpartition(".")
    for figures in getattr(import_module(f"gpu_parts.{module}"), function)(setting):
        pipe.send(figures)


def run_part(number: int, setting: Setting) -> dict[str, Any]:
    """Start a part, gather its figures until it ends or its time is up, and end all of its processes."""
    part, log = PARTS[number], setting.scratch / f"part-{number}.log"
    context = get_context(setting.start_method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_in_child, args=(theirs, part.place, setting, log))
    process.start()
    theirs.close()
    figures: dict[str, Any] = {}
    is_open = True
    while is_open and setting.left > 0 and (process.is_alive() or ours.poll()):
        try:
            if ours.poll(min(0.2, setting.left)):
                figures |= ours.recv()
        except EOFError:
            is_open = False
    process.join(max(0.0, setting.left))
    is_late = process.is_alive()
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        with suppress(ProcessLookupError):
            end()
    process.join()
    printed = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    if is_late:
        return {"status": "timed out", "why": "its time was up", "log": printed[-LOG_LINES:], **figures}
    if process.exitcode:
        ended = f"ended by signal {-process.exitcode}" if process.exitcode < 0 else "failed without a message"
        return {"status": "failed", "why": (printed or [ended])[-1], "log": printed[-LOG_LINES:], **figures}
    return {"status": "ok", **figures}


def reason_not_to_run(part: Part, device: str, has_gpu: bool, seconds_left: float) -> str | None:
    if part.needs_cuda and device == "cpu":
        return "needs a GPU with CUDA"
    if lacking := missing(part.needs):
        return f"missing: {', '.join(lacking)}"
    if device == "cuda" and not has_gpu:
        return "torch sees no GPU; use --cpu"
    return f"the budget has {seconds_left:.0f} s left" if seconds_left < LEAST else None


def sees_gpu() -> bool:
    """Whether torch of this machine sees a GPU; asked in a process of its own, as a fork after the question fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = get_context("spawn").Process(target=_exit_with_gpu, args=(log,))
        process.start()
        process.join()
        return process.exitcode == 0


def _exit_with_gpu(log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    import torch

    sys.exit(not torch.cuda.is_available())


def check(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """The lines of the parts, in order."""
    device = "cpu" if options.cpu else "cuda"
    has_gpu = device == "cuda" and not missing(("torch",)) and sees_gpu()
    end = time.monotonic() + options.budget
    ceiling = None
    if Setting(device, options.size, end, scratch).start_method == "fork":
        with suppress(ImportError):  # once for all parts; each names what is missing
            import_module("transformers")
            import_module("peft")
    for number in options.parts:
        part, start = PARTS[number], time.monotonic()
        line: dict[str, Any] = {"part": number, "name": part.name}
        if why := reason_not_to_run(part, device, has_gpu, end - start):
            yield line | {"status": "not run", "why": why, "seconds": 0.0, "device": device}
            continue
        seconds = dict(options.cap).get(number, CPU_CAP if options.cpu else part.cap)
        setting = Setting(device, options.size, min(end, start + seconds), scratch, ceiling)
        found = run_part(number, setting)
        ceiling = found.get("bf16_tflops", ceiling)
        head = {name: found.pop(name) for name in ("status", "why") if name in found}
        yield line | head | {"seconds": round(time.monotonic() - start, 1), "device": device, **found}


def table(lines: list[dict[str, Any]]) -> str:
    """Status and seconds of each part, with its figures below, in 80 columns."""
    rows = []
    for line in lines:
        figures = {name: value for name, value in line.items() if name not in HEAD}
        if rows:
            rows.append("")
        part, name, device, status, seconds = (line[key] for key in ("part", "name", "device", "status", "seconds"))
        rows.append(f"{part:>2}  {name:<14}{device:<6}{status:<11}{seconds:>6} s")
        if why := line.get("why"):
            rows += wrap(why)
        rows += wrap(listed({name: value for name, value in figures.items() if not isinstance(value, dict)}))
        for name, value in figures.items():
            if isinstance(value, dict):
                rows += wrap(f"{name}: {listed(value)}")
    failed = [line for line in lines if line["status"] in FAILED]
    rows += ["", f"{len(lines)} parts, {len(failed)} failed or timed out"]
    return "\n".join(row.replace(FIRM, " ").rstrip() for row in rows)


def wrap(text: str) -> list[str]:
    indents = {"initial_indent": " " * 4, "subsequent_indent": " " * 6}
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False, **indents)


def listed(figures: dict[str, Any], separator: str = "; ") -> str:
    """Names with values; a name is not parted from its value at the end of a line."""
    pairs = []
    for name, value in figures.items():
        shown = f"({listed(value, ', ')})" if isinstance(value, dict) else str(value).replace(" ", FIRM)
        pairs.append(f"{name.replace(' ', FIRM)}{FIRM}{shown}")
    return separator.join(pairs)


def cap(text: str) -> tuple[int, float]:
    """A part and its cap in seconds, of `N=SECONDS`."""
    number, _, seconds = text.partition("=")
    return int(number), float(seconds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=list(PARTS), default=list(PARTS), metavar="N")
    parser.add_argument("--cpu", action="store_true", help="hide any GPU and run what needs none")
    parser.add_argument("--size", choices=("tiny", "full"), help="default: full, with --cpu tiny")
    parser.add_argument("--budget", type=float, help=f"seconds of all parts; {BUDGET}, with --cpu {CPU_BUDGET}")
    parser.add_argument(
        "--cap", type=cap, nargs="+", default=[], metavar="N=SECONDS", help=f"other caps of parts; with --cpu {CPU_CAP}"
    )
    parser.add_argument("--output", type=Path, help="write the lines of JSON to this file too")
    options = parser.parse_args()
    options.size = options.size or ("tiny" if options.cpu else "full")
    options.budget = options.budget or (CPU_BUDGET if options.cpu else BUDGET)
    return options


def main() -> None:
    options = parse()
    for name, value in {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parts fork
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")))
    )
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.output:
        options.output.write_text("")

    def put(line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if options.output:
            with options.output.open("a") as stream:
                stream.write(text + "\n")

    put(describe("cpu" if options.cpu else "cuda"))
    lines = []
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))  # not a TemporaryDirectory, which a fork removes at its exit
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)  # what processes that are killed leave behind goes with it
    try:
        for line in check(options, scratch):
            put(line)
            lines.append(line)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(lines))
    sys.exit(any(line["status"] in FAILED for line in lines))


if __name__ == "__main__":
    main()
