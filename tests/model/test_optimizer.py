"""Learning rate over a run, and the optimizer: its implementation and its state."""

import pytest
import torch

from ctxtrain.config.sections import TrainingConfig
from ctxtrain.errors import ConfigError
from ctxtrain.model.optimizer import expected_state, find_non_finite, make_optimizer
from ctxtrain.model.schedule import Schedule, make_schedule


def rates(schedule: Schedule, warmup_steps: int, total_steps: int) -> list[float]:
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], learning_rate=1.0, weight_decay=0.0)
    scheduler = make_schedule(optimizer, schedule, warmup_steps=warmup_steps, total_steps=total_steps)
    seen: list[float] = []
    for _ in range(total_steps):
        seen.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return [*seen, float(scheduler.get_last_lr()[0])]


def test_default_warms_up_stays_and_decays_over_the_second_half() -> None:
    seen = rates("warmup_stable_decay", 100, 1000)  # the specification's Gantt chart, section 7.2
    assert seen[:101] == pytest.approx([step / 100 for step in range(101)])
    assert seen[100:501] == pytest.approx([1.0] * 401)
    assert seen[500:] == pytest.approx([1 - step / 500 for step in range(501)])


@pytest.mark.parametrize("total_steps", [1, 2, 7, 10])
def test_default_ends_at_zero_for_any_length(total_steps: int) -> None:
    seen = rates("warmup_stable_decay", 0, total_steps)
    assert seen[0] == 1.0
    assert seen[-1] == 0.0


@pytest.mark.parametrize(("schedule", "end"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)])
def test_other_schedules_share_the_warm_up(schedule: Schedule, end: float) -> None:
    seen = rates(schedule, 10, 100)
    assert seen[:11] == pytest.approx([step / 10 for step in range(11)])
    assert seen[-1] == pytest.approx(end, abs=1e-9)


def test_warm_up_longer_than_half_the_run_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"at most half of the run, 50 of 100 optimizer steps, got 51\. Set training\.warmup_steps=50",
    ):
        rates("warmup_stable_decay", 51, 100)


def test_optimizer_uses_the_one_implementation_whose_bits_resume_can_rely_on() -> None:
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], learning_rate=1.0, weight_decay=0.1)
    assert optimizer.defaults["fused"] is True
    assert optimizer.defaults["weight_decay"] == 0.1


def test_the_keys_of_the_config_make_the_optimizer() -> None:
    settings = TrainingConfig(learning_rate=0.25, weight_decay=0.125).optimizer_settings
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], **settings)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.25, 0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_checkpoint_must_hold_of_a_weight_is_what_the_optimizer_keeps_of_it(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))
    optimizer = make_optimizer([weight], **TrainingConfig().optimizer_settings)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = {name: (value.shape, value.dtype) for name, value in optimizer.state[weight].items()}
    assert kept == {name: (value.shape, value.dtype) for name, value in expected_state(optimizer, weight).items()}


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_what_is_not_finite_is_named_with_its_weight(moment: str) -> None:
    weights = {name: torch.nn.Parameter(torch.ones(3)) for name in ("head", "adapter")}
    optimizer = make_optimizer(weights.values(), **TrainingConfig().optimizer_settings)
    for weight in weights.values():
        weight.grad = torch.ones(3)
    optimizer.step()
    assert find_non_finite(weights, optimizer) is None
    optimizer.state[weights["adapter"]][moment][1] = torch.inf
    assert find_non_finite(weights, optimizer) == f"{moment} of adapter"
    weights["head"].data[0] = torch.nan
    assert find_non_finite(weights, optimizer) == "head"
