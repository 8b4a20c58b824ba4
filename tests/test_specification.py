"""The specification held, box by box: one run through `ml.train`, and what each section names found in it.

Each box is proved in detail by the tests of its own module; this file sees to it that no move loses one.
"""

import inspect
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from ctxtrain import Config
from ctxtrain.data.oversampling import epoch_rows
from ctxtrain.model.lora import trainable_parameters
from ctxtrain.model.losses import focal_loss
from ml.train import TrainingPipeline
from tests.conftest import MakeConfig, short_run
from tests.helpers import learnable_rows, write_rows
from tests.tiny_models import build_tiny

METHODS = {  # section 10, with what each may be called with
    "load_data": [],
    "setup_model": [],
    "train_epoch": [],
    "evaluate": [],
    "save_checkpoint": ["metrics"],
    "run": [],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingPipeline:
    """Four epochs on 12 LONG, 12 SHORT and 22 SKIP."""
    folder = tmp_path_factory.mktemp("specification")
    labels = ["LONG", "SHORT", "SKIP", "SKIP"] * 12
    kinds = {label: [row for row in learnable_rows(120, seed=1) if row["label"] == label] for label in {*labels}}
    picked = [kinds[label].pop() for label in labels]
    rows = {
        "train": str(write_rows(folder / "train.jsonl", picked)),
        "val": str(write_rows(folder / "val.jsonl", learnable_rows(20, seed=2))),
    }
    pipeline = TrainingPipeline(short_run(build_tiny(folder / "base"), rows, folder / "run", "training.epochs=4"))
    assert (pipeline.model, pipeline.optimizer, pipeline.loss_fn) == (None, None, None)
    assert pipeline.run()
    return pipeline


def test_section_10_the_class_and_its_methods() -> None:
    assert list(inspect.signature(TrainingPipeline.__init__).parameters)[:2] == ["self", "config"]
    for name, arguments in METHODS.items():
        parameters = list(inspect.signature(getattr(TrainingPipeline, name)).parameters.values())[1:]
        assert [one.name for one in parameters][: len(arguments)] == arguments
        assert all(one.default is not one.empty for one in parameters), f"{name} can be called without arguments"


def test_section_10_each_method_can_be_called_on_its_own(make_config: MakeConfig) -> None:
    pipeline = TrainingPipeline(make_config("training.epochs=1"))
    pipeline.load_data()
    pipeline.setup_model()
    assert pipeline.model is not None
    assert pipeline.optimizer is not None
    assert pipeline.loss_fn is not None
    assert pipeline.train_epoch() > 0
    metrics = pipeline.evaluate()
    pipeline.save_checkpoint(metrics)
    assert (pipeline.folder.root / "checkpoints" / "checkpoint_epoch_1.pt").is_file()


def test_section_2_rows_become_windows_numbers_text_tokens_and_batches(finished: TrainingPipeline) -> None:
    data = finished.data
    assert data.codec.kind == "compact"
    assert len(data.tokens["train"]) == 48
    assert len(data.tokens["val"]) == 20
    assert data.tokens["train"].lengths.min() > 10


def test_section_3_classes_are_raised_to_the_largest_and_weighed_by_inverse_frequency(
    finished: TrainingPipeline,
) -> None:
    labels_N = finished.data.labels["train"]
    assert np.bincount(labels_N).tolist() == [12, 12, 24]
    order = epoch_rows(labels_N, finished.data.epoch_counts_C, seed=0, epoch=0)
    assert np.bincount(labels_N[order]).tolist() == [24, 24, 24]
    assert finished.data.class_weights == pytest.approx([1.0, 1.0, 1.0])


def test_section_4_focal_loss_is_its_formula() -> None:
    logits_BC, labels_B, alpha_C = torch.tensor([[1.0, 0.2, -0.5]]), torch.tensor([1]), torch.tensor([1.0, 2.0, 0.5])
    p_t = torch.softmax(logits_BC, 1)[0, 1]
    loss_sum, alpha_sum = focal_loss(logits_BC, labels_B, 2.0, alpha_C)
    assert float(loss_sum) == pytest.approx(float(2.0 * (1 - p_t) ** 2 * -torch.log(p_t)), rel=1e-6)
    assert float(alpha_sum) == 2.0


def test_section_5_adapters_on_four_projections_of_a_frozen_base(make_config: MakeConfig) -> None:
    pipeline = TrainingPipeline(make_config())
    pipeline.load_data()
    pipeline.setup_model()
    assert pipeline.model is not None
    trained = Counter(
        "score" if ".score." in name else name.split(".")[-4] for name in trainable_parameters(pipeline.model)
    )
    assert trained == {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "score": 1}  # A and B in two layers


def test_sections_6_and_7_metrics_targets_and_hyperparameters(finished: TrainingPipeline) -> None:
    config = Config.parse({"data": {"train": "t", "val": "v"}, "output_dir": "o"})
    training, lora, loss = config.training, config.lora, config.loss
    assert (training.epochs, training.batch_size, training.learning_rate, training.warmup_steps) == (10, 8, 1e-4, 100)
    assert (training.weight_decay, training.gradient_accumulation) == (0.01, 4)
    assert (lora.r, lora.alpha, lora.dropout) == (8, 16, 0.05)
    assert (loss.focal_gamma, loss.class_weights) == (2.0, "auto")
    assert config.targets.model_dump() == {
        "accuracy": 0.65,
        "macro_f1": 0.6,
        "long_precision": 0.6,
        "short_precision": 0.6,
        "long_recall": 0.55,
        "short_recall": 0.55,
    }
    best = json.loads((finished.folder.root / "training_summary.json").read_text())["best"]
    f1s = [best["per_class"][label]["f1"] for label in ("LONG", "SHORT", "SKIP")]
    assert best["macro_f1"] == pytest.approx(sum(f1s) / 3)
    assert {"precision", "recall", "f1"} <= best["per_class"]["LONG"].keys()
    assert "accuracy" in best


def test_section_8_the_top_three_checkpoints_and_the_files_of_a_run(finished: TrainingPipeline) -> None:
    summary = json.loads((finished.folder.root / "training_summary.json").read_text())
    scores = {epoch["epoch"]: epoch["macro_f1"] for epoch in summary["epochs"]}
    assert len(scores) == 4
    assert scores[summary["best"]["epoch"]] == max(scores.values())
    kept = {path.name for path in (finished.folder.root / "checkpoints").iterdir()}
    assert kept <= {f"checkpoint_epoch_{epoch}.pt" for epoch in scores}
    assert f"checkpoint_epoch_{summary['best']['epoch']}.pt" in kept
    assert len(kept) in (3, 4)  # the three best, and the newest where it is none of them
    for name in ("best_model.safetensors", "training_summary.json", "final_model.zip"):
        assert (finished.folder.root / name).is_file()


def test_section_9_temperature_and_the_merged_model_in_one_zip(finished: TrainingPipeline) -> None:
    summary = json.loads((finished.folder.root / "training_summary.json").read_text())
    assert summary["calibration"]["method"] == "temperature"
    assert summary["calibration"]["temperature"] > 0
    with zipfile.ZipFile(finished.folder.root / "final_model.zip") as archive:
        names = set(archive.namelist())
    assert {"model.safetensors", "config.json", "tokenizer.json", "calibration.json", "codec.json"} <= names
