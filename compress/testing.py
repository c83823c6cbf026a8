"""What must every criterion, method, runtime and task do? Contract suites for the built-in ones and for plug-ins.

A suite is a class whose methods are tests. Subclass it in a test file, say what is under test, and pytest runs it:

    @pytest.fixture(params=..., scope="module")
    def case(request) -> RuntimeCase: ...

    class TestMyRuntime(RuntimeContract):
        runtime_class = MyRuntime

    @pytest.fixture(params=..., scope="module")
    def criterion_case(request) -> CriterionCase: ...

    class TestMyCriterion(CriterionContract):
        criterion_class = MyCriterion

    @pytest.fixture(params=..., scope="module")
    def method_case(request) -> MethodCase: ...

    class TestMyMethod(MethodContract):
        method_class = MyMethod

    @pytest.fixture(params=..., scope="module")
    def task_case(request) -> TaskCase: ...

    class TestMyTask(TaskContract): ...
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import count_macs
from compress.data.packing import draw
from compress.errors import CompressError, ModelError, RuntimeUnavailable, UnsupportedLayer
from compress.model.artifacts import Signature
from compress.pruning.criteria.base import Criterion, Evidence, Order, WidthsBy, collect_gradients, cross_entropies
from compress.pruning.criteria.gradient_flow import collect_gradient_flow
from compress.pruning.criteria.parameter_gradients import collect_parameter_gradients
from compress.pruning.criteria.pfp import collect_contributions
from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.methods.base import Method, Removed, Setting
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import ExpectedCost, build_cost
from compress.tasks.base import Task, joined
from compress.tasks.outputs import arrays, changed, each, first, picked
from compress.training.hooks import OptimizerHooks
from compress.verification.runtimes.base import Runtime
from compress.verification.runtimes.torch_eager import TorchEager


@dataclass(frozen=True)
class RuntimeCase:
    """One network in both its forms.

    Attributes:
        name: For the test's title.
        module: The torch network.
        signature: Its inputs and outputs, with an open batch axis.
        onnx_path: Its export.
    """

    name: str
    module: nn.Module
    signature: Signature
    onnx_path: Path


class RuntimeContract:
    """What every runtime must do. A subclass sets `runtime_class` and offers a fixture `case`.

    Attributes:
        runtime_class: The runtime under test.
        provider: Execution provider that is present on the machine.
        unavailable_provider: A provider that is not.
        tolerance: Largest difference to torch eager, absolute and relative.
    """

    runtime_class: ClassVar[type[Runtime]]
    provider: ClassVar[str] = "CPUExecutionProvider"
    unavailable_provider: ClassVar[str] = "NoSuchExecutionProvider"
    tolerance: ClassVar[float] = 1e-4

    def open(self, case: RuntimeCase, provider: str | None = None) -> AbstractContextManager[Runtime]:
        """Return the runtime of a case, not opened yet; override it for a runtime that reads no ONNX files."""
        return self.runtime_class.from_file(case.onnx_path, provider=provider or self.provider, threads=1)

    def test_signature_is_the_networks(self, case: RuntimeCase) -> None:
        """Names, shapes and dtypes are those of the network."""
        with self.open(case) as runtime:
            _hold(runtime.signature == case.signature, f"signature is {runtime.signature}")

    def test_output_names_equal_the_signatures(self, case: RuntimeCase) -> None:
        """`run` returns exactly the outputs of the signature, in its order, for a batch of 1 and of 3."""
        with self.open(case) as runtime:
            for batch in (1, 3):
                outputs = runtime.run(_inputs(case.signature, batch))
                wanted = {spec.name: (batch, *spec.shape[1:]) for spec in case.signature.outputs}
                _hold({name: array.shape for name, array in outputs.items()} == wanted, f"outputs at batch {batch}")

    def test_agrees_with_torch_eager(self, case: RuntimeCase) -> None:
        """Outputs equal those of the torch network on the same input."""
        inputs = _inputs(case.signature, 3)
        with self.open(case) as runtime, TorchEager(case.module, case.signature) as reference:
            got, wanted = runtime.run(inputs), reference.run(inputs)
        for name, values in wanted.items():
            close = np.allclose(got[name], values, rtol=self.tolerance, atol=self.tolerance)
            _hold(close, f"output '{name}' differs by {np.abs(got[name] - values).max():.2g}")

    def test_each_image_is_computed_on_its_own(self, case: RuntimeCase) -> None:
        """An image has the same output alone and in a batch."""
        inputs = _inputs(case.signature, 3)
        with self.open(case) as runtime:
            together = runtime.run(inputs)
            alone = runtime.run({name: array[1:2] for name, array in inputs.items()})
        for name, values in alone.items():
            _hold(
                np.allclose(together[name][1:2], values, rtol=self.tolerance, atol=self.tolerance), f"output '{name}'"
            )

    def test_outputs_are_the_callers_own(self, case: RuntimeCase) -> None:
        """A second run leaves the arrays of the first alone."""
        with self.open(case) as runtime:
            first = runtime.run(_inputs(case.signature, 1, seed=0))
            kept = {name: array.copy() for name, array in first.items()}
            runtime.run(_inputs(case.signature, 1, seed=1))
        for name, array in kept.items():
            _hold(np.array_equal(first[name], array) and first[name].flags.writeable, f"output '{name}' changed")

    def test_rejects_wrong_input_name(self, case: RuntimeCase) -> None:
        """An input that the network does not have is named in the error."""
        spec = case.signature.inputs[0]
        inputs = {"no_such_input": _inputs(case.signature, 1)[spec.name]}
        self._expect(case, inputs, f"Inputs must be named {spec.name}")

    def test_rejects_wrong_shape(self, case: RuntimeCase) -> None:
        """A wrong rank, a wrong size and an empty batch are refused."""
        spec = case.signature.inputs[0]
        array = _inputs(case.signature, 2)[spec.name]
        for wrong in (array[0], array[..., :-1], array[:0]):
            self._expect(case, {spec.name: np.ascontiguousarray(wrong)}, f"Input '{spec.name}' must have shape")

    def test_rejects_wrong_dtype(self, case: RuntimeCase) -> None:
        """float64 is not silently taken for float32."""
        spec = case.signature.inputs[0]
        array = _inputs(case.signature, 1)[spec.name].astype(np.float64)
        self._expect(case, {spec.name: array}, f"Input '{spec.name}' must be {spec.dtype}")

    def test_provider_in_use_is_the_one_asked_for(self, case: RuntimeCase) -> None:
        """An open runtime computes where it was asked to."""
        with self.open(case) as runtime:
            _hold(runtime.provider_in_use == runtime.provider == self.provider, f"{runtime.provider_in_use} in use")

    def test_nodes_are_placed_where_the_runtime_computes(self, case: RuntimeCase) -> None:
        """A runtime that can tell where its nodes are names at least one, on the provider asked for."""
        with self.open(case) as runtime:
            placements = runtime.placements(_inputs(case.signature, 1))
        _hold(placements is None or bool(placements.get(self.provider)), f"nodes are placed as {placements}")

    def test_a_bound_call_can_be_made_again_and_again(self, case: RuntimeCase) -> None:
        """What is timed computes each time it is called, and leaves the runtime usable."""
        inputs = _inputs(case.signature, 2)
        with self.open(case) as runtime:
            call, before = runtime.bind(inputs), runtime.run(inputs)
            for _ in range(3):
                call()
            after = runtime.run(inputs)
        for name, values in before.items():
            _hold(np.array_equal(values, after[name]), f"output '{name}' changed")

    def test_absent_provider_is_unavailable(self, case: RuntimeCase) -> None:
        """A provider that is not there is an error that names it, never another provider in silence."""
        try:
            with self.open(case, self.unavailable_provider):
                pass
        except RuntimeUnavailable as error:
            _hold(self.unavailable_provider in str(error), f"message is '{error}'")
        else:
            raise AssertionError("The runtime opened on a provider that is not there.")

    def _expect(self, case: RuntimeCase, inputs: dict[str, np.ndarray], wording: str) -> None:
        with self.open(case) as runtime:
            for call in (runtime.run, runtime.bind):
                try:
                    call(inputs)
                except CompressError as error:
                    _hold(isinstance(error, ModelError) and wording in str(error), f"error is {error!r}")
                else:
                    raise AssertionError(f"The runtime must refuse the input with '{wording}'.")


@dataclass(frozen=True)
class CriterionCase:
    """One network and what a criterion may look at.

    Attributes:
        name: For the test's title.
        module: A classifier; the suite works on copies of it.
        images: (N, ...) input of the network.
        labels: (N,) class indices.
    """

    name: str
    module: nn.Module
    images: Tensor
    labels: Tensor


def _evidence(kind: Evidence, module: nn.Module, groups: Mapping[str, ChannelGroup], case: CriterionCase) -> Any:
    """Return what a criterion gets to look at, collected from the images of a case in two batches."""
    halves = list(zip(case.images.chunk(2), case.labels.chunk(2), strict=True))
    if kind == "weights":
        return None
    if kind == "contributions":
        return collect_contributions(module, groups.values(), halves)
    if kind == "gradient_flow":
        return collect_gradient_flow(module, groups.values(), halves)
    if kind == "parameter_gradients":
        return collect_parameter_gradients(module, halves, cross_entropies)
    return collect_gradients(module, groups.values(), halves)


class CriterionContract:
    """What every criterion must do. A subclass sets `criterion_class` and offers a fixture `criterion_case`.

    A criterion may refuse a group with UnsupportedLayer, but not every group of a network.

    Attributes:
        criterion_class: The criterion under test.
        tolerance: Largest difference between scores that must be equal, relative to the largest score of the group.
    """

    criterion_class: ClassVar[type[Criterion]]
    tolerance: ClassVar[float] = 1e-4

    def score(self, case: CriterionCase, module: nn.Module) -> dict[str, Tensor]:
        """Return the scores of every group of `module` that the criterion does not refuse."""
        groups, _ = find_cuttable(module, case.images[:1])
        criterion = self.criterion_class(seed=0)
        stats = _evidence(criterion.evidence, module, groups, case)
        scores = {}
        for name, group in groups.items():
            try:
                scores[name] = criterion.scores(group, stats)
            except UnsupportedLayer as error:
                _hold(name in str(error), f"the refusal of '{name}' does not name it: '{error}'")
        _hold(bool(scores), f"every group of '{case.name}' is refused")
        return scores

    def test_scores_are_one_finite_number_a_channel(self, criterion_case: CriterionCase) -> None:
        """Scores are (C,) float32, finite, detached."""
        groups, _ = find_cuttable(criterion_case.module, criterion_case.images[:1])
        for name, scores in self.score(criterion_case, criterion_case.module).items():
            _hold(scores.shape == (groups[name].width,), f"'{name}' has scores of shape {tuple(scores.shape)}")
            _hold(scores.dtype == torch.float32, f"'{name}' has scores of {scores.dtype}")
            _hold(bool(scores.isfinite().all()), f"'{name}' has scores that are not finite")
            _hold(not scores.requires_grad, f"'{name}' has scores that hold on to a gradient graph")

    def test_scores_are_the_same_twice(self, criterion_case: CriterionCase) -> None:
        """A new criterion with the same seed gives the same scores to the bit."""
        first, second = (self.score(criterion_case, criterion_case.module) for _ in range(2))
        for name, scores in first.items():
            _hold(torch.equal(scores, second[name]), f"'{name}' has other scores the second time")

    def test_network_is_left_as_it_is(self, criterion_case: CriterionCase) -> None:
        """Weights, buffers, gradients, requires_grad, training flags and hooks do not change."""
        module = copy.deepcopy(criterion_case.module).train()
        next(module.children()).eval()
        next(module.parameters()).requires_grad_(False)
        before, flags = copy.deepcopy(module.state_dict()), _flags(module)
        self.score(criterion_case, module)
        for name, value in module.state_dict().items():
            _hold(torch.equal(value, before[name]), f"'{name}' changed")
        _hold(_flags(module) == flags, "a training flag, a requires_grad, a gradient or a hook changed")

    def test_permuted_channels_have_permuted_scores(self, criterion_case: CriterionCase) -> None:
        """A channel is scored by what it is, not by where it stands."""
        if not self.criterion_class.treats_equals_equally:
            return
        for name, group in self._groups(criterion_case).items():
            units = group.width // group.parts
            order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
            index = _over_parts(group, order)
            before = self.score(criterion_case, criterion_case.module)
            after = self.score(criterion_case, _rearranged(criterion_case.module, group, index))
            if name in before:
                self._hold_close(after[name], before[name][index], name)

    def test_equal_channels_have_equal_scores(self, criterion_case: CriterionCase) -> None:
        """Two channels that are computed and read alike are worth the same."""
        if not self.criterion_class.treats_equals_equally:
            return
        for name, group in self._groups(criterion_case).items():
            units = torch.arange(group.width // group.parts)
            units[-1] = 0
            index = _over_parts(group, units)
            scores = self.score(criterion_case, _rearranged(criterion_case.module, group, index))
            if name in scores:
                self._hold_close(scores[name], scores[name][index], name)

    def test_criterion_says_what_it_is(self, criterion_case: CriterionCase) -> None:
        """Name and traits are there, of their types."""
        _hold(isinstance(self.criterion_class.name, str) and bool(self.criterion_class.name), "it has no name")
        for trait in ("comparable", "treats_equals_equally"):
            _hold(isinstance(getattr(self.criterion_class, trait), bool), f"'{trait}' is not True or False")
        for trait, names in (("evidence", Evidence), ("order", Order), ("widths_by", WidthsBy)):
            _hold(getattr(self.criterion_class, trait) in get_args(names), f"'{trait}' is none of {get_args(names)}")
        method = {"readers": "rank", "loss": "rank_by_loss"}.get(self.criterion_class.order, "scores")
        _hold(callable(getattr(self.criterion_class, method, None)), f"it has no method '{method}'")

    def _groups(self, case: CriterionCase) -> dict[str, ChannelGroup]:
        return find_cuttable(case.module, case.images[:1])[0]

    def _hold_close(self, got: Tensor, wanted: Tensor, name: str) -> None:
        difference = float((got - wanted).abs().max())
        _hold(difference <= self.tolerance * float(wanted.abs().max()), f"'{name}' has scores {difference:.2g} apart")


@dataclass(frozen=True)
class MethodCase:
    """A classifier and images to train it on.

    Attributes:
        name: For the test's title.
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
    """What every training-time method must do. A subclass sets `method_class` and offers a fixture `method_case`.

    The network is trained for a few steps by SGD; a quarter of the channels of every group is asked to go.

    Attributes:
        method_class: The method under test.
        options: Its settings; None for its defaults.
        rates: Learning rate of each step.
        momentum: Of SGD.
        tolerance: Largest change of the outputs by the cut, as a share of the largest output.
    """

    method_class: ClassVar[type[Method]]
    options: ClassVar[Any] = None
    rates: ClassVar[tuple[float, ...]] = (0.02,) * 80
    momentum: ClassVar[float] = 0.5
    tolerance: ClassVar[float] = 0.02

    def test_the_cut_changes_next_to_nothing(self, method_case: MethodCase) -> None:
        """What goes is silent at the end: the cut network gives what the trained one gave."""
        run = self._finished(method_case)
        removed = run.method.removed
        _hold(bool(removed), "nothing goes")
        slim = cut_copy(run.module, removed, method_case.images[:1])
        with torch.no_grad():
            difference = float((slim(method_case.images) - run.outputs).abs().max())
        _hold(difference <= self.tolerance * float(run.outputs.abs().max()), f"outputs move by {difference:.2g}")

    def test_what_goes_is_what_was_chosen_last(self, method_case: MethodCase) -> None:
        """The budget is asked for a choice that stands, once, and that one is carried out."""
        run = self._finished(method_case)
        _hold(len(run.final) == 1, f"{len(run.final)} choices were to stand")
        got = {name: len(channels) for name, channels in run.method.removed.items()}
        wanted = {name: len(channels) for name, channels in run.final[0].items()}
        _hold(got == wanted, f"channels go by {got}, chosen were {wanted}")

    def test_same_seed_gives_the_same_network(self, method_case: MethodCase) -> None:
        """Weights and choice are the same to the bit."""
        again = self._run(method_case)
        again.train(len(self.rates))
        again.finish()
        self._hold_same(self._finished(method_case), again)

    def test_a_run_goes_on_from_its_state(self, method_case: MethodCase) -> None:
        """A run that stops and goes on from what was saved, more than once, ends as one that does not stop."""
        run = self._run(method_case)
        for stop in (1, len(self.rates) // 3, len(self.rates) - 3, len(self.rates)):
            run.train(stop)
            before, run = run, self._run(method_case)
            run.go_on_from(before)
        run.finish()
        self._hold_same(self._finished(method_case), run)

    def test_hooks_are_taken_off(self, method_case: MethodCase) -> None:
        """After the end the network has the hooks it had before."""
        _hold(_hooks(self._finished(method_case).module) == _hooks(method_case.module), "a hook is left")

    def test_figures_are_finite_numbers(self, method_case: MethodCase) -> None:
        """What the report shows is numbers by name."""
        figures = self._finished(method_case).method.figures()
        _hold(all(isinstance(name, str) and math.isfinite(value) for name, value in figures.items()), f"{figures}")

    def test_method_says_what_it_is(self, method_case: MethodCase) -> None:
        """It has a name, and says of every group whether it can be cut."""
        _hold(isinstance(self.method_class.name, str) and bool(self.method_class.name), "it has no name")
        for group in find_cuttable(method_case.module, method_case.images[:1])[0].values():
            reason = self.method_class.unfit(group)
            _hold(reason is None or bool(reason), f"'{group.name}' is refused without a reason")

    def _finished(self, case: MethodCase) -> _MethodRun:
        """Return a run that came to its end, made once for each case."""
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
        _hold(first.method.removed == second.method.removed, "other channels go")
        others = second.module.state_dict()
        for name, value in first.module.state_dict().items():
            _hold(torch.equal(value, others[name]), f"'{name}' differs")


class _MethodRun:
    """A network in training with a method at work on it."""

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
        """Let the quarter of each group's units go that has the lowest scores."""
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
        """Note what the network gives with the method at work, then let that come to its end."""
        with torch.no_grad():
            self.outputs = self.module.eval()(self.case.images)
        self.method.finish()

    def go_on_from(self, other: _MethodRun) -> None:
        """Take over what another run would save, as a file holds it."""
        content = io.BytesIO()
        torch.save([other.module.state_dict(), other.optimizer.state_dict(), other.method.state_dict()], content)
        content.seek(0)
        module, optimizer, method = torch.load(content, weights_only=True)
        self.module.load_state_dict(module)
        self.optimizer.load_state_dict(optimizer)
        self.method.load_state_dict(method)
        self.final, self.step = list(other.final), other.step


def _left(group: ChannelGroup) -> int:
    """Return how many units of a group are to be left."""
    units = group.width // group.parts
    return units - max(1, units // 4)


def _hooks(module: nn.Module) -> list[tuple[int, int]]:
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]


def _flags(module: nn.Module) -> list[object]:
    parts = [(part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
    return [parts, [(parameter.requires_grad, parameter.grad is None) for parameter in module.parameters()]]


def _over_parts(group: ChannelGroup, units: Tensor) -> Tensor:
    """Return the channel index that moves the units of every part alike."""
    starts = torch.arange(group.parts) * (group.width // group.parts)
    return (starts[:, None] + units[None, :]).flatten()


@torch.no_grad()
def _rearranged(module: nn.Module, group: ChannelGroup, index: Tensor) -> nn.Module:
    """Return a copy of `module` in which channel c of the group is what channel index[c] was, in every layer."""
    changed = copy.deepcopy(module)
    done: set[tuple[str, str]] = set()
    for member in group.members:
        layer = changed.get_submodule(member.layer)
        depthwise = getattr(layer, "groups", 1) > 1 and layer.weight.shape[1] == 1  # type: ignore[index,union-attr]
        if (member.layer, "out" if depthwise else member.axis) in done:
            continue
        done.add((member.layer, "out" if depthwise else member.axis))
        on_outputs = depthwise or member.axis == "out"
        for name, values in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if values.ndim == 0 or (not on_outputs and name != "weight"):
                continue
            dim = int(on_outputs == bool(getattr(layer, "transposed", False))) if values.ndim > 1 else 0
            values.copy_(values.index_select(dim, _source(member, index, values.shape[dim])))
    return changed


def _source(member: Member, index: Tensor, size: int) -> Tensor:
    """Return for each of `size` slots of the member's axis which slot it takes its values from."""
    source = torch.arange(max(size, int(member.slots.max()) + 1))
    for channel, origin in enumerate(index.tolist()):
        source[member.slots[member.channels == channel]] = member.slots[member.channels == origin]
    return source[:size]  # a grouped convolution stores the inputs of one part only


def _hold(condition: bool, got: str) -> None:
    if not condition:
        raise AssertionError(f"The contract is broken: {got}.")


def _inputs(signature: Signature, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: draw(spec, [size if isinstance(size, int) else batch for size in spec.shape], generator)
        for spec in signature.inputs
    }


@dataclass(frozen=True)
class TaskCase:
    """A task with outputs and targets of a few images.

    Attributes:
        name: For the test's title.
        task: The task.
        outputs: Tensor, or name -> tensor: of N images, at least 4.
        targets: Tensor of N entries, or a list of N.
        best: Outputs of the same form that could not be better; None where the task does not know such.
    """

    name: str
    task: Task
    outputs: Any
    targets: Any
    best: Any = None

    @property
    def count(self) -> int:
        """Images."""
        return len(first(self.outputs))


class TaskContract:
    """What every task must do. A subclass offers a fixture `task_case`."""

    def test_main_figure_is_among_the_figures(self, task_case: TaskCase) -> None:
        """The figure that decides is measured, and every figure is a finite number."""
        figures = _figures(task_case, task_case.outputs)
        _hold(task_case.task.main.name in figures, f"figures are {', '.join(figures)}")
        _hold(all(math.isfinite(value) for value in figures.values()), f"figures are {figures}")

    def test_shares_lie_between_0_and_1(self, task_case: TaskCase) -> None:
        """A figure that is shown in percent is a share."""
        value = _figures(task_case, task_case.outputs)[task_case.task.main.name]
        _hold(not task_case.task.main.is_share or 0 <= value <= 1, f"{task_case.task.main.name} is {value}")

    def test_facts_have_an_entry_for_each_image(self, task_case: TaskCase) -> None:
        """So that images can be drawn again."""
        for name, values in _facts(task_case, task_case.outputs).items():
            _hold(
                len(values) == task_case.count, f"fact '{name}' has {len(values)} entries for {task_case.count} images"
            )

    def test_facts_of_parts_are_those_of_the_whole(self, task_case: TaskCase) -> None:
        """Batches of another size give the same figures."""
        halves = [slice(0, 2), slice(2, task_case.count)]
        parts = [
            task_case.task.facts(arrays(picked(task_case.outputs, one)), _plain(task_case.targets[one]))
            for one in halves
        ]
        together = task_case.task.figures(joined(parts))
        whole = _figures(task_case, task_case.outputs)
        close = all(math.isclose(together[name], whole[name], rel_tol=1e-6, abs_tol=1e-9) for name in whole)
        _hold(close, f"figures are {together} in parts, {whole} together")

    def test_loss_is_a_finite_scalar_with_a_gradient(self, task_case: TaskCase) -> None:
        """A network can be trained by it."""
        if not task_case.task.needs_targets or not _has_loss(task_case):
            return
        outputs = changed(task_case.outputs, lambda one: one.detach().clone().requires_grad_(True))
        loss = task_case.task.loss(outputs, task_case.targets)
        _hold(loss.ndim == 0 and bool(loss.isfinite()), f"loss is {loss}")
        gradients = torch.autograd.grad(loss, each(outputs), allow_unused=True)
        _hold(any(one is not None and bool(one.abs().sum() > 0) for one in gradients), "loss has no gradient")

    def test_losses_of_images_average_to_the_loss(self, task_case: TaskCase) -> None:
        """So that a mean over images says what training minimises."""
        if not _has_loss(task_case):
            return
        losses = task_case.task.image_losses(task_case.outputs, task_case.targets)
        _hold(tuple(losses.shape) == (task_case.count,), f"losses have shape {tuple(losses.shape)}")
        mean, loss = float(losses.mean()), float(task_case.task.loss(task_case.outputs, task_case.targets))
        _hold(math.isclose(mean, loss, rel_tol=1e-4, abs_tol=1e-6), f"mean of losses is {mean}, loss is {loss}")

    def test_distance_is_0_of_equal_outputs_alone(self, task_case: TaskCase) -> None:
        """A network that imitates another one perfectly has nothing to learn."""
        outputs = task_case.outputs
        other = changed(outputs, lambda one: one.flip(0) * 1.5)
        _hold(abs(float(task_case.task.distance(outputs, outputs))) < 1e-6, "distance of equal outputs is not 0")
        _hold(float(task_case.task.distance(other, outputs)) > 1e-3, "distance of other outputs is 0")
        shape = tuple(task_case.task.distances(outputs, outputs).shape)
        _hold(shape == (task_case.count,), f"distances have shape {shape}")

    def test_best_outputs_are_no_worse(self, task_case: TaskCase) -> None:
        """The direction that the task states is the right one."""
        if task_case.best is None:
            return
        name = task_case.task.main.name
        best, some = (_figures(task_case, outputs)[name] for outputs in (task_case.best, task_case.outputs))
        _hold(task_case.task.main.is_better(best, some), f"{name} is {best} at best, {some} of other outputs")

    def test_outputs_of_the_wrong_shape_are_refused(self, task_case: TaskCase) -> None:
        """With an error that says what must hold, not one from deep inside."""
        if type(task_case.task).check is Task.check:
            return
        task_case.task.check(task_case.outputs, task_case.targets)
        wrong = changed(task_case.outputs, lambda one: one.flatten()[:, None, None, None, None])
        try:
            task_case.task.check(wrong, task_case.targets)
        except CompressError:
            return
        raise AssertionError("outputs of a wrong shape were accepted")


def _facts(case: TaskCase, outputs: Any) -> dict[str, np.ndarray]:
    return case.task.facts(arrays(outputs), _plain(case.targets))


def _figures(case: TaskCase, outputs: Any) -> dict[str, float]:
    return case.task.figures(_facts(case, outputs))


def _has_loss(case: TaskCase) -> bool:
    return not (case.task.learns_from_original and case.task.needs_targets)


def _plain(targets: Any) -> Any:
    """Return targets with arrays in place of tensors."""
    if isinstance(targets, Tensor):
        return targets.numpy()
    if isinstance(targets, dict):
        return {name: _plain(value) for name, value in targets.items()}
    return [_plain(value) for value in targets] if isinstance(targets, list) else targets
