"""A: a run that is killed anywhere and resumed ends with the bits of one that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxtrain import Config, TrainingPipeline
from ctxtrain.errors import CtxtrainError
from ctxtrain.storage import checkpoint
from tests.conftest import Amount, MakeConfig, Needs
from tests.helpers import learnable_rows, write_rows
from tests.reliability.conftest import Figure, NewTrial
from tests.reliability.harness import SHARDS, Trial, plain, points_of, results, same
from tests.tiny_models import build_tiny

State = dict[str, Any]


def ledger_of(path: Path) -> dict[tuple[int, int], set[tuple[int, ...]]]:
    """For each (epoch, step), the sets of windows that were ever trained there."""
    steps: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for line in path.read_text().splitlines():
        epoch, step, *windows = json.loads(line)
        steps.setdefault((epoch, step), set()).add(tuple(windows))
    return steps


@pytest.mark.promise("A1", "A6")
def test_runs_killed_at_random_instants_end_with_the_same_bits(
    shard: int, new_trial: NewTrial, undisturbed: Trial, expected: dict[str, Any], amount: Amount, figure: Figure
) -> None:
    start = time.monotonic()
    new_trial("span").finish()
    span = 1.1 * (time.monotonic() - start)
    instants, kills, runs = random.Random(shard), 0, 0
    planned = ledger_of(undisturbed.config.parent / "ledger.txt")
    while kills < amount(2, 75):
        trial, runs = new_trial(f"run{runs}"), runs + 1
        ledger = trial.root.with_suffix(".ledger")
        while True:
            child = trial.train(ledger=str(ledger))
            time.sleep(instants.uniform(0, span))
            os.kill(child.pid, signal.SIGKILL)
            ended = child.wait()
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.said
            kills += 1
        same(results(trial.root), expected)
        assert ledger_of(ledger) == planned
        trial.gone()
    figure("A1", "{} kills over {} runs, 0 differences", kills, runs)
    figure("A6", "{} runs with kills, each step with its own windows", runs)


@pytest.mark.promise("A6")
def test_an_epoch_trains_every_window_and_repeats_only_to_balance_the_classes(undisturbed: Trial) -> None:
    steps = ledger_of(undisturbed.config.parent / "ledger.txt")
    assert sorted(steps) == [(epoch, step) for epoch in range(3) for step in range(7)]
    assert all(len(windows) == 1 for windows in steps.values())
    labels = [
        json.loads(line)["label"] for line in (undisturbed.config.parent / "train.jsonl").read_text().splitlines()
    ]
    for epoch in range(3):
        trained = Counter(row for (number, _), sets in steps.items() if number == epoch for row in next(iter(sets)))
        assert set(trained) == set(range(46))
        assert set(Counter(labels[row] for row in trained.elements()).values()) == {18}


@pytest.mark.promise("A2")
def test_a_kill_at_every_call_of_a_save_a_rotation_and_an_export(
    shard: int,
    late_trial: NewTrial,
    late_events: list[list[str]],
    expected: dict[str, Any],
    amount: Amount,
    figure: Figure,
) -> None:
    points = points_of(shard, amount(1, SHARDS), len(late_events), amount)
    for point in points:
        trial = late_trial(f"at{point}")
        assert trial.train(kill_at=point).wait().code == -signal.SIGKILL, late_events[point - 1]
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
    figure("A2", "{} calls", len(points))


@pytest.mark.promise("A2")
@pytest.mark.parametrize("call", ["fsync", "rename", "unlink", "write"])
def test_a_kill_at_system_calls_of_compiled_code_too(
    call: str, late_trial: NewTrial, expected: dict[str, Any], amount: Amount, needs: Needs, figure: Figure
) -> None:
    needs(shutil.which("strace") is not None, "strace")
    tried, number, stride = 0, 1, {"write": 23, "fsync": 3}.get(call, 1)
    while tried < amount(1, 1000):
        trial = late_trial(f"{call}{number}")
        code = under_strace(trial, f"{call}:signal=KILL:when={number}", needs)
        trial.finish()
        same(results(trial.root), expected)
        trial.gone()
        if code == 0:  # there is no such call any more
            break
        assert code == -signal.SIGKILL
        tried, number = tried + 1, number + stride
    figure("A2", "{} system calls", tried)
    assert tried


def under_strace(trial: Trial, fault: str, needs: Needs) -> int:
    """How a run ends in which strace injects a fault."""
    gate = trial.root.with_suffix(".gate")
    child = trial.train(wait_for=str(gate))
    call = fault.partition(":")[0]
    command = ["strace", "-f", "-p", str(child.pid), "-e", f"trace={call}", "-e", f"inject={fault}", "-o", "/dev/null"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr
    said = tracer.stderr.readline()
    gate.touch()
    code = child.wait().code
    tracer.communicate()
    needs("attached" in said, f"a strace that may attach ({said.strip()})")
    return code


@pytest.mark.promise("A3")
def test_twenty_preemptions_in_a_row_and_kills_while_resuming(
    new_trial: NewTrial, expected: dict[str, Any], amount: Amount, figure: Figure
) -> None:
    trial = new_trial("run")
    stops = range(1, amount(4, 20) + 1)
    for step in stops:
        # A step of two micro-batches: the third begins the second step of this process, and stops after the first.
        ended = trial.train(signal_in=("training", 3), number=signal.SIGTERM).wait()
        assert ended.code == 128 + signal.SIGTERM, ended.said
        assert f"stopped at optimizer step {step} of 21" in ended.said
        assert trial.train(kill_at=step).wait().code == -signal.SIGKILL  # before it has trained
    trial.finish()
    same(results(trial.root), expected)
    figure("A3", "{} preemptions and {} kills in one run, 0 differences", len(stops), len(stops))


MATRIX = [
    (accumulation, batch, stop)
    for accumulation in (1, 3)
    for batch in (4, 6)  # 54 windows per epoch: the last micro-batch holds two, or is whole
    for stop in ("evaluation", "training")
]


@pytest.mark.promise("A4")
def test_resume_is_exact_with_and_without_accumulation_ragged_batches_and_at_any_place(
    new_trial: NewTrial, amount: Amount, figure: Figure
) -> None:
    chosen = MATRIX[:: amount(3, 1)]
    for accumulation, batch, phase in chosen:
        endings = []
        for stopped in (False, True):
            trial = new_trial(f"{accumulation}{batch}{phase}{stopped}")
            words = ["train", str(trial.config), f"output_dir={trial.root}", "--resume", "training.epochs=2"]
            words += [f"training.gradient_accumulation={accumulation}", f"training.batch_size={batch}"]
            if stopped:
                entry = (phase, 1 if phase == "evaluation" else 6)
                ended = trial.server.start(*words, root=trial.root, number=signal.SIGTERM, signal_in=entry).wait()
                assert ended.code == 128 + signal.SIGTERM, ended.said
            ended = trial.server.start(*words, root=trial.root).wait()
            assert ended.code == 0, ended.said
            endings.append(results(trial.root))
        same(*endings)
    figure("A4", "{} combinations, 0 differences", len(chosen))


def halved(state: State) -> None:
    state["learner"]["weights"] = {name: weight / 2 for name, weight in state["learner"]["weights"].items()}


def moments_forgotten(state: State) -> None:
    for moments in state["learner"]["optimizer"]["state"].values():
        moments["exp_avg"].zero_()


def second_moments_forgotten(state: State) -> None:
    for moments in state["learner"]["optimizer"]["state"].values():
        moments["exp_avg_sq"].zero_()


def moment_steps_forgotten(state: State) -> None:
    for moments in state["learner"]["optimizer"]["state"].values():
        moments["step"].zero_()


def schedule_begun_anew(state: State) -> None:
    state["learner"]["schedule"]["last_epoch"] = 0


def one_step_back(state: State) -> None:
    state["state"]["step"] -= 1


def losses_forgotten(state: State) -> None:
    state["state"]["loss_sum"] = 0.0


def best_forgotten(state: State) -> None:
    state["state"]["epochs"][1]["macro_f1"] = 0.0


def an_epoch_forgotten(state: State) -> None:
    state["state"]["epochs"].pop()


def names_reordered(state: State) -> None:
    state["learner"]["optimizer_names"].reverse()


SABOTAGE: list[Callable[[State], None]] = [
    halved,
    moments_forgotten,
    second_moments_forgotten,
    moment_steps_forgotten,
    schedule_begun_anew,
    one_step_back,
    losses_forgotten,
    best_forgotten,
    an_epoch_forgotten,
    names_reordered,
]


@pytest.mark.promise("A5")
def test_a_checkpoint_that_lacks_any_part_makes_the_comparison_fail(
    late_trial: NewTrial, expected: dict[str, Any], amount: Amount, figure: Figure
) -> None:
    chosen = SABOTAGE[:: amount(3, 1)]
    for sabotage in chosen:
        trial = late_trial(sabotage.__name__)
        path = trial.root / "checkpoints" / "checkpoint_step_18.pt"
        payload = checkpoint.load(path)
        sabotage(payload)
        path.unlink()
        checkpoint.save(path.with_name(f"checkpoint_step_{payload['state']['step']}.pt"), payload)
        ended = trial.train().wait()
        refused = ended.code in (2, 65)
        assert refused or results(trial.root) != expected, f"{sabotage.__name__} went unnoticed"
    figure("A5", "{} of {} sabotaged parts noticed", len(chosen), len(SABOTAGE))


class Nosy(TrainingPipeline):
    """Evaluates more often than it must."""

    def train_epoch(self) -> float:
        self.evaluate()
        loss = super().train_epoch()
        self.evaluate()
        return loss


@pytest.mark.promise("A7")
def test_evaluation_leaves_no_trace(make_config: MakeConfig, figure: Figure) -> None:
    ended = []
    for run, pipeline in (("plain", TrainingPipeline), ("nosy", Nosy)):
        config = make_config("training.epochs=1", "model.max_tokens=64", run=run)
        training = pipeline(config)
        training.load_data()
        training.setup_model()
        torch.rand(len(run))
        training.train_epoch()
        ended.append(plain(training.learner.state_dict()))
    assert ended[0] == ended[1]
    figure("A7", "{} runs, weights and moments equal", len(ended))


MUTATIONS = {
    "training.learning_rate=0.02": "config.training.learning_rate: 0.01 → 0.02",
    "training.epochs=4": "config.training.epochs: 3 → 4",
    "training.batch_size=8": "config.training.batch_size: 4 → 8",
    "training.gradient_accumulation=1": "config.training.gradient_accumulation: 2 → 1",
    "training.warmup_steps=3": "config.training.warmup_steps: 2 → 3",
    "training.weight_decay=0.1": "config.training.weight_decay: 0.01 → 0.1",
    "training.max_grad_norm=2.0": "config.training.max_grad_norm: 1.0 → 2.0",
    "training.schedule=cosine": "config.training.schedule: 'warmup_stable_decay' → 'cosine'",
    "training.patience=5": "config.training.patience: None → 5",
    "training.seed=5": "config.training.seed: 1 → 5",
    "lora.r=4": "config.lora.r: 8 → 4",
    "lora.alpha=32": "config.lora.alpha: 16 → 32",
    "lora.dropout=0.2": "config.lora.dropout: 0.05 → 0.2",
    "lora.target_modules=[q_proj]": "config.lora.target_modules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] → ['q_proj']",
    "loss.focal_gamma=1.0": "config.loss.focal_gamma: 2.0 → 1.0",
    "loss.class_weights=none": "config.loss.class_weights: 'auto' → 'none'",
    "oversampling.target=none": "config.oversampling.target: 'auto' → 'none'",
    "model.max_tokens=32": "rows.train: '",
    "data.codec=json": "codec.kind: 'compact' → 'json'",
    "rows": "rows.train: '",
    "order": "rows.train: '",
    "validation": "rows.val: '",
    "base": "base_sha256: '",
    "tokenizer": "tokenizer_sha256: '",
}


@pytest.mark.promise("A8")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_resume_with_anything_changed_is_refused_naming_old_and_new(
    mutation: str, late: Trial, tmp_path: Path, figure: Figure
) -> None:
    config = Config.load(late.config, [f"output_dir={late.root}", *changed(mutation, tmp_path)])
    with pytest.raises(CtxtrainError) as raised:
        TrainingPipeline(config, resume=True).run()
    assert MUTATIONS[mutation] in str(raised.value)
    assert "→" in str(raised.value)
    figure("A8", "{} changes refused", 1)


def changed(mutation: str, folder: Path) -> list[str]:
    """The overrides that make a mutation."""
    if "=" in mutation:
        return [mutation]
    if mutation == "base":
        return [f"model.base={build_tiny(folder / 'base', seed=5)}"]
    if mutation == "tokenizer":
        base = build_tiny(folder / "base")
        file = base / "tokenizer.json"
        tree = json.loads(file.read_text())
        first, second = list(tree["model"]["vocab"])[-2:]  # two entries that no row uses change places
        vocab = tree["model"]["vocab"]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        file.write_text(json.dumps(tree))
        return [f"model.base={base}"]
    name = "val" if mutation == "validation" else "train"
    rows = learnable_rows(46, seed=1) if name == "train" else learnable_rows(40, seed=2)
    if mutation == "order":
        rows.reverse()
    else:
        rows[3]["label"] = "SKIP" if rows[3]["label"] != "SKIP" else "LONG"
    return [f"data.{name}={write_rows(folder / 'other.jsonl', rows)}"]


@pytest.mark.promise("A8")
def test_a_digest_that_is_absent_is_no_match() -> None:
    assert checkpoint.differences({"rows": {}}, {"rows": {"val": None}}) == ["rows.val: 'absent' → None"]
