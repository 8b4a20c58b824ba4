"""What the README and the page of commands tell people to type works as it stands there."""

import json
import re
from pathlib import Path

import pytest

from tests.documented import PAGES, ROOT, SHORT, blocks, commands, run, write_working_folder
from tests.helpers import learnable_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Path:
    write_working_folder(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs_in_the_order_given(folder: Path) -> None:
    lines = commands("README.md")
    assert len(lines) == 4
    for line in lines:
        run(line)
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 20


def test_every_command_of_the_page_runs_in_the_order_given(folder: Path) -> None:
    lines = commands("docs/commands.md")
    assert len(lines) == 13
    for line in lines:
        run(line)
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 20
    assert (folder / "data" / "other" / "sample.json").exists()
    assert (folder / "data" / "own" / "windows.json").exists()
    assert (folder / "runs" / "folds" / "runs.json").exists()
    assert (folder / "runs" / "seeds" / "seed_1" / "final_model.zip").exists()


def test_the_python_of_the_readme_runs_as_it_stands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    exec(code.replace('"output_dir=', ", ".join(map(repr, SHORT)) + ', "output_dir='), {})
    summary = json.loads((folder / "runs" / "python" / "training_summary.json").read_text())
    verdict, *answers = capsys.readouterr().out.splitlines()
    assert verdict == summary["verdict"]
    assert len(answers) == 3


def test_the_python_of_the_page_runs(folder: Path) -> None:
    (code,) = blocks("docs/commands.md", "python")
    code = code.replace('"output_dir=', ", ".join(map(repr, SHORT)) + ', "output_dir=')
    exec(code, {"rows": learnable_rows(3, seed=9)})
    assert (folder / "runs" / "both" / "seed_1" / "final_model.zip").exists()


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].split()) <= 600


def test_every_file_that_the_pages_name_exists() -> None:
    pages = PAGES["README.md"] + PAGES["docs/commands.md"] + PAGES["docs/architecture.md"]
    names = set(re.findall(r"`((?:ctxtrain|ml|configs|docs|tests|benchmarks)/[\w./-]+)`", pages))
    assert len(names) > 5
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
