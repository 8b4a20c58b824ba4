"""A run that exports the mean of its best epochs, or its best epoch where the mean is worse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from peft import PeftModel
from safetensors.torch import load_file

from ctxtrain import Config, TrainingPipeline, load_model
from ctxtrain.data.tokens import tokenise
from ctxtrain.engine.reference import InferenceEngine
from ctxtrain.evaluation.best_epoch import rank_epochs
from ctxtrain.model import lora
from ctxtrain.model.base import load_classifier
from ctxtrain.model.tokenizer import load_tokenizer
from ctxtrain.progress import Reporter
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.storage.atomic_files import sha256_file
from ctxtrain.storage.checkpoint import CheckpointFolder, load
from tests.conftest import MakeConfig, short_run
from tests.helpers import learnable_rows, write_rows
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.slow
OVERRIDES = ("checkpoints.average=3", "checkpoints.keep=1", "training.epochs=5", "training.learning_rate=3e-3")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("averaged")
    rows = {
        "train": str(write_rows(folder / "train.jsonl", learnable_rows(46, seed=1))),
        "val": str(write_rows(folder / "val.jsonl", learnable_rows(60, seed=2))),
    }
    config = short_run(build_tiny(folder / "base"), rows, folder / "run", *OVERRIDES)
    summary = TrainingPipeline(config).run()
    assert summary is not None
    return config, summary


def merged_weights(config: Config, epochs: list[int]) -> dict[str, np.ndarray]:
    """By tensor, the mean over epochs of the weights that the checkpoint of each epoch gives alone."""
    tokenizer = load_tokenizer(config.model.base)
    sums: dict[str, np.ndarray] = {}
    for epoch in epochs:
        base = load_classifier(config.model.base, tokenizer.pad_token_id)
        model = lora.add_lora(base, **config.lora.model_dump())
        path = Path(config.output_dir, "checkpoints", f"checkpoint_epoch_{epoch}.pt")
        lora.load_trainable_state(model, load(path)["learner"]["weights"])
        for name, weight in lora.merge(model).state_dict().items():
            sums[name] = sums.get(name, 0) + weight.double().numpy() / len(epochs)
    return sums


def test_the_export_is_the_mean_of_the_best_epochs(averaged: tuple[Config, dict[str, Any]]) -> None:
    config, summary = averaged
    found, best = summary["averaging"], rank_epochs(summary["epochs"])[:3]
    assert found["used"], found["reason"]
    assert (found["epochs"], found["wanted"]) == (best, 3)
    assert found["macro_f1"] >= found["best_epoch_macro_f1"]
    assert found["macro_f1"] == pytest.approx(summary["best"]["macro_f1"])
    assert summary["best"]["epoch"] == best[0]
    assert found["best_epoch_macro_f1"] == pytest.approx(summary["epochs"][best[0] - 1]["macro_f1"])
    kept = {int(path.stem.rpartition("_")[2]) for path in Path(config.output_dir, "checkpoints").glob("*.pt")}
    assert kept == {*best, 5}
    expected = merged_weights(config, best)
    actual = load_file(Path(config.output_dir, "export", "model.safetensors"))
    assert actual.keys() == expected.keys()
    assert all(np.abs(weight.numpy() - expected[name]).max() <= 1e-6 for name, weight in actual.items())
    alone = merged_weights(config, best[:1])
    assert max(np.abs(alone[name] - expected[name]).max() for name in alone) > 1e-4


def test_peft_and_transformers_open_the_adapters_of_the_mean(averaged: tuple[Config, dict[str, Any]]) -> None:
    config, _ = averaged
    root = Path(config.output_dir)
    adapter = orjson.loads((root / "export" / "adapter" / "adapter_config.json").read_bytes())
    assert (adapter["r"], adapter["lora_alpha"]) == (3 * config.lora.r, config.lora.alpha)
    tokenizer = load_tokenizer(config.model.base)
    base = load_classifier(config.model.base, tokenizer.pad_token_id, seed=7)
    model = PeftModel.from_pretrained(base, root / "export" / "adapter").eval()
    predictor, rows = load_model(root / "final_model.zip"), learnable_rows(20, seed=5)
    logits_NC = InferenceEngine(model).token_logits(tokenise(map(predictor.render, rows), tokenizer, 512))
    assert np.abs(predictor.logits(rows) - logits_NC).max() <= 1e-5
    stranger = (
        "import json, sys; from transformers import AutoModelForSequenceClassification, AutoTokenizer;"
        "m = AutoModelForSequenceClassification.from_pretrained('.');"
        "t = AutoTokenizer.from_pretrained('.');"
        "print(json.dumps(m(**t(sys.argv[1], return_tensors='pt')).logits.tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", stranger, predictor.render(rows[0])],
        cwd=root / "export", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert np.abs(np.array(json.loads(done.stdout)[0]) - logits_NC[0]).max() <= 1e-5


def test_summary_card_report_and_console_say_which_epochs(
    averaged: tuple[Config, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    from ctxtrain.cli.console import print_summary

    config, summary = averaged
    best, scores = summary["averaging"]["epochs"], summary["averaging"]
    first, second, third = sorted(best)
    reason = (
        f"he mean of epochs {first}, {second} and {third} is exported: its validation macro-F1 of "
        f"{scores['macro_f1']:.4f} is not lower than {scores['best_epoch_macro_f1']:.4f}, that of epoch {best[0]}, "
        "the best one"
    )
    assert scores["reason"] == f"t{reason}"
    root = Path(config.output_dir)
    assert f" T{reason}." in (root / "export" / "README.md").read_text()
    assert f"Of the 3 best epochs to average: t{reason}." in (root / "report.html").read_text()
    print_summary(Summary.model_validate(summary), config.output_dir)
    assert f"mean of epochs {first}, {second}, {third} of 5, temperature" in capfd.readouterr().out


def test_a_resumed_run_exports_the_same_mean(averaged: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    config, summary = averaged
    stopped = TrainingPipeline(config.model_copy(update={"output_dir": str(tmp_path / "run")}))
    with stopped._open_run():
        for _ in range(3):
            stopped.train_epoch()
            stopped.save_checkpoint(stopped.evaluate())
    resumed = TrainingPipeline(stopped.config, resume=True).run()
    assert resumed is not None
    assert resumed["averaging"] == summary["averaging"]
    again = TrainingPipeline(stopped.config, resume=True).export()
    for written in (resumed, again):
        assert written["files"] == summary["files"]
    assert sha256_file(tmp_path / "run" / "final_model.zip") == summary["files"]["final_model.zip"]


def test_a_resume_needs_every_epoch_of_the_mean(averaged: tuple[Config, dict[str, Any]]) -> None:
    config, summary = averaged
    folder = Path(config.output_dir, "checkpoints")
    epochs = summary["averaging"]["epochs"]
    lost = next(epoch for epoch in epochs[1:] if epoch != 5)
    path = folder / f"checkpoint_epoch_{lost}.pt"
    content, said = path.read_bytes(), list[str]()
    path.unlink()
    try:
        assert CheckpointFolder(folder, 1).find_resume_point(7, said.append) == folder / "checkpoint_epoch_5.pt"
        earlier = CheckpointFolder(folder, 1, 3).find_resume_point(7, said.append)  # from there it is trained again
        assert earlier is not None
        assert lost not in rank_epochs(load(earlier)["state"]["epochs"])[:3]
        assert f"epoch_{lost}.pt, one of the 3 best epochs so far. Resuming from {earlier.name}" in said[-1]
    finally:
        path.write_bytes(content)


def test_one_epoch_is_exported_alone_and_says_so(make_config: MakeConfig) -> None:
    said: list[str] = []

    class Listener(Reporter):
        def say(self, message: str) -> None:
            said.append(message)

    summary = TrainingPipeline(make_config("training.epochs=1", "checkpoints.average=4"), reporter=Listener()).run()
    assert summary is not None
    reason = "epoch 1 is exported alone: no other epoch has a score to average with"
    assert summary["averaging"] == {
        "wanted": 4, "epochs": [1], "macro_f1": None, "best_epoch_macro_f1": None, "used": False, "reason": reason,
    }  # fmt: skip
    assert f"note: {reason}" in said


def test_a_worse_mean_is_not_exported(make_config: MakeConfig) -> None:
    """Far apart at this rate, the epochs have a mean that is worse than the best of them."""
    config = make_config("training.epochs=6", "checkpoints.average=6", "training.learning_rate=0.1")
    summary = TrainingPipeline(config).run()
    assert summary is not None
    found, best = summary["averaging"], summary["best"]["epoch"]
    assert not found["used"]
    assert found["macro_f1"] < found["best_epoch_macro_f1"]
    assert found["reason"].startswith(f"epoch {best}, the best one, is exported alone: its validation macro-F1 is ")
    expected = merged_weights(config, [best])
    actual = load_file(Path(config.output_dir, "export", "model.safetensors"))
    assert all(np.abs(weight.numpy() - expected[name]).max() <= 1e-6 for name, weight in actual.items())
