"""The model card: `README.md` of an export, with Hugging Face metadata and its scores as a `model-index`."""

from __future__ import annotations

import re

from huggingface_hub import EvalResult, ModelCardData

from ml.evaluation.metrics import Metrics
from ml.labels import LABELS

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = """\
---
{metadata}
---

# LONG, SHORT or SKIP from a window of market bars

A Qwen sequence classifier, fine-tuned with LoRA by ctxtrain and merged; `{base}` is its base. The adapters alone lie in
`adapter/`. It reads the text that `codec.json` describes and answers with three logits in the order {labels};
`calibration.json` holds the temperature that turns them into probabilities, softmax(logits / temperature).

{leaked}Scores on the validation rows, which also chose the epoch and the temperature, so they flatter:

| | precision | recall | F1 | windows |
|---|---|---|---|---|
{rows}

Accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}, {count} windows.

With transformers alone:

```python
import json, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # the unzipped export
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
temperature = json.load(open(f"{{folder}}/calibration.json"))["temperature"]
text = "{text}"
logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0]
print(dict(zip(model.config.id2label.values(), (logits / temperature).softmax(-1).tolist())))
```

With ctxtrain, from rows: `load_model("final_model.zip").predict(rows)`.
"""


def model_card(base: str, metrics: Metrics, text: str, leaked: str = "") -> str:
    """The card's text; `text` is a rendered window for the example, `leaked` says what stands in two files."""
    rows = [
        f"| {label} | {s['precision']:.3f} | {s['recall']:.3f} | {s['f1']:.3f} | {s['support']} |"
        for label, s in metrics["per_class"].items()
    ]
    return _CARD.format(
        metadata=_metadata(base, metrics, leaked),
        base=base,
        labels=", ".join(LABELS),
        leaked=f"**No score here is to be believed, for rows are in two files: {leaked}.**\n\n" if leaked else "",
        rows="\n".join(rows),
        accuracy=metrics["accuracy"],
        macro_f1=metrics["macro_f1"],
        count=metrics["rows"],
        text=text.encode("unicode_escape").decode().replace('"', '\\"'),
    )


def _metadata(base: str, metrics: Metrics, leaked: str) -> str:
    """As a hub reads it; a base is named where it could be one of the hub's."""
    rows = "validation rows, which also chose the epoch" + (f" (LEAKED: {leaked})" if leaked else "")
    scores = (("accuracy", "accuracy", metrics["accuracy"]), ("f1", "macro-F1", metrics["macro_f1"]))
    return ModelCardData(
        base_model=base if _HUB_ID.fullmatch(base) else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["qwen", "lora", "trading", "ctxtrain"],
        model_name="LONG, SHORT or SKIP",
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type="ctx-windows",
                dataset_name=rows,
                dataset_split="validation",
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, name, value in scores
        ],
    ).to_yaml()
