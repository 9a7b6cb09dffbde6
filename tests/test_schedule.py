"""Rates rise linearly, fall as asked, and are a function of the step's number."""

import math

import pytest

from mambainllama.errors import ArgumentError
from mambainllama.schedule import rate_factor, warmup_count
from mambainllama.training import TrainingConfig


@pytest.mark.parametrize(
    "schedule, floor", [("cosine", 0.0), ("cosine", 0.1), ("linear", 0.1), ("constant", 0.0)]
)
def test_schedules(schedule, floor):
    total, warmup = 200, 20
    factors = [rate_factor(step, total, warmup, schedule, floor) for step in range(total)]
    assert factors[:warmup] == pytest.approx([(s + 1) / warmup for s in range(warmup)])
    assert max(factors) == 1.0
    falling = factors[warmup:]
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    if schedule == "constant":
        assert set(falling) == {1.0}
        return
    middle = falling[len(falling) // 2]
    assert middle == pytest.approx(floor + (1 - floor) / 2)
    assert floor <= falling[-1] < floor + 0.02


def test_warmup_is_given_in_steps_or_as_a_share():
    assert warmup_count(1000, None, 0.01) == 10
    assert warmup_count(150, None, 0.01) == 2
    assert warmup_count(1000, 50, 0.01) == 50
    assert warmup_count(10, 50, 0.0) == 10
    assert warmup_count(10, None, 0.0) == 0
    assert rate_factor(0, 1, 0, "cosine", 0.0) == 1.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("max_steps", -1),
        ("batch_size", "8"),
        ("sequence_length", 1),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("learning_rate", -1e-3),
        ("min_learning_rate", 2),
        ("warmup_ratio", 1.5),
        ("warmup_steps", -1),
        ("schedule", "cos"),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1),
        ("loss_on", "answer"),
        ("seed", -1),
        ("log_every", 0),
        ("keep_last", 0),
        ("skip_bad", "no"),
        ("gradient_accumulation", 0),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ArgumentError, match=rf"TrainingConfig: {field}=.*expected") as caught:
        TrainingConfig(**{field: value})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_settings_that_change_nothing_about_the_result_are_free():
    base = TrainingConfig().identity()
    assert (
        TrainingConfig(save_every=7, log_every=3, keep_last=None, checkpointing=True).identity()
        == base
    )
    assert TrainingConfig(learning_rate=1e-3).identity() != base
