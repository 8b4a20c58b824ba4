"""The dtype of answers: which one, that they are those of transformers in it, and how many labels it changes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from ctxtrain import load_model
from ctxtrain.cli.process import main
from ctxtrain.data.batches import collate
from ctxtrain.engine.reference import ReferenceNetwork
from ctxtrain.errors import ConfigError
from ctxtrain.evaluation.dtype_comparison import compare_dtypes
from ctxtrain.export.answer_dtype import choose_answer_dtype, stored_dtype
from ctxtrain.model.agreement import rounding_noise
from ctxtrain.storage.atomic_files import write_manifest
from ctxtrain.train import TrainingPipeline
from tests.conftest import short_run
from tests.helpers import Row, errors, learnable_rows, make_window, write_rows

F32, BF16 = torch.float32, torch.bfloat16
SLOWER = "note: bfloat16 is slower here: "


@dataclass
class Finished:
    export: Path
    rows: list[Row]
    data: Path

    def copy(self, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
        """An export with changed weights."""
        shutil.copytree(self.export, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        write_manifest(folder)
        return folder


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tiny_rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    TrainingPipeline(short_run(tiny_base, tiny_rows, folder / "run", "training.epochs=1")).run()
    rows = learnable_rows(90, seed=3)
    return Finished(folder / "run" / "export", rows, write_rows(folder / "rows.jsonl", rows))


def half(weights: dict[str, Tensor]) -> None:
    weights |= {name: weight.to(BF16) for name, weight in weights.items() if not name.startswith("score.")}


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0


def predicted(model: Path, data: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    run("predict", model, data, "-o", out, *options)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("choice", "stored", "fast", "width", "dtype", "note"),
    [
        ("auto", F32, F32, 896, F32, None),
        (
            "auto",
            F32,
            BF16,
            896,
            F32,
            "the answers are in float32, as the export is, but this machine multiplies faster",
        ),
        ("auto", F32, BF16, 128, F32, None),
        ("auto", BF16, F32, 896, F32, None),
        ("auto", BF16, BF16, 896, BF16, None),
        ("auto", BF16, BF16, 128, F32, None),
        ("float32", BF16, BF16, 896, F32, None),
        ("float32", F32, BF16, 896, F32, None),
        ("bfloat16", F32, BF16, 896, BF16, None),
        ("bfloat16", F32, F32, 896, BF16, "bfloat16 is slower here: this machine multiplies faster in float32"),
        (
            "bfloat16",
            BF16,
            BF16,
            128,
            BF16,
            "bfloat16 is slower here: on a CPU, ONNX Runtime",
        ),
    ],
)
def test_the_dtype_is_that_of_the_file_unless_it_is_slower_or_another_is_named(
    choice: Any, stored: torch.dtype, fast: torch.dtype, width: int, dtype: torch.dtype, note: str | None
) -> None:
    chosen = choose_answer_dtype(choice, stored, fast, width, on_cpu=True)
    assert chosen.dtype == dtype
    assert [text.startswith(note or "-") for text in chosen.notes] == [True] * (note is not None)


def test_on_a_gpu_narrow_models_follow_their_file_too() -> None:
    assert choose_answer_dtype("auto", BF16, BF16, 128, on_cpu=False).dtype == BF16
    assert choose_answer_dtype("auto", F32, BF16, 128, on_cpu=False) == choose_answer_dtype(
        "float32", F32, F32, 9, on_cpu=True
    )


def test_another_dtype_is_refused_before_a_model_is_opened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], finished: Finished
) -> None:
    with pytest.raises(ConfigError, match="dtype must be auto, float32 or bfloat16, got 'float16'"):
        load_model(tmp_path / "nothing.zip", dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(finished.export), str(finished.data), "--dtype", "half"])
    assert ended.value.code == 2
    assert errors(capfd.readouterr().err) == [
        "dtype must be auto, float32 or bfloat16, got 'half'. Use auto: the export's precision."
    ]


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_bfloat16_answers_are_those_of_transformers_in_bfloat16_with_a_float32_head(
    engine: Any, finished: Finished
) -> None:
    """Hugging Face's own way to open the folder in bfloat16; rounding explains the rest."""
    predictor = load_model(finished.export, dtype="bfloat16", engine=engine)
    assert (predictor.dtype, "bfloat16" in repr(predictor)) == ("bfloat16", True)
    plain = AutoModelForSequenceClassification.from_pretrained(finished.export, dtype=BF16).eval()
    plain.score.float()
    with torch.no_grad():
        plain.score.weight.copy_(load_file(finished.export / "model.safetensors")["score.weight"])
    tokens = predictor.tokenise(map(make_window, finished.rows))
    batch = collate(tokens, range(len(tokens)))
    plain.score.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    with torch.no_grad():
        expected_BC = plain(**batch).logits
    noise = rounding_noise(ReferenceNetwork(plain), batch, expected_BC, BF16)
    difference = np.abs(predictor.token_logits(tokens) - expected_BC.numpy()).max()
    assert difference <= 2 * noise < 0.2 * float(expected_BC.abs().max())
    float32_NC = load_model(finished.export).token_logits(tokens)
    assert np.abs(float32_NC - expected_BC.numpy()).max() > 1e-4  # the two dtypes differ


