"""What the README and the pages in docs/ tell people to type, to load and to open, and a folder to type it in."""

import re
import shlex
from pathlib import Path

import pytest

from ctxtrain.cli.process import main
from tests.bars import exporters
from tests.helpers import dated_rows, write_rows

ROOT = Path(__file__).parents[1]
SHORT = ["training.epochs=1", "training.warmup_steps=0"]  # the one thing that the tests change
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return found


def typed(page: str) -> list[str]:
    """Every line of the page's shell blocks, without comments."""
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line and not line.startswith("#")]


def commands(page: str) -> list[str]:
    return [line for line in typed(page) if line.startswith("ctxtrain ")]


def write_working_folder(folder: Path, base: Path) -> None:
    """What `make demo` leaves to type in, with fewer windows and a tiny base under the embedded name; and bars."""
    (folder / "data" / "sample").mkdir(parents=True)
    for seed, (name, rows) in enumerate((("train", 60), ("val", 20), ("test", 20))):
        write_rows(folder / "data" / "sample" / f"{name}.jsonl", dated_rows(rows, seed, apart=40))
    exporters.freqtrade_feather(folder, exporters.make_market())
    (folder / "configs").mkdir()
    demo = (ROOT / "configs" / "demo.yaml").read_text()
    (folder / "configs" / "demo.yaml").write_text(demo.replace("base: embedded", f"base: {base}"))


def run(command: str) -> None:
    """Run one command of a page in the current folder; it must end well."""
    words = shlex.split(command)[1:]
    if words[0] == "train":
        words[2:2] = SHORT
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0, command
