"""Contract suite of training-time methods."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import count_macs
from compress.pruning.groups import ChannelGroup
from compress.pruning.methods.base import Method, Removed, Setting
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import ExpectedCost, build_cost
from compress.testing.checks import hold
from compress.training.hooks import OptimizerHooks


@dataclass(frozen=True)
class MethodCase:
    """A classifier and images to train it on.

    Attributes:
        name: Name in the titles of tests.
        module: Network with (N, K) outputs; copied before it is trained.
        images: (N, C, H, W).
        labels: (N,) int64.
    """

    name: str
    module: nn.Module
    images: Tensor
    labels: Tensor


_FINISHED: dict[tuple[type, str], _MethodRun] = {}


class MethodContract:
    """Contract of every training-time method. A subclass sets `method_class` and offers a fixture `method_case`.

    SGD trains the network for a few steps; a quarter of the channels of every group is to be removed.

    Attributes:
        method_class: The method under test.
        options: Its settings; None for its defaults.
        rates: Learning rate of each step.
        momentum: Momentum of SGD.
        tolerance: Largest change of the outputs by the cut, as a share of the largest output.
    """

    method_class: ClassVar[type[Method]]
    options: ClassVar[Any] = None
    rates: ClassVar[tuple[float, ...]] = (0.02,) * 80
    momentum: ClassVar[float] = 0.5
    tolerance: ClassVar[float] = 0.02

    def test_the_cut_changes_next_to_nothing(self, method_case: MethodCase) -> None:
        """Removed channels are zero at the end: the pruned network has the outputs of the trained one."""
        run = self._finished(method_case)
        removed = run.method.removed
        hold(bool(removed), "nothing goes")
        slim = cut_copy(run.module, removed, method_case.images[:1])
        with torch.no_grad():
            difference = float((slim(method_case.images) - run.outputs).abs().max())
        hold(difference <= self.tolerance * float(run.outputs.abs().max()), f"outputs move by {difference:.2g}")

    def test_what_goes_is_what_was_chosen_last(self, method_case: MethodCase) -> None:
        """The method requests one final choice from the budget, and removes the channels of this choice."""
        run = self._finished(method_case)
        hold(len(run.final) == 1, f"{len(run.final)} choices were to stand")
        got = {name: len(channels) for name, channels in run.method.removed.items()}
        wanted = {name: len(channels) for name, channels in run.final[0].items()}
        hold(got == wanted, f"channels go by {got}, chosen were {wanted}")

    def test_same_seed_gives_the_same_network(self, method_case: MethodCase) -> None:
        """Weights and choice are the same to the bit."""
        again = self._run(method_case)
        again.train(len(self.rates))
        again.finish()
        self._hold_same(self._finished(method_case), again)

    def test_a_run_goes_on_from_its_state(self, method_case: MethodCase) -> None:
        """A run that is resumed several times from its saved state has the result of an uninterrupted run."""
        run = self._run(method_case)
        for stop in (1, len(self.rates) // 3, len(self.rates) - 3, len(self.rates)):
            run.train(stop)
            before, run = run, self._run(method_case)
            run.go_on_from(before)
        run.finish()
        self._hold_same(self._finished(method_case), run)

    def test_hooks_are_taken_off(self, method_case: MethodCase) -> None:
        """After the end the network has the hooks it had before."""
        hold(_hooks(self._finished(method_case).module) == _hooks(method_case.module), "a hook is left")

    def test_metrics_are_finite_numbers(self, method_case: MethodCase) -> None:
        """Metrics of the report are numbers by name."""
        metrics = self._finished(method_case).method.metrics()
        hold(all(isinstance(name, str) and math.isfinite(value) for name, value in metrics.items()), f"{metrics}")

    def test_method_says_what_it_is(self, method_case: MethodCase) -> None:
        """The method has a name, and a decision for every group on whether it can be pruned."""
        hold(isinstance(self.method_class.name, str) and bool(self.method_class.name), "it has no name")
        for group in find_cuttable(method_case.module, method_case.images[:1])[0].values():
            reason = self.method_class.unfit(group)
            hold(reason is None or bool(reason), f"'{group.name}' is refused without a reason")

    def _finished(self, case: MethodCase) -> _MethodRun:
        """Return a finished run, computed once for each case."""
        key = (type(self), case.name)
        if key not in _FINISHED:
            run = self._run(case)
            run.train(len(self.rates))
            run.finish()
            _FINISHED[key] = run
        return _FINISHED[key]

    def _run(self, case: MethodCase) -> _MethodRun:
        return _MethodRun(case, self.method_class, self.options, self.rates, self.momentum)

    def _hold_same(self, first: _MethodRun, second: _MethodRun) -> None:
        hold(first.method.removed == second.method.removed, "other channels go")
        others = second.module.state_dict()
        for name, value in first.module.state_dict().items():
            hold(torch.equal(value, others[name]), f"'{name}' differs")


class _MethodRun:
    """Training of a network with a method."""

    def __init__(
        self, case: MethodCase, method_class: type[Method], options: Any, rates: tuple[float, ...], momentum: float
    ) -> None:
        self.case, self.rates, self.step = case, rates, 0
        self.module = copy.deepcopy(case.module)
        self.final: list[Removed] = []
        self.outputs = torch.zeros(0)
        example = case.images[:1]
        found, _ = find_cuttable(self.module, example)
        self.groups = {name: group for name, group in found.items() if not method_class.unfit(group)}
        cost = ExpectedCost(build_cost(self.module, example, self.groups, "macs"), count_macs(self.module, example))
        levels = {name: (_left(group) * group.parts, group.width) for name, group in self.groups.items()}
        setting = Setting(
            module=self.module,
            groups=self.groups,
            choose=self.choose,
            levels=levels,
            rates=np.asarray(rates),
            momentum=momentum,
            weight_decay=0.0,
            seed=0,
            cost=cost,
            kept_ratio=0.5,
            blocks={},
        )
        self.method = method_class(setting, options)
        self.optimizer = torch.optim.SGD(self.module.parameters(), rates[0], momentum)
        if isinstance(self.method, OptimizerHooks):
            self.method.on_optimizer(self.optimizer)

    def choose(
        self,
        scores: Mapping[str, Tensor],
        damages: Mapping[str, np.ndarray] | None = None,
        closed: Sequence[str] = (),
        is_final: bool = False,
    ) -> Removed:
        """Choose the quarter of each group's units with the lowest scores for removal."""
        removed = {}
        for name, values in scores.items():
            group = self.groups[name]
            units = values.reshape(group.parts, -1).sum(0)
            gone = units.argsort(stable=True)[: len(units) - _left(group)]
            removed[name] = group.expand(gone.tolist())
        if is_final:
            self.final.append(removed)
        return removed

    def train(self, until: int) -> None:
        """Train up to a step."""
        self.module.train()
        for step in range(self.step, until):
            torch.manual_seed(step)
            self.optimizer.param_groups[0]["lr"] = self.rates[step]
            self.optimizer.zero_grad(set_to_none=True)
            self.method.on_step_begin(step)
            chosen = torch.randperm(len(self.case.images))[: max(2, len(self.case.images) // 2)]
            F.cross_entropy(self.module(self.case.images[chosen]), self.case.labels[chosen]).backward()  # type: ignore[no-untyped-call]
            self.method.on_gradients(step)
            self.optimizer.step()
            self.method.on_step_end(step)
        self.step = until

    def finish(self) -> None:
        """Record the outputs of the network with the method, then finish the method."""
        with torch.no_grad():
            self.outputs = self.module.eval()(self.case.images)
        self.method.finish()

    def go_on_from(self, other: _MethodRun) -> None:
        """Restore the state of another run, after saving it to a file in memory."""
        content = io.BytesIO()
        torch.save([other.module.state_dict(), other.optimizer.state_dict(), other.method.state_dict()], content)
        content.seek(0)
        module, optimizer, method = torch.load(content, weights_only=True)
        self.module.load_state_dict(module)
        self.optimizer.load_state_dict(optimizer)
        self.method.load_state_dict(method)
        self.final, self.step = list(other.final), other.step


def _left(group: ChannelGroup) -> int:
    """Return the number of units of a group to keep."""
    units = group.width // group.parts
    return units - max(1, units // 4)


def _hooks(module: nn.Module) -> list[tuple[int, int]]:
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
