"""Whether what must be the same each time is: exports of one run, and the first forward pass of fresh processes.

    python benchmarks/check_repeats.py --exports 200 --processes 300

exports     trains one small run on the embedded base, then exports it so often, each time in a process of its own with
            two threads, every second time beside a process that keeps a core busy. Each must end with 0.
processes   starts so many processes, and in each compares the first forward pass with the second, bit by bit: of
            transformers and PEFT and then of the engine, in every second process the other way round.

Prints a line for whatever differs and a sum; ends with 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

THREADS = "2"
BUSY = "while True: pass"
CONFIG = """
data: {{train: {folder}/train.jsonl, val: {folder}/val.jsonl}}
training: {{epochs: 1, warmup_steps: 1, batch_size: 16, gradient_accumulation: 1, learning_rate: 1.0e-3}}
output_dir: {folder}/run
"""


def child(*, plain_first: bool) -> None:
    """In a fresh process: the bits of the first pass are those of the second."""
    import torch

    torch.set_num_threads(int(THREADS))
    from ctxtrain.engine.cpu.training_model import FastClassifier
    from ctxtrain.engine.tuning import warm_up_vector_math
    from ctxtrain.model.base import load_classifier
    from ctxtrain.model.forward import logits
    from ctxtrain.model.lora import add_lora

    warm_up_vector_math()
    base = load_classifier("embedded", 0)
    model = add_lora(base, r=8, alpha=16, dropout=0.0, target_modules=["q_proj", "v_proj"]).eval()
    batch = {"input_ids": torch.randint(1, 16_000, (16, 400), generator=torch.Generator().manual_seed(0))}
    engine = FastClassifier(model).eval()
    for network in (model, engine) if plain_first else (engine, model):
        with torch.no_grad():
            first, second = (logits(network, batch) for _ in range(2))
        if not torch.equal(first, second):
            print(f"{type(network).__name__}: the first pass differs by {float((first - second).abs().max()):.1e}")
            sys.exit(1)


def write_texts(path: Path, count: int, seed: int) -> None:
    """Rows of text, for which no baseline is fitted, as long as those of 50 bars."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        bars = " ".join(f"{rng.randrange(10**8):08d}" for _ in range(rng.randrange(60, 100)))
        rows.append({"context": f"{bars} ?", "label": ("LONG", "SHORT", "SKIP")[number % 3]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(*words: str) -> tuple[int, str]:
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def check_processes(count: int) -> Counter[int]:
    codes: Counter[int] = Counter()
    for number in range(count):
        code, said = run(__file__, "--child", str(number % 2))
        codes[code] += 1
        if code:
            print(f"process {number + 1}: {code}: {said[-300:]}", flush=True)
    return codes


def check_exports(count: int) -> Counter[int]:
    codes: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/run"
        config = Path(folder, "config.yaml")
        config.write_text(CONFIG.format(folder=folder), encoding="utf-8")
        for name, rows in (("train", 60), ("val", 64)):
            write_texts(Path(folder, f"{name}.jsonl"), rows, seed=rows)
        code, said = run("-m", "ctxtrain", "train", str(config))
        assert code == 0, said
        largest = 0.0
        for number in range(count):
            with ExitStack() as stack:
                if number % 2:
                    neighbour = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
                    stack.callback(neighbour.kill)
                code, said = run("-m", "ctxtrain", "export", root)
            codes[code] += 1
            if code:
                print(f"export {number + 1}: {code}: {said[-300:]}", flush=True)
            else:
                check = json.loads(Path(root, "training_summary.json").read_text())["export_check"]
                largest = max(largest, check["max_logit_difference"], check["max_predict_difference"])
            if (number + 1) % 20 == 0:
                print(f"{number + 1} exports, {codes[0]} ended with 0", flush=True)
        print(f"largest logit difference of an export: {largest:.1e}")
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exports", type=int, default=0)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child is not None:
        child(plain_first=bool(wanted.child))
        return
    found = {"exports": check_exports(wanted.exports)} if wanted.exports else {}
    if wanted.processes:
        found["processes"] = check_processes(wanted.processes)
    for what, codes in found.items():
        print(f"{what}: {codes.total()}, of which {codes.total() - codes[0]} went wrong")
    sys.exit(any(codes.total() - codes[0] for codes in found.values()))


if __name__ == "__main__":
    main()
