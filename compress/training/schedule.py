"""Learning-rate schedules, as shares of their peak."""

import math

_ONE_CYCLE_START = 1 / 25
_LONG, _SHORT_FACTOR = 0.3, 0.3
_STEP_FACTOR, _STEP_MILESTONES = 0.1, (0.5, 0.75)


def schedule(step: int, total_steps: int, warmup_ratio: float, name: str = "cosine", start: float = 0.0) -> float:
    """Return the learning rate at `step` as a share of its peak.

    With `start` the run is the tail of a longer schedule: its steps are the last ones of `total_steps / (1 - start)`,
    rounded. Warm-up and milestones follow the longer schedule; the part before the tail is skipped.

    Args:
        step: Number of the step, counted from 0.
        total_steps: Number of steps of the run.
        warmup_ratio: Share of the steps over which the rate rises.
        name: "cosine": a line up, a cosine down to 0. "one_cycle": a cosine up from 1/25 of the peak and one down to 0.
            "step": a line up, then a tenth from half of the steps on and a hundredth from three quarters.
        start: Share of the schedule, in [0, 1), that lies before the first step.

    Source: Loshchilov and Hutter 2017, "SGDR", arXiv:1608.03983 (cosine); Smith and Topin 2019, "Super-Convergence",
        arXiv:1708.07120 (one cycle, with cosines as in fastai and torch, and momentum constant); He et al. 2016,
        arXiv:1512.03385, section 4.2 (step); Renda et al. 2020, arXiv:2003.02389 (tails: learning-rate rewinding).

    >>> [round(schedule(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    >>> [round(schedule(step, 4, 0.2, start=0.6), 2) for step in range(4)]
    [0.5, 0.31, 0.15, 0.04]
    """
    if start:
        whole = round(total_steps / (1 - start))
        step, total_steps = step + whole - total_steps, whole
    warmup = round(total_steps * warmup_ratio)
    if step < warmup:
        made = (step + 1) / warmup
        return made if name != "one_cycle" else _ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * _rise(made)
    if name == "step":
        return _STEP_FACTOR ** sum(step >= share * total_steps for share in _STEP_MILESTONES)
    return 1 - _rise((step - warmup) / max(1, total_steps - warmup))


def peak_from_original(learning_rate: float, original_epochs: float, epochs: float) -> float:
    """Return the peak to fine-tune with: the original peak, or 0.3 of it for a short fine-tuning.

    Args:
        learning_rate: Peak of the original training.
        original_epochs: Epochs of the original training.
        epochs: Epochs of the fine-tuning; less than 30 % of the original is short.

    Source: Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv:2003.02389: the
        original rates bring back more than the small one that a training ended with. The share for short runs is ours.
    """
    return learning_rate * (1.0 if epochs >= _LONG * original_epochs else _SHORT_FACTOR)


def _rise(made: float) -> float:
    """Return a cosine from 0 to 1."""
    return 0.5 * (1 - math.cos(math.pi * made))