def test_an_export_in_bfloat16_holds_its_head_in_float32_and_answers_in_what_is_faster(
    finished: Finished, tmp_path: Path
) -> None:
    assert stored_dtype(finished.export) == F32
    stored = finished.copy(tmp_path / "half", half)
    assert stored_dtype(stored) == BF16
    predictor = load_model(stored)  # a narrow model on a CPU
    assert (predictor.dtype, predictor.notes) == ("float32", ())
    named = load_model(stored, dtype="bfloat16")
    head = named.engine.network.model.score.weight  # type: ignore[union-attr]
    assert torch.equal(head, load_file(stored / "model.safetensors")["score.weight"])  # type: ignore[arg-type]
    assert head.dtype == F32
    assert named.logits(finished.rows) == pytest.approx(predictor.logits(finished.rows), abs=0.1)


def test_commands_answer_in_the_dtype_that_is_named_and_say_what_it_costs(
    finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    automatic = predicted(finished.export, finished.data, tmp_path / "auto.jsonl")
    named = predicted(finished.export, finished.data, tmp_path / "named.jsonl", "--dtype", "float32")
    assert (tmp_path / "auto.jsonl").read_bytes() == (tmp_path / "named.jsonl").read_bytes()
    assert SLOWER not in capfd.readouterr().err
    coarse = predicted(finished.export, finished.data, tmp_path / "coarse.jsonl", "--dtype", "bfloat16")
    assert capfd.readouterr().err.count(SLOWER) == 1
    assert [one["id"] for one in coarse] == [one["id"] for one in automatic]
    largest = max(abs(one["confidence"] - other["confidence"]) for one, other in zip(coarse, named, strict=True))
    assert 1e-5 < largest < 0.1
    run("evaluate", finished.export, finished.data, "--dtype", "bfloat16")
    assert "answered in bfloat16\n" in capfd.readouterr().out


def near_ties(finished: Finished) -> Callable[[dict[str, Tensor]], None]:
    """A head that reads the direction in which the pooled states of these rows differ least: near ties."""
    predictor = load_model(finished.export, engine="reference")
    pooled: list[Tensor] = []
    network = ReferenceNetwork(predictor.engine.network)
    network.model.score.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    tokens = predictor.tokenise(map(make_window, finished.rows))
    with torch.no_grad():
        network(**collate(tokens, range(len(tokens))))
    *_, direction_D = torch.linalg.svd(pooled[0] - pooled[0].mean(0)).Vh
    direction_D = direction_D - pooled[0].mean(0) * (pooled[0].mean(0) @ direction_D) / pooled[0].mean(0).square().sum()

    def change(weights: dict[str, Tensor]) -> None:
        weights["score.weight"] = torch.stack([direction_D, -direction_D, torch.zeros_like(direction_D)])

    return change


def test_labels_that_change_are_counted(finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = finished.copy(tmp_path / "ties", near_ties(finished))
    fine, coarse = (
        predicted(model, finished.data, tmp_path / f"{dtype}.jsonl", "--dtype", dtype)
        for dtype in ("float32", "bfloat16")
    )
    changed = sum(one["label"] != other["label"] for one, other in zip(fine, coarse, strict=True))
    assert 0 < changed < len(fine)
    capfd.readouterr()
    run("evaluate", model, finished.data, "--compare-dtype", "--json")
    said = capfd.readouterr()
    result = json.loads(said.out)
    compared = result["dtype_comparison"]
    assert (result["dtype"], compared["rows"], compared["labels_changed"]) == ("float32", 90, changed)
    assert compared["max_probability_difference"] == pytest.approx(
        max(
            abs(one["probabilities"][label] - other["probabilities"][label])
            for one, other in zip(fine, coarse, strict=True)
            for label in ("LONG", "SHORT", "SKIP")
        )
    )
    logits = {dtype: load_model(model, dtype=dtype).logits(finished.rows) for dtype in ("float32", "bfloat16")}
    assert compared["max_logit_difference"] == pytest.approx(np.abs(logits["float32"] - logits["bfloat16"]).max())
    assert compared["macro_f1"]["float32"] == result["macro_f1"]
    assert compared["macro_f1"] == {
        dtype: load_model(model, dtype=dtype).evaluate(finished.rows)["macro_f1"] for dtype in ("float32", "bfloat16")
    }
    run("evaluate", model, finished.data, "--compare-dtype", "--dtype", "bfloat16")
    shown = capfd.readouterr().out
    assert "answered in bfloat16\n" in shown
    assert f"between float32 and bfloat16, {changed} of 90 labels change; largest difference" in shown
    assert f"macro-F1 {compared['macro_f1']['float32']:.3f} in float32, " in shown


def test_a_label_is_the_most_likely_class_at_any_temperature() -> None:
    fine = np.array([[1.0, 0.0, -1.0], [0.5, 0.49, 0.0], [0.0, 0.0, 2.0]])
    coarse = np.array([[1.0, 0.25, -1.0], [0.5, 0.51, 0.0], [0.0, 0.0, 2.0]])
    labels = np.array([0, 0, 2])
    for temperature in (0.5, 2.0):
        compared = compare_dtypes({"bfloat16": coarse, "float32": fine}, labels, temperature)
        assert (compared["rows"], compared["labels_changed"], compared["max_logit_difference"]) == (3, 1, 0.25)
        assert list(compared["macro_f1"]) == ["float32", "bfloat16"]
        assert [*compared["macro_f1"].values()] == pytest.approx([2 / 3, (2 / 3 + 0 + 1) / 3])
