"""How long does an export take, and how much memory, at Qwen2.5-0.5B's shape? Prints JSON, one line per step.

    python benchmarks/bench_export.py                       # bfloat16 base, as those on the hub; some minutes
    python benchmarks/bench_export.py --base-dtype float32 --export-dtype bfloat16

The base has random weights, the adapters are random too, and the rows are those of `ctxtrain sample`. Each step runs in
a process of its own, so that its peak is its own.

merge     `write_merged` alone: seconds, and by how much its peak exceeds the memory before it. Pages of the mapped base
          count, as in every figure here.
export    the whole of what `ctxtrain export` does after it has read rows and checkpoint: merge, both checks, scores of
          the validation rows, baselines, zip, and the zip opened as `predict` opens it. `peak_gb` is the peak of this
          process, `fresh_peak_gb` that of the process that opens the export.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import Qwen2Config, Qwen2ForCausalLM

from ctxtrain.config.schema import Config
from ctxtrain.export.fresh_process import fresh_process
from ctxtrain.export.merge import write_merged
from ctxtrain.export.package import prepare_export
from ctxtrain.model.averaging import Candidates
from ctxtrain.model.embedded import build_tokenizer
from ctxtrain.synthetic.sample import write_sample
from ctxtrain.train import TrainingPipeline
from ctxtrain.training import build

STEPS = ("merge", "export")


def memory_gb(name: str) -> float:
    """Resident memory of this process in GB of 10^9 bytes: VmRSS is the current one, VmHWM its peak. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return round(int(line.split()[1]) * 1024 / 1e9, 3)


def make_base(folder: Path, dtype: str, layers: int) -> None:
    """A checkpoint of the shape with random weights, tied embeddings and the embedded tokenizer."""
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14,
        num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def open_run(root: Path, export_dtype: str) -> TrainingPipeline:
    """A run whose rows are read, without a model."""
    tree = {
        "data": {name: str(root / "rows" / f"{name}.jsonl") for name in ("train", "val")},
        "model": {"base": str(root / "base"), "max_tokens": 512},
        "export": {"dtype": export_dtype},
        "output_dir": str(root / "run"),
    }
    pipeline = TrainingPipeline(Config.parse(tree))
    pipeline.load_data()
    pipeline.setup_export()
    return pipeline


def measure(step: str, root: Path, export_dtype: str) -> dict[str, Any]:
    pipeline = open_run(root, export_dtype)
    torch.manual_seed(1)
    shapes = get_peft_model_state_dict(pipeline.skeleton.adapted, save_embedding_layers=False)
    weights = {name: torch.empty(weight.shape).normal_(std=0.02) for name, weight in shapes.items()}
    trained = build.trained(pipeline.config, pipeline.skeleton, weights)
    largest = max(weight.nbytes for weight in pipeline.skeleton.naming.weights.values()) / 1e9
    settings = build.export_settings(pipeline.config)
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of what follows
    before, start = memory_gb("VmRSS"), time.perf_counter()
    if step == "merge":
        digest = write_merged(root / "out.safetensors", pipeline.skeleton, weights, settings["dtype"], trained.load)
        seconds = time.perf_counter() - start
        more = round(memory_gb("VmHWM") - before, 3)
        found: dict[str, Any] = {"more_gb": more, "largest_tensor_gb": round(largest, 3), "bytes": digest.bytes}
        (root / "out.safetensors").unlink()
    else:
        with tempfile.TemporaryDirectory(dir=root) as scratch, fresh_process.running():
            result = prepare_export(
                Candidates(trained, [1]), pipeline.tokenizer, pipeline.data, pipeline.data.tokens, **settings,
                base_name="base", caveat="", scratch=Path(scratch), say=lambda note: print(note, file=sys.stderr),
            )  # fmt: skip
            seconds = time.perf_counter() - start
        fresh = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 3)
        found = {"peak_gb": memory_gb("VmHWM"), "fresh_peak_gb": fresh, "check": result.check}
    return {"step": step, "threads": torch.get_num_threads(), "seconds": round(seconds, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--export-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--val", type=int, default=12, help="validation rows, all of which the export scores")
    parser.add_argument("--measure", nargs=2, metavar=("STEP", "FOLDER"), help="of a process that this script starts")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options.export_dtype)))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_base(root / "base", options.base_dtype, options.layers)
        write_sample(root / "rows", train=60, val=options.val, test=12, seed=0, hide_flags=True)
        for step in STEPS:
            command = [sys.executable, __file__, "--measure", step, name, "--export-dtype", options.export_dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
