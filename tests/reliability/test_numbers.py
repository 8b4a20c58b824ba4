"""Numbers: what is not finite is neither learnt nor saved; gradients, temperatures and exports are right."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from scipy.special import softmax
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ctxtrain import Config, TrainingPipeline, load_model
from ctxtrain.data.batches import plan_step
from ctxtrain.errors import TrainingDiverged
from ctxtrain.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, TemperatureScaler, fit_temperature
from ctxtrain.evaluation.metric_formulas import negative_log_likelihood
from ctxtrain.model import lora
from ctxtrain.model.base import load_classifier
from ctxtrain.model.base_config import HEAD
from ctxtrain.model.losses import FocalLoss, focal_loss
from ctxtrain.model.tokenizer import load_tokenizer
from ctxtrain.storage import checkpoint
from tests.conftest import Amount, MakeConfig
from tests.helpers import frozen_sha256, learnable_rows, write_rows
from tests.reliability.conftest import Figure
from tests.tiny_models import build_tiny

BAD = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}


def ready(make_config: MakeConfig, *overrides: str, run: str = "run") -> TrainingPipeline:
    pipeline = TrainingPipeline(make_config(*overrides, run=run))
    pipeline.load_data()
    pipeline.setup_model()
    return pipeline


def snapshot(pipeline: TrainingPipeline) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in pipeline.learner.parameters.items()}


# What is not finite


def spoil_embedding(pipeline: TrainingPipeline, bad: float) -> None:
    assert pipeline.model is not None
    with torch.no_grad():
        pipeline.model.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("?")] = bad


def spoil_logits(pipeline: TrainingPipeline, bad: float) -> None:
    def change(_module: object, _inputs: object, output: Any) -> Any:
        output.logits = output.logits + torch.tensor([0.0, bad, 0.0])
        return output

    pipeline.learner.engine.network.register_forward_hook(change)


def spoil_loss(pipeline: TrainingPipeline, bad: float) -> None:
    class Spoilt(FocalLoss):
        def sums(self, logits_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
            loss, weight = super().sums(logits_BC, labels_B)
            return loss + bad, weight

    loss_fn = pipeline.learner.loss_fn
    assert isinstance(loss_fn, FocalLoss)
    pipeline.learner.loss_fn = Spoilt(loss_fn.class_weights, torch.device("cpu"), gamma=loss_fn.gamma)


def spoil_gradient(pipeline: TrainingPipeline, bad: float) -> None:
    weight = list(pipeline.learner.parameters.values())[-2]
    weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), bad))


def spoil_moment(pipeline: TrainingPipeline, bad: float, name: str = "exp_avg") -> None:
    learner = pipeline.learner
    if pipeline.state.step:  # before the first step there are none
        learner.optimizer.state[next(iter(learner.parameters.values()))][name].view(-1)[3] = bad
    else:
        spoil_weight(pipeline, bad)


def spoil_weight(pipeline: TrainingPipeline, bad: float) -> None:
    with torch.no_grad():
        list(pipeline.learner.parameters.values())[1].view(-1)[5] = bad


SITES: dict[str, Callable[[TrainingPipeline, float], None]] = {
    "embedding": spoil_embedding,
    "logits": spoil_logits,
    "loss": spoil_loss,
    "gradient": spoil_gradient,
    "first moment": spoil_moment,
    "second moment": partial(spoil_moment, name="exp_avg_sq"),
    "weight": spoil_weight,
}
STEPS = 24


class Spoilt(TrainingPipeline):
    """A run in which one number goes bad after optimizer step `at`, right behind its checkpoint."""

    site, bad, at, optimizer_steps = "", 0.0, 0, 0

    def setup_model(self) -> None:
        super().setup_model()
        self.learner.optimizer.register_step_post_hook(self.count)
        self.before: dict[str, Tensor] = {}
        if self.at == 0:
            self.spoil()

    def count(self, *_: object) -> None:
        self.optimizer_steps += 1

    def save_checkpoint(self, metrics: dict[str, Any] | None = None) -> None:
        super().save_checkpoint(metrics)
        if self.state.step == self.at and not self.before:
            self.spoil()

    def spoil(self) -> None:
        SITES[self.site](self, self.bad)
        self.before = snapshot(self)


@pytest.mark.promise("D1")
@pytest.mark.parametrize("site", SITES)
def test_what_is_not_finite_stops_the_run_before_the_step_and_reaches_no_checkpoint(
    make_config: MakeConfig, tmp_path: Path, amount: Amount, site: str, figure: Figure
) -> None:
    values = ["NaN", "Inf"] if site == "logits" else list(BAD)  # a logit of −Inf is a probability of 0
    cases = [(step, values[step % len(values)]) for step in range(STEPS)][:: amount(10, 1)]
    for step, name in cases:
        run = f"{step}{name}"
        pipeline = Spoilt(
            make_config("training.epochs=4", "training.warmup_steps=1", "checkpoints.every_steps=1", run=run)
        )
        pipeline.site, pipeline.bad, pipeline.at = site, BAD[name], step
        with pytest.raises(TrainingDiverged) as caught:
            pipeline.run()
        message = str(caught.value)
        case = f"{site} {name} after step {step} of {pipeline.total_steps}: {message}"
        assert pipeline.total_steps >= STEPS
        assert caught.value.exit_code == 70
        assert pipeline.optimizer_steps == step, case
        if step == 0 or step % pipeline.steps_per_epoch:  # else scores and checkpoint of the epoch come first
            assert f"optimizer step {step + 1} has loss " in message, case
            assert "gradient norm" in message, case
            assert "learning rate" in message, case
            assert "train.jsonl:" in message, case
        after = snapshot(pipeline)
        assert all(torch.equal(pipeline.before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in after), case
        saved = list((tmp_path / run).rglob("*.pt"))
        assert saved or step == 0
        for path in saved:
            assert_finite(checkpoint.load(path))
    figure("D1", "{} faults in 7 places, all stopped before the step, none saved", len(cases))


def assert_finite(value: object) -> None:
    if isinstance(value, Tensor):
        assert value.isfinite().all()
    elif isinstance(value, dict):
        for item in value.values():
            assert_finite(item)
    elif isinstance(value, list | tuple):
        for item in value:
            assert_finite(item)
    elif isinstance(value, float):
        assert math.isfinite(value)


def large_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:  # 100 · (1 − rate · decay) is beyond float32
        group["lr"], group["weight_decay"] = 1e30, 1e8


@pytest.mark.promise("D1")
def test_a_step_that_overflows_is_not_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    pipeline = ready(make_config, "checkpoints.every_steps=1")
    with torch.no_grad():
        next(iter(pipeline.learner.parameters.values())).view(-1)[0] = 100
    pipeline.learner.optimizer.register_step_pre_hook(large_step)
    with pytest.raises(TrainingDiverged, match=r"a checkpoint must be finite, but .* is not\. Checkpoints on disk"):
        pipeline.train_epoch()
    assert not list((tmp_path / "run").rglob("*.pt"))


# Arithmetic


@pytest.mark.promise("D3")
def test_a_zeroed_head_starts_at_ln_3_and_the_base_never_changes(make_config: MakeConfig) -> None:
    pipeline = ready(make_config, "loss.focal_gamma=0", "loss.class_weights=none", "training.epochs=1")
    assert pipeline.model is not None
    base = frozen_sha256(pipeline.model)
    with torch.no_grad():
        for name, weight in pipeline.learner.parameters.items():
            if HEAD in name:
                weight.zero_()
    metrics = pipeline.evaluate()
    assert metrics["loss"] == pytest.approx(math.log(3), abs=2e-7)
    plan = plan_step(np.arange(8), pipeline.data.tokens["train"].lengths, 0, batch_size=4, accumulation=2)
    figures = pipeline.learner.step(pipeline.data.tokens["train"], pipeline.data.labels["train"], plan, (0, 0))
    assert figures["loss"] == pytest.approx(math.log(3), abs=2e-7)
    pipeline.train_epoch()
    assert frozen_sha256(pipeline.model) == base


@pytest.mark.promise("D3")
@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gradients_are_the_slopes_of_the_loss_in_float64(
    tmp_path: Path, amount: Amount, family: str, path: str, figure: Figure
) -> None:
    tokenizer = load_tokenizer(str(build_tiny(tmp_path, family)))
    base = load_classifier(str(tmp_path), tokenizer.pad_token_id)
    model = lora.add_lora(base, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj", "o_proj"]).double()
    generator = torch.Generator().manual_seed(1)
    weights = lora.trainable_parameters(model)
    with torch.no_grad():
        for weight in weights.values():  # B is zero at first, which would make every slope of A zero
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    ids_BT = torch.randint(1, 200, (4, 12), generator=generator)
    labels_B = torch.tensor([0, 1, 2, 0])
    network: torch.nn.Module = model
    if path == "fast":
        from ctxtrain.engine.cpu.training_model import FastClassifier

        network = FastClassifier(model)
    network.train()

    def loss() -> Tensor:
        logits_BC = network(input_ids=ids_BT).logits
        assert logits_BC.dtype == torch.float64
        total, weight = focal_loss(logits_BC, labels_B, 2.0, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
        return total / weight

    loss().backward()
    rng = np.random.default_rng(0)
    slopes = 0
    h = 2e-3  # transformers computes norms in float32 whatever the weights are: a smaller step would measure rounding
    for name, weight in weights.items():
        assert weight.grad is not None, name
        scale = float(weight.grad.abs().max())
        assert scale > 0, name
        for place in rng.choice(weight.numel(), min(weight.numel(), amount(3, 100)), replace=False):
            flat = weight.data.view(-1)
            kept = float(flat[place])
            with torch.no_grad():
                flat[place] = kept + h
                above = float(loss())
                flat[place] = kept - h
                below = float(loss())
                flat[place] = kept
            slope = (above - below) / (2 * h)
            slopes += 1
            assert abs(slope - float(weight.grad.view(-1)[place])) <= 1e-3 * scale, (name, place)
    figure("D3", "{} slopes of 4 models", slopes)


# Temperature


def drawn_logits(seed: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Logits and labels of one of eight kinds, and whether a temperature can be fitted to them."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 120))
    labels_N = rng.integers(0, 3, rows)
    logits_NC = rng.normal(0, 1, (rows, 3)) + 1.5 * np.eye(3)[labels_N]
    kind = seed % 8
    if kind == 1:  # separable: ever sharper would be ever better
        logits_NC = 10 * np.eye(3)[labels_N]
    elif kind == 2:
        labels_N = np.full(rows, rng.integers(3))
    elif kind == 3:
        logits_NC = np.round(logits_NC)
    elif kind == 4:
        logits_NC *= 10.0 ** rng.integers(-12, 30)
    elif kind == 5:
        logits_NC[rng.integers(rows), rng.integers(3)] = [math.nan, math.inf, -math.inf][seed % 3]
    elif kind == 6:
        logits_NC[:] = rng.normal()
    elif kind == 7:
        logits_NC *= rng.choice([0.3, 1.0, 4.0, 30.0])
    fits = kind not in (2, 5, 6) and rows >= 10 and len(np.unique(labels_N)) > 1
    return logits_NC, labels_N, fits


def grid_temperature(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The best of a grid that is laid ever closer around its best, to 1e-5 of ln T."""
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    while True:
        grid = np.linspace(low, high, 201)
        best = int(np.argmin([negative_log_likelihood(logits_NC / math.exp(t), labels_N) for t in grid]))
        if high - low < 1e-4:
            return math.exp(grid[best])
        low, high = grid[max(0, best - 2)], grid[min(200, best + 2)]


