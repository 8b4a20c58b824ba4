"""Memory that runs out is told as such: what for, how much where that is known, and what would need less.

The limits are real ones (RLIMIT_AS), in processes of their own.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxtrain import TrainingPipeline, memory
from ctxtrain.config.schema import Config
from ctxtrain.errors import DataError, OutOfMemory
from ctxtrain.model.base_config import convert_errors
from ctxtrain.storage import checkpoint
from tests.conftest import short_run
from tests.helpers import learnable_rows, without_progress, write_rows

pytestmark = pytest.mark.slow

TOO_MUCH = 1 << 60  # bytes: no machine has them, so none gives them


def limited(mebibytes: int, *words: object) -> tuple[int, str]:
    """Exit code and stderr of a command that may take so much more memory."""
    command = [sys.executable, "-m", "tests.limited", str(mebibytes), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr
    assert "internal fault" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1] if done.stderr else ""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("memory")
    return {
        "train": str(write_rows(folder / "train.jsonl", learnable_rows(300, seed=1))),
        "val": str(write_rows(folder / "val.jsonl", learnable_rows(20, seed=2))),
    }


@pytest.fixture(scope="module")
def model(rows: dict[str, str], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = short_run(tiny_base, rows, tmp_path_factory.mktemp("model") / "run", "training.epochs=1")
    TrainingPipeline(config).run()
    return Path(config.output_dir) / "final_model.zip"


@pytest.mark.promise("D7")
def test_a_run_without_enough_memory_says_so(rows: dict[str, str], tmp_path: Path) -> None:
    settings = ("training.batch_size=300", "training.warmup_steps=0", "training.epochs=1", "model.max_tokens=512")
    config = short_run(Path("embedded"), rows, tmp_path / "run", *settings)
    config = Config.parse(config.model_dump(mode="json"), ["model.base=embedded"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    code, said = limited(250, "train", tmp_path / "config.yaml", "--quiet")
    assert code == 70, said
    assert said.startswith("error: memory ran out in a run with batches of 300 windows of at most 512 tokens"), said
    assert said.endswith("with a smaller training.batch_size, model.max_tokens or model.base.")
    assert "(an allocation of " in said


@pytest.mark.promise("D7")
def test_pretraining_without_enough_memory_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    wide = {"width": 2048, "layers": 8, "heads": 8, "kv_heads": 8, "head_dim": 256, "intermediate": 8192}
    tree = {"output_dir": str(tmp_path / "base"), "steps": 1, "architecture": wide}
    (tmp_path / "pretrain.yaml").write_text(json.dumps(tree))
    code, said = limited(500, "pretrain", tmp_path / "pretrain.yaml")
    assert code == 70, said
    assert said.startswith("error: memory ran out while pre-training with batches of 24 windows"), said
    assert said.endswith("Set a smaller batch_size, architecture or max_tokens, and run again.")
    assert list((tmp_path / "base").iterdir()) == []


# In bytes of address space: numpy, regex and torch are each mapped in part and then no more.
SMALL = {"check": 120 << 20, "evaluate": 700 << 20, "export": 700 << 20}


@pytest.mark.promise("D7")
@pytest.mark.parametrize("command", SMALL)
def test_libraries_that_memory_does_not_hold_are_no_internal_fault(
    command: str, model: Path, rows: dict[str, str]
) -> None:
    words: dict[str, list[object]] = {
        "check": ["check", rows["train"]],
        "evaluate": ["evaluate", model, rows["val"]],
        "export": ["export", model.parent],
    }
    done = subprocess.run(
        [sys.executable, "-m", "ctxtrain", *map(str, words[command])],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (SMALL[command], SMALL[command])),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = without_progress(done.stderr)
    assert (done.returncode, said.startswith(f"error: memory ran out in {command}. ")) == (70, True), done.stderr


@pytest.mark.promise("D7")
def test_a_prediction_without_enough_memory_says_so_and_blames_no_export(
    model: Path, rows: dict[str, str], tmp_path: Path
) -> None:
    code, said = limited(2, "predict", model, rows["train"], "-o", tmp_path / "out.jsonl")
    assert code == 70, said
    assert said.startswith("error: memory ran out "), said
    assert not (tmp_path / "out.jsonl").exists()


def real_errors() -> dict[str, BaseException]:
    """What the libraries raise, by asking them for more than there is."""
    found: dict[str, BaseException] = {}
    for name, ask in {
        "torch": lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        "numpy": lambda: np.empty(TOO_MUCH, dtype=np.uint8),
        "python": lambda: bytearray(TOO_MUCH),
    }.items():
        try:
            ask()
        except (MemoryError, RuntimeError) as error:
            found[name] = error
    return found


def test_each_library_s_way_to_say_it_is_known() -> None:
    found = real_errors()
    assert len(found) == 3
    wrapped = ValueError("could not load")
    wrapped.__cause__ = found["torch"]
    more = [
        wrapped,
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("Tried to allocate 20.00 MiB"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("libx.so: cannot map zero-fill pages"),
        ImportError("libx.so: cannot create shared object descriptor: Cannot allocate memory"),
    ]
    for error in (*found.values(), *more):
        assert memory.is_out_of_memory(error), error
    others = [
        *(RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), DataError("bad_alloc in a row")),
        ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),  # which has a size of its own
        ImportError("libx.so: failed to map segment from shared object: Operation not permitted"),  # mounted noexec
        ImportError("libx.so: cannot enable executable stack as shared object requires: Invalid argument"),
        ImportError("libx.so: cannot open shared object file: No such file or directory"),
    ]
    for error in others:
        assert not memory.is_out_of_memory(error), error


def test_the_message_has_what_was_asked_for_where_the_library_says_it() -> None:
    found = real_errors()
    assert f"(an allocation of {TOO_MUCH:,} bytes failed)" in memory.out_of_memory_message(
        found["torch"], "while reading"
    )
    assert "(an allocation of 1.00 EiB failed)" in memory.out_of_memory_message(found["numpy"], "while reading")
    assert (
        memory.out_of_memory_message(found["python"], "while reading", "Read less")
        == "memory ran out while reading. Read less."
    )
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB"
    )
    assert "(an allocation of 20.00 MiB failed)" in memory.out_of_memory_message(cuda, "while training")


def test_only_want_of_memory_becomes_an_out_of_memory() -> None:
    with (
        pytest.raises(OutOfMemory, match="memory ran out while reading"),
        memory.annotate_memory_errors("while reading"),
    ):
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with (
        pytest.raises(OutOfMemory),
        memory.annotate_memory_errors("while opening"),
        convert_errors(DataError, "an export must open"),
    ):
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with pytest.raises(DataError, match="as it was"), memory.annotate_memory_errors("while reading"):
        raise DataError("as it was")
    with pytest.raises(ZeroDivisionError), memory.annotate_memory_errors("while reading"):
        print(1 / 0)


LOADING = """
import resource, sys, torch
from pathlib import Path
from ctxtrain.memory import is_out_of_memory
from ctxtrain.storage import checkpoint
from tests.limited import held
torch.set_num_threads(1)
checkpoint.load(Path(sys.argv[1]))
limit = held() + (int(sys.argv[3]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    checkpoint.load(Path(sys.argv[2]))
except Exception as error:
    print(type(error).__name__, is_out_of_memory(error))
"""


@pytest.mark.promise("D7")
@pytest.mark.parametrize("mebibytes", [32, 96])
def test_a_sound_checkpoint_that_memory_does_not_hold_is_not_called_damaged(mebibytes: int, tmp_path: Path) -> None:
    """64 MiB of weights: the first limit is too low for the file, the second for its tensors beside it."""
    for name, numbers in (("small", 4), ("large", 16 << 20)):
        weights = {"a": torch.zeros(numbers)}
        parts = {"state": {}, "learner": {"weights": weights}, "fingerprint": {}, "environment": {}}
        checkpoint.save(tmp_path / f"{name}.pt", parts)
    command = [sys.executable, "-c", LOADING, str(tmp_path / "small.pt"), str(tmp_path / "large.pt"), str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["True"], done.stdout + done.stderr
