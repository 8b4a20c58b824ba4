"""The process that opens exports is shared, started anew where it died, and ended by an exception."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ctxtrain
from ctxtrain import TrainingPipeline
from ctxtrain.errors import ConfigError, ExportError
from ctxtrain.export import reopen
from ctxtrain.export.check_device import choose_device, rehearse_check
from ctxtrain.export.fresh_process import SCRIPT, FreshProcess, fresh_process
from ctxtrain.model.base import load_classifier
from ctxtrain.model.tokenizer import load_tokenizer
from tests.conftest import MakeConfig

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


BASE_PYTHON = Path(sys.base_prefix) / "bin" / "python3"
REHEARSE = "from ctxtrain.export.fresh_process import fresh_process; fresh_process.rehearse('cpu')"


def test_it_finds_the_libraries_where_this_process_does_but_not_in_the_current_folder(tmp_path: Path) -> None:
    """The base interpreter has no torch: PYTHONPATH alone brings it, as on clusters with module files."""
    folders = [str(Path(torch.__file__).parent.parent), str(Path(ctxtrain.__file__).parent.parent)]
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the current folder was imported')")
    command = [str(BASE_PYTHON), "-c", REHEARSE]  # -c puts the current folder first
    alone = subprocess.run([BASE_PYTHON, "-I", "-c", "import torch"], capture_output=True, check=False)
    assert alone.returncode != 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, str(tmp_path)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_whose_fresh_process_cannot_import_fails_before_its_first_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "transformers.py").write_text("raise ImportError('no transformers here')")
    fresh_process.stop()
    monkeypatch.setattr("ctxtrain.export.fresh_process._module_folders", lambda: [str(broken)])
    config = make_config("training.epochs=1")
    with pytest.raises(ExportError, match=r"(?s)must import torch and transformers.*Nothing was trained.*no transf"):
        TrainingPipeline(config).run()
    fresh_process.stop()
    assert not (Path(config.output_dir) / "metrics.jsonl").exists()


def test_a_device_that_is_not_there_is_refused_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"check_device=cuda needs a GPU .*Use export\.check_device=cpu"):
        rehearse_check("cuda", print)
    rehearse_check("auto", print)
    assert choose_device("auto", 1) == "cpu"


def test_the_script_imports_nothing_of_this_package() -> None:
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "os", "sys", "traceback", "typing", "torch", "transformers"}
