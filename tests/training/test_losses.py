"""Losses of the steps: read back together, drawn and checked one by one."""

import pytest
import torch

from compress.errors import NonFinite
from compress.training.losses import LossLog
from compress.training.settings import FitSettings, learning_rate

SETTINGS = FitSettings(steps=10, learning_rate=0.5, warmup_ratio=0.0)


def _log(interval: int) -> tuple[LossLog, list[tuple[int, dict[str, float]]]]:
    drawn: list[tuple[int, dict[str, float]]] = []
    return LossLog(SETTINGS, 10, interval, lambda step, values: drawn.append((step, dict(values)))), drawn


def test_losses_are_read_back_every_few_steps_and_at_the_end_of_an_epoch() -> None:
    log, drawn = _log(3)
    for step in range(1, 6):
        log.check_in_step(torch.tensor(float("nan")), step)  # is not looked at before the readback
        log.add(torch.tensor(float(step)), step)
    assert log.values == [1, 2, 3]
    log.read(5)
    log.read(5)
    assert log.values == [1, 2, 3, 4, 5]
    assert [step for step, _ in drawn] == [1, 2, 3, 4, 5]
    assert drawn[3][1] == {"loss": 4.0, "learning_rate": learning_rate(SETTINGS, 3, 10)}
    assert log.fields() == {"loss": "3.000"}
    assert log.close_epoch() == 3.0
    assert (log.values, log.fields()) == ([], {})


def test_a_loss_that_is_read_late_is_named_with_the_learning_rate_of_its_step() -> None:
    log, _ = _log(3)
    log.add(torch.tensor(1.0), 4)
    log.add(torch.tensor(float("inf")), 5)
    rate = learning_rate(SETTINGS, 4, 10)
    assert f"{rate:.4g}" != f"{learning_rate(SETTINGS, 5, 10):.4g}"
    with pytest.raises(NonFinite, match=rf"got inf at step 5 of 10 \(learning rate {rate:.4g}\)"):
        log.add(torch.tensor(1.0), 6)


def test_where_every_loss_is_read_a_broken_one_ends_the_step_at_once() -> None:
    log, _ = _log(1)
    log.check_in_step(torch.tensor(1.0), 7)
    with pytest.raises(NonFinite, match="got nan at step 7 of 10"):
        log.check_in_step(torch.tensor(float("nan")), 7)
