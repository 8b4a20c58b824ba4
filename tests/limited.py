"""Runs a command of this package in a process whose memory is limited once everything is imported.

python -m tests.limited MEBIBYTES WORDS…      so much more than the process has by then
"""

from __future__ import annotations

import resource
import sys
from importlib import import_module
from pathlib import Path

import torch

from ctxtrain.cli.process import main
from ctxtrain.model import lora
from ctxtrain.model.base import load_classifier
from ctxtrain.model.tokenizer import load_tokenizer

USED = (
    "ctxtrain.evaluation.export_scores",
    "ctxtrain.evaluation.baseline_models",
    "sklearn.model_selection",
    "ctxtrain.reporting.charts",
    "ctxtrain.export.predictor",
    "ctxtrain.pretraining.run",
    "ctxtrain.multi_run",
    "onnxruntime",
)


def held() -> int:
    """Bytes of address space that the process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def load_libraries() -> None:
    """What they set up at their first use is not what the command asks for."""
    torch.set_num_threads(1)
    for name in USED:
        import_module(name)
    pad = load_tokenizer("embedded").pad_token_id
    model = lora.add_lora(load_classifier("embedded", pad), r=2, alpha=2, dropout=0.0, target_modules=["q_proj"])
    model(input_ids=torch.ones(1, 8, dtype=torch.int64)).logits.sum().backward()


if __name__ == "__main__":
    load_libraries()
    limit = held() + (int(sys.argv[1]) << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    main(sys.argv[2:])
