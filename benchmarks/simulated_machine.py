"""Simulated machine: a clock, sessions and calls with the noise that real machines were seen to have.

Two speeds with dwell times of seconds, an offset of each session (now and then a large one), a penalty for the session
opened first, cold caches after another model's call, jitter and slow single calls.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from compress.model.artifacts import Signature, TensorSpec
from compress.verification.latency import Stopwatch
from compress.verification.runtimes.base import Arrays, Runtime, check_inputs

SIGNATURE = Signature((TensorSpec("image", (1, 1)),), (TensorSpec("logits", (1, 1)),))


@dataclass
class SimulatedMachine:
    """Clock and noise; every share is relative to the time of a call.

    Attributes:
        seed: Of all noise.
        slow: Time of a call in the slow state / in the fast state.
        dwell_s: Mean seconds in one state.
        session: Standard deviation of a session's offset.
        outlier: How often a session's offset is five times as large.
        first_opened: Penalty of the session that is opened while no other is open.
        cold: Penalty of a call that follows another model's.
        jitter: Standard deviation of a single call.
        tail: How often a call is slow, by half on average.
        open_s: Seconds that opening takes.
    """

    seed: int = 0
    slow: float = 1.25
    dwell_s: float = 3.0
    session: float = 0.007
    outlier: float = 0.05
    first_opened: float = 0.005
    cold: float = 0.10
    jitter: float = 0.02
    tail: float = 0.02
    open_s: float = 0.02
    now: float = 0.0
    is_slow: bool = False
    open_count: int = 0
    last: Runtime | None = None
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.is_slow = self.random.random() < 0.5
        self.switch_at = self.random.expovariate(1 / self.dwell_s)

    @property
    def stopwatch(self) -> Stopwatch:
        """The machine's own time."""
        return Stopwatch(lambda: self.now, self.advance)

    def advance(self, seconds: float) -> None:
        """Let time pass; the state may change."""
        self.now += seconds
        while self.now > self.switch_at:
            self.is_slow = not self.is_slow
            self.switch_at += self.random.expovariate(1 / self.dwell_s)

    def model(self, name: str, milliseconds: float, reaction: float = 1.0) -> Callable[[], Runtime]:
        """Return what makes a runtime of a model.

        Args:
            name: Written to `log` at each opening and call.
            milliseconds: Of a call in the fast state.
            reaction: How much of the change of speed the model feels, as an exponent.
        """
        return lambda: _SimulatedRuntime(self, name, milliseconds, reaction)

    @classmethod
    def quiet(cls, **changes: float) -> SimulatedMachine:
        """Return a machine without noise of any kind but that which is given."""
        still = {
            "slow": 1.0,
            "session": 0.0,
            "outlier": 0.0,
            "first_opened": 0.0,
            "cold": 0.0,
            "jitter": 0.0,
            "tail": 0.0,
        }
        return cls(**{**still, **changes})  # type: ignore[arg-type]

    def true_ratio(self, one: tuple[float, float], other: tuple[float, float]) -> float:
        """Return the ratio of two models, (milliseconds, reaction), in geometric mean over both states."""
        return one[0] / other[0] * self.slow ** ((one[1] - other[1]) / 2)


class _SimulatedRuntime(Runtime):
    name = "simulated"

    def __init__(self, machine: SimulatedMachine, model: str, milliseconds: float, reaction: float) -> None:
        super().__init__("simulated")
        self.machine, self.model, self.milliseconds, self.reaction = machine, model, milliseconds, reaction
        self.factor = 1.0

    @property
    def provider_in_use(self) -> str:
        return "simulated"

    def _open(self) -> Signature:
        machine = self.machine
        machine.log.append(f"open {self.model}")
        machine.advance(machine.open_s)
        scale = machine.session * (5 if machine.random.random() < machine.outlier else 1)
        self.factor = math.exp(machine.random.gauss(0, scale)) * (1 + machine.first_opened * (machine.open_count == 0))
        machine.open_count += 1
        return SIGNATURE

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        check_inputs(self.signature, inputs)
        return self._call

    def _call(self) -> None:
        machine, noise = self.machine, self.machine.random
        took = self.milliseconds * self.factor * math.exp(noise.gauss(0, machine.jitter))
        if machine.is_slow:
            took *= machine.slow**self.reaction
        if machine.last is not self:
            took *= 1 + machine.cold
        if noise.random() < machine.tail:
            took *= 1 + noise.expovariate(2)
        machine.last = self
        machine.log.append(self.model)
        machine.advance(took / 1e3)

    def _run(self, inputs: Arrays) -> Arrays:
        self._call()
        return {"logits": np.zeros((1, 1), np.float32)}

    def _close(self) -> None:
        self.machine.open_count -= 1


def no_inputs(_session: Runtime) -> dict[str, np.ndarray]:
    """Return the inputs of a simulated model."""
    return {"image": np.zeros((1, 1), np.float32)}
