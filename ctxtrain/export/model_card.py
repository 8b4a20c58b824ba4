"""The model card: the `README.md` of an export, with Hugging Face metadata and the scores as `model-index`."""

from __future__ import annotations

import re

from huggingface_hub import EvalResult, ModelCardData

from ctxtrain.evaluation.metrics import PRIMARY_METRIC
from ctxtrain.labels import LABELS
from ctxtrain.storage.metrics_log import Scores

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
VALIDATION_ROWS = "validation rows, also used to choose the epoch and the temperature, so these scores are optimistic"
TEST_ROWS = "test rows, used for no choice"
_CARD = """\
---
{metadata}
---

# LONG, SHORT or SKIP from a window of market bars

A Qwen sequence classifier, fine-tuned with LoRA by ctxtrain and merged into the base model `{base}`. `adapter/` has
the adapters alone. The input is the text that `codec.json` describes. The output is three logits in the order {labels}.
Probabilities are softmax(logits / temperature), with the temperature in `calibration.json`.{origin}

{caveat}{advice}

Scores on the {scored_rows}:

| | precision | recall | F1 | windows |
|---|---|---|---|---|
{rows}

Accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}, {count} windows.{validation_scores}

With transformers only:

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

With ctxtrain: `load_model("final_model.zip").predict(rows)`.
"""


def model_card(
    base: str, validation: Scores, test: Scores | None, advice: str, text: str, caveat: str = "", origin: str = ""
) -> str:
    """The text of the model card.

    `text` is a rendered window for the code example. The `caveat` and the `advice` on whether to use the model come
    before the scores, so that readers see them first. `origin` says which epochs the weights are from, if several were
    to be averaged.
    """
    metrics, scored_rows, validation_scores = validation, VALIDATION_ROWS, ""
    if test is not None:
        metrics, scored_rows = test, TEST_ROWS
        validation_scores = (
            f"\nOn the {VALIDATION_ROWS}: accuracy {validation.value('accuracy'):.3f}, "
            f"macro-F1 {validation.value(PRIMARY_METRIC):.3f}, {validation.rows} windows."
        )
    rows = [
        f"| {label} | {s.precision:.3f} | {s.recall:.3f} | {s.f1:.3f} | {s.support} |"
        for label, s in metrics.per_class.items()
    ]
    return _CARD.format(
        metadata=_metadata(base, metrics, scored_rows, "validation" if test is None else "test", caveat),
        base=base,
        labels=", ".join(LABELS),
        caveat=f"**{caveat}**\n\n" if caveat else "",
        origin=f" {origin[:1].upper()}{origin[1:]}." if origin else "",
        advice=advice,
        scored_rows=scored_rows,
        rows="\n".join(rows),
        accuracy=metrics.value("accuracy"),
        macro_f1=metrics.value(PRIMARY_METRIC),
        count=metrics.rows,
        validation_scores=validation_scores,
        text=text.encode("unicode_escape").decode().replace('"', '\\"'),
    )


def _metadata(base: str, metrics: Scores, scored_rows: str, split: str, caveat: str) -> str:
    """The YAML metadata of the Hugging Face Hub. It names the base only if the name can be a Hub ID."""
    scores = (("accuracy", "accuracy", metrics.value("accuracy")), ("f1", "macro-F1", metrics.value(PRIMARY_METRIC)))
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
                dataset_name=f"{scored_rows}. {caveat}" if caveat else scored_rows,
                dataset_split=split,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, name, value in scores
        ],
    ).to_yaml()