@pytest.mark.promise("D4")
def test_a_temperature_is_the_best_there_is_or_1_with_a_reason(amount: Amount, figure: Figure) -> None:
    fitted = compared = 0
    for seed in range(amount(160, 1_000)):
        logits_NC, labels_N, fits = drawn_logits(seed)
        scaler = TemperatureScaler().fit(logits_NC, labels_N)
        if scaler.reason_ is not None or not fits:
            assert scaler.reason_, seed
            assert scaler.temperature_ == 1, seed
            continue
        fitted += 1
        temperature = scaler.temperature_
        assert MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE, seed
        before, after = (negative_log_likelihood(logits_NC / t, labels_N) for t in (1.0, temperature))
        assert after <= before + 1e-9, seed
        likeliest_N = logits_NC.argmax(axis=1)[:, None]
        p_NC = scaler.predict_proba(logits_NC)
        assert (np.take_along_axis(p_NC, likeliest_N, 1)[:, 0] == p_NC.max(axis=1)).all(), seed
        if seed % 8 in (0, 3, 7):  # elsewhere many temperatures are equally good
            compared += 1
            assert abs(fit_temperature(logits_NC, labels_N) - grid_temperature(logits_NC, labels_N)) <= 1e-3, seed
    assert fitted > amount(40, 250)
    assert compared > amount(20, 150)
    figure("D4", "{} sets of logits, {} of them fitted", amount(160, 1_000), fitted)


