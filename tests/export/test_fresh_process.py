"""The process that opens exports is shared, started anew where it died, and ended by an exception."""

import ast
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ctxtrain.errors import ExportError
from ctxtrain.export import reopen
from ctxtrain.export.fresh_process import SCRIPT, FreshProcess, fresh_process
from ctxtrain.model.lora import load_classifier
from ctxtrain.model.tokenizer import load_tokenizer

TEXTS = [f"Trend {n} up down" for n in range(40)]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tokenizer = load_tokenizer(str(tiny_base))
    load_classifier(str(tiny_base), tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_gives_the_logits_of_plain_transformers_again_and_again(export: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    expected = reopen.model_logits(model, AutoTokenizer.from_pretrained(export), TEXTS, 32)
    before = fresh_process.start().pid
    for _ in range(2):
        with fresh_process.reopened_logits(export, TEXTS, 1) as logits:
            assert logits.result().tolist() == expected
    assert fresh_process.start().pid == before


def test_a_relative_folder_is_one_of_this_process_wherever_it_went_since_the_other_started(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh_process.start()
    monkeypatch.chdir(export.parent)
    with fresh_process.reopened_logits(Path(export.name), TEXTS[:3], 1) as logits:
        assert logits.result().shape == (3, 3)


def test_a_folder_that_does_not_open_is_refused_with_the_reason_and_the_next_one_is_answered(
    export: Path, tmp_path: Path
) -> None:
    refused = pytest.raises(ExportError, match="transformers cannot open the export:")
    with refused, fresh_process.reopened_logits(tmp_path, TEXTS, 1) as logits:
        logits.result()
    with fresh_process.reopened_logits(export, TEXTS[:3], 1) as logits:
        assert logits.result().shape == (3, 3)


def test_a_process_that_was_killed_is_started_again_and_one_that_is_left_early_is_ended(export: Path) -> None:
    process = FreshProcess()
    with process.running():
        first = process.start()
        first.kill()
        first.wait()
        with process.reopened_logits(export, TEXTS[:3], 1) as logits:
            assert logits.result().shape == (3, 3)
        second = process.start()
        with pytest.raises(KeyboardInterrupt), process.reopened_logits(export, TEXTS * 100, 1):
            raise KeyboardInterrupt
        assert second.poll() is not None
        third = process.start()
    assert third.poll() is not None


def test_the_last_of_several_blocks_ends_it_and_a_signal_is_named(export: Path) -> None:
    process = FreshProcess()
    with process.running():
        with process.running():
            first = process.start()
        assert first.poll() is None
        with process.reopened_logits(export, TEXTS[:3], 1) as logits:
            assert logits.result().shape == (3, 3)
        ended = pytest.raises(ExportError, match="the process that opens the new export was ended by SIGTERM")
        with ended, process.reopened_logits(export, TEXTS, 1) as logits:
            process.start().terminate()
            logits.result()
    assert first.poll() is not None


def test_a_fork_leaves_the_process_of_its_parent_alone() -> None:
    mine = fresh_process.start()
    child = os.fork()
    if not child:
        fresh_process.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert mine.poll() is None
    assert fresh_process.start() is mine


def test_the_script_imports_nothing_of_this_package() -> None:
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "os", "sys", "traceback", "typing", "torch", "transformers"}
