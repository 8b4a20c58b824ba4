"""Public names, commands, options and config keys: what the scripts of users depend on.

A change that turns a test here red is a change that users must be told about.
"""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import ctxtrain
from ctxtrain.cli.commands import app
from ctxtrain.cli.process import main
from ctxtrain.config.schema import KEYS
from ctxtrain.engine import tuning
from ctxtrain.engine.api import tune_process

WAIT = "OMP_WAIT_POLICY"
CONFIG_KEYS = """
data data.train data.val data.test data.codec data.purge data.embargo data.label_horizon data.allow_leakage
data.fields data.cache
augmentation augmentation.mirror augmentation.crop
model model.base model.revision model.max_tokens model.dtype model.engine model.quantization
model.gradient_checkpointing
lora lora.r lora.alpha lora.dropout lora.target_modules lora.layers
loss loss.focal_gamma loss.class_weights
oversampling oversampling.target oversampling.max_repeat
training training.epochs training.batch_size training.learning_rate training.warmup_steps training.weight_decay
training.gradient_accumulation training.tokens_per_batch training.max_grad_norm training.schedule
training.skip_nonfinite training.patience training.seed training.seeds
checkpoints checkpoints.keep checkpoints.every_steps checkpoints.average
calibration calibration.method
export export.dtype export.check_device
targets targets.accuracy targets.macro_f1 targets.long_precision targets.short_precision targets.long_recall
targets.short_recall
evaluation evaluation.folds evaluation.fold evaluation.learning_curve
tracking tracking.to
output_dir
"""

COMMANDS = {
    "windows": (
        "bars_files... -o/--output --events --bars --label --profit --stop --horizon --cost --structure --higher "
        "--fields --split --max-gap --symbol --time-zone --stamp --bar-length --columns --decimal --separator --dates"
    ),
    "sample": "folder --train --val --test --seed --noise --mix --hide-flags --shuffle-labels",
    "check": "train [val] [test] --base --max-tokens --fields --json",
    "train": "config [overrides...] --resume --skip-nonfinite --require-targets --quiet --json",
    "evaluate": "model data --dtype --compare-dtype --json",
    "predict": "model data -o/--output --min-confidence --dtype",
    "serve": (
        "model --host --port --max-batch --max-wait-ms --max-body-bytes --queue --min-confidence --dtype --access-log"
    ),
    "export": "run",
    "report": "run",
    "pretrain": "config",
}

# Prints the heavy modules that each --help loaded, in one process.
HELP = """
import sys
from ctxtrain.cli.process import main
for words in ([], *([command] for command in sys.argv[1:])):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
heavy = {"accelerate", "altair", "fastapi", "numpy", "peft", "prometheus_client", "scipy", "sklearn", "tokenizers"}
heavy |= {"catboost", "pandas", "torch", "transformers", "uvicorn"}
print("LOADED", sorted(heavy & sys.modules.keys()))
"""


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group has commands


def usage(command: Any) -> str:
    words = []
    for parameter in command.params:
        if parameter.param_type_name == "option":
            words.append("/".join(name for name in parameter.opts if name != "--help"))
        else:
            name = parameter.name + ("..." if parameter.nargs == -1 else "")
            words.append(name if parameter.required else f"[{name}]")
    return " ".join(word for word in words if word)


def test_public_names_are_these() -> None:
    assert ctxtrain.__all__ == ["Config", "TrainingPipeline", "load_model", "run_several"]
    for name in ctxtrain.__all__:
        assert getattr(ctxtrain, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'ctxtrain' has no attribute 'Trainer'"):
        ctxtrain.Trainer  # noqa: B018  # reading it is the test


def test_config_keys_are_these() -> None:
    assert sorted(KEYS) == sorted(CONFIG_KEYS.split())


def test_commands_and_their_options_are_these() -> None:
    assert {name: usage(command) for name, command in commands().items()} == COMMANDS


def test_every_command_and_option_has_its_help() -> None:
    for name, command in commands().items():
        assert command.help, name
        assert [parameter.name for parameter in command.params if not parameter.help] == [], name


def test_help_answers_without_loading_anything_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *pages, loaded = done.stdout.splitlines()
    assert loaded == "LOADED []"
    assert sum(line.startswith("Usage: ctxtrain") for line in pages) == 1 + len(COMMANDS)


def test_the_version_is_that_of_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    project = tomllib.loads((Path(ctxtrain.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert (ended.value.code, capfd.readouterr().out) == (0, f"ctxtrain {project['version']}\n")


@pytest.mark.parametrize(
    ("running", "cores", "given", "spins"),
    [
        (1, 2, {}, "10000"),
        (2, 2, {}, "0"),
        (17, 64, {}, "10000"),
        (18, 64, {}, "0"),
        (None, 2, {}, "10000"),
        (2, 2, {"GOMP_SPINCOUNT": "7"}, "7"),
        (1, 2, {"OMP_WAIT_POLICY": "passive"}, None),
    ],
)
def test_threads_spin_on_a_quiet_machine_unless_the_user_says_how_they_wait(
    running: int | None,
    cores: int,
    given: dict[str, str],
    spins: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(tuning, "LOADAVG", tmp_path / "loadavg")
    if running is not None:
        (tmp_path / "loadavg").write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
    tune_process()
    assert given.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["sample", "--seed", "x"]])
def test_only_a_command_that_needs_a_model_waits_to_see_whether_the_machine_is_busy(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(tuning, "LOADAVG", tmp_path / "loadavg")
    monkeypatch.setattr(time, "sleep", looks.append)
    (tmp_path / "loadavg").write_text("9.20 9.18 9.12 9999/9999 11206\n")
    pretraining = ["pretrain", str(tmp_path / "none.yaml")]
    for arguments in (words, pretraining):
        with pytest.raises(SystemExit):
            main(arguments)
        assert bool(looks) == (arguments == pretraining)


def test_threads_do_not_spin_beside_programs_that_are_busy() -> None:
    """Real programs, one per core, and what the system says of them."""
    code = (
        "from ctxtrain.engine.api import tune_process; import os; tune_process(); print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", WAIT)}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.stdout == "0\n"
