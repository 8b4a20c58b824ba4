"""The exported model: the trained one, merged, that anyone opens with transformers, and that takes no foreign file."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from ctxtrain import Config, TrainingPipeline, load_model
from ctxtrain.cli.process import main
from ctxtrain.data.codec import RENDER_CHUNK
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.tokens import tokenise
from ctxtrain.engine.reference import InferenceEngine
from ctxtrain.errors import ConfigError, DataError, ExportError
from ctxtrain.export import reopen
from ctxtrain.export.compare import TrainedLogits, compare_logits
from ctxtrain.export.fresh_process import fresh_process
from ctxtrain.export.model_card import model_card
from ctxtrain.model import lora
from ctxtrain.model.base import load_classifier
from ctxtrain.model.tokenizer import load_tokenizer
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import advice, verdict
from ctxtrain.storage import checkpoint
from ctxtrain.storage.archive import pack, unpack
from ctxtrain.storage.atomic_files import check_manifest, sha256_file, write_manifest
from tests.data.test_formats import table
from tests.helpers import learnable_rows, make_row, write_rows
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.slow

# Transformers alone, as a stranger would write it.
STRANGER = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts, size = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
rows = []
with torch.no_grad():
    for start in range(0, len(texts), size):
        batch = tokenizer(texts[start:start + size], padding=True, return_tensors="pt")
        rows += model(**batch).logits.tolist()
assert "ctxtrain" not in sys.modules
print(json.dumps(rows))
"""