# Export and batches


STRANGER = """
import json, os, sys, torch
from scipy.special import softmax
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
def refuse(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"network: {event}")
sys.addaudithook(refuse)
texts = json.load(open(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype=torch.float32)
rows = []
with torch.no_grad():
    for start in range(0, len(texts), 50):
        rows += model(**tokenizer(texts[start:start + 50], padding=True, return_tensors="pt")).logits.tolist()
json.dump(rows, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A finished run, and 500 windows."""
    folder = tmp_path_factory.mktemp("exported")
    rows = learnable_rows(500, seed=2)
    config = Config.parse(
        {
            "data": {
                "train": str(write_rows(folder / "train.jsonl", learnable_rows(46, seed=1))),
                "val": str(write_rows(folder / "val.jsonl", rows[:60])),
            },
            "model": {"base": str(build_tiny(folder / "base")), "max_tokens": 512},
            "training": {"epochs": 2, "warmup_steps": 1, "learning_rate": 1e-2, "gradient_accumulation": 1},
            "output_dir": str(folder / "run"),
        }
    )
    assert TrainingPipeline(config).run()
    return Path(config.output_dir), rows


def trained_logits(run: Path, texts: list[str]) -> np.ndarray:
    """Of the best epoch's adapters on the frozen base, before any merging."""
    config = Config.load(run / "config.yaml")
    tokenizer = load_tokenizer(config.model.base)
    model = lora.add_lora(load_classifier(config.model.base, tokenizer.pad_token_id), **config.lora.model_dump()).eval()
    best = orjson.loads((run / "training_summary.json").read_bytes())["best"]["epoch"]
    saved = checkpoint.load(run / "checkpoints" / f"checkpoint_epoch_{best}.pt")
    lora.load_trainable_state(model, saved["learner"]["weights"])
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].tolist() for text in texts]
    return np.array(rows)


