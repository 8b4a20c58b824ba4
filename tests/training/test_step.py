"""One optimizer step: how it is cut does not matter, what is not finite stops it, evaluation leaves no trace."""

import math

import numpy as np
import pytest
import torch

from ctxtrain.data.batches import plan_step
from ctxtrain.errors import TrainingDiverged
from ctxtrain.model import lora
from ctxtrain.train import TrainingPipeline
from ctxtrain.training.step import NonFiniteStep
from tests.conftest import MakeConfig
from tests.helpers import frozen_sha256
from tests.read_backs import counted_read_backs


def ready(make_config: MakeConfig, *overrides: str) -> TrainingPipeline:
    pipeline = TrainingPipeline(make_config(*overrides))
    pipeline.load_data()
    pipeline.setup_model()
    return pipeline


def gradients(pipeline: TrainingPipeline, batch_size: int, accumulation: int, windows: int) -> dict[str, torch.Tensor]:
    """Gradients of one step over the first windows, unclipped, with class weights that differ."""
    learner, labels_N = pipeline.learner, pipeline.data.labels["train"]
    plan = plan_step(
        np.arange(windows), pipeline.data.tokens["train"].lengths, 0, batch_size=batch_size, accumulation=accumulation
    )
    kept: dict[str, torch.Tensor] = {}
    learner.optimizer.register_step_pre_hook(
        lambda *_: kept.update({name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None})
    )
    learner.step(pipeline.data.tokens["train"], labels_N, plan, (0, 0))
    return kept


@pytest.mark.parametrize("windows", [8, 7])
def test_8x1_4x2_and_1x8_give_one_gradient(make_config: MakeConfig, windows: int) -> None:
    ways = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        pipeline = ready(make_config, "lora.dropout=0", "loss.class_weights=[1, 5, 1]", "training.max_grad_norm=null")
        ways.append(gradients(pipeline, batch_size, accumulation, windows))
    whole = ways[0]
    assert all(torch.isfinite(grad).all() for grad in whole.values())
    assert any(grad.abs().max() > 1e-3 for grad in whole.values())
    for other in ways[1:]:
        for name, grad in whole.items():
            torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=0)


