"""What the README tells people to type works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from ml.cli import main
from ml.config import Config
from ml.yaml_text import parse_yaml
from tests.conftest import MakeConfig
from tests.helpers import dated_rows, learnable_rows, write_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = ["training.epochs=1", "training.warmup_steps=0"]  # the one thing that the test changes


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> Path:
    """A working folder as after `make demo`, with fewer windows and a tiny base under the embedded one's name."""
    (tmp_path / "data" / "sample").mkdir(parents=True)
    for seed, (name, rows) in enumerate((("train", 60), ("val", 20), ("test", 20))):
        write_rows(tmp_path / "data" / "sample" / f"{name}.jsonl", dated_rows(rows, seed, apart=40))
    (tmp_path / "configs").mkdir()
    demo = (ROOT / "configs" / "demo.yaml").read_text()
    demo = demo.replace("base: embedded", f"base: {make_config().model.base}")
    (tmp_path / "configs" / "demo.yaml").write_text(demo)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_in_the_order_given(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("ctxtrain ")]
    assert len(lines) == 11
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words[2:2] = SHORT
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, f"{line}\n{capfd.readouterr().err}"
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 20
    assert (folder / "data" / "other" / "sample.json").exists()
    assert (folder / "runs" / "folds" / "runs.json").exists()
    assert (folder / "runs" / "seeds" / "seed_1" / "final_model.zip").exists()


def test_the_python_example_runs(folder: Path) -> None:
    (code,) = blocks("python")
    code = code.replace('["output_dir=runs/python"]', repr(["output_dir=runs/python", *SHORT]))
    names = {"rows": learnable_rows(3, seed=9)}
    exec(code, names)
    assert (folder / "runs" / "python" / "final_model.zip").exists()


def test_the_config_shown_is_the_default_one() -> None:
    (shown,) = blocks("yaml")
    config = Config.parse({"data": {"train": "train.jsonl", "val": "val.jsonl"}, "output_dir": "runs/mine"})
    assert Config.parse(parse_yaml(shown, "README.md")) == config


def test_every_file_that_the_readme_names_exists() -> None:
    names = set(re.findall(r"`((?:ml|configs|docs|tests|benchmarks)/[\w./-]+)`", README))
    assert len(names) > 20
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
