"""The pages in docs/: what they tell people to type works, what they name exists, what they list is what is there.

README.md, docs/commands.md and docs/serving.md have their commands run by test_readme.py and test_serve.py.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from ctxtrain.config.overrides import dotted_keys
from ctxtrain.config.schema import Config
from ctxtrain.config.strict_yaml import parse_yaml
from ctxtrain.data.row_schema import ROW_FIELDS, Bar
from ctxtrain.pretraining.run import PretrainConfig
from ctxtrain.storage import checkpoint
from ctxtrain.storage.atomic_files import list_files
from tests import config_page
from tests.bars import exporters
from tests.documented import PAGES, ROOT, SHORT, blocks, commands, run, typed, write_working_folder
from tests.helpers import dated_rows, learnable_rows, write_rows

pytestmark = pytest.mark.slow

RUN = {
    "README.md",
    "docs/commands.md",
    "docs/tutorial.md",
    "docs/own-windows.md",
}  # in the order in which they stand there


def load(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def listed(kind: str, page: str = "docs/formats.md") -> set[str]:
    """The first column of the table that is headed `kind`."""
    (table,) = re.findall(rf"^\| {kind} \|.*\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE)
    return {name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Path]:
    """A working folder in which the tutorial's commands were typed, one after the other."""
    folder = tmp_path_factory.mktemp("tutorial")
    write_working_folder(folder, tiny_base)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in commands("docs/tutorial.md"):
            run(command)
        yield folder
    finally:
        os.chdir(before)


def test_the_tutorial_ends_in_what_it_says(tutorial: Path) -> None:
    assert len(commands("docs/tutorial.md")) == 8
    assert all("abstained" in orjson.loads(line) for line in (tutorial / "sure.jsonl").read_bytes().splitlines())
    assert (tutorial / "runs" / "mine" / "final_model.zip").exists()
    assert (tutorial / "runs" / "folds" / "fold_1" / "final_model.zip").exists()


