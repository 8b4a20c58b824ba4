"""What the README tells people to type works as it stands there."""

import re
from pathlib import Path

import pytest

from ctxtrain.config.schema import Config
from ctxtrain.config.strict_yaml import parse_yaml
from tests.documented import PAGES, ROOT, SHORT, blocks, commands, run, write_working_folder
from tests.helpers import learnable_rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Path:
    write_working_folder(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_in_the_order_given(folder: Path) -> None:
    lines = commands("README.md")
    assert len(lines) == 11
    for line in lines:
        run(line)
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 20
    assert (folder / "data" / "other" / "sample.json").exists()
    assert (folder / "runs" / "folds" / "runs.json").exists()
    assert (folder / "runs" / "seeds" / "seed_1" / "final_model.zip").exists()


def test_the_python_example_runs(folder: Path) -> None:
    (code,) = blocks("README.md", "python")
    code = code.replace('"output_dir=', ", ".join(map(repr, SHORT)) + ', "output_dir=')
    names = {"rows": learnable_rows(3, seed=9)}
    exec(code, names)
    assert (folder / "runs" / "python" / "final_model.zip").exists()
    assert (folder / "runs" / "both" / "seed_1" / "final_model.zip").exists()


def test_the_config_shown_is_the_default_one() -> None:
    (shown,) = blocks("README.md", "yaml")
    config = Config.parse({"data": {"train": "train.jsonl", "val": "val.jsonl"}, "output_dir": "runs/mine"})
    assert Config.parse(parse_yaml(shown, "README.md")) == config


def test_every_file_that_the_readme_names_exists() -> None:
    names = set(re.findall(r"`((?:ctxtrain|ml|configs|docs|tests|benchmarks)/[\w./-]+)`", PAGES["README.md"]))
    assert len(names) > 5
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