def test_micro_batches_cut_by_tokens_give_the_same_loss_and_gradient(make_config: MakeConfig) -> None:
    settings = ("lora.dropout=0", "loss.class_weights=[1, 5, 1]", "training.max_grad_norm=null")
    results = []
    for limit in ("null", "700", "1"):
        pipeline = ready(make_config, *settings, f"training.tokens_per_batch={limit}")
        kept: dict[str, torch.Tensor] = {}
        parameters = pipeline.learner.parameters
        pipeline.learner.optimizer.register_step_pre_hook(
            lambda *_, kept=kept, parameters=parameters: kept.update(
                {name: weight.grad.clone() for name, weight in parameters.items() if weight.grad is not None}
            )
        )
        tokens, labels_N = pipeline.data.tokens["train"], pipeline.data.labels["train"]
        plan = pipeline.learner.plan(np.arange(8), tokens.lengths, 0, 4, 2)
        figures = pipeline.learner.step(tokens, labels_N, plan, (0, 0))
        results.append((len(plan.micro_batches), figures["loss"], kept))
        val = pipeline.evaluate()["loss"]
        assert val == pytest.approx(results[0][1], abs=1)
    (usual, loss, grads), *others = results
    assert usual == 2
    assert [count for count, _, _ in others] == [8 // (700 // int(tokens.lengths[:8].max())), 8]
    for _, other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, abs=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_run_continues_with_layers_computed_anew_to_the_same_bits(make_config: MakeConfig, engine: str) -> None:
    states = []
    for first, second in (("false", "false"), ("true", "false"), ("false", "true")):
        name = f"{engine}-{first}-{second}"
        for run, checkpointing in enumerate((first, second)):
            config = make_config(f"model.engine={engine}", f"model.gradient_checkpointing={checkpointing}", run=name)
            pipeline = TrainingPipeline(config, resume=run > 0)
            pipeline.load_data()
            pipeline.setup_model()
            assert pipeline.learner.engine.kind == ("packed" if engine == "auto" else engine)
            if run:
                pipeline.load_checkpoint(pipeline.checkpoints.epoch_path(1))
            pipeline.train_epoch()
            pipeline.save_checkpoint(pipeline.evaluate())
        states.append(pipeline.learner.state_dict())
    for state in states[1:]:
        for name, weight in states[0]["weights"].items():
            assert torch.equal(state["weights"][name], weight), name
        moments = [torch.cat([m.flatten() for s in each["optimizer"]["state"].values() for m in s.values()])
                   for each in (states[0], state)]  # fmt: skip
        assert torch.equal(*moments)


def test_gradients_are_clipped_to_the_norm_asked_for(make_config: MakeConfig) -> None:
    pipeline = ready(make_config, "training.max_grad_norm=0.01", "lora.dropout=0")
    clipped = gradients(pipeline, 8, 1, 8)
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in clipped.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.promise("D3")
def test_base_does_not_change_and_adapters_do(make_config: MakeConfig) -> None:
    pipeline = ready(make_config)
    assert pipeline.model is not None
    base, trained = frozen_sha256(pipeline.model), lora.trainable_state(pipeline.model)
    pipeline.train_epoch()
    assert frozen_sha256(pipeline.model) == base
    after = lora.trainable_state(pipeline.model)
    assert all(not torch.equal(trained[name], after[name]) for name in trained)


def test_evaluation_leaves_no_trace(make_config: MakeConfig) -> None:
    states = []
    for evaluations in (0, 2):
        pipeline = ready(make_config)
        for _ in range(2):
            for _ in range(evaluations):
                pipeline.evaluate()
            pipeline.train_epoch()
        states.append(pipeline.learner.state_dict()["weights"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.promise("D3")
def test_one_batch_can_be_learnt_by_heart(make_config: MakeConfig) -> None:
    pipeline = ready(make_config, "training.learning_rate=0.005", "lora.dropout=0", "training.schedule=constant")
    labels_N, tokens = pipeline.data.labels["train"], pipeline.data.tokens["train"]
    plan = plan_step(np.arange(8), tokens.lengths, 0, batch_size=8, accumulation=1)
    losses = [pipeline.learner.step(tokens, labels_N, plan, (0, step))["loss"] for step in range(100)]
    assert losses[-1] < 0.01 < losses[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_window_stops_the_step_before_any_weight_changes_and_is_named(
    make_config: MakeConfig, bad: float
) -> None:
    pipeline = ready(make_config)
    assert pipeline.model is not None
    tokens, names = pipeline.data.tokens["train"], pipeline.data.names["train"]
    culprit = 5
    bad_token = int(tokens.row(culprit)[3])
    others = [row for row in range(len(tokens)) if row != culprit and bad_token in tokens.row(row)]
    with torch.no_grad():
        pipeline.model.get_input_embeddings().weight[bad_token] = bad
    before = pipeline.learner.state_dict()
    with pytest.raises(TrainingDiverged) as raised:
        pipeline.train_epoch()
    message = str(raised.value)
    assert f"optimizer step {pipeline.state.step + 1} has loss" in message
    assert "learning rate" in message
    named = {row for row in range(len(tokens)) if names[row] in message}
    assert named
    assert named <= {culprit, *others}
    after = pipeline.learner.state_dict()
    if pipeline.state.step == 0:
        assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])
    assert all(torch.isfinite(weight).all() for weight in after["weights"].values())


def test_a_gradient_that_is_not_finite_stops_the_step_too(make_config: MakeConfig) -> None:
    pipeline = ready(make_config)
    labels_N, tokens = pipeline.data.labels["train"], pipeline.data.tokens["train"]
    weight = next(iter(pipeline.learner.parameters.values()))
    weight.register_hook(lambda grad: grad * math.inf)
    before = pipeline.learner.state_dict()["weights"]
    plan = plan_step(np.arange(8), tokens.lengths, 0, batch_size=4, accumulation=2)
    with pytest.raises(NonFiniteStep, match="gradient norm"):
        pipeline.learner.step(tokens, labels_N, plan, (0, 0))
    after = pipeline.learner.state_dict()["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in pipeline.learner.parameters.values())


def test_validation_logits_that_are_not_finite_name_their_rows(make_config: MakeConfig) -> None:
    pipeline = ready(make_config)
    assert pipeline.model is not None
    with torch.no_grad():
        pipeline.model.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(TrainingDiverged, match=r"logits of 20 validation rows are not finite: row-"):
        pipeline.evaluate()


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_step_of_four_micro_batches_waits_for_the_device_once(make_config: MakeConfig, engine: str) -> None:
    pipeline = ready(make_config, f"model.engine={engine}")
    labels_N, tokens = pipeline.data.labels["train"], pipeline.data.tokens["train"]
    plan = plan_step(np.arange(8), tokens.lengths, 0, batch_size=2, accumulation=4)
    pipeline.learner.step(tokens, labels_N, plan, (0, 0), pipeline._stop_on_signal)  # moments and tables are made once
    with counted_read_backs() as found:
        pipeline.learner.step(tokens, labels_N, plan, (0, 1), pipeline._stop_on_signal)
    assert found == {"tolist": 1}
