"""Ground of every test: no network, and one thread, so that sums keep one order."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the libraries read the environment when they are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from ctxtrain.config.schema import Config
from ctxtrain.evaluation import baseline_models
from ctxtrain.export.fresh_process import fresh_process
from tests.helpers import learnable_rows, write_rows
from tests.tiny_models import build_tiny

torch.set_num_threads(1)
# Trees of the baselines in runs that are not about them: on a few rows those of the product take most of a run's time.
FEWER_TREES = {"EXTRA_TREES": 20, "CATBOOST_TREES": 20, "BOOSTING_ROUNDS": 10}
ALL_TREES = {name: getattr(baseline_models, name) for name in FEWER_TREES}


def set_trees(numbers: Mapping[str, int]) -> None:
    for name, number in numbers.items():
        setattr(baseline_models, name, number)


set_trees(FEWER_TREES)
# A shell starts background jobs with interrupts ignored, which the processes under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeConfig = Callable[..., Config]
Amount = Callable[[int, int], int]
Needs = Callable[[bool, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden/losses.txt anew")
    parser.addoption("--torture", action="store_true", help="fault tests in full: many more kills, flips and inputs")


# Files that take longest come first, so that no worker is left with one of them at the end.
LONGEST = (
    "test_gpu_check",
    *("test_repeats", "test_signals", "test_multi_run", "test_exact_resume", "test_processes", "test_serve"),
    *("test_train", "test_durability", "test_export", "test_memory", "test_table", "test_results", "test_owned_files"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def amount(request: pytest.FixtureRequest) -> Amount:
    """`amount(sample, full)`: how often a fault test tries; the full number under --torture, else a fixed sample."""

    def pick(sample: int, full: int) -> int:
        return full if request.config.getoption("--torture") else sample

    return pick


@pytest.fixture
def needs(request: pytest.FixtureRequest) -> Needs:
    """`needs(there, what)`: what a fault test cannot run without; it skips with the reason, or fails if --torture."""

    def check(there: bool, what: str) -> None:
        if not there:
            (pytest.fail if request.config.getoption("--torture") else pytest.skip)(f"needs {what}")

    return check


@pytest.fixture(scope="module")
def all_trees() -> Iterator[None]:
    """The baselines as the product fits them."""
    set_trees(ALL_TREES)
    yield
    set_trees(FEWER_TREES)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen2 of random weights with the embedded tokenizer."""
    fresh_process.start()  # the runs of one test process share it
    return build_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """46 training and 20 validation rows: with steps of 8 windows, an epoch of 54 ends in a ragged one."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        "train": str(write_rows(folder / "train.jsonl", learnable_rows(46, seed=1))),
        "val": str(write_rows(folder / "val.jsonl", learnable_rows(20, seed=2))),
    }


@pytest.fixture
def make_config(tiny_base: Path, tiny_rows: dict[str, str], tmp_path: Path) -> MakeConfig:
    """A config of a short run, with `section.key=value` overrides."""
    return lambda *overrides, run="run": short_run(tiny_base, tiny_rows, tmp_path / run, *overrides)


def short_run(base: Path, rows: dict[str, str], folder: Path, *overrides: str) -> Config:
    tree = {
        "data": dict(rows),
        "model": {"base": str(base), "max_tokens": 512},
        "training": {
            "epochs": 3,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
        },
        "output_dir": str(folder),
    }
    return Config.parse(tree, overrides)
