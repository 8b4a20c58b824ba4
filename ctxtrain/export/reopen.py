"""Open an export with transformers alone and print its logits; run as a script, in a process of its own.

    python -I reopen.py EXPORT_FOLDER BATCH_SIZE < texts.json

Nothing is written to a disk, so that a full one cannot pass for a broken export.

It imports nothing of this package, so what it computes is what any user of transformers gets. `model_logits` computes
the other sides of the comparison, too: the rows in their order, in batches of the same size, padded and masked.
"""

import json
import sys
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


def logits(folder: str, texts: list[str], batch_size: int) -> list[list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where the trained model's logits were computed
    model = model.to(device)
    # A process's first call of MKL's vector mathematics by two threads at once has given wrong numbers on one
    # processor, and no later one ever did: see `enter_vector_math` in engine/tuning.py. This pass is for nothing else.
    model_logits(model, tokenizer, texts[:1], 1)
    return model_logits(model, tokenizer, texts, batch_size)


if __name__ == "__main__":
    print(json.dumps(logits(sys.argv[1], json.load(sys.stdin.buffer), int(sys.argv[2]))))
