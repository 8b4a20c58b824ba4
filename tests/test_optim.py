"""Learning rate over a run, and the optimizer's implementation."""

import pytest
import torch

from ctxtrain.errors import ConfigError
from ctxtrain.model.optimizer import Schedule, make_optimizer, make_schedule


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
        ConfigError, match=r"at most half of the run, 50 of 100 optimizer steps, got 51\. Use at most 50,"
    ):
        rates("warmup_stable_decay", 51, 100)


def test_optimizer_uses_the_one_implementation_whose_bits_resume_can_rely_on() -> None:
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], learning_rate=1.0, weight_decay=0.1)
    assert optimizer.defaults["fused"] is True
    assert optimizer.defaults["weight_decay"] == 0.1
