"""Steps that are not finite and may be skipped: whole, in the ledger, and the same however often a run was stopped."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ctxtrain import Config, TrainingPipeline
from ctxtrain.errors import TrainingDiverged
from ctxtrain.labels import LABELS
from ctxtrain.model.tokenizer import load_tokenizer, quiet_transformers
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import verdict
from ctxtrain.storage.run_folder import RunFolder
from tests.conftest import Amount
from tests.helpers import write_rows
from tests.reliability.conftest import Figure
from tests.reliability.harness import Server, Trial, plain, results, same, write_config
from tests.tiny_models import build_tiny

SICK = "?"
SICK_LINE = 7
ALLOWED = 9


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """Rows that no two files share; every sixth label is not what the text says."""
    return [{"context": f"{'uds'[n % 3] * 4} {seed} {n}", "label": LABELS[n % 3 if n % 6 else 2]} for n in range(count)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound base, and the same with an embedding of one token that overflows in the first norm."""
    sound, sick = (tmp_path_factory.mktemp(name) for name in ("sound", "sick"))
    tokenizer = load_tokenizer(str(build_tiny(sound)))
    (token,) = tokenizer(SICK, add_special_tokens=False)["input_ids"]
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(sound, dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[0] = 3e38
            model.get_input_embeddings().weight[:, 0] = 0.0
            model.save_pretrained(sound)
            model.get_input_embeddings().weight[token, 0] = 1.0
        model.save_pretrained(sick)
    tokenizer.save_pretrained(sick)
    return {"sound": sound, "sick": sick}


def config_of(folder: Path, base: Path, **training: Any) -> Config:
    """Three epochs of five steps of two micro-batches; the token stands in one training window, drawn once an epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = texts(40, seed=1)
    rows[SICK_LINE - 1] |= {"context": f"dddd {SICK}"}
    tree = {
        "data": {
            "train": str(write_rows(folder / "train.jsonl", rows)),
            "val": str(write_rows(folder / "val.jsonl", texts(20, seed=2))),
        },
        "model": {"base": str(base), "max_tokens": 64},
        "oversampling": {"target": "none"},
        "training": {
            "epochs": 3, "batch_size": 4, "gradient_accumulation": 2, "warmup_steps": 2, "learning_rate": 1e-2,
            "skip_nonfinite": ALLOWED,
        } | training,
        "checkpoints": {"keep": 2, "every_steps": 2},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    return Config.parse(tree)


@pytest.fixture(scope="module")
def undisturbed(server: Server, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A run with three skipped steps that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trial = Trial(server, write_config(config_of(folder, bases["sick"]), folder / "config.yaml"), folder / "run")
    trial.finish()
    return trial


@pytest.fixture(scope="module")
def expected(undisturbed: Trial) -> dict[str, Any]:
    return results(undisturbed.root)


class Watched(TrainingPipeline):
    """Keeps the trained weights and their moments behind every record of the ledger."""

    def setup_model(self) -> None:
        super().setup_model()
        self.optimizer_steps = 0
        self.behind: list[dict[str, Any]] = []
        self.learner.optimizer.register_step_post_hook(self.count)
        self.first = self.trained()

    def count(self, *_: object) -> None:
        self.optimizer_steps += 1

    def trained(self) -> dict[str, Any]:
        state = self.learner.state_dict()
        return plain({"weights": state["weights"], "moments": state["optimizer"]["state"]})

    def _log(self, record: dict[str, Any]) -> None:
        super()._log(record)
        assert all(weight.grad is None for weight in self.learner.parameters.values())
        self.behind.append(record | {"trained": self.trained()})


@pytest.mark.promise("D2")
def test_a_step_that_is_not_finite_is_skipped_whole_and_stands_in_the_ledger(
    bases: dict[str, Path], tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    rates: dict[str, list[float | None]] = {}
    seeds = range(amount(1, 3))
    for seed in seeds:
        for name, base in bases.items():
            pipeline = Watched(config_of(tmp_path / f"{name}{seed}", base, seed=seed))
            summary = pipeline.run()
            assert summary
            steps = [record for record in pipeline.behind if record["kind"] != "epoch"]
            skips = [record for record in steps if record["kind"] == "skip"]
            rates[name] = [record.get("learning_rate") for record in steps]
            assert [record["step"] for record in steps] == list(range(1, pipeline.total_steps + 1))
            assert pipeline.optimizer_steps == len(steps) - len(skips)
            assert summary["skipped_steps"] == len(skips) == (3 if name == "sick" else 0)
            said = verdict(Summary.model_validate(summary))
            assert ("3 optimizer steps were skipped because loss or gradient" in said) == bool(skips)
            for number, record in enumerate(steps):
                changed = record["trained"] != (steps[number - 1]["trained"] if number else pipeline.first)
                assert changed == (record["kind"] == "step"), record["step"]
            for skip in skips:  # the window stands in one micro-batch; the other of the step was finite
                assert skip["rows"] == [f"{pipeline.config.data.train}:{SICK_LINE}"]
                assert skip["windows"] == 8
                assert skip["why"].startswith("loss nan, gradient norm nan, learning rate ")
            text = RunFolder(Path(pipeline.config.output_dir)).metrics.path.read_text()
            assert [{**json.loads(line), "trained": 0} for line in text.splitlines()] == [
                {**record, "trained": 0} for record in pipeline.behind
            ]
        # The rate of a step depends on its number alone, whatever was skipped before it.
        assert [sick or sound for sick, sound in zip(rates["sick"], rates["sound"], strict=True)] == rates["sound"]
    figure("D2", "{} steps skipped whole in {} runs", 3 * len(seeds), len(seeds))


@pytest.mark.promise("D2")
def test_the_step_after_the_last_that_may_be_skipped_ends_the_run_and_more_let_it_go_on(
    undisturbed: Trial, expected: dict[str, Any], tmp_path: Path, figure: Figure
) -> None:
    words = ["train", str(undisturbed.config), f"output_dir={tmp_path / 'run'}", "--resume", "--skip-nonfinite"]
    for allowed in range(3):
        ended = undisturbed.server.start(*words, str(allowed), root=tmp_path / "run").wait()
        assert ended.code == 70
        more = " more" if allowed else ""
        assert f"training.skip_nonfinite={allowed} allows no{more} skipped steps" in ended.said
        assert f"or resume from the last checkpoint with training.skip_nonfinite={allowed + 1}." in ended.said
        assert f"train.jsonl:{SICK_LINE}. No weight was changed" in ended.said
    ended = undisturbed.server.start(*words, "3", root=tmp_path / "run").wait()
    assert ended.code == 0
    assert f"train.jsonl:{SICK_LINE}. Step skipped, 3 of 3 allowed" in ended.said
    same(results(tmp_path / "run"), expected)
    figure("D2", "{} runs ended at the first skip too many, then went on to the same bits", 3)


@pytest.mark.promise("D2")
def test_a_run_with_skipped_steps_ends_with_the_same_bits_however_often_it_was_stopped(
    undisturbed: Trial, expected: dict[str, Any], tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    stops = kills = 0
    for entry in range(3, amount(5, 15)):  # a batch of training, or a window that is tried alone for the ledger
        trial = Trial(undisturbed.server, undisturbed.config, tmp_path / f"stopped{entry}")
        while (code := trial.train(signal_in=("training", entry), number=signal.SIGTERM).wait().code) != 0:
            assert code == 128 + signal.SIGTERM
            stops += 1
            kills += trial.train(kill_at=entry).wait().code == -signal.SIGKILL
        same(results(trial.root), expected)
    assert min(stops, kills) > 3
    figure("D2", "{} stops and {} kills of runs that skip, 0 differences", stops, kills)


@pytest.mark.promise("D2")
def test_neither_a_broken_weight_nor_a_whole_epoch_can_be_skipped(bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline = Watched(config_of(tmp_path / "weight", bases["sound"]))
    pipeline.load_data()
    pipeline.setup_model()
    with torch.no_grad():
        next(iter(pipeline.learner.parameters.values())).view(-1)[0] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"optimizer step 1 has .* is not finite; .* No weight was changed\. "):
        pipeline.train_epoch()
    assert pipeline.state.skipped == 0

    config = config_of(tmp_path / "epoch", bases["sick"], batch_size=40, gradient_accumulation=1, warmup_steps=0)
    with pytest.raises(TrainingDiverged, match=r"No step of its epoch was finite, and an epoch needs at least one"):
        TrainingPipeline(config).run()
    assert not list(tmp_path.rglob("*.pt"))
