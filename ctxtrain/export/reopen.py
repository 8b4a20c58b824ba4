"""Open exports with transformers alone and compute their logits; run as a script, in a process of its own.

    python -P reopen.py

It imports nothing of this package, so its results are those of any user of transformers. It imports the libraries at
once and then waits: each line of standard input is a request, and each gets one line of standard output. On Linux every
request runs in a fork that has computed nothing before. `model_logits` computes the other sides of the comparison too:
the rows in their order, in batches of the same size, padded and masked.

    {"folder": "…", "texts": ["…"], "batch_size": 32, "threads": 2, "device": "cpu"}
    {"status": 0, "output": "…"}          # output ends in a line with the logits, or in a traceback

A request without texts is a rehearsal: it uses the device, and its answer has no logits.
"""

import json
import os
import sys
import traceback
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def model_logits(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> list[list[float]]:
    """Logits of a classifier, of shape (texts, 3), as plain transformers computes them."""
    rows = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            rows += model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.tolist()
    return rows


def logits(folder: str, texts: list[str], batch_size: int, device: str) -> list[list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    model = model.to(device)
    # This pass only warms up: a process's first call of MKL's vector mathematics by two threads at once has given wrong
    # numbers on one processor, and no later call ever did. See `warm_up_vector_math` in engine/tuning.py.
    model_logits(model, tokenizer, texts[:1], 1)
    return model_logits(model, tokenizer, texts, batch_size)


def compute(request: dict[str, Any]) -> str:
    """The logits that a request asks for, as JSON."""
    torch.set_num_threads(request["threads"])
    if not request["texts"]:
        return json.dumps(torch.zeros(0, 3, device=request["device"]).tolist())
    return json.dumps(logits(request["folder"], request["texts"], request["batch_size"], request["device"]))


def in_fork(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a forked process; returns its exit status and all that it printed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            print(compute(request), flush=True)
            status = 0
        finally:
            if status:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as output:
        printed = output.read()
    return {"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "output": printed}


def main() -> None:
    for line in sys.stdin.buffer:
        if sys.platform == "linux":
            print(json.dumps(in_fork(json.loads(line))), flush=True)
        else:  # elsewhere a fork with these libraries loaded is not safe, so the process ends after one request
            print(json.dumps({"status": 0, "output": compute(json.loads(line))}), flush=True)
            return


if __name__ == "__main__":
    main()
