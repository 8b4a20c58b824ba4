"""The model card: `README.md` of an export, with Hugging Face metadata and its scores as a `model-index`."""

from __future__ import annotations

import re

from huggingface_hub import EvalResult, ModelCardData

from ctxtrain.evaluation.metrics import CHIEF
from ctxtrain.labels import LABELS
from ctxtrain.reporting.summary_schema import Baselines
from ctxtrain.reporting.verdict import comparison_said
from ctxtrain.storage.metrics_log import Scores

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CHOSEN_ON = "validation rows, which also chose the epoch and the temperature, so they flatter"
_CARD = """\
---
{metadata}
---

# LONG, SHORT or SKIP from a window of market bars

A Qwen sequence classifier, fine-tuned with LoRA by ctxtrain and merged; `{base}` is its base. The adapters alone lie in
`adapter/`. It reads the text that `codec.json` describes and answers with three logits in the order {labels};
`calibration.json` holds the temperature that turns them into probabilities, softmax(logits / temperature).

{caveat}{advice}

Scores on the {judged}:

| | precision | recall | F1 | windows |
|---|---|---|---|---|
{rows}

Accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}, {count} windows.{besides}

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


def model_card(
    base: str, validation: Scores, test: Scores | None, baselines: Baselines, text: str, caveat: str = ""
) -> str:
    """The card's text; `baselines` are those of `assess`, `text` is a rendered window for the example.

    It begins with what nobody is to read the scores past: the `caveat`, and whether to use the model at all.
    """
    metrics, judged, besides = validation, CHOSEN_ON, ""
    if test is not None:
        metrics, judged = test, "test rows, which chose nothing"
        besides = (
            f"\nOn the {CHOSEN_ON}: accuracy {validation.value('accuracy'):.3f}, "
            f"macro-F1 {validation.value(CHIEF):.3f}, {validation.rows} windows."
        )
    rows = [
        f"| {label} | {s.precision:.3f} | {s.recall:.3f} | {s.f1:.3f} | {s.support} |"
        for label, s in metrics.per_class.items()
    ]
    return _CARD.format(
        metadata=_metadata(base, metrics, judged, "validation" if test is None else "test", caveat),
        base=base,
        labels=", ".join(LABELS),
        caveat=f"**{caveat}**\n\n" if caveat else "",
        advice=comparison_said(metrics.value(CHIEF), baselines),
        judged=judged,
        rows="\n".join(rows),
        accuracy=metrics.value("accuracy"),
        macro_f1=metrics.value(CHIEF),
        count=metrics.rows,
        besides=besides,
        text=text.encode("unicode_escape").decode().replace('"', '\\"'),
    )


def _metadata(base: str, metrics: Scores, judged: str, split: str, caveat: str) -> str:
    """As a hub reads it; a base is named where it could be one of the hub's."""
    scores = (("accuracy", "accuracy", metrics.value("accuracy")), ("f1", "macro-F1", metrics.value(CHIEF)))
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
                dataset_name=f"{judged}. {caveat}" if caveat else judged,
                dataset_split=split,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, name, value in scores
        ],
    ).to_yaml()
