"""The model card: `README.md` of an export, with Hugging Face metadata."""

from __future__ import annotations

from ml.evaluation.metrics import Metrics
from ml.labels import LABELS

_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
base_model: {base}
tags: [qwen, lora, trading, ctxtrain]
---

# LONG, SHORT or SKIP from a window of market bars

A Qwen sequence classifier, fine-tuned with LoRA by ctxtrain and merged; `{base}` is its base. The adapters alone lie in
`adapter/`. It reads the text that `codec.json` describes and answers with three logits in the order {labels};
`calibration.json` holds the temperature that turns them into probabilities, softmax(logits / temperature).

Scores on the validation rows, which also chose the epoch and the temperature, so they flatter:

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


def model_card(base: str, metrics: Metrics, text: str) -> str:
    """The card's text; `text` is a rendered window for the example."""
    rows = [
        f"| {label} | {s['precision']:.3f} | {s['recall']:.3f} | {s['f1']:.3f} | {s['support']} |"
        for label, s in metrics["per_class"].items()
    ]
    return _CARD.format(
        base=base,
        labels=", ".join(LABELS),
        rows="\n".join(rows),
        accuracy=metrics["accuracy"],
        macro_f1=metrics["macro_f1"],
        count=metrics["rows"],
        text=text.encode("unicode_escape").decode().replace('"', '\\"'),
    )
