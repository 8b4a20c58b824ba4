"""Open an export with transformers only, and print its logits. Runs as a script in a separate process.

    python -I reopen.py EXPORT_FOLDER BATCH_SIZE < texts.json

The script imports nothing from ctxtrain, so its logits are those that any user of transformers gets. It writes nothing
to disk, so a full disk cannot look like a broken export. The references of the comparison also come from
`model_logits`: same order of rows, same batch size, padding and mask.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def model_logits(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> list[list[float]]:
    """Logits of a transformers classifier, shape (texts, 3)."""
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
    device = "cuda" if torch.cuda.is_available() else "cpu"  # same device as for the trained model
    model = model.to(device)
    # Warm-up: on one processor, the first concurrent calls of MKL's vector math in a process gave wrong numbers, and
    # later calls never did. See `warm_up_vector_math` in engine/tuning.py.
    model_logits(model, tokenizer, texts[:1], 1)
    return model_logits(model, tokenizer, texts, batch_size)


if __name__ == "__main__":
    print(json.dumps(logits(sys.argv[1], json.load(sys.stdin.buffer), int(sys.argv[2]))))