def test_the_formats_page_lists_what_a_run_leaves(tutorial: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    root = tutorial / "runs" / "mine"
    lines = [orjson.loads(line) for line in (root / "metrics.jsonl").read_bytes().splitlines()]
    newest = max((root / "checkpoints").iterdir())
    sure = orjson.loads((tutorial / "sure.jsonl").read_bytes().splitlines()[0])
    capfdbinary.readouterr()
    run("ctxtrain check data/sample/train.jsonl data/sample/val.jsonl --json")
    check = orjson.loads(capfdbinary.readouterr().out)
    run("ctxtrain evaluate runs/mine/final_model.zip data/sample/test.jsonl --compare-dtype --json")
    evaluation = orjson.loads(capfdbinary.readouterr().out)
    found = {
        "key": load(root / "training_summary.json"),
        "step key": next(line for line in lines if line["kind"] == "step"),
        "epoch key": next(line for line in lines if line["kind"] == "epoch"),
        "checkpoint key": checkpoint.load(newest),
        "file of the export": list_files(root / "export"),
        "calibration key": load(root / "export" / "calibration.json"),
        "codec key": load(root / "export" / "codec.json"),
        "prediction key": sure,
        "runs key": load(tutorial / "runs" / "folds" / "runs.json"),
        "check key": check,
        "evaluation key": evaluation.keys() - next(line for line in lines if line["kind"] == "epoch").keys(),
        "comparison key": evaluation["dtype_comparison"],
    }
    assert {kind: listed(kind) for kind in found} == {kind: set(keys) for kind, keys in found.items()}
    assert {path.name for path in root.iterdir()} <= {name.strip("/") for name in listed("file in the run folder")}


def write_exports(folder: Path) -> None:
    """Bars of each program under the names that docs/own-windows.md has."""
    market = exporters.make_market()
    half = len(market["when"]) // 2
    months = ({name: values[part] for name, values in market.items()} for part in (slice(half), slice(half, None)))
    exporters.freqtrade_feather(folder, market).rename(folder / "BTC_USDT-5m.feather")
    exporters.freqtrade_json(folder, market).rename(folder / "BTC_USDT-5m.json.gz")
    exporters.tradingview(folder, market).rename(folder / "BINANCE_BTCUSDT, 5.csv")
    exporters.metatrader(folder, market).rename(folder / "EURUSD_M5_202410252300_202411040700.csv")
    for month, bars in zip((10, 11), months, strict=True):
        exporters.binance(folder, bars).rename(folder / f"BTCUSDT-5m-2024-{month}.csv")
    for write in (exporters.ninjatrader, exporters.interactive_brokers, exporters.nested_export, exporters.excel):
        write(folder, market)


@pytest.fixture
def own_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Path:
    """The files that docs/own-windows.md takes its reader to have."""
    write_working_folder(tmp_path, tiny_base)
    rows = dated_rows(100, seed=0, apart=40)  # cut in order of time, as the page says
    for name, part in (("train", rows[:60]), ("val", rows[60:80]), ("test", rows[80:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    new = [{name: value for name, value in row.items() if name != "label"} for row in learnable_rows(3, seed=9)]
    write_rows(tmp_path / "new.jsonl", new)
    write_exports(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_windows_are_checked_trained_on_and_predicted(own_windows: Path) -> None:
    lines = commands("docs/own-windows.md")
    assert [line.split()[1] for line in lines] == [*["windows"] * 10, "check", "train", "predict"]
    for command in lines:
        run(command)
    written = [line.partition(" -o ")[2] for line in lines[:10]]
    assert all((own_windows / folder / "windows.json").exists() for folder in written)
    # The markets are equal, and so are the windows of the commands that differ in their program only.
    counts = [orjson.loads((own_windows / folder / "windows.json").read_bytes())["events"] for folder in written[:7]]
    assert counts == [counts[0]] * 7
    assert len((own_windows / "predictions.jsonl").read_bytes().splitlines()) == 3


def test_the_formats_page_lists_what_the_card_of_windows_has(tmp_path: Path) -> None:
    path = exporters.freqtrade_feather(tmp_path, exporters.make_market())
    run(f"ctxtrain windows {path} --events 20 -o {tmp_path / 'out'}")
    assert listed("windows key") >= load(tmp_path / "out" / "windows.json").keys()


def test_the_python_of_own_windows_trains_on_rows_in_memory(own_windows: Path) -> None:
    (code,) = blocks("docs/own-windows.md", "python")
    demo = parse_yaml((own_windows / "configs" / "demo.yaml").read_text(), "demo.yaml")
    assert isinstance(demo, dict)
    (own_windows / "own.yaml").write_text(json.dumps({name: demo[name] for name in ("model", "training")}))
    names = ("train", "val", "test")
    rows = {
        name: [json.loads(line) for line in (own_windows / f"{name}.jsonl").read_text().splitlines()] for name in names
    }
    found: dict[str, Any] = dict(rows)
    exec(code.replace('"output_dir=', ", ".join(map(repr, SHORT)) + ', "output_dir='), found)
    assert len(found["predictions"]) == len(rows["test"])
    summary = json.loads((own_windows / "runs" / "memory" / "training_summary.json").read_text())
    assert found["scores"]["accuracy"] == summary["test"]["accuracy"]


def test_own_windows_lists_every_field_that_is_read() -> None:
    assert listed("bar field", "docs/own-windows.md") == set(Bar.__annotations__)
    assert listed("row field", "docs/own-windows.md") == ROW_FIELDS | {"outcome"}  # which is only checked


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"docs/serving.md"}))
def test_every_command_of_a_page_is_run_or_is_a_target_of_make(page: str) -> None:
    if page not in RUN:
        assert commands(page) == [], "give the page a test that runs its commands"
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    others = [line for line in typed(page) if not line.startswith("ctxtrain ")]
    assert [line for line in others if line.split()[0] != "make" or line.split()[1] not in targets] == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_config_on_a_page_is_a_config(page: str) -> None:
    for shown in blocks(page, "yaml"):
        tree = parse_yaml(shown, page)
        assert isinstance(tree, dict), shown
        if "steps" in tree:
            PretrainConfig.model_validate(tree)
        else:
            Config.parse(tree)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = set(re.findall(r"`((?:ctxtrain|ml|configs|docs|tests|benchmarks)/[\w./-]+)`", PAGES[page]))
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_within_the_pages_resolves(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    inside = [link.partition("#") for link in links if not link.startswith(("http://", "https://"))]
    here = (ROOT / page).parent
    assert [path for path, _, _ in inside if not (here / path).exists()] == []
    for path, _, anchor in inside:
        headings = re.findall(r"^#+ (.*)$", (here / path).read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{path}#{anchor}"


def test_the_index_names_every_page_and_the_readme_the_index() -> None:
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/README.md"])) == pages
    assert "README.md" in re.findall(r"\]\(docs/([\w-]+\.md)\)", PAGES["README.md"])  # and that one names them all


def test_the_page_of_config_keys_has_every_key_of_a_run_and_of_pretrain() -> None:
    listed_keys = re.findall(r"^\| `([a-z0-9_.]+)` \|", config_page.page(), re.MULTILINE)
    for model in (Config, PretrainConfig):
        names = dotted_keys(model)
        keys = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
        assert [key for key in keys if key not in listed_keys] == []


def test_the_page_of_config_keys_is_that_of_the_schema() -> None:
    assert config_page.PAGE.read_text() == config_page.page(), "docs/config.md is not current: run `make docs`"


def test_the_published_schemas_are_those_of_the_code() -> None:
    names = {"config.schema.json", "training_summary.schema.json", "runs.schema.json"}
    assert {file.name for file in config_page.SCHEMAS} == names
    for file, part in config_page.SCHEMAS.items():
        assert file.read_bytes() == config_page.published(part), f"{file.name} is not current: run `make docs`"