@pytest.mark.promise("D5")
def test_the_export_answers_as_the_trained_model_did_in_a_fresh_process(
    exported: tuple[Path, list[dict[str, Any]]], tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    run, rows = exported
    model = load_model(run / "final_model.zip")
    texts = [model.render(row) for row in rows[: amount(100, 500)]]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    words = [run / "export", tmp_path / "texts.json", tmp_path / "logits.json"]
    command = [sys.executable, "-I", "-c", STRANGER, *map(str, words)]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    opened = np.array(json.loads((tmp_path / "logits.json").read_text()))
    trained = trained_logits(run, texts)
    assert np.ptp(trained) > 0.1
    assert np.abs(opened - trained).max() <= 1e-5
    assert (opened.argmax(axis=1) == trained.argmax(axis=1)).all()
    predicted = [list(p["probabilities"].values()) for p in model.predict(rows[: len(texts)])]
    assert np.abs(np.array(predicted) - softmax(trained / model.temperature, axis=1)).max() <= 1e-6
    figure("D5", "{} windows", len(texts))


@pytest.mark.promise("D6")
def test_logits_do_not_depend_on_batch_mates_order_or_the_side_of_the_padding(
    exported: tuple[Path, list[dict[str, Any]]], amount: Amount, figure: Figure
) -> None:
    run, _ = exported
    rows = [row for bars in range(30, 46) for row in learnable_rows(4, seed=bars, bars=bars)]
    predictor = load_model(run)
    texts = [predictor.render(row) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    model = AutoModelForSequenceClassification.from_pretrained(run / "export", dtype=torch.float32).eval()
    alone = np.array([logits_of(model, tokenizer, [text])[0] for text in texts])
    assert len({len(ids) for ids in tokenizer(texts)["input_ids"]}) > 10
    assert np.ptp(alone) > 0.1
    rng = np.random.default_rng(0)
    sizes = list(range(1, 65))[:: amount(21, 1)]
    for size in sizes:
        for side in ("right", "left"):
            tokenizer.padding_side = side
            order = rng.permutation(64)[:size]
            together = logits_of(model, tokenizer, [texts[i] for i in order])
            assert np.abs(together - alone[order]).max() <= 1e-5, (size, side)
            assert (together.argmax(axis=1) == alone[order].argmax(axis=1)).all()
        assert np.abs(predictor.logits([rows[i] for i in order]) - alone[order]).max() <= 1e-5, size
    figure("D6", "{} batches of up to 64", 3 * len(sizes))


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> np.ndarray:
    return np.array(model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist())
