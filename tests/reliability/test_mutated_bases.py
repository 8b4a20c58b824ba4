"""Bases with one thing changed: each is refused before a step, or ends in a zip that predict reads."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain import TrainingPipeline, load_model
from ctxtrain.errors import ConfigError
from tests.conftest import Amount, MakeConfig
from tests.helpers import learnable_rows
from tests.reliability.conftest import Figure

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**19, 0.0, -0.5, 0.5, 1e-30, 1e30, "", "x", "float16",
    "float32", "full_attention", "sliding_attention", "gelu", "qwen3", "qwen2", "llama", "https://example.org/x",
    [], ["x"], [0, 1], {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic"}, {"0": "LONG"},
]  # fmt: skip
KEYS = (
    "auto_map", "is_causal", "problem_type", "return_dict", "output_attentions", "output_hidden_states",
    "torchscript", "quantization_config", "attn_implementation", "_attn_implementation_internal", "dtype",
    "torch_dtype", "num_labels", "id2label", "rope_scaling", "partial_rotary_factor", "text_config", "chat_template",
    "pruned_heads", "tokenizer_file", "model_max_length", "additional_special_tokens", "tokenizer_class",
    "add_bos_token",
)  # fmt: skip


def mutated(values: dict[str, Any], rng: np.random.Generator) -> str:
    """Change one key of a JSON object in place; returns what was done."""
    key = str(rng.choice([*values, *KEYS]))
    if key in values and rng.random() < 0.15:
        del values[key]
        return f"without {key}"
    values[key] = deepcopy(VALUES[rng.integers(len(VALUES))])
    return f"{key}={values[key]!r}"


def bytes_changed(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, or with one byte changed."""
    place = int(rng.integers(len(content)))
    return content[:place] + (b"" if rng.random() < 0.5 else bytes([rng.integers(256)]) + content[place + 1 :])


def change(folder: Path, rng: np.random.Generator) -> str:
    name = str(
        rng.choice(["config.json"] * 6 + ["tokenizer_config.json"] * 2 + ["tokenizer.json", "model.safetensors"])
    )
    path = folder / name
    if name in ("tokenizer.json", "model.safetensors"):
        path.write_bytes(bytes_changed(path.read_bytes(), rng))
        return f"{name}: bytes"
    values = json.loads(path.read_text())
    done = mutated(values, rng)
    path.write_text(json.dumps(values))
    return f"{name}: {done}"


@pytest.mark.promise("F10")
def test_a_changed_base_is_refused_before_a_step_or_ends_in_a_zip_that_opens(
    tiny_base: Path, make_config: MakeConfig, tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    rows = learnable_rows(2, seed=5)
    refused = trained = 0
    for seed in range(amount(8, 500)):
        base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
        what = change(base, np.random.default_rng(seed))
        pipeline = TrainingPipeline(make_config(f"model.base={base}", "training.epochs=1", run=f"run{seed}"))
        try:
            assert pipeline.run()
            assert len(load_model(pipeline.folder.zip).predict(rows)) == 2
            trained += 1
        except ConfigError:
            refused += 1
            if pipeline.folder.metrics.path.exists():
                raise
        except Exception as error:
            raise AssertionError(f"seed {seed}, {what}: {error!r}") from error
        shutil.rmtree(base)
        shutil.rmtree(pipeline.folder.root)
    figure("F10", "{} changed bases refused, {} trained to a zip that opens", refused, trained)
