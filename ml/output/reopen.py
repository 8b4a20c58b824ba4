"""Open an export with transformers alone and write its logits; run as a script, in a process of its own.

    python -I reopen.py EXPORT_FOLDER TEXTS.json LOGITS.json BATCH_SIZE

It imports nothing of this package, so what it computes is what any user of transformers gets.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main(folder: str, texts_file: str, logits_file: str, batch_size: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where the trained model's logits were computed
    model = model.to(device)
    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    rows = []
    for start in range(0, len(texts), int(batch_size)):
        batch = texts[start : start + int(batch_size)]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.inference_mode():
            rows += model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.tolist()
    Path(logits_file).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