@dataclass
class Finished:
    config: Config
    summary: dict[str, Any]
    root: Path
    rows: list[dict[str, Any]]

    def trained_logits(self) -> np.ndarray:
        """Logits of the best epoch's adapters on the frozen base, before any merging."""
        predictor = load_model(self.root)
        tokenizer = load_tokenizer(self.config.model.base)
        base = load_classifier(self.config.model.base, tokenizer.pad_token_id)
        model = lora.add_lora(base, **self.config.lora.model_dump())
        name = f"checkpoint_epoch_{self.summary['best']['epoch']}.pt"
        lora.load_trainable_state(model, checkpoint.load(self.root / "checkpoints" / name)["learner"]["weights"])
        return InferenceEngine(model.eval()).token_logits(tokenise(map(predictor.render, self.rows), tokenizer, 512))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    rows = learnable_rows(200, seed=2)
    config = Config.parse(
        {
            "data": {
                "train": str(write_rows(folder / "train.jsonl", learnable_rows(46, seed=1))),
                "val": str(write_rows(folder / "val.jsonl", rows)),
            },
            "model": {"base": str(build_tiny(folder / "base")), "max_tokens": 512},
            "training": {"epochs": 3, "warmup_steps": 1, "learning_rate": 1e-2, "gradient_accumulation": 1},
            "output_dir": str(folder / "run"),
        }
    )
    summary = TrainingPipeline(config).run()
    assert summary is not None
    return Finished(config, summary, Path(config.output_dir), rows)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_plain_transformers_gives_the_trained_logits_on_200_windows(
    finished: Finished, tmp_path: Path, size: int
) -> None:
    predictor = load_model(finished.root)
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([predictor.render(row) for row in finished.rows]))
    command = [sys.executable, "-I", "-c", STRANGER, str(finished.root / "export"), str(texts), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = finished.trained_logits()
    assert np.ptp(expected) > 0.1
    assert np.abs(np.array(json.loads(done.stdout)) - expected).max() <= 1e-5


def test_python_use_gives_the_trained_logits(finished: Finished) -> None:
    expected = finished.trained_logits()
    for path in ("final_model.zip", "export", "."):
        model = load_model(finished.root / path)
        logits = model.logits(finished.rows)
        assert logits.shape == (200, 3)
        assert np.abs(logits - expected).max() <= 1e-5
    predictions = model.predict(finished.rows[:5])
    assert [prediction["id"] for prediction in predictions] == [row["id"] for row in finished.rows[:5]]
    for prediction in predictions:
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["confidence"] == prediction["probabilities"][prediction["label"]]
        assert prediction["confidence"] == max(prediction["probabilities"].values())


def test_peft_opens_the_adapter(finished: Finished) -> None:
    tokenizer = load_tokenizer(finished.config.model.base)
    base = load_classifier(finished.config.model.base, tokenizer.pad_token_id, seed=7)
    model = PeftModel.from_pretrained(base, finished.root / "export" / "adapter").eval()
    predictor = load_model(finished.root)
    logits_NC = InferenceEngine(model).token_logits(tokenise(map(predictor.render, finished.rows), tokenizer, 512))
    assert np.abs(logits_NC - finished.trained_logits()).max() <= 1e-5


def test_evaluate_and_predict_on_the_zip_give_the_numbers_of_the_summary(
    finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, data = str(finished.root / "final_model.zip"), str(finished.config.data.val)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", archive, data, "--json"])
    assert ended.value.code == 0
    scores = json.loads(capfd.readouterr().out)
    assert scores.pop("dtype") == "float32"
    best = {name: value for name, value in finished.summary["best"].items() if name != "epoch"}
    assert scores.pop("nll") == pytest.approx(best.pop("nll"), abs=1e-6)
    assert scores.pop("ece") == pytest.approx(best.pop("ece"), abs=1e-6)
    assert scores == best

    with pytest.raises(SystemExit) as ended:
        main(["predict", archive, data, "-o", str(tmp_path / "out.jsonl")])
    assert ended.value.code == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in finished.rows]
    right = sum(line["label"] == row["label"] for line, row in zip(lines, finished.rows, strict=True))
    assert right / 200 == finished.summary["best"]["accuracy"]


def test_predictions_go_where_they_are_sent_and_replace_nothing_that_is_read(
    finished: Finished, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def predict(output: Path | str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(model), str(rows), "-o", str(output)])
        shown = capfdbinary.readouterr()
        assert ended.value.code == code, shown.err
        return (shown.err if code else shown.out).decode()

    model, rows = finished.root / "final_model.zip", write_rows(tmp_path / "rows.jsonl", finished.rows[:3])
    before, (told, pipe, link) = rows.read_bytes(), (tmp_path / name for name in ("told.jsonl", "pipe", "link"))
    lines = predict("-")
    assert lines.count("\n") == 3
    assert not Path("-").exists()
    told.write_text("older")
    link.symlink_to(told)
    predict(link)
    assert (link.is_symlink(), told.read_text()) == (True, lines)
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as reader:
        read = reader.submit(pipe.read_text)
        predict(pipe)
    assert (pipe.is_fifo(), read.result()) == (True, lines)

    (tmp_path / "same.jsonl").symlink_to(rows)
    for output in (rows, tmp_path / "same.jsonl", model):
        assert f"output must not be an input, got {output} for both." in predict(output, 2)
    assert f"there is no folder {tmp_path}/none. Give another path." in predict(tmp_path / "none" / "out.jsonl", 2)
    assert f"{tmp_path} is a folder. Give another path." in predict(tmp_path, 2)
    assert rows.read_bytes() == before


def test_less_confident_rows_are_skip_only_where_that_is_asked_for(finished: Finished) -> None:
    model = load_model(finished.root / "final_model.zip")
    plain = model.predict(finished.rows)
    assert not any("abstained" in prediction for prediction in plain)
    for bound in (0.0, sorted(prediction["confidence"] for prediction in plain)[100], 1.0):
        for before, after in zip(plain, model.predict(finished.rows, min_confidence=bound), strict=True):
            abstained = before["confidence"] < bound
            label = "SKIP" if abstained else before["label"]
            assert after == {**before, "label": label, "abstained": abstained}
    stored = json.loads((finished.root / "export" / "calibration.json").read_text())["thresholds"]
    assert stored == finished.summary["selective"]["thresholds"]
    for before, after in zip(plain, model.predict(finished.rows, min_confidence="auto"), strict=True):
        least = stored.get(before["label"], {"min_confidence": 0})["min_confidence"]
        assert after["abstained"] == (least is None or before["confidence"] < least)
    with pytest.raises(ConfigError, match=r"auto or a number from 0 to 1, got 1\.5"):
        model.predict(finished.rows, min_confidence=1.5)


def test_predict_reads_standard_input_without_labels(finished: Finished) -> None:
    rows = [make_row(seed=seed, flags=False, id=f"event {seed}") for seed in (3, 1, 2)]
    for row in rows:
        del row["label"]
    command = [sys.executable, "-m", "ctxtrain", "predict", str(finished.root), "-"]
    done = subprocess.run(command, input="\n".join(map(json.dumps, rows)), capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["event 3", "event 1", "event 2"]
    assert all(list(line) == ["id", "label", "confidence", "probabilities"] for line in lines)


def test_what_is_asked_is_read_without_keeping_the_windows(finished: Finished) -> None:
    seen: list[weakref.ref[Any]] = []
    most = 0

    def windows(count: int) -> Iterator[Window]:
        nonlocal most
        for number in range(count):
            window, _ = parse_row(make_row(flags=False, id=f"event {number}"), f"row {number}", labelled=True)
            assert window
            seen.append(weakref.ref(window.bars["close"]))
            if number % 100 == 0:
                most = max(most, sum(there() is not None for there in seen))
            yield window

    batch = load_model(finished.root).encode(windows(4 * RENDER_CHUNK))
    assert len(batch.tokens) == 4 * RENDER_CHUNK
    assert batch.ids[7] == "event 7"
    assert batch.locations[7] == "row 7"
    assert batch.labels_N.tolist() == [0] * len(batch.tokens)
    assert most <= 2 * RENDER_CHUNK  # those rendered, and those that are next


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_faults_of_the_rows_are_named_before_what_the_model_misses_in_them(
    finished: Finished, tmp_path: Path, source: str
) -> None:
    good, odd = make_row(flags=False), make_row(flags=False, delta=False)
    lines = "\n".join([json.dumps(good), json.dumps(odd), json.dumps(good)[:-1]])
    path = tmp_path / "rows.jsonl"
    path.write_text(lines)
    for text, said in ((lines, "3:"), (lines + "}", "2: lacks delta, which the model was trained on")):
        path.write_text(text)
        command = [
            sys.executable,
            "-m",
            "ctxtrain",
            "predict",
            str(finished.root),
            str(path) if source == "file" else "-",
        ]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == DataError.exit_code
        assert f"{path if source == 'file' else source}:{said}" in done.stderr
        assert done.stdout == ""


def test_a_row_without_a_trained_field_is_refused(finished: Finished) -> None:
    with pytest.raises(DataError, match=r"row 2: lacks delta, which the model was trained on"):
        load_model(finished.root).predict([make_row(flags=False), make_row(flags=False, delta=False)])


def test_a_single_row_is_refused_with_what_to_pass(finished: Finished) -> None:
    model = load_model(finished.root)
    with pytest.raises(DataError, match=r"got a single dict\. Pass \[row\]\."):
        model.predict(make_row(flags=False))
    assert re.fullmatch(r"<Predictor \w+: temperature \d\.\d{3}, float32, \w+>", repr(model))


def test_rows_are_predicted_and_scored_alike_whatever_holds_them(finished: Finished) -> None:
    model, rows, path = load_model(finished.root), finished.rows[:40], finished.config.data.val
    expected = model.predict(rows)
    assert model.predict(pd.DataFrame(rows)) == model.predict(row for row in rows) == expected
    assert model.predict(table(rows)) == model.predict(path)[:40] == expected
    assert model.predict([]) == []
    scores = model.evaluate(finished.rows)
    assert scores == model.evaluate(pd.DataFrame(finished.rows)) == model.evaluate(f"file://{path}")
    assert scores["accuracy"] == finished.summary["best"]["accuracy"]
    with pytest.raises(DataError, match=r"^row 1: label is missing"):
        model.evaluate([{name: value for name, value in rows[0].items() if name != "label"}])


def test_the_example_of_the_model_card_runs_as_it_stands(finished: Finished) -> None:
    card = (finished.root / "export" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    done = subprocess.run(
        [sys.executable, "-I", "-c", code[1]], cwd=finished.root / "export", capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\{'LONG': 0\.\d+.*, 'SHORT': 0\.\d+.*, 'SKIP': 0\.\d+.*\}", done.stdout.strip())


def test_the_model_card_holds_its_scores_for_a_hub(finished: Finished) -> None:
    card = finished.root.joinpath("export", "README.md").read_text()
    metadata: Any = ModelCard(card).data
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "text-classification")
    scores = {result.metric_name: result.metric_value for result in metadata.eval_results}
    best = finished.summary["best"]
    assert scores == {"accuracy": best["accuracy"], "macro-F1": best["macro_f1"]}
    summary = Summary.model_validate(finished.summary)
    assert 0 < card.index(advice(summary)) < card.index("Scores on the validation rows")
    assert next(iter(finished.summary)) == "verdict"
    assert finished.summary["verdict"] == verdict(summary)
    assert "base_model" not in metadata.to_dict()  # a folder's name is no id of a hub
    assert "base_model: Qwen/Qwen3-0.6B" in model_card("Qwen/Qwen3-0.6B", summary.best, None, "advice", "text")


def test_export_names_no_path_of_this_machine(finished: Finished) -> None:
    for path in (finished.root / "export").rglob("*"):
        if path.is_file():
            assert str(finished.root.parent).encode() not in path.read_bytes()


def reopened(folder: Path, texts: list[str]) -> Any:
    with fresh_process.reopened_logits(folder, texts, 1) as logits:
        return logits.result()


def test_an_export_that_answers_differently_is_refused(finished: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.root / "export", tmp_path / "export")
    predictor = load_model(finished.root)
    texts = [predictor.render(row) for row in finished.rows[:20]]
    trained = TrainedLogits(finished.trained_logits()[:20], 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    merged = np.array(reopen.model_logits(model, predictor.tokenizer, texts, 32))
    check = compare_logits(reopened(folder, texts), trained, merged)
    assert check["max_logit_difference"] <= 1e-5
    assert check["max_reading_difference"] <= 2e-6
    with torch.no_grad():  # a change that merging could round, but writing and reading could not
        inputs = predictor.tokenizer(texts[:1], return_tensors="pt")
        model.score.weight[0] += 1e-6 * model.model(**inputs).last_hidden_state[0, -1].sign()
    model.save_pretrained(folder)
    logits_NC = reopened(folder, texts)
    with pytest.raises(ExportError, match=r"the merged model's logits within .*, but differs by"):
        compare_logits(logits_NC, trained, merged)
    with pytest.raises(ExportError, match=r"the trained model's logits within .*, but differs by"):
        compare_logits(logits_NC, TrainedLogits(trained.logits_NC + 1e-3, 0.0), logits_NC)


def test_every_changed_missing_or_added_file_is_named(finished: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.root / "export", tmp_path / "export")
    check_manifest(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-10] ^= 1
    weights.write_bytes(content)
    (folder / "codec.json").unlink()
    (folder / "surplus.py").write_text("")
    with pytest.raises(DataError) as raised:
        load_model(folder)
    for words in ("model.safetensors: changed", "codec.json: listed"):
        assert words in str(raised.value)
    surplus = f"{folder}/surplus.py: not listed in manifest.json. Move it away, or copy the whole export."
    assert surplus in raised.value.faults


def test_packing_is_deterministic_and_unpacks_to_the_same(finished: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.root / "export", tmp_path / "export")
    for path in folder.rglob("*"):
        path.touch()
    pack(folder, tmp_path / "again.zip")
    assert sha256_file(tmp_path / "again.zip") == sha256_file(finished.root / "final_model.zip")
    unpack(tmp_path / "again.zip", tmp_path / "unpacked")
    check_manifest(tmp_path / "unpacked")


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    "names",
    [
        ["../outside.txt"],
        ["/absolute.txt"],
        ["adapter/../../outside.txt"],
        ["C:\\drive.txt"],
        ["deep/er/file.txt"],
        ["Config.json"],
        [".hidden"],
        ["link"],
    ],
)
def test_a_hostile_zip_is_refused_before_anything_is_written(names: list[str], tmp_path: Path) -> None:
    archive = tmp_path / "hostile.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for name in ["config.json", *names]:
            out.writestr(entry(name, stat.S_IFLNK | 0o777 if name == "link" else stat.S_IFREG | 0o644), b"{}")
    with pytest.raises(DataError, match="not a whole zip file of an export"):
        unpack(archive, tmp_path / "inside" / "folder")
    assert not (tmp_path / "inside").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.zip"]


def test_a_compressed_or_cut_zip_is_refused(finished: Finished, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model.safetensors", b"\0" * 10_000_000)
    with pytest.raises(DataError, match="not a whole zip file of an export"):
        load_model(bomb)
    cut = tmp_path / "cut.zip"
    cut.write_bytes((finished.root / "final_model.zip").read_bytes()[:-100])
    with pytest.raises(DataError, match="not a whole zip file"):
        load_model(cut)


def test_what_is_no_model_is_named(tmp_path: Path, finished: Finished) -> None:
    with pytest.raises(ConfigError, match="no such model"):
        load_model(tmp_path / "nothing.zip")
    with pytest.raises(DataError, match="not an export, it has no manifest"):
        load_model(tmp_path)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="no export yet"):
        load_model(unfinished)
    for name in ("codec.json", "calibration.json"):
        folder = shutil.copytree(finished.root / "export", tmp_path / name)
        (folder / name).write_text('{"version": 2}')
        write_manifest(folder)
        with pytest.raises(DataError, match=name):
            load_model(folder)
