"""The server, the run that nobody disturbs, and what the page of promises is filled with."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ctxtrain.config.schema import Config
from tests.helpers import learnable_rows, write_rows
from tests.reliability.harness import SHARDS, Server, Trial, results, serving, write_config
from tests.reliability.page import FIGURES
from tests.tiny_models import build_tiny

NewTrial = Callable[..., Trial]
Figure = Callable[..., None]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """`figure(id, text, *counts)`: what a full run found, for the last column of docs/reliability.md.

    The text has `{}` for each count; the counts of tests that give the same text are added up.
    """

    def write(promise: str, text: str, *counts: int) -> None:
        if request.config.getoption("--torture"):
            FIGURES.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "_", f"{promise} {text} {request.node.name}")
            (FIGURES / f"{name}.json").write_text(json.dumps([promise, text, counts]))

    return write


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of seven steps, the last of each ragged; the two best epochs and the newest are kept."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tree = {
        "data": {
            "train": str(write_rows(folder / "train.jsonl", learnable_rows(46, seed=1))),
            "val": str(write_rows(folder / "val.jsonl", learnable_rows(40, seed=2))),
        },
        "model": {"base": str(build_tiny(folder / "base")), "max_tokens": 64},
        "training": {
            "epochs": 3,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "seed": 1,  # by macro-F1 the second epoch is the best, then the first: all three are kept
        },
        "checkpoints": {"keep": 2, "every_steps": 3},
        "output_dir": str(folder / "run"),
    }
    return write_config(Config.parse(tree), folder / "config.yaml")


@pytest.fixture(scope="session")
def undisturbed(server: Server, config_file: Path) -> Trial:
    """The run to compare with; the server then imports what it has imported."""
    trial = Trial(server, config_file, config_file.parent / "run")
    modules, trace = config_file.parent / "modules.json", config_file.parent / "trace.json"
    trial.finish(modules=str(modules), trace=str(trace), ledger=str(config_file.parent / "ledger.txt"))
    kept = sorted(path.name for path in (trial.root / "checkpoints").iterdir())
    best = json.loads((trial.root / "training_summary.json").read_text())["best"]["epoch"]
    assert (best, len(kept)) == (2, 3), f"tests need a seed by which epoch 2 is best and 1 next, got {best} of {kept}"
    server.ask(**{"import": json.loads(modules.read_text())})
    return trial


@pytest.fixture(scope="session")
def late(undisturbed: Trial) -> Trial:
    """A run killed after step 18 of 21: what is left is three steps, an evaluation, saves, a rotation, the export."""
    events = json.loads((undisturbed.config.parent / "trace.json").read_text())
    saved = next(i for i, (kind, path) in enumerate(events) if kind == "unlink" and path.endswith("_step_15.pt"))
    trial = Trial(undisturbed.server, undisturbed.config, undisturbed.root.with_name("late"))
    assert trial.train(kill_at=saved + 2).wait().code == -signal.SIGKILL
    return trial


@pytest.fixture(scope="session")
def late_events(late: Trial) -> list[list[str]]:
    """The calls of the rest of that run, as [kind, path]."""
    rest = Trial(late.server, late.config, late.root.with_name("rest"))
    shutil.copytree(late.root, rest.root)
    trace = late.config.parent / "late_trace.json"
    rest.finish(trace=str(trace))
    return json.loads(trace.read_text())


@pytest.fixture
def late_trial(late: Trial, new_trial: NewTrial) -> NewTrial:
    """`late_trial(name)`: a run of its own that goes on from there."""

    def make(name: str) -> Trial:
        trial = new_trial(name)
        shutil.copytree(late.root, trial.root)
        return trial

    return make


@pytest.fixture(scope="session")
def expected(undisturbed: Trial) -> dict[str, object]:
    return results(undisturbed.root)


@pytest.fixture
def new_trial(undisturbed: Trial, tmp_path: Path) -> NewTrial:
    """`new_trial(name)`: a run in an empty folder, by the undisturbed run's config."""
    return lambda name: Trial(undisturbed.server, undisturbed.config, tmp_path / name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of this folder are slow; the hook sees those of all folders."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shard" in metafunc.fixturenames:
        metafunc.parametrize("shard", range(SHARDS if metafunc.config.getoption("--torture") else 1))
